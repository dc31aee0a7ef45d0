// What Python passes to the kernels, on the CPU and on a GPU. Tensors are checked, and contiguous unless a stride is
// given; "real" is float, or double for a double table. Sizes: B rows, K negatives per row, G sets of negatives, D
// components, N table rows, S sums per score (2 for hake, else 1), W similarity weights.
#pragma once

#include <cstdint>

#include "common/mutation.h"

namespace emu {

enum class DType { kFloat, kBFloat16, kHalf, kDouble };
enum class Reduction { kNone, kSum, kMean };

// Where a call runs.
struct Place {
  int threads;     // CPU: how many
  int device;      // CUDA, as the next two
  int processors;  // of the device
  void* stream;
};

struct Problem {
  const void* query;        // (B, D) real
  const void* table;        // (N, D) of dtype, rows table_stride elements apart
  const void* scale;        // (B, D/2 or D) real, or null: ones
  const void* weights;      // (W,) real, or null: ones
  const int64_t* positive;  // (B,) in [0, N)
  const int64_t* negative;  // (G, K) in [-1, N), −1 for padding
  int64_t* report;          // CUDA, where ids are not checked before: (2,) on the host, where kernels store an id of
                            // positive, and one of negative, that is out of range
  DType dtype;
  int64_t table_stride;
  int64_t N, B, D, G, K;
  int similarity;  // its index in the list of common/similarity.h
  double phase_scale;
  Draws draws;
  Place place;

  EMU_MEMBER int64_t rows_per_group() const { return G ? B / G : 0; }
};

// What a backward pass needs, all real. A weight is that of a sum (backends/base.py, ScoresGradient).
struct GradientArgs {
  void* weight;           // (S, B, K)
  void* mutated_weight;   // (S, B, K) with mutation
  void* variance_weight;  // (S, B, K) with moments: derivatives by half the variance
  void* grad_rate;        // (B, U) with moments, or null
  void* grad_query;       // (B, D)
  void* grad_positive;    // (B, D)
  void* grad_scale;       // (B, scale's width) or null
  void* grad_weights;     // (B, W) or null
};

struct LossArgs {
  double beta, alpha;
  const void* coefficients;    // CUDA: (2,) real, β and α instead of the two numbers, or null
  const void* sample_weight;   // (B,) real or null
  const void* positive_log_q;  // (B,) real, subtracted from the positive's score, or null
  const void* negative_log_q;  // (G, K) real, subtracted from the (mutated) negatives', or null; 0 at padding
  Reduction reduction;
  bool need_grad;
  // Outputs, all real; those of gradient are written if need_grad.
  void* loss;       // (1,) or (B,)
  void* terms;      // (2,)
  void* row_scale;  // (B,)
  GradientArgs gradient;
  void* workspace;  // CUDA: of loss_workspace bytes
};

struct ScoreArgs {
  void* positive;  // (B,) real
  void* negative;  // (B, K)
  void* mutated;   // (B, K)
  void* cumulant;  // (B, K) with moments
};

struct QueryGradientArgs {
  const void* positive_weight;  // (B,) real: upstream gradients of scores, like the next three
  const void* weight;           // (B, K)
  const void* mutated_weight;   // (B, K) with mutation
  const void* cumulant_weight;  // (B, K) with moments
  GradientArgs gradient;
  void* workspace;  // CUDA: of query_gradient_workspace bytes
};

// Optimizers that do not move rows without a gradient.
enum class Optimizer { kNone, kSgd, kAdagrad, kRowwiseAdagrad };

// CPU: a step of the touched rows, which is made instead of writing their gradient.
struct StepArgs {
  Optimizer optimizer;  // kNone: there is no step
  double lr, eps;
  void* table;  // the problem's table, of real
  void* sums;   // Adagrad's: (N, D) real, or (N,) row-wise; otherwise null
  // M further gradients of rows of the table.
  int64_t count;         // M
  const int64_t* ids;    // (M,) ascending
  const int64_t* order;  // (M,) where each id's gradient is in rows
  const void* rows;      // (M, D) real
};

struct TableGradientArgs {
  const void* row_scale;        // (B,) real
  const void* weight;           // (S, B, K)
  const void* mutated_weight;   // (S, B, K) with mutation
  const void* variance_weight;  // (S, B, K) with moments
  const void* grad_positive;    // (B, D)
  int64_t* ids;                 // (touched,): the sparse form; null: the dense form
  void* out;                    // (N, D) or (touched, D) of dtype
  const void* sorted;           // the batch's ids, sorted: cpu/segments.h, cuda/sort.h
  int64_t sorted_size;          // CPU
  StepArgs step;                // CPU
  void* partials;               // CUDA: of partials_workspace bytes
};

struct MutateArgs {
  const void* positive;  // forward: (B, D)
  const void* negative;  // forward: (B, K, D); backward: upstream gradient
  void* out;             // forward: (B, K, D)
  void* grad_positive;   // backward: (B, D)
  void* grad_negative;   // backward: (B, K, D)
  DType dtype;
  int64_t B, K, D;
  Draws draws;
  Place place;
};

// Messages along edges, aggregated: N nodes, E edges, R relations, B queries, D components. Edges are sorted by the
// node that a task loops over (target, or source in the backward pass); `other`, `relation` and `edge` (its number
// before sorting) are those of the sorted edges.
enum class Message { kDistMult, kTransE, kRotate };
enum class Aggregate { kSum, kMin, kMax, kPna };
enum class RelationalTask { kForward, kBackward, kOwn };

struct RelationalArgs {
  RelationalTask task;
  Message message;
  Aggregate aggregate;
  DType dtype;  // float or double: that of all arrays called real
  int64_t N, R, B, D, size;
  int64_t relation_rows;    // 1, or B if each query has relations of its own
  const void* nodes;        // (N, B, D) real
  const void* relations;    // (R, relation_rows, D) real
  const void* own;          // (N, B, D) real: a message from each node to itself, or null
  const void* weight;       // (E,) real or null
  const uint8_t* keep;      // (E,) 0 for an edge to leave out, or null
  const int64_t* start;     // (N + 1,)
  const int64_t* other;     // (E,) the source in the forward pass, else the target
  const int64_t* relation;  // (E,)
  const int64_t* edge;      // (E,)
  const void* share;        // (N,) real: the share of each message in a node's mean, 1 / their number; null: 1
  const void* grad;         // (N, B, S, D) real, by the result; S sections
  const void* result;       // (N, B, S, D) real, that of the forward pass
  void* out;                // (N, B, S, D) real, or the gradient of nodes or own, (N, B, D)
  void* relation_gradient;  // (R, relation_rows, D) real, backward
  double epsilon;           // the lower bound of the variance
  int threads;
};

}  // namespace emu
