// The operators of one similarity: which kernels each launches, and how.
#pragma once

#include "cuda/operators.h"
#include "cuda/rows.cuh"
#include "cuda/table_gradient.cuh"

namespace emu::cuda {

constexpr int kMostTeams = 8;
constexpr int kWantedWarps = 16;  // per multiprocessor

inline bool aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

template <class Sim, class T, Mode kMode>
Plan make_plan(const Problem& p) {
  using S = Shape<Sim, T, kMode>;
  constexpr int64_t kChunk = S::V * int64_t{sizeof(T)};
  constexpr int64_t kReals = 16 / sizeof(typename Sum<T>::Real);
  Plan plan{};
  plan.half = static_cast<int>(p.D / S::H);
  const int threads = (plan.half + S::V - 1) / S::V;
  plan.team_threads = threads > kMostTeamThreads ? kMostTeamThreads : (threads + kWarp - 1) / kWarp * kWarp;
  plan.tile = plan.team_threads * S::V;
  plan.teams = plan.splits = 1;
  const auto loadable = [&](int64_t bytes) {
    return aligned(p.table, bytes) && p.table_stride * int64_t{sizeof(T)} % bytes == 0 &&
           plan.half * int64_t{sizeof(T)} % bytes == 0;
  };
  plan.width = loadable(kChunk)                               ? Width::kWhole
               : kChunk == 16 && sizeof(T) < 8 && loadable(8) ? Width::kHalves
                                                              : Width::kElements;
  plan.whole_reals =
      plan.half % kReals == 0 && aligned(p.query, 16) && aligned(p.scale, 16) && aligned(p.draws.rate, 16);
  return plan;
}

// For passes over a row's negatives. If a team is one warp, several share a block; if rows are few, several blocks
// share a row.
template <class Sim, class T, Mode kMode>
Plan make_query_plan(const Problem& p, int columns) {
  constexpr int R = Shape<Sim, T, kMode>::R;
  if (p.K > 0x7FFFFFFF) throw std::invalid_argument("negative: the cuda backend takes at most 2**31 - 1 ids a row");
  Plan plan = make_plan<Sim, T, kMode>(p);
  const int64_t groups = (p.K + R - 1) / R;
  if (plan.team_threads == kWarp) {
    plan.teams = static_cast<int>(groups < 1 ? 1 : groups < kMostTeams ? groups : kMostTeams);
  }
  const int64_t warps = p.B * columns * (plan.threads() / kWarp);
  const int64_t most = (groups + plan.teams - 1) / plan.teams;
  int64_t splits = warps > 0 ? int64_t{p.place.processors} * kWantedWarps / warps : 1;
  splits = splits < most ? splits : most;
  plan.splits = static_cast<int>(splits < 1 ? 1 : splits);
  return plan;
}

// Hands out parts of a workspace, or only adds up their sizes if base is null.
struct Carver {
  char* base;
  int64_t used = 0;

  template <class X>
  X* take(int64_t count) {
    X* const at = base != nullptr ? reinterpret_cast<X*>(base + used) : nullptr;
    used += (count * int64_t{sizeof(X)} + 255) / 256 * 256;
    return at;
  }
};

template <class Sim, class T, Mode kMode>
struct Operators {
  using Real = typename Sum<T>::Real;
  static constexpr int kSums = Sums<Sim>::kCount;
  static constexpr bool kMutated = kMode != Mode::kPlain, kMoments = kMode == Mode::kMoments;

  // Whether scores and gradients can be computed in one pass over the negatives. Doubles (for checking gradients),
  // shares (for comparison with masks), long rows and learned rates take two, and so do one-half rows with a scale.
  static constexpr bool kCanBeOnline = sizeof(T) < 8 && kMode != Mode::kShare;

  static bool online(const Problem& p) {
    if constexpr (!kCanBeOnline) return false;
    const bool own_scale = Sums<Sim>::kScaled && Sim::kHalves == 1 && p.scale != nullptr;
    const bool learned = kMoments && p.draws.learned;
    return make_plan<Sim, T, kMode>(p).tiles() == 1 && !own_scale && !learned;
  }

  template <Pass kPass>
  static void run_pass(const QueryMajorArgs& args, const char* name) {
    const int columns = kPass == Pass::kWeighted ? args.plan.tiles() : 1;
    const size_t shared = QueryMajor<Sim, T, kMode, kPass>::Memory::block(args.plan);
    EMU_LAUNCH((query_major<Sim, T, kMode, kPass>), name,
               dim3(grid(args.p.B * args.plan.splits), static_cast<unsigned>(columns)), args.plan.threads(), shared,
               args.p.place.stream, args);
  }

  struct LossMemory {
    Real *positive_value, *uls, *vanilla, *value, *mutated_value, *variance, *highest, *sums;
    RowState<Real>* state;
    Plan scores, weighted;
    int64_t bytes;

    LossMemory(const Problem& p, bool need_grad, void* workspace) {
      Carver carver{static_cast<char*>(workspace)};
      const bool in_one = need_grad && online(p);
      scores = make_query_plan<Sim, T, kMode>(p, 1);
      weighted = make_query_plan<Sim, T, kMode>(p, scores.tiles());
      positive_value = carver.take<Real>(kSums * p.B);
      uls = carver.take<Real>(p.B);
      vanilla = carver.take<Real>(p.B);
      state = carver.take<RowState<Real>>(p.B);
      const int64_t values = need_grad ? 0 : kSums * p.B * p.K;
      value = carver.take<Real>(values);
      mutated_value = carver.take<Real>(kMutated ? values : 0);
      variance = carver.take<Real>(kMoments ? values : 0);
      highest = carver.take<Real>(in_one ? p.B * scores.splits * 2 : 0);
      const int64_t arrays = in_one ? p.B * scores.splits * Arrays<Sim, kMode, Pass::kOnline>::kCount
                                    : p.B * weighted.splits * Arrays<Sim, kMode, Pass::kWeighted>::kCount;
      sums = carver.take<Real>(need_grad ? arrays * p.D : 0);
      bytes = carver.used;
    }
  };

  static int64_t loss_workspace(const Problem& p, bool need_grad) { return LossMemory(p, need_grad, nullptr).bytes; }

  static void loss_forward(const Problem& p, const LossArgs& a) {
    const LossMemory memory(p, a.need_grad, a.workspace);
    if (p.B > 0) {
      QueryMajorArgs args{};
      args.p = p;
      args.plan = memory.scores;
      args.positive_value = memory.positive_value;
      args.value = a.need_grad ? a.gradient.weight : memory.value;
      args.mutated_value = a.need_grad ? a.gradient.mutated_weight : memory.mutated_value;
      args.variance = a.need_grad ? a.gradient.variance_weight : memory.variance;
      args.positive_log_q = a.positive_log_q;
      args.negative_log_q = a.negative_log_q;
      args.highest = memory.highest;
      args.sums = memory.sums;
      const bool in_one = a.need_grad && online(p);
      if constexpr (kCanBeOnline) {
        if (in_one) run_pass<Pass::kOnline>(args, "query_major (online)");
      }
      if (!in_one) run_pass<Pass::kScores>(args, "query_major (scores)");

      RowLossArgs rows{p,
                       memory.positive_value,
                       args.value,
                       args.mutated_value,
                       args.variance,
                       a.beta,
                       a.alpha,
                       a.coefficients,
                       a.positive_log_q,
                       a.negative_log_q,
                       memory.uls,
                       memory.vanilla,
                       memory.state,
                       a.gradient.grad_weights,
                       kMutated,
                       a.need_grad};
      EMU_LAUNCH((row_loss<Sim, Real, kMoments>), "row_loss", grid(p.B), kRowThreads,
                 kRowThreads / kWarp * sizeof(Real), p.place.stream, rows);
      if (a.need_grad) {
        if (in_one) {
          if constexpr (kCanBeOnline) {
            finish_gradient<Pass::kOnline>(p, memory.scores, memory.sums, memory.highest, memory.state, a.gradient);
          }
        } else {
          weigh(p, memory.weighted, memory.sums, memory.state, a.gradient);
        }
      }
    }
    const ReduceArgs reduce{p.B,         memory.uls, memory.vanilla, a.sample_weight, a.coefficients, a.alpha,
                            a.reduction, kMutated,   a.loss,         a.terms,         a.row_scale};
    EMU_LAUNCH(reduce_rows<Real>, "reduce_rows", 1, kReduceThreads, kReduceThreads / kWarp * sizeof(double),
               p.place.stream, reduce);
  }

  // The gradients from the weights of sums, which are in `gradient` already.
  static void weigh(const Problem& p, const Plan& plan, Real* sums, RowState<Real>* state,
                    const GradientArgs& gradient) {
    QueryMajorArgs args{};
    args.p = p;
    args.plan = plan;
    args.weight = gradient.weight;
    args.mutated_weight = gradient.mutated_weight;
    args.variance_weight = gradient.variance_weight;
    args.sums = sums;
    run_pass<Pass::kWeighted>(args, "query_major (weighted)");
    finish_gradient<Pass::kWeighted>(p, plan, sums, nullptr, state, gradient);
  }

  template <Pass kPass>
  static void finish_gradient(const Problem& p, const Plan& plan, const Real* sums, const Real* highest,
                              const RowState<Real>* state, const GradientArgs& gradient) {
    const RowGradientArgs args{p,
                               plan,
                               sums,
                               highest,
                               state,
                               gradient.grad_query,
                               gradient.grad_positive,
                               gradient.grad_scale,
                               gradient.grad_rate};
    EMU_LAUNCH((row_gradient<Sim, T, kMode, kPass>), "row_gradient", grid(p.B), kRowThreads, 0, p.place.stream, args);
  }

  static void scores_forward(const Problem& p, const ScoreArgs& a) {
    if (p.B == 0) return;
    QueryMajorArgs args{};
    args.p = p;
    args.plan = make_query_plan<Sim, T, kMode>(p, 1);
    args.positive_score = a.positive;
    args.score = a.negative;
    args.mutated_score = a.mutated;
    args.cumulant = a.cumulant;
    run_pass<Pass::kScores>(args, "query_major (scores)");
  }

  struct WeightsMemory {
    Real *positive_value, *sums;
    RowState<Real>* state;
    Plan plan;
    int64_t bytes;

    WeightsMemory(const Problem& p, void* workspace) {
      Carver carver{static_cast<char*>(workspace)};
      plan = make_query_plan<Sim, T, kMode>(p, make_plan<Sim, T, kMode>(p).tiles());
      positive_value = carver.take<Real>(kSums * p.B);
      state = carver.take<RowState<Real>>(p.B);
      sums = carver.take<Real>(p.B * plan.splits * Arrays<Sim, kMode, Pass::kWeighted>::kCount * p.D);
      bytes = carver.used;
    }
  };

  static int64_t query_gradient_workspace(const Problem& p) { return WeightsMemory(p, nullptr).bytes; }

  static void query_gradient(const Problem& p, const QueryGradientArgs& a) {
    if (p.B == 0) return;
    const WeightsMemory memory(p, a.workspace);
    if constexpr (!Sums<Sim>::kDirect) {
      QueryMajorArgs args{};
      args.p = p;
      args.plan = make_query_plan<Sim, T, kMode>(p, 1);
      args.positive_value = memory.positive_value;
      args.value = a.gradient.weight;
      args.mutated_value = a.gradient.mutated_weight;
      args.variance = a.gradient.variance_weight;
      run_pass<Pass::kScores>(args, "query_major (scores)");
    }
    const RowWeightsArgs rows{p,
                              memory.positive_value,
                              a.positive_weight,
                              a.weight,
                              a.mutated_weight,
                              a.cumulant_weight,
                              a.gradient.weight,
                              a.gradient.mutated_weight,
                              a.gradient.variance_weight,
                              memory.state,
                              a.gradient.grad_weights,
                              kMutated};
    EMU_LAUNCH((row_weights<Sim, Real, kMoments>), "row_weights", grid(p.B), kRowThreads,
               kRowThreads / kWarp * sizeof(Real), p.place.stream, rows);
    weigh(p, memory.plan, memory.sums, memory.state, a.gradient);
  }

  static TableGradientKernelArgs table_args(const Problem& p, const TableGradientArgs& a) {
    TableGradientKernelArgs args{};
    args.p = p;
    args.plan = make_plan<Sim, T, kMode>(p);
    args.plan.whole_reals = args.plan.whole_reals && aligned(a.grad_positive, 16) && aligned(a.out, 16);
    args.plan.whole_out = args.plan.half % Shape<Sim, T, kMode>::V == 0 && aligned(a.out, 16);
    args.sorted = sorted_ids(p, a.sorted);
    args.pieces = cut_pieces(p, args.sorted.entries);
    args.row_scale = a.row_scale;
    args.weight = a.weight;
    args.mutated_weight = a.mutated_weight;
    args.variance_weight = a.variance_weight;
    args.grad_positive = a.grad_positive;
    args.ids = a.ids;
    args.out = a.out;
    Carver carver{static_cast<char*>(a.partials)};
    args.ordinals = carver.take<int64_t>(args.pieces.count() / args.pieces.chunks + 1);
    args.partials = carver.take<Real>(args.pieces.count() * 2 * p.D);
    return args;
  }

  static void zero_rows(const Problem& p, const TableGradientArgs& a) {
    fill_zero(a.out, static_cast<size_t>(p.N * p.D) * sizeof(T), p.place.stream, "table_gradient");
  }

  static void table_gradient(const Problem& p, const TableGradientArgs& a) {
    if (a.ids == nullptr) zero_rows(p, a);
    if (count_entries(p) == 0) return;
    const TableGradientKernelArgs args = table_args(p, a);
    run_table_gradient<false>(args, "add_segments");
    EMU_LAUNCH(join_pieces<T>, "join_pieces", grid(args.pieces.count()), kJoinThreads, 0, p.place.stream, args);
  }

  static void table_gradient_atomic(const Problem& p, const TableGradientArgs& a) {
    if constexpr (sizeof(T) == 4 && kMode != Mode::kShare) {
      zero_rows(p, a);
      if (count_entries(p) > 0) run_table_gradient<true>(table_args(p, a), "add_segments (atomic)");
    } else {
      throw std::invalid_argument("atomics add to fp32 gradients only, and not under shares");
    }
  }

  template <bool kAtomic>
  static void run_table_gradient(TableGradientKernelArgs args, const char* name) {
    if (args.plan.team_threads == kWarp) args.plan.teams = 4;
    const size_t shared =
        static_cast<size_t>(args.plan.teams) * TableGradient<Sim, T, kMode, kAtomic>::memory(args.plan);
    const int64_t blocks = (args.pieces.count() + args.plan.teams - 1) / args.plan.teams;
    EMU_LAUNCH((add_segments<Sim, T, kMode, kAtomic>), name,
               dim3(grid(blocks), static_cast<unsigned>(args.plan.tiles())), args.plan.threads(), shared,
               args.p.place.stream, args);
  }
};

// --- from run-time values to template arguments ---------------------------------------------------------------

template <class Sim, class Call>
auto with_operators(const Problem& p, Call&& call) {
  return with_mode<Sim>(p.draws.kind, [&](auto mode) {
    constexpr Mode kMode = decltype(mode)::value;
    switch (p.dtype) {
      case DType::kFloat: return call(Operators<Sim, float, kMode>{});
      case DType::kBFloat16: return call(Operators<Sim, BFloat16, kMode>{});
      case DType::kHalf: return call(Operators<Sim, Half, kMode>{});
      default: return call(Operators<Sim, double, kMode>{});
    }
  });
}

template <class Sim>
Kernels make_kernels() {
  Kernels kernels{};
  kernels.loss_workspace = [](const Problem& p, bool need_grad) {
    return with_operators<Sim>(p, [&](auto of) { return of.loss_workspace(p, need_grad); });
  };
  kernels.query_gradient_workspace = [](const Problem& p) {
    return with_operators<Sim>(p, [&](auto of) { return of.query_gradient_workspace(p); });
  };
  kernels.loss_forward = [](const Problem& p, const LossArgs& a) {
    with_operators<Sim>(p, [&](auto of) { of.loss_forward(p, a); });
  };
  kernels.scores_forward = [](const Problem& p, const ScoreArgs& a) {
    with_operators<Sim>(p, [&](auto of) { of.scores_forward(p, a); });
  };
  kernels.query_gradient = [](const Problem& p, const QueryGradientArgs& a) {
    with_operators<Sim>(p, [&](auto of) { of.query_gradient(p, a); });
  };
  kernels.table_gradient = [](const Problem& p, const TableGradientArgs& a) {
    with_operators<Sim>(p, [&](auto of) { of.table_gradient(p, a); });
  };
  kernels.table_gradient_atomic = [](const Problem& p, const TableGradientArgs& a) {
    with_operators<Sim>(p, [&](auto of) { of.table_gradient_atomic(p, a); });
  };
  return kernels;
}

}  // namespace emu::cuda
