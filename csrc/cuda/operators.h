// The operators on a GPU. They only launch kernels: they allocate nothing, and wait for nothing. A failed launch throws
// std::runtime_error with the kernel's name.
#pragma once

#include <stdexcept>

#include "common/problem.h"

namespace emu::cuda {

// One similarity's kernels. The first two say how many bytes of workspace a call needs.
struct Kernels {
  int64_t (*loss_workspace)(const Problem&, bool need_grad);
  int64_t (*query_gradient_workspace)(const Problem&);
  void (*loss_forward)(const Problem&, const LossArgs&);
  void (*scores_forward)(const Problem&, const ScoreArgs&);
  void (*query_gradient)(const Problem&, const QueryGradientArgs&);
  void (*table_gradient)(const Problem&, const TableGradientArgs&);
  // Another way to compute a dense fp32 gradient: adds every contribution with atomics, in no fixed order.
  void (*table_gradient_atomic)(const Problem&, const TableGradientArgs&);
};

// similarity.cu is compiled once for each entry of the list in common/similarity.h.
template <class Sim>
Kernels make_kernels();

// The kernels of the problem's similarity.
Kernels kernels(const Problem& p);

// For the gradient of the touched rows only, before table_gradient: numbers the touched rows, and returns the offset
// in `partials`, in bytes, where their count will be.
int64_t count_touched(const Problem& p, const TableGradientArgs& a);
int64_t partials_workspace(const Problem& p);

void mutate_forward(const MutateArgs& a);
void mutate_backward(const MutateArgs& a);

// Throws std::invalid_argument for more blocks than a grid has.
inline unsigned grid(int64_t blocks) {
  if (blocks > 0x7FFFFFFF) throw std::invalid_argument("the cuda backend takes at most 2**31 - 1 blocks a kernel");
  return static_cast<unsigned>(blocks);
}

}  // namespace emu::cuda
