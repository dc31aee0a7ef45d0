// What is computed for a row after its pass over the negatives: softmax, loss, weights of sums, last gradient steps.
#pragma once

#include "cuda/query_major.cuh"

namespace emu::cuda {

constexpr int kRowThreads = 128;
constexpr int kRowBlocks = 8;  // per SM, of row_loss: leaves it 64 registers, whereas ptxas by itself chose to spill

// What a row's gradients need from its softmax: the factors α/Σe, mass/Σê and β/K, with mass = (1 + βK)/K; the maxima
// that e and ê are relative to; the weights of the positive's sums.
template <class Real>
struct RowState {
  Real plain, mutated, label, highest, mutated_highest, positive_weight[2];
  Real taken[2];  // with moments: Σ_k of the weights of each sum's M
};

template <class Sim, class Real>
struct RowValues {
  static constexpr int kSums = Sums<Sim>::kCount;
  const Problem& p;
  int64_t b;
  const int64_t* ids;

  EMU_DEVICE RowValues(const Problem& problem, int64_t row)
      : p(problem),
        b(row),
        ids(problem.negative + (problem.rows_per_group() > 0 ? row / problem.rows_per_group() : 0) * problem.K) {}

  EMU_DEVICE bool counts(int64_t k) const { return ids[k] != -1; }  // an id out of range counts too, as NaN
  EMU_DEVICE Real weight(int s) const {
    return Sim::kWeights > 0 && p.weights != nullptr ? static_cast<const Real*>(p.weights)[s] : Real{1};
  }
  // The score's derivative by a sum (for a root, minus that by half of the sum), from the sum's value.
  EMU_DEVICE Real derivative(int s, Real value) const {
    if (!Sim::root(Sim::kCoupled ? 0 : s)) return weight(s);
    return value == 0 ? Real{0} : -weight(s) / value;
  }
  EMU_DEVICE int64_t at(int s, int64_t k) const { return (s * p.B + b) * p.K + k; }
  EMU_DEVICE Real score(const void* values, int64_t k) const {
    Real sum = 0;
#pragma unroll
    for (int s = 0; s < kSums; ++s) sum += weight(s) * static_cast<const Real*>(values)[at(s, k)];
    return sum;
  }
  // A mutated score's mean and cumulant, from its sums' M and V.
  struct Expectation {
    Real mean, cumulant;
  };
  EMU_DEVICE Expectation expectation(const void* means, const void* variances, int64_t k) const {
    Expectation e{};
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      const Real w = weight(s);
      const Moments<Real> of =
          moments_of<Sim>(s, static_cast<const Real*>(means)[at(s, k)], static_cast<const Real*>(variances)[at(s, k)]);
      e.mean += w * of.mean;
      e.cumulant += w * of.mean + w * w * of.variance * static_cast<Real>(0.5);
    }
    return e;
  }
  // Overwrites M and V by the weights of M and of V/2, from the derivatives by the mean (also through the cumulant,
  // which is a function of it) and by the cumulant. Adds to the gradient of w and to Σ_k of M's weights.
  EMU_DEVICE void weigh_moments(void* means, void* variances, int64_t k, Real of_mean, Real of_cumulant,
                                Real (&of_weights)[2], Real (&taken)[2]) const {
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      Real &m = static_cast<Real*>(means)[at(s, k)], &v = static_cast<Real*>(variances)[at(s, k)];
      const Moments<Real> of = Sums<Sim>::kDirect ? Moments<Real>{0, 0, 1, 0, 0, 2} : moments_of<Sim>(s, m, v);
      const Real w = weight(s), half = w * of_cumulant * static_cast<Real>(0.5);
      of_weights[s] += of_mean * of.mean + w * of_cumulant * of.variance;
      m = w * (of_mean * of.mean_by_m + half * of.variance_by_m);
      v = w * (of_mean * of.mean_by_v + half * of.variance_by_v);
      taken[s] += m;
    }
  }
  EMU_DEVICE Real positive_value(const void* values, int s) const {
    return static_cast<const Real*>(values)[s * p.B + b];
  }
  EMU_DEVICE Real positive_score(const void* values) const {
    Real sum = 0;
#pragma unroll
    for (int s = 0; s < kSums; ++s) sum += weight(s) * positive_value(values, s);
    return sum;
  }
};

struct RowLossArgs {
  Problem p;
  const void* positive_value;              // (S, B)
  void *value, *mutated_value, *variance;  // (S, B, K); with need_grad they become the weights of the sums;
                                           // mutated_value is M with moments, and variance V
  double beta, alpha;
  const void* coefficients;                     // (2,) or null
  const void *positive_log_q, *negative_log_q;  // those of LossArgs
  void *uls, *vanilla;                          // (B,) of L_emu and L_van
  void* state;                                  // (B,) RowState, if need_grad
  void* grad_weights;                           // (B, W) or null
  bool mutated, need_grad;
};

// Writes the gradient of a row's w, the total of its threads' sums.
template <class Sim, class Real>
EMU_DEVICE void keep_weights_gradient(const RowValues<Sim, Real>& row, Real (&sums)[2], Real* scratch, void* to) {
  if constexpr (Sim::kWeights > 0) {
    if (to == nullptr) return;
#pragma unroll
    for (int s = 0; s < Sim::kWeights; ++s) {
      const Real sum = block_sum(sums[s], scratch);
      if (threadIdx.x == 0) static_cast<Real*>(to)[row.b * Sim::kWeights + s] = sum;
    }
  }
}

// Keeps Σ_k of the weights of M, for the positive's gradient.
template <class Sim, class Real>
EMU_DEVICE void keep_taken(const RowValues<Sim, Real>& row, Real (&taken)[2], Real* scratch, void* states) {
#pragma unroll
  for (int s = 0; s < Sums<Sim>::kCount; ++s) {
    const Real sum = block_sum(taken[s], scratch);
    if (threadIdx.x == 0) static_cast<RowState<Real>*>(states)[row.b].taken[s] = sum;
  }
}

template <class Sim, class Real, bool kMoments>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks) row_loss(const __grid_constant__ RowLossArgs a) {
  using M = Maths<Real>;
  constexpr int kSums = Sums<Sim>::kCount;
  EMU_SHARED_MEMORY(shared);
  Real* const scratch = reinterpret_cast<Real*>(shared);
  const Problem& p = a.p;
  const RowValues<Sim, Real> row(p, blockIdx.x);
  const int64_t K = p.K;
  // Logits: scores minus log q.
  const Real* log_q =
      a.negative_log_q != nullptr ? static_cast<const Real*>(a.negative_log_q) + (row.ids - p.negative) : nullptr;
  const auto correct = [&](Real score, int64_t k) { return log_q != nullptr ? score - log_q[k] : score; };
  const auto plain_logit = [&](int64_t k) { return correct(row.score(a.value, k), k); };
  Real positive = row.positive_score(a.positive_value);
  if (a.positive_log_q != nullptr) positive -= static_cast<const Real*>(a.positive_log_q)[row.b];
  Real beta = static_cast<Real>(a.beta), alpha = static_cast<Real>(a.alpha);
  if (a.coefficients != nullptr) {
    beta = static_cast<const Real*>(a.coefficients)[0], alpha = static_cast<const Real*>(a.coefficients)[1];
  }
  const bool bad_coefficient = !(beta >= 0 && beta - beta == 0 && alpha >= 0 && alpha - alpha == 0);

  const auto in_softmax = [&](int64_t k) {
    if constexpr (kMoments) {
      return correct(row.expectation(a.mutated_value, a.variance, k).cumulant, k);
    } else {
      return correct(row.score(a.mutated_value, k), k);
    }
  };

  Real most = positive, mutated_most = positive, zero = positive * 0, real = 0;
  for (int64_t k = threadIdx.x; k < K; k += kRowThreads) {
    if (!row.counts(k)) continue;
    real += 1;
    const Real logit = plain_logit(k);
    zero += logit * 0;
    most = logit > most ? logit : most;
    if (!a.mutated) continue;
    const Real mutated = in_softmax(k);
    zero += mutated * 0;
    mutated_most = mutated > mutated_most ? mutated : mutated_most;
  }
  most = block_max(most, scratch);
  mutated_most = block_max(mutated_most, scratch);
  real = block_sum(real, scratch);
  const bool finite = block_sum(zero, scratch) == 0 && !bad_coefficient;

  Real sum = 0, mutated_sum = 0, gaps = 0;
  for (int64_t k = threadIdx.x; k < K; k += kRowThreads) {
    if (!row.counts(k)) continue;
    sum += M::exp(plain_logit(k) - most);
    if (!a.mutated) continue;
    if constexpr (kMoments) {
      const auto e = row.expectation(a.mutated_value, a.variance, k);
      mutated_sum += M::exp(correct(e.cumulant, k) - mutated_most);
      gaps += mutated_most - correct(e.mean, k);
      continue;
    }
    const Real gap = mutated_most - in_softmax(k);
    mutated_sum += M::exp(-gap);
    gaps += gap;
  }
  const Real own = M::exp(positive - most), mutated_own = M::exp(positive - mutated_most);
  sum = block_sum(sum, scratch) + own;
  mutated_sum = block_sum(mutated_sum, scratch) + mutated_own;
  gaps = block_sum(gaps, scratch);

  const Real nan = static_cast<Real>(NAN);
  const bool mutates = a.mutated && real > 0;
  const Real inverse = mutates ? 1 / real : Real{0}, mass = mutates ? inverse + beta : Real{0};  // (1 + βK)/K
  if (threadIdx.x == 0) {
    const Real log_sum = M::log(mutated_sum);
    const Real uls = ((mutated_most - positive) + log_sum) * inverse + beta * (gaps * inverse + log_sum);
    static_cast<Real*>(a.uls)[row.b] = !finite ? nan : mutates ? uls : Real{0};
    static_cast<Real*>(a.vanilla)[row.b] = finite ? (most - positive) + M::log(sum) : nan;
  }
  if (!a.need_grad) return;

  const Real plain_factor = finite ? alpha / sum : nan, mutated_factor = finite ? mass / mutated_sum : nan;
  const Real label = finite ? (mutates ? beta * inverse : Real{0}) : nan;
  Real positive_weight = alpha * (own / sum - 1);
  if (mutates) positive_weight += mass * (mutated_own / mutated_sum) - inverse;
  if (!finite) positive_weight = nan;

  Real of_weights[2] = {}, taken[2] = {};
  if (threadIdx.x == 0) {
    RowState<Real> state{plain_factor, mutated_factor, label, most, mutated_most, {}, {}};
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      const Real value = row.positive_value(a.positive_value, s);
      state.positive_weight[s] = positive_weight * row.derivative(s, value);
      of_weights[s] = positive_weight * value;
    }
    static_cast<RowState<Real>*>(a.state)[row.b] = state;
  }
  for (int64_t k = threadIdx.x; k < K; k += kRowThreads) {
    const bool counts = row.counts(k);
    const Real plain = counts ? plain_factor * M::exp(plain_logit(k) - most) : Real{0};
    const bool mutated_counts = counts && a.mutated;
    const Real in_mutated = mutated_counts ? mutated_factor * M::exp(in_softmax(k) - mutated_most) : Real{0};
    const Real mutated = mutated_counts ? in_mutated - label : Real{0};
    if constexpr (kMoments) {
      row.weigh_moments(a.mutated_value, a.variance, k, finite ? mutated : nan, in_mutated, of_weights, taken);
    }
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      const auto weigh = [&](void* values, Real of_score) {
        Real& value = static_cast<Real*>(values)[row.at(s, k)];
        of_weights[s] += of_score * value;
        value = finite ? of_score * row.derivative(s, value) : nan;
      };
      weigh(a.value, plain);
      if (!kMoments && a.mutated) weigh(a.mutated_value, mutated);
    }
  }
  if constexpr (kMoments) keep_taken(row, taken, scratch, a.state);
  keep_weights_gradient<Sim>(row, of_weights, scratch, a.grad_weights);
}

struct RowWeightsArgs {
  Problem p;
  const void* positive_value;                                               // (S, B), or null where scores are sums
  const void *positive_weight, *weight, *mutated_weight, *cumulant_weight;  // of scores: (B,), (B, K), ..
  void *value, *mutated_value, *variance;                                   // (S, B, K); become the weights of the sums
  void* state;                                                              // (B,) RowState
  void* grad_weights;                                                       // (B, W) or null
  bool mutated;
};

// From weights of scores to weights of sums. Padding has no gradient, whatever its upstream weight.
template <class Sim, class Real, bool kMoments>
__global__ void __launch_bounds__(kRowThreads) row_weights(const __grid_constant__ RowWeightsArgs a) {
  constexpr int kSums = Sums<Sim>::kCount;
  EMU_SHARED_MEMORY(shared);
  const RowValues<Sim, Real> row(a.p, blockIdx.x);
  const Real positive_weight = static_cast<const Real*>(a.positive_weight)[row.b];
  Real of_weights[2] = {}, taken[2] = {};
  if (threadIdx.x == 0) {
    RowState<Real> state{};
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      const Real value = Sums<Sim>::kDirect ? Real{0} : row.positive_value(a.positive_value, s);
      state.positive_weight[s] = positive_weight * row.derivative(s, value);
      of_weights[s] = positive_weight * value;
    }
    static_cast<RowState<Real>*>(a.state)[row.b] = state;
  }
  for (int64_t k = threadIdx.x; k < a.p.K; k += kRowThreads) {
    const bool real = row.ids[k] >= 0 && row.ids[k] < a.p.N;
    const auto weigh = [&](const void* of_scores, void* values) {
      const Real of_score = real ? static_cast<const Real*>(of_scores)[row.b * a.p.K + k] : Real{0};
#pragma unroll
      for (int s = 0; s < kSums; ++s) {
        Real& value = static_cast<Real*>(values)[row.at(s, k)];
        if (!Sums<Sim>::kDirect) of_weights[s] += real ? of_score * value : Real{0};
        value = real ? of_score * (Sums<Sim>::kDirect ? Real{1} : row.derivative(s, value)) : Real{0};
      }
    };
    weigh(a.weight, a.value);
    if constexpr (kMoments) {
      const int64_t of = row.b * a.p.K + k;
      const Real of_cumulant = static_cast<const Real*>(a.cumulant_weight)[of];
      const Real of_mean = static_cast<const Real*>(a.mutated_weight)[of] + of_cumulant;
      if (real) row.weigh_moments(a.mutated_value, a.variance, k, of_mean, of_cumulant, of_weights, taken);
#pragma unroll
      for (int s = 0; s < kSums && !real; ++s) {
        static_cast<Real*>(a.mutated_value)[row.at(s, k)] = static_cast<Real*>(a.variance)[row.at(s, k)] = 0;
      }
      continue;
    }
    if (a.mutated) weigh(a.mutated_weight, a.mutated_value);
  }
  if constexpr (kMoments) keep_taken(row, taken, reinterpret_cast<Real*>(shared), a.state);
  keep_weights_gradient<Sim>(row, of_weights, reinterpret_cast<Real*>(shared), a.grad_weights);
}

struct RowGradientArgs {
  Problem p;
  Plan plan;
  const void *sums, *highest, *state;  // see QueryMajorArgs and RowLossArgs
  void *grad_query, *grad_positive, *grad_scale, *grad_rate;
};

// Adds up the splits' sums in order, and the positive's own part; for kSelect and kMoments also its part in mutated
// negatives.
template <class Sim, class T, Mode kMode, Pass kPass>
__global__ void __launch_bounds__(kRowThreads) row_gradient(const __grid_constant__ RowGradientArgs a) {
  using Real = typename Sum<T>::Real;
  using M = Maths<Real>;
  using A = Arrays<Sim, kMode, kPass>;
  constexpr int H = Sim::kHalves;
  const Problem& p = a.p;
  const int64_t b = blockIdx.x;
  const RowState<Real> state = static_cast<const RowState<Real>*>(a.state)[b];
  bool bad;
  const T* positive_row = find_row<T>(p, p.positive[b], 0, bad);
  const Real nan = static_cast<Real>(NAN);

  for (int j = threadIdx.x; j < a.plan.half; j += kRowThreads) {
    Real query[H] = {}, share[H] = {}, factor[H] = {}, rate[H] = {};
    for (int split = 0; split < a.plan.splits; ++split) {
      Real ways[3] = {1, 0, 0};
      if constexpr (kPass == Pass::kOnline) {
        const Real* highest = static_cast<const Real*>(a.highest) + (b * a.plan.splits + split) * 2;
        ways[0] = state.plain * M::exp(highest[0] - state.highest);
        ways[1] = state.mutated * M::exp(highest[1] - state.mutated_highest);
        ways[2] = -state.label;
      }
      const Real* from = static_cast<const Real*>(a.sums) + (b * a.plan.splits + split) * A::kCount * p.D + j;
#pragma unroll
      for (int h = 0; h < H; ++h) {
        const Real* of_half = from + h * a.plan.half;
#pragma unroll
        for (int way = 0; way < A::kWays; ++way) {
          query[h] += ways[way] * of_half[(A::kQuery + way) * p.D];
          if (A::kFactors) factor[h] += ways[way] * of_half[(A::kFactor + way) % A::kCount * p.D];
        }
#pragma unroll
        for (int way = 0; way < A::kShareWays; ++way) {
          share[h] += ways[kPass == Pass::kOnline ? way + 1 : 0] * of_half[(A::kShare + way) % A::kCount * p.D];
        }
        if (A::kRates && a.grad_rate != nullptr) rate[h] += of_half[A::kRate % A::kCount * p.D];
      }
    }
    Columns<Sim, T, 1> at;
    at.load(p, a.plan, b, j, false);
    Rates<Sim, T, 1> rates;
    if constexpr (kMode == Mode::kMoments) rates.load(p, a.plan, b, j, false);
    Real c[H], slopes[2];
#pragma unroll
    for (int h = 0; h < H; ++h) c[h] = positive_row != nullptr ? widen(positive_row[h * a.plan.half + j]) : Real{0};
    if constexpr (Sim::kCoupled) {
      Sim::template slopes<M>(difference<Sim, 0>(at.query[0][0], at.factor[0][0], c[0]),
                              difference<Sim, 0>(at.query[1][0], at.factor[1][0], c[1]), slopes[0], slopes[1]);
    } else if constexpr (!Sim::kBilinear) {
      slopes[0] = Sim::template slope<0, M>(difference<Sim, 0>(at.query[0][0], at.factor[0][0], c[0]));
      if constexpr (H > 1) {
        slopes[1] = Sim::template slope<1, M>(difference<Sim, 1>(at.query[1][0], at.factor[1][0], c[1]));
      }
    }
#pragma unroll
    for (int h = 0; h < H; ++h) {
      const Real q = at.query[h][0], f = at.factor[h][0], own = state.positive_weight[Sim::kCoupled ? 0 : h];
      Real x = kMode == Mode::kSelect ? share[h] + own : own;
      if constexpr (kMode == Mode::kMoments) {
        constexpr int kLast = Sums<Sim>::kCount - 1;
        const int s = h < kLast ? h : kLast;
        x += (1 - rates.keep[s][0]) * state.taken[s] - rates.spread[s][0] * share[s];
        if (A::kRates && a.grad_rate != nullptr && h == s) {
          const Real sign = Sim::root(s) ? static_cast<Real>(-0.5) : Real{1};  // a root's weights are multiplied by −2
          static_cast<Real*>(a.grad_rate)[(b * (kLast + 1) + s) * a.plan.half + j] = bad ? nan : sign * rate[s];
        }
      }
      const Real slope = Sim::kBilinear ? c[h] : slopes[h];
      Real of_query = query[h] + x * slope, of_positive = Sim::kBilinear ? x * q : x * (f * slope);
      const Real of_factor = factor[h] + x * (slope * c[h]);
      if (!Sim::kBilinear) of_query = -of_query;
      if (Sim::factor(h) == Factor::kPhase) of_query *= f;
      if (kMode != Mode::kSelect && kMode != Mode::kMoments) of_positive += share[h];
      const int64_t to = b * p.D + h * a.plan.half + j;
      static_cast<Real*>(a.grad_query)[to] = bad ? nan : of_query;
      static_cast<Real*>(a.grad_positive)[to] = bad ? nan : of_positive;
      if (Sim::factor(h) == Factor::kScale && a.grad_scale != nullptr) {
        static_cast<Real*>(a.grad_scale)[b * a.plan.half + j] = bad ? nan : of_factor;
      }
    }
  }
}

struct ReduceArgs {
  int64_t B;
  const void *uls, *vanilla, *sample_weight;  // (B,)
  const void* coefficients;
  double alpha;
  Reduction reduction;
  bool mutated;
  void *loss, *terms, *row_scale;
};

constexpr int kReduceThreads = 1024;

// Uses one block, which always sums in the same order.
template <class Real>
__global__ void __launch_bounds__(kReduceThreads) reduce_rows(const __grid_constant__ ReduceArgs a) {
  EMU_SHARED_MEMORY(shared);
  double* const scratch = reinterpret_cast<double*>(shared);
  const Real* weights = static_cast<const Real*>(a.sample_weight);
  const Real* uls = static_cast<const Real*>(a.uls);
  const Real* vanilla = static_cast<const Real*>(a.vanilla);
  const Real alpha =
      a.coefficients != nullptr ? static_cast<const Real*>(a.coefficients)[1] : static_cast<Real>(a.alpha);
  double total = 0, total_weight = 0, total_uls = 0, total_vanilla = 0;
  for (int64_t b = threadIdx.x; b < a.B; b += blockDim.x) {
    const double w = weights != nullptr ? static_cast<double>(weights[b]) : 1.0;
    const Real row = a.mutated ? uls[b] + alpha * vanilla[b] : vanilla[b];
    if (a.reduction == Reduction::kNone) {
      static_cast<Real*>(a.loss)[b] = static_cast<Real>(w * static_cast<double>(row));
    }
    total += w * static_cast<double>(row);
    total_weight += w;
    total_uls += w * static_cast<double>(uls[b]);
    total_vanilla += w * static_cast<double>(vanilla[b]);
  }
  total = block_sum(total, scratch);
  total_weight = block_sum(total_weight, scratch);
  total_uls = block_sum(total_uls, scratch);
  total_vanilla = block_sum(total_vanilla, scratch);
  const double mean = total_weight == 0 ? 0.0 : 1.0 / total_weight;
  const double factor = a.reduction == Reduction::kMean ? mean : 1.0;
  if (threadIdx.x == 0) {
    if (a.reduction != Reduction::kNone) *static_cast<Real*>(a.loss) = static_cast<Real>(total * factor);
    static_cast<Real*>(a.terms)[0] = static_cast<Real>(total_uls * mean);
    static_cast<Real*>(a.terms)[1] = static_cast<Real>(total_vanilla * mean);
  }
  for (int64_t b = threadIdx.x; b < a.B; b += blockDim.x) {
    const double w = weights != nullptr ? static_cast<double>(weights[b]) : 1.0;
    static_cast<Real*>(a.row_scale)[b] = static_cast<Real>(w * factor);
  }
}

}  // namespace emu::cuda
