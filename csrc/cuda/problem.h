// What the Python side hands to the CUDA kernels. Pointers are to device memory, checked and contiguous unless a
// stride is given; "real" is float, or double for a double table. Sizes: B rows, K negatives a row, G sets of
// negatives, D components, N table rows. Ids are not checked: the kernels do.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/types.h"

#if defined(__CUDACC__)
#define EMU_MEMBER __host__ __device__ __forceinline__
#else
#define EMU_MEMBER inline
#endif

namespace emu::cuda {

struct MaskSpec {
  const int64_t* seed;        // (1,), read when a kernel runs, so that a replayed graph draws fresh masks
  const int16_t* thresholds;  // of each component (of each pair), or null
  uint32_t row_offset;
  int threshold;  // of all bytes, 0..256; for Mixup the order
  bool pairs;     // component j decides for component D/2 + j too
};

struct Problem {
  const void* query;        // (B, D) real
  const void* table;        // (N, D) of dtype, rows table_stride elements apart
  const void* scale;        // (B, S) real, or null: ones
  const void* weights;      // (W,) real, or null: ones
  const int64_t* positive;  // (B,)
  const int64_t* negative;  // (G, K)
  int64_t* report;          // (2,) on the host: an id of positive and one of negative that is out of range
  int64_t table_stride;
  int64_t N, B, D, G, K;
  double phase_scale;
  MaskSpec mask;

  EMU_MEMBER int64_t group_rows() const { return G ? B / G : 0; }
};

// How a call is to run.
struct Launch {
  DType dtype;
  int similarity;  // its place in the list of common/similarity.h
  Mutation mutation;
  int processors;  // of the device
  void* stream;
};

// What a backward pass needs, all real (backends/base.py, LossState). S is 2 for hake, else 1.
struct GradientArgs {
  void* weight;          // (S, B, K)
  void* mutated_weight;  // (S, B, K) with mutation
  void* grad_query;      // (B, D)
  void* grad_positive;   // (B, D)
  void* grad_scale;      // (B, scale's width) or null
  void* grad_weights;    // (B, W) or null
};

struct LossArgs {
  double beta, alpha;
  const void* coefficients;   // (2,) real, β and α instead of the two numbers, or null
  const void* sample_weight;  // (B,) real or null
  Reduction reduction;
  bool need_grad;
  // Outputs, all real; those of gradient are written if need_grad.
  void* loss;       // (1,) or (B,)
  void* terms;      // (2,)
  void* row_scale;  // (B,)
  GradientArgs gradient;
  void* workspace;  // of loss_workspace bytes
};

struct ScoreArgs {
  void* positive;  // (B,) real
  void* negative;  // (B, K)
  void* mutated;   // (B, K)
};

struct QueryGradientArgs {
  const void* positive_weight;  // (B,) real, of scores, as the next two
  const void* weight;           // (B, K)
  const void* mutated_weight;   // (B, K) with mutation
  GradientArgs gradient;
  void* workspace;  // of query_gradient_workspace bytes
};

struct TableGradientArgs {
  const void* row_scale;       // (B,) real
  const void* weight;          // (S, B, K)
  const void* mutated_weight;  // (S, B, K) with mutation
  const void* grad_positive;   // (B, D)
  int64_t* ids;                // (touched,): the sparse form; null: the dense form
  void* out;                   // (N, D) or (touched, D) of dtype
  void* sorted;                // of segments_workspace bytes, filled by sort_ids
  void* partials;              // of partials_workspace bytes
};

struct MutateArgs {
  const void* positive;  // forward: (B, D)
  const void* negative;  // forward: (B, K, D); backward: upstream gradient
  void* out;             // forward: (B, K, D)
  void* grad_positive;   // backward: (B, D)
  void* grad_negative;   // backward: (B, K, D)
  int64_t B, K, D;
  MaskSpec mask;
};

}  // namespace emu::cuda
