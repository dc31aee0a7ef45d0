// Each similarity's kernels are compiled in a file of their own: kernels_*.cu.
#include "common/similarity.h"
#include "cuda/operators.h"
#include "cuda/platform.h"

namespace emu::cuda {

Kernels dot_kernels();
Kernels l1_kernels();
Kernels l2_kernels();
Kernels rotate_kernels();
Kernels hake_kernels();
Kernels protate_kernels();

namespace {

constexpr Kernels (*kOf(Dot))() { return dot_kernels; }
constexpr Kernels (*kOf(L1))() { return l1_kernels; }
constexpr Kernels (*kOf(L2))() { return l2_kernels; }
constexpr Kernels (*kOf(Rotate))() { return rotate_kernels; }
constexpr Kernels (*kOf(Hake))() { return hake_kernels; }
constexpr Kernels (*kOf(PRotate))() { return protate_kernels; }

template <class... Sims>
Kernels find(List<Sims...>, int place) {
  constexpr Kernels (*all[])() = {kOf(Sims{})...};
  return all[place]();
}

Kernels kernels(const Launch& launch) { return find(Similarities{}, launch.similarity); }

}  // namespace

int64_t loss_workspace(const Problem& p, const Launch& launch, bool need_grad) {
  return kernels(launch).loss_workspace(p, launch, need_grad);
}
int64_t query_gradient_workspace(const Problem& p, const Launch& launch) {
  return kernels(launch).query_gradient_workspace(p, launch);
}
void loss_forward(const Problem& p, const LossArgs& a, const Launch& launch) {
  kernels(launch).loss_forward(p, a, launch);
}
void scores_forward(const Problem& p, const ScoreArgs& a, const Launch& launch) {
  kernels(launch).scores_forward(p, a, launch);
}
void query_gradient(const Problem& p, const QueryGradientArgs& a, const Launch& launch) {
  kernels(launch).query_gradient(p, a, launch);
}
void table_gradient(const Problem& p, const TableGradientArgs& a, const Launch& launch) {
  kernels(launch).table_gradient(p, a, launch);
}

void table_gradient_atomic(const Problem& p, const TableGradientArgs& a, const Launch& launch) {
  kernels(launch).table_gradient_atomic(p, a, launch);
}

}  // namespace emu::cuda
