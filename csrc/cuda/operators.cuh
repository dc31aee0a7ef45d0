// The operators of one similarity, launch by launch. Included by kernels_*.cu.
#pragma once

#include "cuda/operators.h"
#include "cuda/rows.cuh"
#include "cuda/table_gradient.cuh"

namespace emu::cuda {

constexpr int kMostTeams = 8;
constexpr int kWantedWarps = 16;  // a processor

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
  plan.width = loadable(kChunk) ? Width::kWhole
               : kChunk == 16 && sizeof(T) < 8 && loadable(8) ? Width::kHalves : Width::kElements;
  plan.whole_reals = plan.half % kReals == 0 && aligned(p.query, 16) && aligned(p.scale, 16);
  return plan;
}

// For passes over a row's negatives: teams of one warp share a block, and blocks share a row where rows are few.
template <class Sim, class T, Mode kMode>
Plan make_query_plan(const Problem& p, int processors, int columns) {
  constexpr int R = Shape<Sim, T, kMode>::R;
  Plan plan = make_plan<Sim, T, kMode>(p);
  const int64_t groups = (p.K + R - 1) / R;
  if (plan.team_threads == kWarp) {
    plan.teams = static_cast<int>(groups < 1 ? 1 : groups < kMostTeams ? groups : kMostTeams);
  }
  const int64_t warps = p.B * columns * (plan.threads() / kWarp);
  const int64_t most = (groups + plan.teams - 1) / plan.teams;
  int64_t splits = warps > 0 ? int64_t{processors} * kWantedWarps / warps : 1;
  splits = splits < most ? splits : most;
  plan.splits = static_cast<int>(splits < 1 ? 1 : splits);
  return plan;
}

// Parts of a workspace; without memory, only their sizes.
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
  static constexpr bool kMutated = kMode != Mode::kPlain;

  // Doubles are for checking gradients; Mixup is for comparison. They and long rows take two passes.
  static constexpr bool kCanBeOnline = sizeof(T) < 8 && kMode != Mode::kMixup;

  static bool online(const Problem& p) {
    if constexpr (!kCanBeOnline) return false;
    const bool own_scale = Sums<Sim>::kScaled && Sim::kHalves == 1 && p.scale != nullptr;
    return make_plan<Sim, T, kMode>(p).tiles() == 1 && !own_scale;
  }

  template <Pass kPass>
  static void run_pass(const QueryMajorArgs& args, const Launch& launch, const char* name) {
    const int columns = kPass == Pass::kWeighted ? args.plan.tiles() : 1;
    const size_t shared = QueryMajor<Sim, T, kMode, kPass>::Memory::block(args.plan);
    EMU_LAUNCH((query_major<Sim, T, kMode, kPass>), name,
               dim3(grid(args.p.B * args.plan.splits), static_cast<unsigned>(columns)), args.plan.threads(), shared,
               launch.stream, args);
  }

  struct LossMemory {
    Real *positive_value, *uls, *vanilla, *value, *mutated_value, *highest, *sums;
    RowState<Real>* state;
    Plan scores, weighted;
    int64_t bytes;

    LossMemory(const Problem& p, const Launch& launch, bool need_grad, void* workspace) {
      Carver carver{static_cast<char*>(workspace)};
      const bool in_one = need_grad && online(p);
      scores = make_query_plan<Sim, T, kMode>(p, launch.processors, 1);
      weighted = make_query_plan<Sim, T, kMode>(p, launch.processors, scores.tiles());
      positive_value = carver.take<Real>(kSums * p.B);
      uls = carver.take<Real>(p.B);
      vanilla = carver.take<Real>(p.B);
      state = carver.take<RowState<Real>>(p.B);
      const int64_t values = need_grad ? 0 : kSums * p.B * p.K;
      value = carver.take<Real>(values);
      mutated_value = carver.take<Real>(kMutated ? values : 0);
      highest = carver.take<Real>(in_one ? p.B * scores.splits * 2 : 0);
      const int64_t arrays = in_one ? p.B * scores.splits * Arrays<Sim, kMode, Pass::kOnline>::kCount
                                    : p.B * weighted.splits * Arrays<Sim, kMode, Pass::kWeighted>::kCount;
      sums = carver.take<Real>(need_grad ? arrays * p.D : 0);
      bytes = carver.used;
    }
  };

  static int64_t loss_workspace(const Problem& p, const Launch& launch, bool need_grad) {
    return LossMemory(p, launch, need_grad, nullptr).bytes;
  }

  static void loss_forward(const Problem& p, const LossArgs& a, const Launch& launch) {
    const LossMemory memory(p, launch, a.need_grad, a.workspace);
    if (p.B > 0) {
      QueryMajorArgs args{};
      args.p = p;
      args.plan = memory.scores;
      args.positive_value = memory.positive_value;
      args.value = a.need_grad ? a.gradient.weight : memory.value;
      args.mutated_value = a.need_grad ? a.gradient.mutated_weight : memory.mutated_value;
      args.highest = memory.highest;
      args.sums = memory.sums;
      const bool in_one = a.need_grad && online(p);
      if constexpr (kCanBeOnline) {
        if (in_one) run_pass<Pass::kOnline>(args, launch, "query_major (online)");
      }
      if (!in_one) run_pass<Pass::kScores>(args, launch, "query_major (scores)");

      RowLossArgs rows{p,      memory.positive_value,  args.value, args.mutated_value,
                       a.beta, a.alpha,                a.coefficients,
                       memory.uls, memory.vanilla, memory.state, a.gradient.grad_weights, kMutated, a.need_grad};
      EMU_LAUNCH((row_loss<Sim, Real>), "row_loss", grid(p.B), kRowThreads, kRowThreads / kWarp * sizeof(Real),
                 launch.stream, rows);
      if (a.need_grad) {
        if (in_one) {
          if constexpr (kCanBeOnline) {
            finish_gradient<Pass::kOnline>(p, memory.scores, memory.sums, memory.highest, memory.state, a.gradient,
                                           launch);
          }
        } else {
          weigh(p, memory.weighted, memory.sums, memory.state, a.gradient, launch);
        }
      }
    }
    const ReduceArgs reduce{p.B,  memory.uls, memory.vanilla, a.sample_weight, a.coefficients, a.alpha, a.reduction,
                            kMutated, a.loss, a.terms, a.row_scale};
    EMU_LAUNCH(reduce_rows<Real>, "reduce_rows", 1, kReduceThreads, kReduceThreads / kWarp * sizeof(double),
               launch.stream, reduce);
  }

  // Gradients under the weights of sums that `gradient` has by now.
  static void weigh(const Problem& p, const Plan& plan, Real* sums, RowState<Real>* state,
                    const GradientArgs& gradient, const Launch& launch) {
    QueryMajorArgs args{};
    args.p = p;
    args.plan = plan;
    args.weight = gradient.weight;
    args.mutated_weight = gradient.mutated_weight;
    args.sums = sums;
    run_pass<Pass::kWeighted>(args, launch, "query_major (weighted)");
    finish_gradient<Pass::kWeighted>(p, plan, sums, nullptr, state, gradient, launch);
  }

  template <Pass kPass>
  static void finish_gradient(const Problem& p, const Plan& plan, const Real* sums, const Real* highest,
                              const RowState<Real>* state, const GradientArgs& gradient, const Launch& launch) {
    const RowGradientArgs args{p,     plan, sums, highest, state, gradient.grad_query, gradient.grad_positive,
                               gradient.grad_scale};
    EMU_LAUNCH((row_gradient<Sim, T, kMode, kPass>), "row_gradient", grid(p.B), kRowThreads, 0, launch.stream, args);
  }

  static void scores_forward(const Problem& p, const ScoreArgs& a, const Launch& launch) {
    if (p.B == 0) return;
    QueryMajorArgs args{};
    args.p = p;
    args.plan = make_query_plan<Sim, T, kMode>(p, launch.processors, 1);
    args.positive_score = a.positive;
    args.score = a.negative;
    args.mutated_score = a.mutated;
    run_pass<Pass::kScores>(args, launch, "query_major (scores)");
  }

  struct WeightsMemory {
    Real *positive_value, *sums;
    RowState<Real>* state;
    Plan plan;
    int64_t bytes;

    WeightsMemory(const Problem& p, const Launch& launch, void* workspace) {
      Carver carver{static_cast<char*>(workspace)};
      plan = make_query_plan<Sim, T, kMode>(p, launch.processors, make_plan<Sim, T, kMode>(p).tiles());
      positive_value = carver.take<Real>(kSums * p.B);
      state = carver.take<RowState<Real>>(p.B);
      sums = carver.take<Real>(p.B * plan.splits * Arrays<Sim, kMode, Pass::kWeighted>::kCount * p.D);
      bytes = carver.used;
    }
  };

  static int64_t query_gradient_workspace(const Problem& p, const Launch& launch) {
    return WeightsMemory(p, launch, nullptr).bytes;
  }

  static void query_gradient(const Problem& p, const QueryGradientArgs& a, const Launch& launch) {
    if (p.B == 0) return;
    const WeightsMemory memory(p, launch, a.workspace);
    if constexpr (!Sums<Sim>::kDirect) {
      QueryMajorArgs args{};
      args.p = p;
      args.plan = make_query_plan<Sim, T, kMode>(p, launch.processors, 1);
      args.positive_value = memory.positive_value;
      args.value = a.gradient.weight;
      args.mutated_value = a.gradient.mutated_weight;
      run_pass<Pass::kScores>(args, launch, "query_major (scores)");
    }
    const RowWeightsArgs rows{p,
                              memory.positive_value,
                              a.positive_weight,
                              a.weight,
                              a.mutated_weight,
                              a.gradient.weight,
                              a.gradient.mutated_weight,
                              memory.state,
                              a.gradient.grad_weights,
                              kMutated};
    EMU_LAUNCH((row_weights<Sim, Real>), "row_weights", grid(p.B), kRowThreads, kRowThreads / kWarp * sizeof(Real),
               launch.stream, rows);
    weigh(p, memory.plan, memory.sums, memory.state, a.gradient, launch);
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
    args.grad_positive = a.grad_positive;
    args.ids = a.ids;
    args.out = a.out;
    Carver carver{static_cast<char*>(a.partials)};
    args.ordinals = carver.take<int64_t>(args.pieces.count() / args.pieces.chunks + 1);
    args.partials = carver.take<Real>(args.pieces.count() * 2 * p.D);
    return args;
  }

  static void table_gradient(const Problem& p, const TableGradientArgs& a, const Launch& launch) {
    if (a.ids == nullptr) fill_zero(a.out, static_cast<size_t>(p.N * p.D) * sizeof(T), launch.stream, "table_gradient");
    if (count_entries(p) == 0) return;
    const TableGradientKernelArgs args = table_args(p, a);
    run_table_gradient<false>(args, launch, "add_segments");
    EMU_LAUNCH(join_pieces<T>, "join_pieces", grid(args.pieces.count()), kJoinThreads, 0, launch.stream, args);
  }

  static void table_gradient_atomic(const Problem& p, const TableGradientArgs& a, const Launch& launch) {
    if constexpr (sizeof(T) == 4 && kMode != Mode::kMixup) {
      fill_zero(a.out, static_cast<size_t>(p.N * p.D) * sizeof(T), launch.stream, "table_gradient");
      if (count_entries(p) > 0) run_table_gradient<true>(table_args(p, a), launch, "add_segments (atomic)");
    } else {
      throw std::invalid_argument("atomics add to fp32 gradients only, and not of Mixup");
    }
  }

  template <bool kAtomic>
  static void run_table_gradient(TableGradientKernelArgs args, const Launch& launch, const char* name) {
    if (args.plan.team_threads == kWarp) args.plan.teams = 4;
    const size_t shared =
        static_cast<size_t>(args.plan.teams) * TableGradient<Sim, T, kMode, kAtomic>::memory(args.plan);
    const int64_t blocks = (args.pieces.count() + args.plan.teams - 1) / args.plan.teams;
    EMU_LAUNCH((add_segments<Sim, T, kMode, kAtomic>), name,
               dim3(grid(blocks), static_cast<unsigned>(args.plan.tiles())), args.plan.threads(), shared,
               launch.stream, args);
  }
};

// --- from run-time values to template arguments ---------------------------------------------------------------

template <class Sim, class T, class Call>
auto with_mode(const Launch& launch, Call&& call) {
  constexpr Mode kByMask = Sim::kCoupled ? Mode::kMask : Mode::kSelect;
  switch (launch.mutation) {
    case Mutation::kNone: return call(Operators<Sim, T, Mode::kPlain>{});
    case Mutation::kMask: return call(Operators<Sim, T, kByMask>{});
    default: return call(Operators<Sim, T, Mode::kMixup>{});
  }
}

template <class Sim, class Call>
auto with_operators(const Launch& launch, Call&& call) {
  switch (launch.dtype) {
    case DType::kFloat: return with_mode<Sim, float>(launch, call);
    case DType::kBFloat16: return with_mode<Sim, BFloat16>(launch, call);
    case DType::kHalf: return with_mode<Sim, Half>(launch, call);
    default: return with_mode<Sim, double>(launch, call);
  }
}

template <class Sim>
Kernels make_kernels() {
  Kernels kernels{};
  kernels.loss_workspace = [](const Problem& p, const Launch& launch, bool need_grad) {
    return with_operators<Sim>(launch, [&](auto of) { return of.loss_workspace(p, launch, need_grad); });
  };
  kernels.query_gradient_workspace = [](const Problem& p, const Launch& launch) {
    return with_operators<Sim>(launch, [&](auto of) { return of.query_gradient_workspace(p, launch); });
  };
  kernels.loss_forward = [](const Problem& p, const LossArgs& a, const Launch& launch) {
    with_operators<Sim>(launch, [&](auto of) { of.loss_forward(p, a, launch); });
  };
  kernels.scores_forward = [](const Problem& p, const ScoreArgs& a, const Launch& launch) {
    with_operators<Sim>(launch, [&](auto of) { of.scores_forward(p, a, launch); });
  };
  kernels.query_gradient = [](const Problem& p, const QueryGradientArgs& a, const Launch& launch) {
    with_operators<Sim>(launch, [&](auto of) { of.query_gradient(p, a, launch); });
  };
  kernels.table_gradient = [](const Problem& p, const TableGradientArgs& a, const Launch& launch) {
    with_operators<Sim>(launch, [&](auto of) { of.table_gradient(p, a, launch); });
  };
  kernels.table_gradient_atomic = [](const Problem& p, const TableGradientArgs& a, const Launch& launch) {
    with_operators<Sim>(launch, [&](auto of) { of.table_gradient_atomic(p, a, launch); });
  };
  return kernels;
}

}  // namespace emu::cuda
