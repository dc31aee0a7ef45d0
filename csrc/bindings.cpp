// The extension module emu_kernels._C. Python checks tensors and passes addresses, sizes and strides; no
// torch headers here, so one build serves every torch version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/philox.h"
#include "common/similarity.h"
#include "cpu/huge_pages.h"
#include "cpu/problem.h"
#include "cpu/segments.h"
#include "cpu/threads.h"

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

// The place of a similarity in the list of common/similarity.h.
int place(List<>, const std::string& name, int) { throw std::invalid_argument("unknown similarity " + name); }
template <class First, class... Rest>
int place(List<First, Rest...>, const std::string& name, int index) {
  return name == First::name ? index : place(List<Rest...>{}, name, index + 1);
}

MaskSpec mask_spec(const std::string& mutation, int64_t seed, int64_t row_offset, int threshold,
                   uintptr_t thresholds) {
  return {static_cast<uint64_t>(seed), static_cast<uint32_t>(row_offset), threshold,
          static_cast<const int16_t*>(pointer(thresholds)), mutation == "pair"};
}

Batch make_batch(py::object keep, uintptr_t query, uintptr_t table, const std::string& table_dtype,
                 int64_t table_stride, int64_t table_rows, uintptr_t scale, uintptr_t weights,
                 uintptr_t positive, uintptr_t negative, int64_t batch, int64_t dim, int64_t groups,
                 int64_t count, int64_t seed, uintptr_t thresholds, int64_t row_offset,
                 const std::string& mutation, int threshold, const std::string& similarity,
                 double phase_scale, int threads) {
  Problem p{};
  p.query = pointer(query);
  p.table = pointer(table);
  p.scale = pointer(scale);
  p.weights = pointer(weights);
  p.positive = static_cast<const int64_t*>(pointer(positive));
  p.negative = static_cast<const int64_t*>(pointer(negative));
  p.dtype = dtype(table_dtype);
  p.table_stride = table_stride;
  p.N = table_rows, p.B = batch, p.D = dim, p.G = groups, p.K = count;
  p.similarity = place(Similarities{}, similarity, 0);
  p.phase_scale = phase_scale;
  p.mutation = mutation == "none"    ? Mutation::kNone
               : mutation == "mixup" ? Mutation::kMixup
                                     : Mutation::kMask;
  p.mask = mask_spec(mutation, seed, row_offset, threshold, thresholds);
  p.threads = threads < 1 ? 1 : threads;
  return {p, std::move(keep)};
}

// weight, mutated_weight, grad_query, grad_positive, grad_scale, grad_weights
using GradientAddresses = std::array<uintptr_t, 6>;
GradientArgs gradient_args(const GradientAddresses& a) {
  return {pointer(a[0]), pointer(a[1]), pointer(a[2]), pointer(a[3]), pointer(a[4]), pointer(a[5])};
}

void loss_forward(const Batch& batch, double beta, double alpha, uintptr_t sample_weight,
                  const std::string& reduction_name, uintptr_t loss, uintptr_t terms, uintptr_t row_scale,
                  const GradientAddresses& gradient, bool need_grad) {
  const LossArgs a{beta,
                   alpha,
                   pointer(sample_weight),
                   reduction(reduction_name),
                   need_grad,
                   pointer(loss),
                   pointer(terms),
                   pointer(row_scale),
                   gradient_args(gradient)};
  const py::gil_scoped_release release;
  kernels().loss_forward(batch.problem, a);
}

void scores_forward(const Batch& batch, uintptr_t positive, uintptr_t negative, uintptr_t mutated) {
  const py::gil_scoped_release release;
  kernels().scores_forward(batch.problem, {pointer(positive), pointer(negative), pointer(mutated)});
}

void query_gradient(const Batch& batch, uintptr_t positive_weight, uintptr_t weight,
                    uintptr_t mutated_weight, const GradientAddresses& gradient) {
  const QueryGradientArgs a{pointer(positive_weight), pointer(weight), pointer(mutated_weight),
                            gradient_args(gradient)};
  const py::gil_scoped_release release;
  kernels().query_gradient(batch.problem, a);
}

void table_gradient(const Batch& batch, const Segments& segments, uintptr_t row_scale, uintptr_t weight,
                    uintptr_t mutated_weight, uintptr_t grad_positive, uintptr_t ids, uintptr_t out) {
  const TableGradientArgs a{&segments,
                            pointer(row_scale),
                            pointer(weight),
                            pointer(mutated_weight),
                            pointer(grad_positive),
                            static_cast<int64_t*>(pointer(ids)),
                            pointer(out)};
  const py::gil_scoped_release release;
  kernels().table_gradient(batch.problem, a);
}

MutateArgs mutate_args(const std::string& dtype_name, std::array<int64_t, 3> shape, const MaskSpec& mask,
                       int threads) {
  MutateArgs a{};
  a.dtype = dtype(dtype_name);
  a.B = shape[0], a.K = shape[1], a.D = shape[2];
  a.mask = mask;
  a.threads = threads < 1 ? 1 : threads;
  return a;
}

void mutate_forward(uintptr_t positive, uintptr_t negative, uintptr_t out, const std::string& dtype_name,
                    std::array<int64_t, 3> shape, const MaskSpec& mask, int threads) {
  MutateArgs a = mutate_args(dtype_name, shape, mask, threads);
  a.positive = pointer(positive), a.negative = pointer(negative), a.out = pointer(out);
  const py::gil_scoped_release release;
  kernels().mutate_forward(a);
}

void mutate_backward(uintptr_t grad, uintptr_t grad_positive, uintptr_t grad_negative,
                     const std::string& dtype_name, std::array<int64_t, 3> shape, const MaskSpec& mask,
                     int threads) {
  MutateArgs a = mutate_args(dtype_name, shape, mask, threads);
  a.negative = pointer(grad), a.grad_positive = pointer(grad_positive);
  a.grad_negative = pointer(grad_negative);
  const py::gil_scoped_release release;
  kernels().mutate_backward(a);
}

// The position of the first id outside [lowest, rows), or −1. In one pass, where torch takes several.
int64_t find_bad_id(uintptr_t ids, int64_t count, int64_t lowest, int64_t rows, int threads) {
  constexpr int64_t kBlock = 16384;
  const int64_t* const from = static_cast<const int64_t*>(pointer(ids));
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  std::vector<int64_t> found(static_cast<size_t>(blocks), -1);
  const py::gil_scoped_release release;
  const uint64_t allowed = static_cast<uint64_t>(rows - lowest);
  parallel(threads < 1 ? 1 : threads, blocks, [&](int64_t block, int) {
    const int64_t end = std::min(count, (block + 1) * kBlock);
    bool bad = false;
    for (int64_t i = block * kBlock; i < end; ++i) bad |= static_cast<uint64_t>(from[i] - lowest) >= allowed;
    for (int64_t i = block * kBlock; bad && i < end; ++i) {
      if (static_cast<uint64_t>(from[i] - lowest) < allowed) continue;
      found[static_cast<size_t>(block)] = i;
      bad = false;
    }
  });
  for (int64_t at : found) {
    if (at >= 0) return at;
  }
  return -1;
}

// out[b, j] = rows[b, j] · scale[b]
template <class Real>
void scale_rows_as(const void* rows, const void* scale, void* out, int64_t count, int64_t dim, int threads) {
  constexpr int64_t kBlock = 64;
  parallel(threads < 1 ? 1 : threads, (count + kBlock - 1) / kBlock, [&](int64_t block, int) {
    for (int64_t b = block * kBlock; b < std::min(count, (block + 1) * kBlock); ++b) {
      const Real factor = static_cast<const Real*>(scale)[b];
      for (int64_t j = b * dim; j < (b + 1) * dim; ++j) {
        static_cast<Real*>(out)[j] = static_cast<const Real*>(rows)[j] * factor;
      }
    }
  });
}

void scale_rows(uintptr_t rows, uintptr_t scale, uintptr_t out, int64_t count, int64_t dim, bool wide,
                int threads) {
  const py::gil_scoped_release release;
  (wide ? scale_rows_as<double> : scale_rows_as<float>)(pointer(rows), pointer(scale), pointer(out), count,
                                                        dim, threads);
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
           py::arg("table_dtype"), py::arg("table_stride"), py::arg("table_rows"), py::arg("scale"),
           py::arg("weights"), py::arg("positive"), py::arg("negative"), py::arg("batch"), py::arg("dim"),
           py::arg("groups"), py::arg("count"), py::arg("seed"), py::arg("thresholds"),
           py::arg("row_offset"), py::arg("mutation"), py::arg("threshold"), py::arg("similarity"),
           py::arg("phase_scale"), py::arg("threads"));

  py::class_<MaskSpec>(m, "MaskSpec")
      .def(py::init(&mask_spec), py::kw_only(), py::arg("mutation"), py::arg("seed"), py::arg("row_offset"),
           py::arg("threshold"), py::arg("thresholds"));

  py::class_<Segments>(m, "Segments")
      .def(py::init([](const Batch& batch) {
             const Problem& problem = batch.problem;
             const py::gil_scoped_release release;
             return Segments(problem);
           }))
      .def("touched", &Segments::touched);

  m.def("loss_forward", &loss_forward, py::arg("batch"), py::kw_only(), py::arg("beta"), py::arg("alpha"),
        py::arg("sample_weight"), py::arg("reduction"), py::arg("loss"), py::arg("terms"),
        py::arg("row_scale"), py::arg("gradient"), py::arg("need_grad"));
  m.def("scores_forward", &scores_forward);
  m.def("query_gradient", &query_gradient);
  m.def("table_gradient", &table_gradient, py::arg("batch"), py::arg("segments"), py::arg("row_scale"),
        py::arg("weight"), py::arg("mutated_weight"), py::arg("grad_positive"), py::kw_only(),
        py::arg("ids"), py::arg("out"));
  m.def("mutate_forward", &mutate_forward, py::arg("positive"), py::arg("negative"), py::arg("out"),
        py::kw_only(), py::arg("dtype"), py::arg("shape"), py::arg("mask"), py::arg("threads"));
  m.def("mutate_backward", &mutate_backward, py::arg("grad"), py::arg("grad_positive"),
        py::arg("grad_negative"), py::kw_only(), py::arg("dtype"), py::arg("shape"), py::arg("mask"),
        py::arg("threads"));

  m.def("prefer_huge_pages",
        [](uintptr_t memory, size_t bytes) { prefer_huge_pages(pointer(memory), bytes); });
  m.def("find_bad_id", &find_bad_id);
  m.def("scale_rows", &scale_rows);
  m.def("philox", &philox, py::arg("counter"), py::arg("seed"));
  m.def("joins_torch", &joins_torch);
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
