// What the Python side hands to the CPU kernels, and the table of kernels of one instruction set.
// Pointers are checked and contiguous unless a stride is given; "real" is float, or double for a double
// table. Sizes: B rows, K negatives a row, G sets of negatives, D components, N table rows.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace emu {

// Which masks are drawn: emu_kernels/mask.py.
struct MaskSpec {
  uint64_t seed;
  uint32_t row_offset;
  int threshold;              // of all bytes, 0..256
  const int16_t* thresholds;  // of each component (of each pair), or null
  bool pairs;                 // component j decides for component D/2 + j too
};

struct Problem {
  const void* query;        // (B, D) real
  const void* table;        // (N, D) of dtype, rows table_stride elements apart
  const void* scale;        // (B, S) real, or null: ones
  const void* weights;      // (W,) real, or null: ones
  const int64_t* positive;  // (B,) in [0, N)
  const int64_t* negative;  // (G, K) in [-1, N)
  DType dtype;
  int64_t table_stride;
  int64_t N, B, D, G, K;
  int similarity;  // its place in the list of common/similarity.h
  double phase_scale;
  Mutation mutation;
  MaskSpec mask;  // for Mixup, the threshold is the order
  int threads;

  bool mutated() const { return mutation != Mutation::kNone; }
  int64_t rows_per_group() const { return G ? B / G : 0; }
};

// What a backward pass needs, all real. A weight is what a sum's terms share (backends/base.py, LossState);
// S is 2 for hake, else 1.
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
  const void* sample_weight;  // (B,) real or null
  Reduction reduction;
  bool need_grad;
  // Outputs, all real; those of gradient are written if need_grad.
  void* loss;       // (1,) or (B,)
  void* terms;      // (2,)
  void* row_scale;  // (B,)
  GradientArgs gradient;
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
};

class Segments;

struct TableGradientArgs {
  const Segments* segments;
  const void* row_scale;       // (B,) real
  const void* weight;          // (S, B, K)
  const void* mutated_weight;  // (S, B, K) with mutation
  const void* grad_positive;   // (B, D)
  int64_t* ids;                // (touched,): the sparse form; null: the dense form
  void* out;                   // (N, D) or (touched, D) of dtype
};

struct MutateArgs {
  const void* positive;  // forward: (B, D)
  const void* negative;  // forward: (B, K, D); backward: upstream gradient
  void* out;             // forward: (B, K, D)
  void* grad_positive;   // backward: (B, D)
  void* grad_negative;   // backward: (B, K, D)
  DType dtype;
  int64_t B, K, D;
  MaskSpec mask;
  int threads;
};

struct Kernels {
  const char* name;
  void (*loss_forward)(const Problem&, const LossArgs&);
  void (*scores_forward)(const Problem&, const ScoreArgs&);
  void (*query_gradient)(const Problem&, const QueryGradientArgs&);
  void (*table_gradient)(const Problem&, const TableGradientArgs&);
  void (*mutate_forward)(const MutateArgs&);
  void (*mutate_backward)(const MutateArgs&);
};

extern const Kernels kBaselineKernels;
#if defined(EMU_HAS_AVX2)
extern const Kernels kAvx2Kernels;
#endif
#if defined(EMU_HAS_AVX512)
extern const Kernels kAvx512Kernels;
#endif

// dispatch.cpp: the kernels in use, chosen at the first call: the best the machine runs, or the one named by
// the environment variable EMU_KERNELS_CPU. Throws std::invalid_argument for a name that cannot run here.
const Kernels& kernels();
int runnable_kernels(const Kernels* out[3]);  // best first; returns how many

}  // namespace emu
