// The extension module emu_kernels._C. Python checks tensors and passes addresses, sizes and strides; no
// torch headers here, so one build serves every torch version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/philox.h"
#include "common/similarity.h"
#include "cpu/problem.h"
#include "cpu/segments.h"

namespace py = pybind11;
using namespace emu;

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

// A Problem with the Python objects that its addresses belong to.
struct Batch {
  Problem problem;
  py::object keep;
};

Batch make_batch(py::object keep, uintptr_t query, uintptr_t table, const std::string& table_dtype,
                 int64_t table_stride, int64_t table_rows, uintptr_t positive, uintptr_t negative,
                 int64_t batch, int64_t dim, int64_t groups, int64_t count, int64_t seed,
                 int64_t row_offset, int threshold, const std::string& similarity, int threads) {
  if (similarity != Dot::name) throw std::invalid_argument("unknown similarity " + similarity);
  Problem p{};
  p.query = pointer(query);
  p.table = pointer(table);
  p.positive = static_cast<const int64_t*>(pointer(positive));
  p.negative = static_cast<const int64_t*>(pointer(negative));
  p.dtype = dtype(table_dtype);
  p.table_stride = table_stride;
  p.N = table_rows, p.B = batch, p.D = dim, p.G = groups, p.K = count;
  p.seed = static_cast<uint64_t>(seed);
  p.row_offset = static_cast<uint32_t>(row_offset);
  p.threshold = threshold;
  p.threads = threads < 1 ? 1 : threads;
  return {p, std::move(keep)};
}

void loss_forward(const Batch& batch, double beta, double alpha, uintptr_t sample_weight,
                  const std::string& reduction_name, uintptr_t loss, uintptr_t terms, uintptr_t row_scale,
                  uintptr_t weight, uintptr_t mutated_weight, uintptr_t grad_query,
                  uintptr_t grad_positive, bool need_grad) {
  const LossArgs a{beta,
                   alpha,
                   pointer(sample_weight),
                   reduction(reduction_name),
                   need_grad,
                   pointer(loss),
                   pointer(terms),
                   pointer(row_scale),
                   pointer(weight),
                   pointer(mutated_weight),
                   pointer(grad_query),
                   pointer(grad_positive)};
  const py::gil_scoped_release release;
  kernels().loss_forward(batch.problem, a);
}

void scores_forward(const Batch& batch, uintptr_t positive, uintptr_t negative, uintptr_t mutated) {
  const py::gil_scoped_release release;
  kernels().scores_forward(batch.problem, {pointer(positive), pointer(negative), pointer(mutated)});
}

void query_gradient(const Batch& batch, uintptr_t positive_weight, uintptr_t weight,
                    uintptr_t mutated_weight, uintptr_t grad_query, uintptr_t grad_positive) {
  const py::gil_scoped_release release;
  kernels().query_gradient(batch.problem, {pointer(positive_weight), pointer(weight), pointer(mutated_weight),
                                           pointer(grad_query), pointer(grad_positive)});
}

void table_gradient(const Batch& batch, const Segments& segments, uintptr_t row_scale, uintptr_t weight,
                    uintptr_t mutated_weight, uintptr_t grad_positive, uintptr_t ids, bool sparse,
                    uintptr_t out) {
  if (sparse && segments.touched() == 0) return;
  const TableGradientArgs a{&segments,
                            pointer(row_scale),
                            pointer(weight),
                            pointer(mutated_weight),
                            pointer(grad_positive),
                            sparse ? static_cast<int64_t*>(pointer(ids)) : nullptr,
                            pointer(out)};
  const py::gil_scoped_release release;
  kernels().table_gradient(batch.problem, a);
}

MutateArgs mutate_args(const std::string& dtype_name, std::array<int64_t, 3> shape, int64_t seed,
                       int64_t row_offset, int threshold, int threads) {
  MutateArgs a{};
  a.dtype = dtype(dtype_name);
  a.B = shape[0], a.K = shape[1], a.D = shape[2];
  a.seed = static_cast<uint64_t>(seed);
  a.row_offset = static_cast<uint32_t>(row_offset);
  a.threshold = threshold;
  a.threads = threads < 1 ? 1 : threads;
  return a;
}

void mutate_forward(uintptr_t positive, uintptr_t negative, uintptr_t out, const std::string& dtype_name,
                    std::array<int64_t, 3> shape, int64_t seed, int64_t row_offset, int threshold,
                    int threads) {
  MutateArgs a = mutate_args(dtype_name, shape, seed, row_offset, threshold, threads);
  a.positive = pointer(positive), a.negative = pointer(negative), a.out = pointer(out);
  const py::gil_scoped_release release;
  kernels().mutate_forward(a);
}

void mutate_backward(uintptr_t grad, uintptr_t grad_positive, uintptr_t grad_negative,
                     const std::string& dtype_name, std::array<int64_t, 3> shape, int64_t seed,
                     int64_t row_offset, int threshold, int threads) {
  MutateArgs a = mutate_args(dtype_name, shape, seed, row_offset, threshold, threads);
  a.negative = pointer(grad), a.grad_positive = pointer(grad_positive);
  a.grad_negative = pointer(grad_negative);
  const py::gil_scoped_release release;
  kernels().mutate_backward(a);
}

std::vector<std::string> instruction_sets() {
  const Kernels* runnable[3];
  const int count = runnable_kernels(runnable);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) names.emplace_back(runnable[i]->name);
  return names;
}

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, uint64_t seed) {
  std::array<uint32_t, 4> out;
  philox4x32(counter.data(), seed, out.data());
  return out;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of emu_kernels (private)";
  m.attr("version") = EMU_VERSION;

  py::class_<Batch>(m, "Batch")
      .def(py::init(&make_batch), py::kw_only(), py::arg("keep"), py::arg("query"), py::arg("table"),
           py::arg("table_dtype"), py::arg("table_stride"), py::arg("table_rows"), py::arg("positive"),
           py::arg("negative"), py::arg("batch"), py::arg("dim"), py::arg("groups"), py::arg("count"),
           py::arg("seed"), py::arg("row_offset"), py::arg("threshold"), py::arg("similarity"),
           py::arg("threads"));

  py::class_<Segments>(m, "Segments")
      .def(py::init([](const Batch& batch) {
             const Problem& problem = batch.problem;
             const py::gil_scoped_release release;
             return Segments(problem);
           }))
      .def("touched", &Segments::touched);

  m.def("loss_forward", &loss_forward, py::arg("batch"), py::kw_only(), py::arg("beta"), py::arg("alpha"),
        py::arg("sample_weight"), py::arg("reduction"), py::arg("loss"), py::arg("terms"),
        py::arg("row_scale"), py::arg("weight"), py::arg("mutated_weight"), py::arg("grad_query"),
        py::arg("grad_positive"), py::arg("need_grad"));
  m.def("scores_forward", &scores_forward);
  m.def("query_gradient", &query_gradient);
  m.def("table_gradient", &table_gradient, py::arg("batch"), py::arg("segments"), py::arg("row_scale"),
        py::arg("weight"), py::arg("mutated_weight"), py::arg("grad_positive"), py::kw_only(),
        py::arg("ids"), py::arg("sparse"), py::arg("out"));
  m.def("mutate_forward", &mutate_forward, py::arg("positive"), py::arg("negative"), py::arg("out"),
        py::kw_only(), py::arg("dtype"), py::arg("shape"), py::arg("seed"), py::arg("row_offset"),
        py::arg("threshold"), py::arg("threads"));
  m.def("mutate_backward", &mutate_backward, py::arg("grad"), py::arg("grad_positive"),
        py::arg("grad_negative"), py::kw_only(), py::arg("dtype"), py::arg("shape"), py::arg("seed"),
        py::arg("row_offset"), py::arg("threshold"), py::arg("threads"));

  m.def("philox", &philox, py::arg("counter"), py::arg("seed"));
  m.def("instruction_sets", &instruction_sets);
  m.def("instruction_set", [] { return std::string(kernels().name); });
  m.def("compiler", [] {
#if defined(__clang__)
    return "Clang " __clang_version__;
#else
    return "GCC " __VERSION__;
#endif
  });
}
