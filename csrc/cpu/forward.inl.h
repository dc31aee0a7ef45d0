// Query-major: the loss, the scores, and the gradients of query, scale, weights and positive.

template <class Real>
struct Softmax {
  Real max, sum, gaps;  // gaps = Σ_k (max − s_k) over real negatives
  Real log_sum() const { return static_cast<Real>(__builtin_log(static_cast<double>(sum))); }
};

template <class F>
EMU_INLINE typename F::V tail_load(const typename F::Real* from, int64_t count) {
  typename F::Real lanes[F::kLanes];
  for (int i = 0; i < F::kLanes; ++i) {
    lanes[i] = i < count ? from[i] : -static_cast<typename F::Real>(__builtin_inf());
  }
  return load<typename F::V>(lanes);
}

// Statistics of softmax(positive, scores); everything except padding is finite. Writes e^(s_k − max) to `powers`.
template <class F>
static Softmax<typename F::Real> softmax(typename F::Real positive, const typename F::Real* scores, int64_t count,
                                         typename F::Real* powers) {
  using Real = typename F::Real;
  using V = typename F::V;
  const Real none = -static_cast<Real>(__builtin_inf());
  V top = F::broadcast(positive);
  for (int64_t k = 0; k < count; k += F::kLanes) {
    const V s = count - k >= F::kLanes ? load<V>(scores + k) : tail_load<F>(scores + k, count - k);
    top = s > top ? s : top;
  }
  Real lanes[F::kLanes];
  store(lanes, top);
  Real max = positive;
  for (Real x : lanes) max = x > max ? x : max;
  const V max_v = F::broadcast(max), none_v = F::broadcast(none);
  V sum = {}, gaps = {};
  for (int64_t k = 0; k < count; k += F::kLanes) {
    const V s = count - k >= F::kLanes ? load<V>(scores + k) : tail_load<F>(scores + k, count - k);
    const V power = exp_nonpositive(s - max_v);
    sum += power;
    gaps += s == none_v ? V{} : max_v - s;
    store(powers + k, power);  // the arrays are padded to whole vectors
  }
  const V own = exp_nonpositive(F::broadcast(positive) - max_v);
  return {max, horizontal_sum<F>(sum) + own[0], horizontal_sum<F>(gaps)};
}

template <class F>
static bool all_finite(const typename F::Real* scores, int64_t count) {
  using V = typename F::V;
  V zero = {};
  int64_t k = 0;
  for (; k + F::kLanes <= count; k += F::kLanes) zero += load<V>(scores + k) * F::broadcast(0);
  typename F::Real rest = horizontal_sum<F>(zero);
  for (; k < count; ++k) rest += scores[k] * 0;
  return rest == 0;
}

// --- gradients of query, scale and positive ------------------------------------------------------------

// Over the negatives of a tile, for N vectors of half h's components from j on, with x = (w_k + ŵ_k (1 − λ_k)):
//   gradient += x c_k (bilinear) or x slope(u_k)      factor_gradient += x slope(u_k) c_k      share += ŵ_k λ_k
// With shares, the mutated negative has terms of its own. With moments ŵ_k is M's weight, v_k is that of V/2, and
//   x = w_k + ŵ_k (1 − ρ) + v_k ρ (1 − ρ) (t_k − p)      share += v_k (t_k − p)
// If all components have the same rate (kUniform), the weights are multiplied by (1 − ρ) and ρ (1 − ρ) instead.
template <class F, class Sim, Mode kMode, int h, int N, bool kUniform = false>
static void accumulate_half(RowScratch<F, Sim, kMode>& s, const Layout<Sim>& at, int64_t j, int64_t from,
                            int64_t count) {
  using V = typename F::V;
  constexpr bool kScaled = Sim::factor(h) == Factor::kScale;
  const int64_t first = h * at.half_padded + j;
  const typename F::Real* rows = s.tile.rows + first;
  const uint8_t* masks = s.tile.masks + h * at.half + j;
  const typename F::Real* weight = s.plain_weight[h] + from;
  const typename F::Real* mutated_weight = s.mutated_weight[h] + from;
  const typename F::Real* variance_weight = s.variance_weight[h] + from;
  V g[N], share[N], f[N];
  for (int n = 0; n < N; ++n) {
    g[n] = load<V>(s.gradient + first + n * F::kLanes);
    share[n] = load<V>(s.share + first + n * F::kLanes);
    f[n] = load<V>(s.factor_gradient + first + n * F::kLanes);
  }
  for (int64_t k = 0; k < count; ++k) {
    const V w = F::broadcast(weight[k]);
    const V hat = kMode != kPlain ? F::broadcast(mutated_weight[k]) : V{};
    V of_variance = kMode == kMoments ? F::broadcast(variance_weight[k]) : V{};
    if (kUniform) of_variance *= s.uniform_spread;
    const V both = kUniform ? F::fma(hat, F::broadcast(s.uniform_keep), w) : w + hat;
    const V own = kMode == kShare ? F::broadcast(s.tile.shares[k]) : V{};
    const V from_positive = hat * (1 - own);  // for kShare
    for (int n = 0; n < N; ++n) {
      const int64_t i = n * F::kLanes;
      const V q = load<V>(s.query + first + i), c = load<V>(rows + k * at.row + i);
      V a = {}, slope = c;
      if constexpr (!Sim::kBilinear) {
        a = load<V>(s.factor + first + i);
        slope = Sim::template slope<h, F>(difference<Sim, h>(q, a, c));
      }
      if constexpr (kMode == kSelect) {
        const auto mask = F::load_mask(masks + k * at.mask_row + i);
        const V x = F::select(mask, w, both);
        g[n] = F::fma(x, slope, g[n]);
        if (kScaled) f[n] = F::fma(x, slope * c, f[n]);
        share[n] += F::keep(mask, hat);
      } else if constexpr (kMode == kMoments) {
        const V own_term = load<V>(s.own_term + first + i);
        V gap;
        if constexpr (Sim::kBilinear) {
          gap = F::fma(q, c, -own_term);
        } else {
          gap = Sim::template term<h, F>(difference<Sim, h>(q, a, c)) - own_term;
        }
        const V pull = of_variance * gap;
        V x = both + pull;
        if (!kUniform) {
          x = F::fma(load<V>(s.spread + first + i), pull, F::fma(load<V>(s.keep + first + i), hat, w));
        }
        g[n] = F::fma(x, slope, g[n]);
        if (kScaled) f[n] = F::fma(x, slope * c, f[n]);
        share[n] += pull;
      } else {
        g[n] = F::fma(w, slope, g[n]);
        if (kScaled) f[n] = F::fma(w, slope * c, f[n]);
      }
      if constexpr (kMode == kShare) {
        const V mixed = mix(load<V>(s.positive + first + i), c, own);
        if constexpr (Sim::kBilinear) {
          g[n] = F::fma(hat, mixed, g[n]);
          share[n] = F::fma(from_positive, q, share[n]);
        } else {
          const V mixed_slope = Sim::template slope<h, F>(difference<Sim, h>(q, a, mixed));
          g[n] = F::fma(hat, mixed_slope, g[n]);
          if (kScaled) f[n] = F::fma(hat, mixed_slope * mixed, f[n]);
          share[n] = F::fma(from_positive, a * mixed_slope, share[n]);
        }
      }
    }
  }
  for (int n = 0; n < N; ++n) {
    store(s.gradient + first + n * F::kLanes, g[n]);
    store(s.share + first + n * F::kLanes, share[n]);
    if (kScaled) store(s.factor_gradient + first + n * F::kLanes, f[n]);
  }
}

// The same if a term is a function of both halves. Uses the inverses that scoring left in the tile.
template <class F, class Sim, Mode kMode, int N>
static void accumulate_coupled(RowScratch<F, Sim, kMode>& s, const Layout<Sim>& at, int64_t j, int64_t from,
                               int64_t count) {
  using V = typename F::V;
  constexpr int kInverses = Tile<F, Sim, kMode>::kInverses;
  const int64_t first[2] = {j, at.half_padded + j}, first_mask[2] = {j, at.half + j};
  V g[2][N], share[2][N];
  for (int h = 0; h < 2; ++h) {
    for (int n = 0; n < N; ++n) {
      g[h][n] = load<V>(s.gradient + first[h] + n * F::kLanes);
      share[h][n] = load<V>(s.share + first[h] + n * F::kLanes);
    }
  }
  for (int64_t k = 0; k < count; ++k) {
    const V w = F::broadcast(s.plain_weight[0][from + k]);
    const V hat = kMode != kPlain ? F::broadcast(s.mutated_weight[0][from + k]) : V{};
    const V of_variance = kMode == kMoments ? F::broadcast(s.variance_weight[0][from + k]) : V{};
    const V own = kMode == kShare ? F::broadcast(s.tile.shares[k]) : V{};
    const typename F::Real* inverses = s.tile.inverses + k * kInverses * at.half_padded + j;
    for (int n = 0; n < N; ++n) {
      const int64_t i = n * F::kLanes;
      const V inverse = load<V>(inverses + i);
      const V mixed_inverse = kInverses > 1 ? load<V>(inverses + at.half_padded + i) : V{};
      V x = w;
      if (kMode == kMoments) {
        V square = {};
        for (int h = 0; h < 2; ++h) {
          const V u = difference<Sim, 0>(load<V>(s.query + first[h] + i), load<V>(s.factor + first[h] + i),
                                         load<V>(s.tile.rows + k * at.row + first[h] + i));
          square += u * u;
        }
        const V pull = of_variance * (Sim::value(square, inverse) - load<V>(s.own_term + j + i));
        x = F::fma(load<V>(s.spread + j + i), pull, F::fma(load<V>(s.keep + j + i), hat, w));
        for (int h = 0; h < 2; ++h) share[h][n] += pull;
      }
      for (int h = 0; h < 2; ++h) {
        const V q = load<V>(s.query + first[h] + i), a = load<V>(s.factor + first[h] + i);
        const V c = load<V>(s.tile.rows + k * at.row + first[h] + i);
        const V u = difference<Sim, 0>(q, a, c);
        g[h][n] = F::fma(x, u * inverse, g[h][n]);
        if (kMode == kMask) {
          const auto mask = F::load_mask(s.tile.masks + k * at.mask_row + first_mask[h] + i);
          const V mixed = F::select(mask, load<V>(s.positive_term + first[h] + i), u);
          const V slope = hat * (mixed * mixed_inverse);
          g[h][n] += slope;
          share[h][n] += F::keep(mask, slope);
        } else if (kMode == kShare) {
          const V z = mix(load<V>(s.positive + first[h] + i), c, own);
          const V slope = hat * (difference<Sim, 0>(q, a, z) * mixed_inverse);
          g[h][n] += slope;
          share[h][n] = F::fma(1 - own, slope, share[h][n]);
        }
      }
    }
  }
  for (int h = 0; h < 2; ++h) {
    for (int n = 0; n < N; ++n) {
      store(s.gradient + first[h] + n * F::kLanes, g[h][n]);
      store(s.share + first[h] + n * F::kLanes, share[h][n]);
    }
  }
}

// Adds the tile's part of the gradient of half h's rates: Σ_k ŵ_k (p − t_k) + v_k (1/2 − ρ) (t_k − p)².
template <class F, class Sim, int h>
static void accumulate_rates(const RowScratch<F, Sim, kMoments>& s, const Layout<Sim>& at, int64_t from, int64_t count,
                             typename F::Real* sums) {
  using V = typename F::V;
  const typename F::Real half = static_cast<typename F::Real>(0.5);
  for (int64_t j = 0; j < at.half; j += F::kLanes) {
    const int64_t i = h * at.half_padded + j;
    const V own = load<V>(s.own_term + i), by_square = load<V>(s.keep + i) - half;  // 1/2 − ρ
    V sum = load<V>(sums + i);
    for (int64_t k = 0; k < count; ++k) {
      const typename F::Real* row = s.tile.rows + k * at.row;
      V term;
      if constexpr (Sim::kCoupled) {
        V u[2];
        for (int part = 0; part < 2; ++part) {
          const int64_t to = part * at.half_padded + j;
          u[part] = difference<Sim, 0>(load<V>(s.query + to), load<V>(s.factor + to), load<V>(row + to));
        }
        term = Sim::template term<F>(u[0], u[1]);
      } else {
        const V a = Sim::kBilinear ? V{} : load<V>(s.factor + i);
        term = Sim::template term<h, F>(difference<Sim, h>(load<V>(s.query + i), a, load<V>(row + i)));
      }
      const V gap = term - own;
      const V hat = F::broadcast(s.mutated_weight[h][from + k]);
      const V of_variance = F::broadcast(s.variance_weight[h][from + k]);
      sum += gap * (of_variance * by_square * gap - hat);
    }
    store(sums + i, sum);
  }
}

// How many vectors of components have their sums in registers at a time: as many as registers allow, or fewer if more
// were not faster, because a vector takes much arithmetic.
template <class Sim, Mode kMode>
constexpr int accumulators() {
  constexpr bool kManyRegisters = kVectorBytes == 64;
  if (kMode == kMoments) return Sim::kBilinear ? (kManyRegisters ? 8 : 4) : 2;
  if (Sim::kBilinear && kMode != kShare) return kManyRegisters ? 8 : 6;
  return Sim::kCoupled || kMode == kShare ? 2 : 3;
}

// Cuts the vectors evenly into blocks of at most kMost, and calls body(first, Vectors<N>) for each block.
template <int N>
struct Vectors {
  static constexpr int value = N;
};
template <int kMost, class Body>
EMU_INLINE void for_blocks(int64_t vectors, Body&& body) {
  const int64_t blocks = (vectors + kMost - 1) / kMost;
  for (int64_t i = 0, at = 0; i < blocks; ++i) {
    const int64_t n = (vectors - at + blocks - i - 1) / (blocks - i);
    if constexpr (kMost >= 8) {
      if (n == 8) body(at, Vectors<8>{});
      if (n == 7) body(at, Vectors<7>{});
    }
    if constexpr (kMost >= 4) {
      if (n == 6) body(at, Vectors<6>{});
      if (n == 5) body(at, Vectors<5>{});
      if (n == 4) body(at, Vectors<4>{});
    }
    if constexpr (kMost >= 3) {
      if (n == 3) body(at, Vectors<3>{});
    }
    if (n == 2) body(at, Vectors<2>{});
    if (n == 1) body(at, Vectors<1>{});
    at += n;
  }
}

template <class F, class Sim, Mode kMode, bool kUniform>
EMU_INLINE void accumulate_query(RowScratch<F, Sim, kMode>& s, const Layout<Sim>& at, int64_t from, int64_t count) {
  const int64_t vectors = (at.half + F::kLanes - 1) / F::kLanes;
  for_blocks<accumulators<Sim, kMode>()>(vectors, [&](int64_t first, auto n) {
    constexpr int N = decltype(n)::value;
    const int64_t j = first * F::kLanes;
    if constexpr (Sim::kCoupled) {
      accumulate_coupled<F, Sim, kMode, N>(s, at, j, from, count);
    } else {
      accumulate_half<F, Sim, kMode, 0, N, kUniform>(s, at, j, from, count);
      if constexpr (Sim::kHalves > 1) accumulate_half<F, Sim, kMode, 1, N, kUniform>(s, at, j, from, count);
    }
  });
}

// Adds the positive's own part; for kSelect and kMoments also its part in mutated negatives. `hat` is Σ_k ŵ_k.
template <class F, class Sim, Mode kMode, int h>
EMU_INLINE void finish_gradient(RowScratch<F, Sim, kMode>& s, const Layout<Sim>& at, typename F::Real hat) {
  using V = typename F::V;
  const V own = F::broadcast(s.positive_weight[Sim::kCoupled ? 0 : h]);
  for (int64_t i = h * at.half_padded; i < (h + 1) * at.half_padded; i += F::kLanes) {
    const V q = load<V>(s.query + i), a = load<V>(s.factor + i), c = load<V>(s.positive + i);
    const V share = load<V>(s.share + i);
    V x = kMode == kSelect ? share + own : own;
    if (kMode == kMoments) {
      const int64_t unit = Sim::kCoupled ? i - h * at.half_padded : i;
      const V spread = s.uniform && !Sim::kCoupled ? V{} + 1 : load<V>(s.spread + unit);
      x += (1 - load<V>(s.keep + unit)) * hat - spread * share;
    }
    V of_query, of_positive, slope = c;
    if constexpr (Sim::kBilinear) {
      of_query = F::fma(x, c, load<V>(s.gradient + i));
      of_positive = x * q;
    } else {
      if constexpr (Sim::kCoupled) {
        V u[2], slopes[2];
        for (int part = 0; part < 2; ++part) {
          u[part] = load<V>(s.positive_term + i + (part - h) * at.half_padded);
        }
        Sim::template slopes<F>(u[0], u[1], slopes[0], slopes[1]);
        slope = slopes[h];
      } else {
        slope = Sim::template slope<h, F>(difference<Sim, h>(q, a, c));
      }
      of_query = -F::fma(x, slope, load<V>(s.gradient + i));
      of_positive = x * (a * slope);
      store(s.factor_gradient + i, F::fma(x, slope * c, load<V>(s.factor_gradient + i)));
    }
    if (Sim::factor(h) == Factor::kPhase) of_query *= a;
    store(s.gradient + i, of_query);
    store(s.share + i, kMode == kSelect || kMode == kMoments ? of_positive : of_positive + share);
  }
}

// Row b's part of what a backward pass needs, from the weights of its scores in s.plain and s.mutated. The row must be
// loaded, and also scored, unless scores are sums of uncoupled terms.
template <class F, class Sim, Mode kMode>
static void gradient_row(const Problem& p, const Random& random, RowScratch<F, Sim, kMode>& s, int64_t b,
                         typename F::Real positive_weight, const GradientArgs& a) {
  using Real = typename F::Real;
  const Layout<Sim> at(p.D);
  const int64_t g = b / p.rows_per_group();
  Real* const zeroed[] = {s.gradient, s.share, s.factor_gradient, s.grad_rate};
  for (Real* sums : zeroed) {
    if (sums != nullptr) __builtin_memset(sums, 0, sizeof(Real) * static_cast<size_t>(at.row));
  }
  finish_weights<F, Sim, kMode>(
      p, s, positive_weight,
      a.grad_weights != nullptr ? static_cast<Real*>(a.grad_weights) + b * Sim::kWeights : nullptr);
  for (int64_t from = 0; from < p.K; from += s.tile.capacity) {
    const int64_t count = min64(s.tile.capacity, p.K - from);
    if (!s.tile.holds(g, b, from)) {
      if constexpr (Sim::kCoupled) {
        score_tile<F, Sim, kMode>(p, random, s, b, from, count);
      } else {
        s.tile.stream(p, random, g, b, from, count, [](int64_t, int64_t) {});
      }
    }
    if (kMode == kMoments && !Sim::kCoupled && s.uniform) {
      accumulate_query<F, Sim, kMode, kMode == kMoments>(s, at, from, count);
    } else {
      accumulate_query<F, Sim, kMode, false>(s, at, from, count);
    }
    if constexpr (kMode == kMoments) {
      if (a.grad_rate != nullptr) {
        accumulate_rates<F, Sim, 0>(s, at, from, count, s.grad_rate);
        if constexpr (at.kSums > 1) accumulate_rates<F, Sim, 1>(s, at, from, count, s.grad_rate);
      }
    }
  }
  Real hat[2] = {0, 0};  // Σ_k ŵ_k of each half
  if constexpr (kMode == kMoments) {
    for (int h = 0; h < at.H; ++h) {
      for (int64_t k = 0; k < p.K; ++k) hat[h] += s.mutated_weight[Sim::kCoupled ? 0 : h][k];
    }
    if (a.grad_rate != nullptr) {
      Real* to = static_cast<Real*>(a.grad_rate) + b * at.units();
      for (int i = 0; i < at.kSums; ++i) {
        const Real sign = Sim::root(i) ? static_cast<Real>(-0.5) : Real{1};  // a root's weights are multiplied by −2
        for (int64_t j = 0; j < at.half; ++j) to[i * at.half + j] = sign * s.grad_rate[i * at.half_padded + j];
      }
    }
  }
  finish_gradient<F, Sim, kMode, 0>(s, at, hat[0]);
  if constexpr (Sim::kHalves > 1) finish_gradient<F, Sim, kMode, Sim::kHalves - 1>(s, at, hat[Sim::kHalves - 1]);
  collect(at, static_cast<Real*>(a.grad_query) + b * p.D, s.gradient);
  collect(at, static_cast<Real*>(a.grad_positive) + b * p.D, s.share);
  if (a.grad_scale != nullptr) {
    Real* to = static_cast<Real*>(a.grad_scale) + b * at.scale_width();
    for (int h = 0; h < at.H; ++h) {
      if (Sim::factor(h) != Factor::kScale) continue;
      copy(to, s.factor_gradient + h * at.half_padded, at.half);
      to += at.half;
    }
  }
  for (int i = 0; i < at.kSums; ++i) {
    copy(static_cast<Real*>(a.weight) + (i * p.B + b) * p.K, s.plain_weight[i], p.K);
    if (kMode == kPlain) continue;
    copy(static_cast<Real*>(a.mutated_weight) + (i * p.B + b) * p.K, s.mutated_weight[i], p.K);
    if (kMode != kMoments) continue;
    copy(static_cast<Real*>(a.variance_weight) + (i * p.B + b) * p.K, s.variance_weight[i], p.K);
  }
}

// --- the loss ------------------------------------------------------------------------------------------

template <class Real>
struct RowLoss {
  Real uls, vanilla, positive_weight;
};

// The loss of one row from its scores; with need_grad, overwrites every score by the loss's derivative by it:
//   ∂/∂s⁻_k = α p_k      ∂/∂ŝ_k = ((1 + βK) p̂_k − β)/K      ∂/∂s⁺ = ((1 + βK) p̂_0 − 1)/K + α (p_0 − 1)
// With moments p̂ is the softmax of the cumulants c, and ∂/∂c_k = (1 + βK) p̂_k / K, ∂/∂m_k = −β/K.
template <class F, Mode kMode>
static RowLoss<typename F::Real> row_loss(const LossArgs& a, typename F::Real positive, typename F::Real* plain,
                                          typename F::Real* mutated, typename F::Real* cumulant, int64_t count,
                                          int64_t real) {
  using Real = typename F::Real;
  using V = typename F::V;
  const Real alpha = static_cast<Real>(a.alpha), beta = static_cast<Real>(a.beta);
  RowLoss<Real> out{0, 0, 0};
  {
    const Softmax<Real> s = softmax<F>(positive, plain, count, plain);
    out.vanilla = (s.max - positive) + s.log_sum();
    if (a.need_grad) {
      const Real factor = alpha / s.sum;
      for (int64_t k = 0; k < count; k += F::kLanes) {
        store(plain + k, load<V>(plain + k) * F::broadcast(factor));
      }
      const V own = exp_nonpositive(F::broadcast(positive - s.max));
      out.positive_weight = alpha * (own[0] / s.sum - 1);
    }
  }
  if (kMode != kPlain && real > 0) {
    const Real inverse = 1 / static_cast<Real>(real);
    Real* in_softmax = kMode == kMoments ? cumulant : mutated;
    Softmax<Real> s = softmax<F>(positive, in_softmax, count, in_softmax);
    if (kMode == kMoments) {
      s.gaps = 0;
      for (int64_t k = 0; k < count; ++k) s.gaps += mutated[k] * 0 == 0 ? s.max - mutated[k] : 0;
    }
    const Real log_sum = s.log_sum();
    out.uls = ((s.max - positive) + log_sum) * inverse + beta * (s.gaps * inverse + log_sum);
    if (a.need_grad) {
      const Real mass = inverse + beta;  // (1 + βK)/K
      const V factor = F::broadcast(mass / s.sum), label = F::broadcast(beta * inverse);
      for (int64_t k = 0; k < count; k += F::kLanes) {
        store(in_softmax + k, load<V>(in_softmax + k) * factor - (kMode == kMoments ? V{} : label));
        if (kMode == kMoments) store(mutated + k, -label);
      }
      const V own = exp_nonpositive(F::broadcast(positive - s.max));
      out.positive_weight += mass * (own[0] / s.sum) - inverse;
    }
  }
  return out;
}

// From scores to logits: subtracts log q from row b's scores; returns the positive's logit.
template <class F, class Sim, Mode kMode>
static typename F::Real correct(const Problem& p, const LossArgs& a, RowScratch<F, Sim, kMode>& s, int64_t b,
                                typename F::Real positive) {
  using Real = typename F::Real;
  if (a.negative_log_q != nullptr) {
    const Real* log_q = static_cast<const Real*>(a.negative_log_q) + b / p.rows_per_group() * p.K;
    for (int64_t k = 0; k < p.K; ++k) s.plain[k] -= log_q[k];
    for (int64_t k = 0; k < p.K && kMode != kPlain; ++k) s.mutated[k] -= log_q[k];
    for (int64_t k = 0; k < p.K && kMode == kMoments; ++k) s.cumulant[k] -= log_q[k];
  }
  return a.positive_log_q != nullptr ? positive - static_cast<const Real*>(a.positive_log_q)[b] : positive;
}

template <class F, class Sim, Mode kMode>
static void loss_forward(const Problem& p, const LossArgs& a) {
  using Real = typename F::Real;
  constexpr bool kMutated = kMode != kPlain;
  const Random random(p.draws, p.D);
  const int64_t K = p.K, kp = (K + 15) / 16 * 16;
  Workers<F, Sim, kMode> workers(p);
  Scratch rows_scratch(1, 2 * p.B * static_cast<int64_t>(sizeof(Real)));
  Real* uls = reinterpret_cast<Real*>(rows_scratch.slot(0));
  Real* vanilla = uls + p.B;

  parallel(p.place.threads, p.B, [&](int64_t b, int slot) {
    RowScratch<F, Sim, kMode>& s = workers[slot];
    s.load_row(p, b);
    const Real score = score_row<F, Sim, kMode>(p, random, s, b);
    const Real positive = correct<F, Sim, kMode>(p, a, s, b, score);
    bool finite = positive * 0 == 0 && all_finite<F>(s.plain, K);
    if (kMutated) finite = finite && all_finite<F>(kMode == kMoments ? s.cumulant : s.mutated, K);
    RowLoss<Real> loss;
    if (finite) {
      const int64_t real = blank_padding(p, b, s);
      loss = row_loss<F, kMode>(a, positive, s.plain, s.mutated, s.cumulant, K, real);
      if (real < K && kMutated && a.need_grad) {
        const int64_t* ids = p.negative + b / p.rows_per_group() * K;
        for (int64_t k = 0; k < K; ++k) {
          if (ids[k] >= 0) continue;
          s.mutated[k] = 0;
          if (kMode == kMoments) s.cumulant[k] = 0;
        }
      }
    } else {
      const Real nan = static_cast<Real>(__builtin_nan(""));
      loss = {nan, nan, nan};
      for (int64_t k = 0; k < kp; ++k) s.plain[k] = s.mutated[k] = nan;
      for (int64_t k = 0; k < kp && kMode == kMoments; ++k) s.cumulant[k] = nan;
    }
    uls[b] = loss.uls;
    vanilla[b] = loss.vanilla;
    if (a.need_grad) gradient_row<F, Sim, kMode>(p, random, s, b, loss.positive_weight, a.gradient);
  });

  // Summed in the rows' order, so that the result does not depend on the threads.
  const Real* sample_weight = static_cast<const Real*>(a.sample_weight);
  const Real alpha = static_cast<Real>(a.alpha);
  double total = 0, total_weight = 0, total_uls = 0, total_vanilla = 0;
  for (int64_t b = 0; b < p.B; ++b) {
    const double w = sample_weight ? static_cast<double>(sample_weight[b]) : 1.0;
    const Real row = kMutated ? uls[b] + alpha * vanilla[b] : vanilla[b];
    if (a.reduction == Reduction::kNone) {
      static_cast<Real*>(a.loss)[b] = static_cast<Real>(w * static_cast<double>(row));
    }
    total += w * static_cast<double>(row);
    total_weight += w;
    total_uls += w * static_cast<double>(uls[b]);
    total_vanilla += w * static_cast<double>(vanilla[b]);
  }
  const double mean = total_weight == 0 ? 0.0 : 1.0 / total_weight;
  const double factor = a.reduction == Reduction::kMean ? mean : 1.0;
  if (a.reduction != Reduction::kNone) *static_cast<Real*>(a.loss) = static_cast<Real>(total * factor);
  static_cast<Real*>(a.terms)[0] = static_cast<Real>(total_uls * mean);
  static_cast<Real*>(a.terms)[1] = static_cast<Real>(total_vanilla * mean);
  for (int64_t b = 0; b < p.B; ++b) {
    const double w = sample_weight ? static_cast<double>(sample_weight[b]) : 1.0;
    static_cast<Real*>(a.row_scale)[b] = static_cast<Real>(w * factor);
  }
}

// --- scores alone, with a backward for any upstream gradient -------------------------------------------

template <class F, class Sim, Mode kMode>
static void scores_forward(const Problem& p, const ScoreArgs& a) {
  using Real = typename F::Real;
  const Random random(p.draws, p.D);
  Workers<F, Sim, kMode> workers(p);
  parallel(p.place.threads, p.B, [&](int64_t b, int slot) {
    RowScratch<F, Sim, kMode>& s = workers[slot];
    s.load_row(p, b);
    static_cast<Real*>(a.positive)[b] = score_row<F, Sim, kMode>(p, random, s, b);
    blank_padding(p, b, s);
    copy(static_cast<Real*>(a.negative) + b * p.K, s.plain, p.K);
    if (kMode != kPlain) copy(static_cast<Real*>(a.mutated) + b * p.K, s.mutated, p.K);
    if (kMode == kMoments) copy(static_cast<Real*>(a.cumulant) + b * p.K, s.cumulant, p.K);
  });
}

template <class F, class Sim, Mode kMode>
static void query_gradient(const Problem& p, const QueryGradientArgs& a) {
  using Real = typename F::Real;
  const Random random(p.draws, p.D);
  Workers<F, Sim, kMode> workers(p);
  parallel(p.place.threads, p.B, [&](int64_t b, int slot) {
    RowScratch<F, Sim, kMode>& s = workers[slot];
    s.load_row(p, b);
    if constexpr (!Sums<Sim>::kDirect || Sim::kCoupled) {
      score_row<F, Sim, kMode>(p, random, s, b);
    } else if constexpr (kMode == kMoments) {
      score_positive<F, Sim, kMode>(s, Layout<Sim>(p.D));
    }
    // Padding has no gradient, whatever its upstream weight (its score is −inf).
    const int64_t* ids = p.negative + b / p.rows_per_group() * p.K;
    for (int64_t k = 0; k < p.K; ++k) {
      const bool real = ids[k] >= 0;
      s.plain[k] = real ? static_cast<const Real*>(a.weight)[b * p.K + k] : 0;
      if (kMode != kPlain) s.mutated[k] = real ? static_cast<const Real*>(a.mutated_weight)[b * p.K + k] : 0;
      if (kMode == kMoments) s.cumulant[k] = real ? static_cast<const Real*>(a.cumulant_weight)[b * p.K + k] : 0;
    }
    gradient_row<F, Sim, kMode>(p, random, s, b, static_cast<const Real*>(a.positive_weight)[b], a.gradient);
  });
}
