// The CPU kernels, compiled once for each instruction set (see vec.h for the rules that follow from that).
//
// Forward, row by row: gather a row's negatives into a tile that stays in the cache, draw its masks, score,
// softmax, and, from the same tile, the gradients of the query and of the positive. Backward, entity by
// entity over sorted segments, with the masks drawn again: each touched row is written once.
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
#include "cpu/table_gradient.inl.h"

// --- from run-time values to template arguments -------------------------------------------------------------

template <template <class, class, int> class Kernel, class F, class Sim, class Args>
static void specialise_mode(const Problem& p, const Args& a) {
  switch (p.mutation) {
    case Mutation::kNone: return Kernel<F, Sim, kPlain>::run(p, a);
    case Mutation::kMask: return Kernel<F, Sim, Sim::kCoupled ? kMask : kSelect>::run(p, a);
    case Mutation::kMixup: return Kernel<F, Sim, kMixup>::run(p, a);
  }
}

template <template <class, class, int> class Kernel, class F, class Args>
static void specialise_similarity(List<>, int, const Problem&, const Args&) {}
template <template <class, class, int> class Kernel, class F, class Args, class First, class... Rest>
static void specialise_similarity(List<First, Rest...>, int index, const Problem& p, const Args& a) {
  if (index == 0) return specialise_mode<Kernel, F, First>(p, a);
  specialise_similarity<Kernel, F>(List<Rest...>{}, index - 1, p, a);
}

// Doubles are for checking gradients, so their kernels are compiled for one instruction set only.
#if defined(EMU_DOUBLES)
#define EMU_DOUBLE_KERNEL(function, p, a) \
  specialise_similarity<function##_kernel, F64>(Similarities{}, p.similarity, p, a)
#else
#define EMU_DOUBLE_KERNEL(function, p, a) kBaselineKernels.function(p, a)
#endif

#define EMU_KERNEL(function, Args)                                                                \
  template <class F, class Sim, int kMode>                                                        \
  struct function##_kernel {                                                                      \
    static void run(const Problem& p, const Args& a) { function<F, Sim, kMode>(p, a); }           \
  };                                                                                              \
  static void function##_any(const Problem& p, const Args& a) {                                   \
    if (p.dtype == DType::kDouble) return EMU_DOUBLE_KERNEL(function, p, a);                      \
    specialise_similarity<function##_kernel, F32>(Similarities{}, p.similarity, p, a);            \
  }

EMU_KERNEL(loss_forward, LossArgs)
EMU_KERNEL(scores_forward, ScoreArgs)
EMU_KERNEL(query_gradient, QueryGradientArgs)
EMU_KERNEL(table_gradient, TableGradientArgs)
#undef EMU_KERNEL
#undef EMU_DOUBLE_KERNEL

constexpr Kernels make_kernels(const char* name) {
  return {name,           loss_forward_any, scores_forward_any, query_gradient_any, table_gradient_any,
          mutate_forward, mutate_backward};
}
