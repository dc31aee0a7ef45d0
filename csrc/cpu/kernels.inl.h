// The CPU kernels, compiled once for each instruction set (see vec.h for the rules that follow from that).
//
// Forward, row by row: gather a row's negatives into a tile that stays in the cache, draw masks or shares, score,
// take the softmax, and compute the gradients of the query and of the positive from the same tile. Backward, entity by
// entity: a sorted segment has all contributions to a row of the table, which is written once; masks are drawn again.
#include "cpu/memory.inl.h"
//
#include "cpu/random.inl.h"
//
#include "cpu/layout.inl.h"
//
#include "cpu/scores.inl.h"
//
#include "cpu/forward.inl.h"
//
#include "cpu/mutate.inl.h"
#include "cpu/relational.inl.h"
#include "cpu/step.inl.h"
//
#include "cpu/table_gradient.inl.h"

// --- from run-time values to template arguments -------------------------------------------------------------

// Calls body(similarity, mode) with the call's similarity and mode as types.
template <class Body>
static void specialize(const Problem& p, Body&& body) {
  with_entry(Similarities{}, p.similarity,
             [&](auto sim) { with_mode<decltype(sim)>(p.draws.kind, [&](auto mode) { body(sim, mode); }); });
}

// Doubles are for checking gradients, so their kernels are compiled for one instruction set only.
#if defined(EMU_DOUBLES)
#define EMU_DOUBLE_KERNEL(function, p, a) \
  specialize(p, [&](auto sim, auto mode) { function<F64, decltype(sim), decltype(mode)::value>(p, a); })
#else
#define EMU_DOUBLE_KERNEL(function, p, a) kBaselineKernels.function(p, a)
#endif

#define EMU_KERNEL(function, Args)                                                                          \
  static void function##_any(const Problem& p, const Args& a) {                                             \
    if (p.dtype == DType::kDouble) return EMU_DOUBLE_KERNEL(function, p, a);                                \
    specialize(p, [&](auto sim, auto mode) { function<F32, decltype(sim), decltype(mode)::value>(p, a); }); \
  }

EMU_KERNEL(loss_forward, LossArgs)
EMU_KERNEL(scores_forward, ScoreArgs)
EMU_KERNEL(query_gradient, QueryGradientArgs)
EMU_KERNEL(table_gradient, TableGradientArgs)
#undef EMU_KERNEL
#undef EMU_DOUBLE_KERNEL

constexpr Kernels make_kernels(const char* name) {
  return {name,           loss_forward_any, scores_forward_any, query_gradient_any, table_gradient_any,
          mutate_forward, mutate_backward,  relational};
}
