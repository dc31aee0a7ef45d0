// Query-major: one pass over a row's negatives, which scores them, or adds their weighted parts of the gradients of
// query, scale and positive, or does both.
#pragma once

#include "cuda/shape.cuh"

namespace emu::cuda {

enum class Pass {
  kScores,   // sums and scores
  kOnline,   // sums, and gradients by weights that are relative to the highest score so far
  kWeighted  // gradients by given weights
};

struct QueryMajorArgs {
  Problem p;
  Plan plan;
  // kScores, kOnline: outputs for each sum (or minus its root): (S, B) and (S, B, K), or null. With moments
  // mutated_value is M, and variance V.
  void *positive_value, *value, *mutated_value, *variance;
  void *positive_score, *score, *mutated_score, *cumulant;  // (B,), and (B, K) each, or null
  const void *weight, *mutated_weight, *variance_weight;    // kWeighted: (S, B, K), of the sums
  const void *positive_log_q, *negative_log_q;              // kOnline: those of LossArgs
  void* highest;  // kOnline: (B, splits, 2), what the weights of a split are relative to
  void* sums;     // kOnline, kWeighted: (B, splits, arrays, D)
};

// The arrays of sums over a row's negatives. In an online pass there are three of each kind: weighted by e^(s − max),
// weighted by e^(ŝ − max), and not weighted. For the positive's share there are the last two. With moments these are of
// (t − p) times V's weight, which has an unweighted part only with a root. The rates' gradient has one array, in a
// weighted pass only: so learned rates take two passes.
template <class Sim, Mode kMode, Pass kPass>
struct Arrays {
  static constexpr bool kMutated = kMode != Mode::kPlain;
  static constexpr int kWays = kPass == Pass::kOnline && kMutated ? 3 : 1;
  static constexpr bool kRoots = Sim::root(0) || Sim::root(Sums<Sim>::kCount - 1);
  static constexpr bool kTwoShares = kPass == Pass::kOnline && (kMode != Mode::kMoments || kRoots);
  static constexpr int kShareWays = !kMutated ? 0 : kTwoShares ? 2 : 1;
  static constexpr int kQuery = 0, kShare = kWays, kFactor = kWays + kShareWays;
  // The gradient of a scale takes arrays of its own. An online pass has registers for them only with two halves.
  static constexpr bool kFactors = Sums<Sim>::kScaled && (kPass != Pass::kOnline || Sim::kHalves > 1);
  static constexpr bool kRates = kMode == Mode::kMoments && kPass == Pass::kWeighted;
  static constexpr int kRate = kFactor + (kFactors ? kWays : 0);
  static constexpr int kCount = kRate + (kRates ? 1 : 0);
};

template <class Sim, class T, Mode kMode, Pass kPass>
struct QueryMajor {
  using Real = typename Sum<T>::Real;
  using M = Maths<Real>;
  using S = Shape<Sim, T, kMode>;
  using A = Arrays<Sim, kMode, kPass>;
  static constexpr int H = S::H, V = S::V, R = S::R, kSums = Sums<Sim>::kCount;
  static constexpr bool kMutated = kMode != Mode::kPlain, kDirect = Sums<Sim>::kDirect;
  static constexpr bool kMoments = kMode == Mode::kMoments, kDrawn = kMutated && !kMoments;
  static constexpr bool kOneTile = kPass != Pass::kScores;        // per block; online passes need rows of one tile
  static constexpr int kKinds = kMoments ? 4 : kMutated ? 2 : 1;  // moments: plain, M, V and an unused one
  static constexpr int kValues = kSums * kKinds * R;  // for R rows; value (s, kind, r) is at (s·kinds + kind)·R + r
  static constexpr int kLanes = kWarp / kValues;      // lanes that hold the same value

  // A multiprocessor runs two blocks of the largest size if each thread has 128 registers. Only these kernels fit into
  // them on every target; of those with a scale, two halves, or eight rows or components per thread, some would spill.
  static constexpr bool kFits = kPass == Pass::kOnline && kMutated && sizeof(T) == 4 && H == 1 && !Sums<Sim>::kScaled;
  static constexpr int kBlocks = kFits ? 2 : 1;

  // A team's shared memory: masks, shares, scratch for sums. At the end it is used to join the teams' sums.
  struct Memory {
    static EMU_MEMBER size_t masks(const Plan& plan) {
      return masked(kMode) ? static_cast<size_t>(R) * MaskTile<Sim>::row_bytes(plan.tile) : 0;
    }
    static EMU_MEMBER size_t team(const Plan& plan) {
      return masks(plan) + (16 + static_cast<size_t>(plan.team_threads)) * sizeof(Real);
    }
    static EMU_MEMBER size_t join(const Plan& plan) {
      if (kPass == Pass::kScores || plan.teams == 1) return 0;
      return (32 + static_cast<size_t>(A::kCount) * H * plan.tile) * sizeof(Real);
    }
    static EMU_MEMBER size_t block(const Plan& plan) {
      const size_t loop = team(plan) * static_cast<size_t>(plan.teams), end = join(plan);
      return loop > end ? loop : end;
    }
  };

  const QueryMajorArgs& a;
  const Problem& p;
  const Plan& plan;
  const Team team;
  const int64_t b, split;
  MaskTile<Sim> tile;
  Real *const shares, *const scratch;
  unsigned char* const shared;

  Columns<Sim, T, V> at;
  const T* positive_row;
  bool positive_bad;
  Real positive[H][V];        // z⁺, if candidates are mixed with it
  Real positive_term[H][V];   // its terms, if those are selected
  Rates<Sim, T, V> rates;     // for moments
  Real from_positive[kSums];  // Σ_j ρ_j p_j, for moments
  Chunk<T, V> rows[R][H];
  uint32_t words[R][H][S::kWords];
  Real acc[A::kCount][H][V];

  EMU_DEVICE QueryMajor(const QueryMajorArgs& args, unsigned char* memory)
      : a(args),
        p(args.p),
        plan(args.plan),
        team(plan.team_threads),
        b(blockIdx.x / plan.splits),
        split(blockIdx.x % plan.splits),
        tile(p, plan.tile, memory + team.index * Memory::team(plan)),
        shares(reinterpret_cast<Real*>(tile.bytes + Memory::masks(plan))),
        scratch(shares + 16),
        shared(memory) {}

  EMU_DEVICE void load_columns(int c0) {
    at.load(p, plan, b, c0 + team.at * V);
    if constexpr (masked(kMode)) tile.move_to(team, c0);
    if constexpr (kMutated) {
#pragma unroll
      for (int h = 0; h < H; ++h) {
        const Chunk<T, V> z = load_row<T, V>(positive_row, h * plan.half, at.j, at.end, plan.width);
#pragma unroll
        for (int i = 0; i < V; ++i) positive[h][i] = z.at(i);
      }
    }
    if constexpr (kMode == Mode::kSelect) {
      select_terms<0>(positive_term[0]);
      if constexpr (H > 1) select_terms<H - 1>(positive_term[H - 1]);
    }
    if constexpr (kMoments) {
      rates.load(p, plan, b, at.j, plan.whole_reals);
      if constexpr (Sim::kCoupled) {
#pragma unroll
        for (int i = 0; i < V; ++i) rates.own_term[0][i] = coupled_term(i, positive[0][i], positive[1][i]);
      } else {
        select_terms<0>(rates.own_term[0]);
        if constexpr (H > 1) select_terms<H - 1>(rates.own_term[H - 1]);
      }
    }
  }
  template <int h>
  EMU_DEVICE void select_terms(Real (&to)[V]) const {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      to[i] = Sim::template term<h, M>(difference<Sim, h>(at.query[h][i], at.factor[h][i], positive[h][i]));
    }
  }
  EMU_DEVICE Real coupled_term(int i, Real c0, Real c1) const {
    return Sim::template term<M>(difference<Sim, 0>(at.query[0][i], at.factor[0][i], c0),
                                 difference<Sim, 0>(at.query[1][i], at.factor[1][i], c1));
  }

  EMU_DEVICE Real mix(int r, int h, int i, Real c) const {
    if constexpr (kMode == Mode::kShare) return positive[h][i] + multiply(shares[r], subtract(c, positive[h][i]));
    return is_mutated(r, h, i) ? positive[h][i] : c;
  }
  EMU_DEVICE bool is_mutated(int r, int h, int i) const { return tile.limit.mutated(words[r][h][i / 4], i % 4); }

  // --- sums ------------------------------------------------------------------------------------------------

  template <int h>
  EMU_DEVICE void add_terms(Real (&part)[kValues]) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      Real plain = 0, mutated = 0;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const Real q = at.query[h][i], f = at.factor[h][i], c = rows[r][h].at(i);
        const Real term = Sim::template term<h, M>(difference<Sim, h>(q, f, c));
        plain += term;
        if constexpr (kMoments) add_moments(part, r, h, i, term);
        if constexpr (kMode == Mode::kSelect) mutated += is_mutated(r, h, i) ? positive_term[h][i] : term;
        if constexpr (kMode == Mode::kShare) {
          mutated += Sim::template term<h, M>(difference<Sim, h>(q, f, mix(r, h, i, c)));
        }
      }
      part[h * kKinds * R + r] += plain;
      if (kDrawn) part[(h * kKinds + 1) * R % kValues + r] += mutated;
    }
  }
  EMU_DEVICE void add_moments(Real (&part)[kValues], int r, int s, int i, Real term) const {
    const Real gap = term - rates.own_term[s][i];
    part[(s * kKinds + 1) * R % kValues + r] += rates.keep[s][i] * term;
    part[(s * kKinds + 2) * R % kValues + r] += rates.spread[s][i] * gap * gap;
  }
  EMU_DEVICE void add_coupled_terms(Real (&part)[kValues]) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        if constexpr (kMoments) {
          const Real term = coupled_term(i, rows[r][0].at(i), rows[r][1].at(i));
          part[r] += term;
          add_moments(part, r, 0, i, term);
        } else {
          Real u[2], mixed[2];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const Real q = at.query[h][i], f = at.factor[h][i], c = rows[r][h].at(i);
            u[h] = difference<Sim, 0>(q, f, c);
            if (kMutated) mixed[h] = difference<Sim, 0>(q, f, mix(r, h, i, c));
          }
          part[r] += Sim::template term<M>(u[0], u[1]);
          if (kMutated) part[R % kValues + r] += Sim::template term<M>(mixed[0], mixed[1]);
        }
      }
    }
  }

  // From a sum to its value (minus the root, if there is one) and the score's derivative by the sum (for a root, minus
  // that by half of the sum).
  EMU_DEVICE void finish_value(int s, Real& value, Real& derivative) const {
    derivative = Sim::kWeights > 0 && p.weights != nullptr ? static_cast<const Real*>(p.weights)[s] : Real{1};
    if (Sim::root(Sim::kCoupled ? 0 : s)) {
      const Real inverse = M::inverse_root(value);
      value = -(value * inverse);
      derivative *= inverse;
    }
  }
  EMU_DEVICE Real weight_of(int s) const {
    return Sim::kWeights > 0 && p.weights != nullptr ? static_cast<const Real*>(p.weights)[s] : Real{1};
  }

  // The same for a lane's kind with moments. The score of lanes of M and of V is the cumulant, with its derivatives;
  // they keep those of the mean too.
  struct LaneMoments {
    Real value[kSums], derivative[kSums], of_mean[kSums], score, mean;
  };
  EMU_DEVICE LaneMoments finish_moments(Real sum, int kind, int r, bool bad) const {
    LaneMoments lane{};
    Real plain_score = 0;
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      Real plain = from_lane(sum, (s * kKinds * R + r) * kLanes);
      Real m = from_lane(sum, ((s * kKinds + 1) * R + r) * kLanes) + from_positive[s];
      const Real v = from_lane(sum, ((s * kKinds + 2) * R + r) * kLanes), w = weight_of(s);
      finish_value(s, plain, lane.derivative[s]);
      if (bad) plain = m = static_cast<Real>(NAN);
      plain_score += w * plain;
      const Moments<Real> of = moments_of<Sim>(s, m, v);
      const Real half = w * w * static_cast<Real>(0.5);
      lane.mean += w * of.mean;
      lane.score += w * of.mean + half * of.variance;
      lane.value[s] = kind == 0 ? plain : kind == 1 ? m : v;
      if (kind == 0) continue;
      lane.of_mean[s] = w * (kind == 1 ? of.mean_by_m : of.mean_by_v);
      lane.derivative[s] = lane.of_mean[s] + half * (kind == 1 ? of.variance_by_m : of.variance_by_v);
    }
    if (kind == 0) lane.score = plain_score;
    return lane;
  }

  // s⁺, from all components. Tiles are taken in reverse, so that the first one's columns stay loaded.
  EMU_DEVICE Real score_positive() {
    constexpr int kOf = kMoments ? 4 : 2;
    Real sums[kOf] = {};  // the second is for hake only; with moments the next two are each sum's part of M
    for (int tile_at = kOneTile ? 0 : plan.tiles() - 1; tile_at >= 0; --tile_at) {
      load_columns(tile_at * plan.tile);
      Real z[H][V];
#pragma unroll
      for (int h = 0; h < H; ++h) {
        const Chunk<T, V> row = load_row<T, V>(positive_row, h * plan.half, at.j, at.end, plan.width);
#pragma unroll
        for (int i = 0; i < V; ++i) z[h][i] = row.at(i);
      }
#pragma unroll
      for (int i = 0; i < V; ++i) {
        if constexpr (Sim::kCoupled) {
          sums[0] += Sim::template term<M>(difference<Sim, 0>(at.query[0][i], at.factor[0][i], z[0][i]),
                                           difference<Sim, 0>(at.query[1][i], at.factor[1][i], z[1][i]));
        } else {
          sums[0] += Sim::template term<0, M>(difference<Sim, 0>(at.query[0][i], at.factor[0][i], z[0][i]));
          if constexpr (H > 1) {
            sums[1] += Sim::template term<1, M>(difference<Sim, 1>(at.query[1][i], at.factor[1][i], z[1][i]));
          }
        }
        if constexpr (kMoments) {
#pragma unroll
          for (int s = 0; s < kSums; ++s) sums[2 + s] += (1 - rates.keep[s][i]) * rates.own_term[s][i];
        }
      }
    }
    const Real sum = team_sums(team, sums, scratch);  // the first is in a warp's lower half, or its lowest quarter
    if constexpr (kMoments) {
#pragma unroll
      for (int s = 0; s < kSums; ++s) from_positive[s] = from_lane(sum, (2 + s) * kWarp / kOf);
    }
    Real score = 0;
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      Real value = from_lane(sum, s * kWarp / kOf), derivative;
      finish_value(s, value, derivative);
      if (positive_bad) value = static_cast<Real>(NAN);
      score += weight_of(s) * value;
      if (a.positive_value != nullptr && split == 0 && threadIdx.x == 0) {
        static_cast<Real*>(a.positive_value)[s * p.B + b] = value;
      }
    }
    if (a.positive_score != nullptr && split == 0 && threadIdx.x == 0) {
      static_cast<Real*>(a.positive_score)[b] = score;
    }
    return score;
  }

  // --- gradients -------------------------------------------------------------------------------------------

  // The weights of a term: the negative's, the mutated negative's, and that of the mutated one's label. With moments
  // the last two are for M, and there are two for V.
  struct Weights {
    Real plain[kSums], mutated[kSums], label[kSums], variance[kSums], variance_label[kSums];
  };

  // With moments, what replaces the weights of the mutated negative's term and of its label. Adds to the positive's
  // share.
  template <int s>
  EMU_DEVICE void spread_weights(int i, const Weights& w, Real term, Real& mutated, Real& label) {
    const Real gap = term - rates.own_term[s][i], keep = rates.keep[s][i], spread = rates.spread[s][i];
    const Real pull = w.variance[s] * gap;
    mutated = spread * pull + keep * w.mutated[s];
    label = keep * w.label[s];
    acc[A::kShare][s][i] += pull;
    if constexpr (A::kShareWays > 1 && Sim::root(s)) {
      const Real label_pull = w.variance_label[s] * gap;
      label += spread * label_pull;
      acc[A::kShare + 1][s][i] += label_pull;
    }
  }
  // Adds to the gradient of the rates of sum s: ŵ (p − t) + v (1/2 − ρ) (t − p)².
  template <int s>
  EMU_DEVICE void add_rates(int r, const Weights& w) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      Real term;
      if constexpr (Sim::kCoupled) {
        term = coupled_term(i, rows[r][0].at(i), rows[r][H - 1].at(i));
      } else {
        term = Sim::template term<s, M>(difference<Sim, s>(at.query[s][i], at.factor[s][i], rows[r][s].at(i)));
      }
      const Real gap = term - rates.own_term[s][i], by_square = rates.keep[s][i] - static_cast<Real>(0.5);
      acc[A::kRate][s][i] += gap * (by_square * (w.variance[s] * gap) - w.mutated[s]);
    }
  }

  template <int h>
  EMU_DEVICE void accumulate(int r, const Weights& w) {
    constexpr int s = Sim::kCoupled ? 0 : h;
    constexpr bool kScaledHalf = A::kFactors && Sim::factor(h) == Factor::kScale;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const Real q = at.query[h][i], f = at.factor[h][i], c = rows[r][h].at(i);
      Real slope = c;
      if constexpr (!Sim::kBilinear) slope = Sim::template slope<h, M>(difference<Sim, h>(q, f, c));
      if constexpr (kMoments) {
        Real mutated, label;
        spread_weights<s>(i, w, Sim::template term<h, M>(difference<Sim, h>(q, f, c)), mutated, label);
        add_spread<h, kScaledHalf>(i, w.plain[s], mutated, label, slope, c);
        continue;
      }
      add_gradient<h, kScaledHalf>(i, w.plain[s], slope, c);
      if constexpr (kMode == Mode::kSelect) {
        if (is_mutated(r, h, i)) {
          add_share<h>(i, w.mutated[s], w.label[s], Real{1});
        } else {
          add_mutated<h, kScaledHalf>(i, w.mutated[s], w.label[s], slope, c);
        }
      }
      if constexpr (kMode == Mode::kShare) {
        const Real mixed = mix(r, h, i, c), rest = 1 - shares[r];
        Real mixed_slope = mixed;
        if constexpr (!Sim::kBilinear) mixed_slope = Sim::template slope<h, M>(difference<Sim, h>(q, f, mixed));
        add_mutated<h, kScaledHalf>(i, w.mutated[s], w.label[s], mixed_slope, mixed);
        add_share<h>(i, w.mutated[s] * rest, w.label[s] * rest, Sim::kBilinear ? q : f * mixed_slope);
      }
    }
  }
  EMU_DEVICE void accumulate_coupled(int r, const Weights& w) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      Real u[2], mixed[2], slope[2], mixed_slope[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const Real q = at.query[h][i], f = at.factor[h][i], c = rows[r][h].at(i);
        u[h] = difference<Sim, 0>(q, f, c);
        if (kDrawn) mixed[h] = difference<Sim, 0>(q, f, mix(r, h, i, c));
      }
      if constexpr (kMoments) {
        const Real square = u[0] * u[0] + u[1] * u[1], inverse = Sim::template inverse<M>(square);
        Real mutated, label;
        spread_weights<0>(i, w, Sim::value(square, inverse), mutated, label);
        add_spread<0, false>(i, w.plain[0], mutated, label, u[0] * inverse, Real{0});
        add_spread<1, false>(i, w.plain[0], mutated, label, u[1] * inverse, Real{0});
        continue;
      }
      Sim::template slopes<M>(u[0], u[1], slope[0], slope[1]);
      if (kMutated) Sim::template slopes<M>(mixed[0], mixed[1], mixed_slope[0], mixed_slope[1]);
      couple<0>(r, i, w, slope, mixed_slope);
      couple<1>(r, i, w, slope, mixed_slope);
    }
  }
  template <int h>
  EMU_DEVICE void couple(int r, int i, const Weights& w, const Real (&slope)[2], const Real (&mixed_slope)[2]) {
    add_gradient<h, false>(i, w.plain[0], slope[h], Real{0});
    if constexpr (kMutated) {
      add_mutated<h, false>(i, w.mutated[0], w.label[0], mixed_slope[h], Real{0});
      Real rest;
      if constexpr (kMode == Mode::kShare) {
        rest = 1 - shares[r];
      } else {
        rest = is_mutated(r, h, i) ? 1 : 0;
      }
      add_share<h>(i, w.mutated[0] * rest, w.label[0] * rest, mixed_slope[h]);
    }
  }

  template <int h, bool kScaledHalf>
  EMU_DEVICE void add_gradient(int i, Real w, Real slope, Real c) {
    acc[A::kQuery][h][i] += w * slope;
    if constexpr (kScaledHalf) acc[A::kFactor][h][i] += w * (slope * c);
  }
  template <int h, bool kScaledHalf>
  EMU_DEVICE void add_mutated(int i, Real w, Real label, Real slope, Real c) {
    constexpr int way = A::kWays > 1 ? 1 : 0;
    acc[A::kQuery + way][h][i] += w * slope;
    if constexpr (kScaledHalf) acc[A::kFactor + way][h][i] += w * (slope * c);
    if constexpr (A::kWays > 1) {
      acc[A::kQuery + 2][h][i] += label * slope;
      if constexpr (kScaledHalf) acc[A::kFactor + 2][h][i] += label * (slope * c);
    }
  }
  template <int h, bool kScaledHalf>
  EMU_DEVICE void add_spread(int i, Real w, Real mutated, Real label, Real slope, Real c) {
    if constexpr (A::kWays > 1) {
      add_gradient<h, kScaledHalf>(i, w, slope, c);
      add_mutated<h, kScaledHalf>(i, mutated, label, slope, c);
    } else {
      add_gradient<h, kScaledHalf>(i, w + mutated, slope, c);
    }
  }
  template <int h>
  EMU_DEVICE void add_share(int i, Real w, Real label, Real derivative) {
    acc[A::kShare][h][i] += w * derivative;
    if constexpr (A::kShareWays > 1) acc[A::kShare + 1][h][i] += label * derivative;
  }

  EMU_DEVICE void rescale(Real plain, Real mutated) {
    if (plain != 1) scale_way(0, plain);
    if constexpr (A::kWays > 1) {
      if (mutated != 1) {
        scale_way(1, mutated);
        scale_array(A::kShare, mutated);
      }
    }
  }
  EMU_DEVICE void scale_way(int way, Real by) {
    scale_array(A::kQuery + way, by);
    if constexpr (A::kFactors) scale_array(A::kFactor + way, by);
  }
  EMU_DEVICE void scale_array(int array, Real by) {
#pragma unroll
    for (int h = 0; h < H; ++h) {
#pragma unroll
      for (int i = 0; i < V; ++i) acc[array][h][i] *= by;
    }
  }

  // --- the pass --------------------------------------------------------------------------------------------

  EMU_DEVICE void run() {
    if constexpr (kDrawn) tile.seed.load(p.draws);
    positive_row = find_row<T>(p, p.positive[b], 0, positive_bad);
    const int first_tile = kPass == Pass::kWeighted ? static_cast<int>(blockIdx.y) : 0;
    const int last_tile = kOneTile ? first_tile + 1 : plan.tiles();
    const bool one_tile = kOneTile || plan.tiles() == 1;
    Real highest = 0;  // the highest score so far of this lane's kind
    if constexpr (kPass == Pass::kWeighted) {
      load_columns(first_tile * plan.tile);
    } else {
      highest = score_positive();
      if (kPass == Pass::kOnline && a.positive_log_q != nullptr) {
        highest -= static_cast<const Real*>(a.positive_log_q)[b];
      }
    }
    if constexpr (kPass != Pass::kScores) {
#pragma unroll
      for (int array = 0; array < A::kCount; ++array) scale_to_zero(array);
    }

    const int lane_value = team.lane / kLanes;
    const int lane_r = lane_value % R, lane_kind = lane_value / R % kKinds, lane_sum = lane_value / (R * kKinds);
    const int64_t group = p.rows_per_group() > 0 ? b / p.rows_per_group() : 0;
    const int64_t* ids = p.negative + group * p.K;
    const uint32_t K = static_cast<uint32_t>(p.K);
    const int64_t groups = (p.K + R - 1) / R;
    const uint32_t end = static_cast<uint32_t>(groups * (split + 1) / plan.splits) * R;
    const uint32_t first = static_cast<uint32_t>(groups * split / plan.splits) + static_cast<uint32_t>(team.index);
    const uint32_t step = static_cast<uint32_t>(team.count) * R;
    for (uint32_t k0 = first * R; k0 < end; k0 += step) {
      // All ids are loaded before any is checked: the store that reports a bad one is volatile, and loads would wait.
      int64_t id[R];
#pragma unroll
      for (int r = 0; r < R; ++r) id[r] = k0 + r < K ? ids[k0 + r] : -1;
      const T* from[R];
      unsigned real = 0, bad = 0;  // a bit for each row
#pragma unroll
      for (int r = 0; r < R; ++r) {
        bool out_of_range;
        from[r] = find_row<T>(p, id[r], 1, out_of_range);
        bad |= static_cast<unsigned>(out_of_range) << r;
        real |= static_cast<unsigned>(from[r] != nullptr) << r;
      }
      if (!kDrawn && !team.one_warp()) team.sync();  // before the scratch is used for the next sums
      Real part[kValues] = {};
      for (int tile_at = first_tile; tile_at < last_tile; ++tile_at) {
        if (!one_tile) load_columns(tile_at * plan.tile);
        load_rows(from);
        if constexpr (kDrawn) {
          // The whole team must have read the last masks before new ones are drawn. This synchronises it, unless
          // something else has since.
          if (kPass == Pass::kWeighted || kMode == Mode::kShare || !one_tile || team.one_warp()) team.sync();
          const uint32_t row = p.draws.row_offset + static_cast<uint32_t>(b);
          if constexpr (kMode == Mode::kShare) {
            if (team.at < R) {
              shares[team.at] = draw_share<Real>(p.draws, tile.seed, k0 + static_cast<uint32_t>(team.at), row);
            }
          } else {
            tile.draw(R, [&](int r, uint32_t& k, uint32_t& of_row) {
              k = k0 + static_cast<uint32_t>(r), of_row = row;
              return true;
            });
          }
          team.sync();
          if constexpr (masked(kMode)) {
#pragma unroll
            for (int r = 0; r < R; ++r) {
#pragma unroll
              for (int h = 0; h < H; ++h) tile.template load<V>(r, h, at.j, words[r][h]);
            }
          }
        }
        if constexpr (kPass != Pass::kWeighted) {
          if constexpr (Sim::kCoupled) {
            add_coupled_terms(part);
          } else {
            add_terms<0>(part);
            if constexpr (H > 1) add_terms<H - 1>(part);
          }
        }
      }
      if constexpr (kPass == Pass::kWeighted) {
#pragma unroll
        for (int r = 0; r < R; ++r) {
          Weights w{};
          if (real >> r & 1) {
#pragma unroll
            for (int s = 0; s < kSums; ++s) {
              const int64_t of = (s * p.B + b) * p.K + k0 + r;
              w.plain[s] = static_cast<const Real*>(a.weight)[of];
              if (kMutated) w.mutated[s] = static_cast<const Real*>(a.mutated_weight)[of];
              if (kMoments) w.variance[s] = static_cast<const Real*>(a.variance_weight)[of];
            }
          }
          accumulate_row(r, w);
        }
      } else {
        const Real sum = team_sums(team, part, scratch);
        const bool lane_real = real >> lane_r & 1;
        Real value[kSums], derivative[kSums], score = 0;
        LaneMoments lane{};
        if constexpr (kMoments) {
          lane = finish_moments(sum, lane_kind, lane_r, bad >> lane_r & 1);
          score = lane.score;
        }
#pragma unroll
        for (int s = 0; s < kSums; ++s) {
          if constexpr (kMoments) {
            value[s] = lane.value[s], derivative[s] = lane.derivative[s];
            continue;
          }
          value[s] = kSums == 1 ? sum : from_lane(sum, ((s * kKinds + lane_kind) * R + lane_r) * kLanes);
          finish_value(s, value[s], derivative[s]);
          if (bad >> lane_r & 1) value[s] = static_cast<Real>(NAN);
          score += weight_of(s) * value[s];
        }
        keep_values(k0 + lane_r, lane_kind, lane_sum, lane_real || (bad >> lane_r & 1), value,
                    kMoments && lane_kind == 1 ? lane.mean : score);
        if constexpr (kPass == Pass::kOnline) {
          if (a.negative_log_q != nullptr && lane_real) {
            score -= static_cast<const Real*>(a.negative_log_q)[group * p.K + k0 + lane_r];
          }
          Real most = lane_real && score > highest ? score : highest;
#pragma unroll
          for (int distance = kLanes; distance < kLanes * R; distance *= 2) {
            const Real other = from_partner(most, distance);
            most = other > most ? other : most;
          }
          const Real fall = highest == most ? Real{1} : M::exp(highest - most);
          highest = most;
          Real own = derivative[0];
#pragma unroll
          for (int s = 1; s < kSums; ++s) own = lane_sum == s ? derivative[s] : own;
          Real of_label = own;
          if constexpr (kMoments) {
            of_label = lane.of_mean[0];
#pragma unroll
            for (int s = 1; s < kSums; ++s) of_label = lane_sum == s ? lane.of_mean[s] : of_label;
          }
          const Real label = lane_real ? of_label : Real{0};
          const Real power = lane_real ? own * M::exp(score - most) : Real{0};
          rescale(from_lane(fall, 0), kMutated ? from_lane(fall, R * kLanes % kWarp) : Real{1});
#pragma unroll
          for (int r = 0; r < R; ++r) {
#pragma unroll
            for (int h = 0; h < H; ++h) {
              rows[r][h].forget();
              if constexpr (masked(kMode)) {
#pragma unroll
                for (uint32_t& word : words[r][h]) forget(word);
              }
            }
            Weights w{};
#pragma unroll
            for (int s = 0; s < kSums; ++s) {
              w.plain[s] = from_lane(power, (s * kKinds * R + r) * kLanes);
              if constexpr (kMutated) {
                const int lane = ((s * kKinds + 1) * R + r) * kLanes;
                w.mutated[s] = from_lane(power, lane);
                w.label[s] = kDirect ? static_cast<Real>(real >> r & 1) : from_lane(label, lane);
              }
              if constexpr (kMoments) {
                const int lane = ((s * kKinds + 2) * R + r) * kLanes;
                w.variance[s] = kDirect ? w.mutated[s] : from_lane(power, lane);
                if (A::kShareWays > 1) w.variance_label[s] = from_lane(label, lane);
              }
            }
            accumulate_row(r, w);
          }
        }
      }
    }
    if constexpr (kPass != Pass::kScores) finish(highest);
  }

  // Loads all rows with one branch on their width.
  EMU_DEVICE void load_rows(const T* const (&from)[R]) {
    if (plan.width == Width::kWhole) {
      load_rows_of<Width::kWhole>(from);
    } else if (plan.width == Width::kHalves) {
      load_rows_of<Width::kHalves>(from);
    } else {
      load_rows_of<Width::kElements>(from);
    }
  }
  template <Width kWidth>
  EMU_DEVICE void load_rows_of(const T* const (&from)[R]) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int h = 0; h < H; ++h) rows[r][h] = load_row<T, V>(from[r], h * plan.half, at.j, at.end, kWidth);
    }
  }

  EMU_DEVICE void scale_to_zero(int array) {
#pragma unroll
    for (int h = 0; h < H; ++h) {
#pragma unroll
      for (int i = 0; i < V; ++i) acc[array][h][i] = 0;
    }
  }

  EMU_DEVICE void accumulate_row(int r, const Weights& w) {
    if constexpr (Sim::kCoupled) {
      accumulate_coupled(r, w);
    } else {
      accumulate<0>(r, w);
      if constexpr (H > 1) accumulate<H - 1>(r, w);
    }
    if constexpr (A::kRates) {
      if (!p.draws.learned) return;
      add_rates<0>(r, w);
      if constexpr (kSums > 1) add_rates<kSums - 1>(r, w);
    }
  }

  // Writes this lane's value (of one row, kind and sum) and its row's score.
  EMU_DEVICE void keep_values(int64_t k, int kind, int sum, bool counts, const Real (&value)[kSums], Real score) {
    if (k >= p.K || team.at >= kWarp || team.lane % kLanes != 0) return;
    Real own = value[0];
#pragma unroll
    for (int s = 1; s < kSums; ++s) own = sum == s ? value[s] : own;
    if (kMoments && kind == 3) return;
    Real* values = static_cast<Real*>(kind == 0 ? a.value : kMoments && kind == 2 ? a.variance : a.mutated_value);
    if (values != nullptr) values[(sum * p.B + b) * p.K + k] = counts ? own : Real{0};
    Real* scores = static_cast<Real*>(kind == 0 ? a.score : kMoments && kind == 2 ? a.cumulant : a.mutated_score);
    if (scores != nullptr && sum == 0) scores[b * p.K + k] = counts ? score : -static_cast<Real>(INFINITY);
  }

  // Joins the teams' sums in order and keeps them.
  EMU_DEVICE void finish(Real highest) {
    Real* const of_teams = reinterpret_cast<Real*>(shared);  // (teams, 2)
    Real* const joined = of_teams + 32;                      // (arrays, H, V, threads of a team)
    Real high[2] = {from_lane(highest, 0), kMutated ? from_lane(highest, R * kLanes % kWarp) : Real{0}};
    if (plan.teams > 1) {
      __syncthreads();
      if (kPass == Pass::kOnline) {
        if (team.at == 0) of_teams[2 * team.index] = high[0], of_teams[2 * team.index + 1] = high[1];
        __syncthreads();
        Real all[2] = {of_teams[0], of_teams[1]};
        for (int t = 1; t < plan.teams; ++t) {
#pragma unroll
          for (int kind = 0; kind < 2; ++kind) {
            all[kind] = of_teams[2 * t + kind] > all[kind] ? of_teams[2 * t + kind] : all[kind];
          }
        }
        rescale(high[0] == all[0] ? Real{1} : M::exp(high[0] - all[0]),
                high[1] == all[1] ? Real{1} : M::exp(high[1] - all[1]));
        high[0] = all[0], high[1] = all[1];
      }
      for (int t = 0; t < plan.teams; ++t) {
        if (t == team.index) {
#pragma unroll
          for (int array = 0; array < A::kCount; ++array) {
#pragma unroll
            for (int h = 0; h < H; ++h) {
#pragma unroll
              for (int i = 0; i < V; ++i) {
                Real* const to = joined + ((array * H + h) * V + i) * team.threads + team.at;
                if (t > 0) acc[array][h][i] += *to;
                *to = acc[array][h][i];
              }
            }
          }
        }
        __syncthreads();
      }
    }
    // The last team has the sums of all.
    if (team.index != plan.teams - 1) return;
    if (kPass == Pass::kOnline && team.at == 0) {
      Real* const to = static_cast<Real*>(a.highest) + (b * plan.splits + split) * 2;
      to[0] = high[0], to[1] = high[1];
    }
    Real* const to = static_cast<Real*>(a.sums) + (b * plan.splits + split) * A::kCount * p.D;
#pragma unroll
    for (int array = 0; array < A::kCount; ++array) {
#pragma unroll
      for (int h = 0; h < H; ++h) {
        store_reals<V>(to + array * p.D + h * plan.half, at.j, at.end, plan.whole_reals, acc[array][h]);
      }
    }
  }
};

template <class Sim, class T, Mode kMode, Pass kPass>
__global__ void __launch_bounds__(kMostTeamThreads, QueryMajor<Sim, T, kMode, kPass>::kBlocks)
    query_major(const __grid_constant__ QueryMajorArgs args) {
  EMU_SHARED_MEMORY(shared);
  QueryMajor<Sim, T, kMode, kPass>(args, shared).run();
}

}  // namespace emu::cuda
