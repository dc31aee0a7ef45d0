// The operators on a GPU. All of them only launch: they allocate nothing, and wait for nothing. A failed launch throws
// std::runtime_error with the kernel's name.
#pragma once

#include <stdexcept>

#include "cuda/problem.h"

namespace emu::cuda {

// Bytes of workspace that a call needs.
int64_t loss_workspace(const Problem& p, const Launch& launch, bool need_grad);
int64_t query_gradient_workspace(const Problem& p, const Launch& launch);
int64_t partials_workspace(const Problem& p, const Launch& launch);

void loss_forward(const Problem& p, const LossArgs& a, const Launch& launch);
void scores_forward(const Problem& p, const ScoreArgs& a, const Launch& launch);
void query_gradient(const Problem& p, const QueryGradientArgs& a, const Launch& launch);

// The gradient of the table. Where only touched rows are wanted, count_touched comes first: it numbers them and returns
// where in `partials`, in bytes, their count will be.
int64_t count_touched(const Problem& p, const TableGradientArgs& a, const Launch& launch);
void table_gradient(const Problem& p, const TableGradientArgs& a, const Launch& launch);
// The other way for a dense fp32 gradient: adds every contribution with atomics, in no fixed order.
void table_gradient_atomic(const Problem& p, const TableGradientArgs& a, const Launch& launch);

void mutate_forward(const MutateArgs& a, const Launch& launch);
void mutate_backward(const MutateArgs& a, const Launch& launch);

// Throws std::invalid_argument for more blocks than a grid has.
inline unsigned grid(int64_t blocks) {
  if (blocks > 0x7FFFFFFF) throw std::invalid_argument("the cuda backend takes at most 2**31 - 1 blocks a kernel");
  return static_cast<unsigned>(blocks);
}

// One similarity's kernels: kernels_*.cu.
struct Kernels {
  int64_t (*loss_workspace)(const Problem&, const Launch&, bool);
  int64_t (*query_gradient_workspace)(const Problem&, const Launch&);
  void (*loss_forward)(const Problem&, const LossArgs&, const Launch&);
  void (*scores_forward)(const Problem&, const ScoreArgs&, const Launch&);
  void (*query_gradient)(const Problem&, const QueryGradientArgs&, const Launch&);
  void (*table_gradient)(const Problem&, const TableGradientArgs&, const Launch&);
  void (*table_gradient_atomic)(const Problem&, const TableGradientArgs&, const Launch&);
};

}  // namespace emu::cuda
