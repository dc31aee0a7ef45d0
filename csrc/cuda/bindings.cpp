// The extension module emu_kernels._cuda.
#include "common/bindings.h"

#include "cuda/device.h"
#include "cuda/operators.h"
#include "cuda/sort.h"

#if !defined(EMU_CUDA_MODULE)
#define EMU_CUDA_MODULE _cuda
#endif

using namespace emu;
using namespace emu::cuda;

namespace {

constexpr int64_t kMostComponents = int64_t{1} << 30;

struct Cuda {
  struct Guard : DeviceGuard {
    explicit Guard(const Place& place) : DeviceGuard(place.device) {}
  };
  static Kernels of(const Problem& p) {
    if (p.D > kMostComponents) {
      throw std::invalid_argument("query: the cuda backend takes at most 2**30 components");
    }
    return kernels(p);
  }
  static int64_t loss_workspace(const Problem& p, bool need_grad) { return of(p).loss_workspace(p, need_grad); }
  static int64_t query_gradient_workspace(const Problem& p, Nothing) { return of(p).query_gradient_workspace(p); }
  static void loss_forward(const Problem& p, const LossArgs& a) { of(p).loss_forward(p, a); }
  static void scores_forward(const Problem& p, const ScoreArgs& a) { of(p).scores_forward(p, a); }
  static void query_gradient(const Problem& p, const QueryGradientArgs& a) { of(p).query_gradient(p, a); }
  static void mutate_forward(const MutateArgs& a) { cuda::mutate_forward(a); }
  static void mutate_backward(const MutateArgs& a) { cuda::mutate_backward(a); }
};

}  // namespace

PYBIND11_MODULE(EMU_CUDA_MODULE, m) {
  m.doc() = "CUDA kernels of emu_kernels (private)";
  m.attr("version") = EMU_VERSION;
  m.attr("architectures") = EMU_CUDA_BUILT_FOR;
  m.def("toolkit", &toolkit_version, "Version of the CUDA toolkit that it was built with, as (major, minor).");
  m.def("driver_problem", &driver_problem, "Why the driver cannot run it, or an empty string.");
  define_operators<Cuda>(m);

  const auto read_sorted = [](Arguments& a) -> void* { return a["sorted"]; };
  define_call<Cuda>(m, "sort_workspace", read_nothing, [](const Problem& p, Nothing) { return sort_workspace(p); });
  define_call<Cuda>(m, "sort_ids", read_sorted, [](const Problem& p, void* sorted) { sort_ids(p, sorted); });
  define_call<Cuda>(m, "partials_workspace", read_nothing,
                    [](const Problem& p, Nothing) { return partials_workspace(p); });
  define_call<Cuda>(
      m, "count_touched",
      [](Arguments& a) {
        TableGradientArgs args{};
        args.sorted = a["sorted"];
        args.partials = a["partials"];
        return args;
      },
      [](const Problem& p, const TableGradientArgs& a) { return count_touched(p, a); });
  define_call<Cuda>(
      m, "table_gradient",
      [](Arguments& a) {
        TableGradientArgs args = read_table_gradient(a);
        args.ids = a["ids"];
        args.sorted = a["sorted"];
        args.partials = a["partials"];
        return args;
      },
      [](const Problem& p, const TableGradientArgs& a) { Cuda::of(p).table_gradient(p, a); });

  // `sorted` is memory of sort_workspace bytes, for the ids in their own order.
  define_call<Cuda>(m, "list_ids", read_sorted, [](const Problem& p, void* listed) { list_ids(p, listed); });
  define_call<Cuda>(
      m, "table_gradient_atomic",
      [](Arguments& a) {
        TableGradientArgs args = read_table_gradient(a);
        args.sorted = a["sorted"];
        return args;
      },
      [](const Problem& p, const TableGradientArgs& a) { Cuda::of(p).table_gradient_atomic(p, a); });
}
