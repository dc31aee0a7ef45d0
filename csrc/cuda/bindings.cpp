// The extension module emu_kernels._cuda. Python checks tensors and passes addresses, sizes, strides and the stream; no
// torch headers here, so one build serves every torch version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "common/similarity.h"
#include "cuda/device.h"
#include "cuda/operators.h"
#include "cuda/sort.h"

#if !defined(EMU_CUDA_MODULE)
#define EMU_CUDA_MODULE _cuda
#endif

namespace py = pybind11;
using namespace emu;
using namespace emu::cuda;

namespace {

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

DType dtype(const std::string& name) {
  if (name == "float32") return DType::kFloat;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kHalf;
  if (name == "float64") return DType::kDouble;
  throw std::invalid_argument("unsupported dtype " + name);
}

Reduction reduction(const std::string& name) {
  if (name == "none") return Reduction::kNone;
  if (name == "sum") return Reduction::kSum;
  if (name == "mean") return Reduction::kMean;
  throw std::invalid_argument("unknown reduction " + name);
}

// The place of a similarity in the list of common/similarity.h.
int place(List<>, const std::string& name, int) { throw std::invalid_argument("unknown similarity " + name); }
template <class First, class... Rest>
int place(List<First, Rest...>, const std::string& name, int index) {
  return name == First::name ? index : place(List<Rest...>{}, name, index + 1);
}

MaskSpec mask_spec(const std::string& mutation, uintptr_t seed, int64_t row_offset, int threshold,
                   uintptr_t thresholds) {
  return {static_cast<const int64_t*>(pointer(seed)), static_cast<const int16_t*>(pointer(thresholds)),
          static_cast<uint32_t>(row_offset), threshold, mutation == "pair"};
}

// Where a call runs. Python objects that the addresses belong to are kept by their owners until it was launched.
struct Place {
  int device;
  uintptr_t stream;
  int processors;
};

struct Batch {
  Problem problem;
  Launch launch;
  int device;
  py::object keep;
};

Batch make_batch(py::object keep, const Place& where, uintptr_t query, uintptr_t table,
                 const std::string& table_dtype, int64_t table_stride, int64_t table_rows, uintptr_t scale,
                 uintptr_t weights, uintptr_t positive, uintptr_t negative, uintptr_t report, int64_t batch,
                 int64_t dim, int64_t groups, int64_t count, uintptr_t seed, uintptr_t thresholds,
                 int64_t row_offset, const std::string& mutation, int threshold, const std::string& similarity,
                 double phase_scale) {
  if (dim > (int64_t{1} << 30)) throw std::invalid_argument("query: the cuda backend takes at most 2**30 components");
  Problem p{};
  p.query = pointer(query);
  p.table = pointer(table);
  p.scale = pointer(scale);
  p.weights = pointer(weights);
  p.positive = static_cast<const int64_t*>(pointer(positive));
  p.negative = static_cast<const int64_t*>(pointer(negative));
  p.report = static_cast<int64_t*>(pointer(report));
  p.table_stride = table_stride;
  p.N = table_rows, p.B = batch, p.D = dim, p.G = groups, p.K = count;
  p.phase_scale = phase_scale;
  p.mask = mask_spec(mutation, seed, row_offset, threshold, thresholds);
  const Mutation kind = mutation == "none"    ? Mutation::kNone
                        : mutation == "mixup" ? Mutation::kMixup
                                              : Mutation::kMask;
  const Launch launch{dtype(table_dtype), place(Similarities{}, similarity, 0), kind, where.processors,
                      pointer(where.stream)};
  return {p, launch, where.device, std::move(keep)};
}

// weight, mutated_weight, grad_query, grad_positive, grad_scale, grad_weights
using GradientAddresses = std::array<uintptr_t, 6>;
GradientArgs gradient_args(const GradientAddresses& a) {
  return {pointer(a[0]), pointer(a[1]), pointer(a[2]), pointer(a[3]), pointer(a[4]), pointer(a[5])};
}

void run_loss_forward(const Batch& batch, double beta, double alpha, uintptr_t coefficients,
                      uintptr_t sample_weight, const std::string& reduction_name, uintptr_t loss, uintptr_t terms,
                      uintptr_t row_scale, const GradientAddresses& gradient, bool need_grad, uintptr_t workspace) {
  const LossArgs a{beta,
                   alpha,
                   pointer(coefficients),
                   pointer(sample_weight),
                   reduction(reduction_name),
                   need_grad,
                   pointer(loss),
                   pointer(terms),
                   pointer(row_scale),
                   gradient_args(gradient),
                   pointer(workspace)};
  const py::gil_scoped_release release;
  const DeviceGuard guard(batch.device);
  loss_forward(batch.problem, a, batch.launch);
}

void run_scores_forward(const Batch& batch, uintptr_t positive, uintptr_t negative, uintptr_t mutated) {
  const py::gil_scoped_release release;
  const DeviceGuard guard(batch.device);
  scores_forward(batch.problem, {pointer(positive), pointer(negative), pointer(mutated)}, batch.launch);
}

void run_query_gradient(const Batch& batch, uintptr_t positive_weight, uintptr_t weight, uintptr_t mutated_weight,
                        const GradientAddresses& gradient, uintptr_t workspace) {
  const QueryGradientArgs a{pointer(positive_weight), pointer(weight), pointer(mutated_weight),
                            gradient_args(gradient), pointer(workspace)};
  const py::gil_scoped_release release;
  const DeviceGuard guard(batch.device);
  query_gradient(batch.problem, a, batch.launch);
}

// The entities of a batch in order; see TableGradientArgs for `sorted` and `partials`.
void run_sort(const Batch& batch, uintptr_t sorted) {
  const py::gil_scoped_release release;
  const DeviceGuard guard(batch.device);
  sort_ids(batch.problem, pointer(sorted), batch.launch.stream);
}

int64_t run_count_touched(const Batch& batch, uintptr_t sorted, uintptr_t partials) {
  TableGradientArgs a{};
  a.sorted = pointer(sorted), a.partials = pointer(partials);
  const py::gil_scoped_release release;
  const DeviceGuard guard(batch.device);
  return count_touched(batch.problem, a, batch.launch);
}

void run_table_gradient(const Batch& batch, uintptr_t row_scale, uintptr_t weight, uintptr_t mutated_weight,
                        uintptr_t grad_positive, uintptr_t ids, uintptr_t out, uintptr_t sorted,
                        uintptr_t partials) {
  const TableGradientArgs a{pointer(row_scale),     pointer(weight), pointer(mutated_weight),
                            pointer(grad_positive), static_cast<int64_t*>(pointer(ids)),
                            pointer(out),           pointer(sorted), pointer(partials)};
  const py::gil_scoped_release release;
  const DeviceGuard guard(batch.device);
  table_gradient(batch.problem, a, batch.launch);
}

void run_table_gradient_atomic(const Batch& batch, uintptr_t row_scale, uintptr_t weight, uintptr_t mutated_weight,
                               uintptr_t grad_positive, uintptr_t out, uintptr_t sorted,
                               uintptr_t partials) {
  TableGradientArgs a{};
  a.row_scale = pointer(row_scale), a.weight = pointer(weight), a.mutated_weight = pointer(mutated_weight);
  a.grad_positive = pointer(grad_positive), a.out = pointer(out);
  a.sorted = pointer(sorted), a.partials = pointer(partials);
  const py::gil_scoped_release release;
  const DeviceGuard guard(batch.device);
  list_ids(batch.problem, a.sorted, batch.launch.stream);
  table_gradient_atomic(batch.problem, a, batch.launch);
}

Launch mutate_launch(const std::string& dtype_name, const Place& where) {
  return {dtype(dtype_name), 0, Mutation::kMask, where.processors, pointer(where.stream)};
}

void run_mutate_forward(uintptr_t positive, uintptr_t negative, uintptr_t out, const std::string& dtype_name,
                        std::array<int64_t, 3> shape, const MaskSpec& mask, const Place& where) {
  MutateArgs a{};
  a.positive = pointer(positive), a.negative = pointer(negative), a.out = pointer(out);
  a.B = shape[0], a.K = shape[1], a.D = shape[2];
  a.mask = mask;
  const Launch launch = mutate_launch(dtype_name, where);
  const py::gil_scoped_release release;
  const DeviceGuard guard(where.device);
  mutate_forward(a, launch);
}

void run_mutate_backward(uintptr_t grad, uintptr_t grad_positive, uintptr_t grad_negative,
                         const std::string& dtype_name, std::array<int64_t, 3> shape, const MaskSpec& mask,
                         const Place& where) {
  MutateArgs a{};
  a.negative = pointer(grad), a.grad_positive = pointer(grad_positive);
  a.grad_negative = pointer(grad_negative);
  a.B = shape[0], a.K = shape[1], a.D = shape[2];
  a.mask = mask;
  const Launch launch = mutate_launch(dtype_name, where);
  const py::gil_scoped_release release;
  const DeviceGuard guard(where.device);
  mutate_backward(a, launch);
}

}  // namespace

PYBIND11_MODULE(EMU_CUDA_MODULE, m) {
  m.doc() = "CUDA kernels of emu_kernels (private)";
  m.attr("version") = EMU_VERSION;
  m.attr("architectures") = EMU_CUDA_BUILT_FOR;
  m.def("toolkit", &toolkit_version, "Version of the CUDA toolkit that it was built with, as (major, minor).");
  m.def("driver_problem", &driver_problem, "Why the driver cannot run it, or an empty string.");

  // Local, so that the tests' build of the same sources can be loaded beside this one.
  py::class_<Place>(m, "Place", py::module_local())
      .def(py::init<int, uintptr_t, int>(), py::kw_only(), py::arg("device"), py::arg("stream"),
           py::arg("processors"));

  py::class_<Batch>(m, "Batch", py::module_local())
      .def(py::init(&make_batch), py::kw_only(), py::arg("keep"), py::arg("where"), py::arg("query"),
           py::arg("table"), py::arg("table_dtype"), py::arg("table_stride"), py::arg("table_rows"),
           py::arg("scale"), py::arg("weights"), py::arg("positive"), py::arg("negative"), py::arg("report"),
           py::arg("batch"), py::arg("dim"), py::arg("groups"), py::arg("count"), py::arg("seed"),
           py::arg("thresholds"), py::arg("row_offset"), py::arg("mutation"), py::arg("threshold"),
           py::arg("similarity"), py::arg("phase_scale"))
      .def("loss_workspace",
           [](const Batch& b, bool need_grad) { return loss_workspace(b.problem, b.launch, need_grad); })
      .def("query_gradient_workspace",
           [](const Batch& b) { return query_gradient_workspace(b.problem, b.launch); })
      .def("sort_workspace",
           [](const Batch& b) {
             const DeviceGuard guard(b.device);
             return sort_workspace(b.problem);
           })
      .def("partials_workspace", [](const Batch& b) { return partials_workspace(b.problem, b.launch); });

  py::class_<MaskSpec>(m, "MaskSpec", py::module_local())
      .def(py::init(&mask_spec), py::kw_only(), py::arg("mutation"), py::arg("seed"), py::arg("row_offset"),
           py::arg("threshold"), py::arg("thresholds"));

  m.def("loss_forward", &run_loss_forward, py::arg("batch"), py::kw_only(), py::arg("beta"), py::arg("alpha"),
        py::arg("coefficients"), py::arg("sample_weight"), py::arg("reduction"), py::arg("loss"),
        py::arg("terms"), py::arg("row_scale"), py::arg("gradient"), py::arg("need_grad"), py::arg("workspace"));
  m.def("scores_forward", &run_scores_forward);
  m.def("query_gradient", &run_query_gradient);
  m.def("sort_ids", &run_sort);
  m.def("count_touched", &run_count_touched);
  m.def("table_gradient", &run_table_gradient, py::arg("batch"), py::arg("row_scale"), py::arg("weight"),
        py::arg("mutated_weight"), py::arg("grad_positive"), py::kw_only(), py::arg("ids"), py::arg("out"),
        py::arg("sorted"), py::arg("partials"));
  m.def("table_gradient_atomic", &run_table_gradient_atomic, py::arg("batch"), py::arg("row_scale"),
        py::arg("weight"), py::arg("mutated_weight"), py::arg("grad_positive"), py::kw_only(), py::arg("out"),
        py::arg("sorted"), py::arg("partials"));
  m.def("mutate_forward", &run_mutate_forward, py::arg("positive"), py::arg("negative"), py::arg("out"),
        py::kw_only(), py::arg("dtype"), py::arg("shape"), py::arg("mask"), py::arg("where"));
  m.def("mutate_backward", &run_mutate_backward, py::arg("grad"), py::arg("grad_positive"),
        py::arg("grad_negative"), py::kw_only(), py::arg("dtype"), py::arg("shape"), py::arg("mask"),
        py::arg("where"));
}
