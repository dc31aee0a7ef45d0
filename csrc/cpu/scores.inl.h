// A row's negatives in a tile that fits the cache, and their scores.

constexpr int64_t kTileBytes = 256 * 1024;  // of a tile's rows; its other arrays take at most as much
constexpr int kStreamRows = 8;              // gathered, masked and scored together
constexpr int kPrefetchRows = 8;            // how many rows ahead to prefetch
constexpr int64_t kPrefetchBytes = 1024;    // of a row; the processor prefetches the rest by itself

template <class F, class Sim, Mode kMode>
struct Tile {
  using Real = typename F::Real;
  Real* rows;      // (capacity, row), zero beyond a half's end and at padding
  uint8_t* masks;  // (capacity, mask_row)
  Real* shares;    // (capacity,) for kShare
  Real* inverses;  // (capacity, kInverses, half_padded) of coupled terms: of the negative, and of the mutated one
  int64_t capacity;
  int64_t group = -1, first = -1, scored_row = -1;  // what the arrays hold now
  static constexpr int kInverses = !Sim::kCoupled ? 0 : kMode == kPlain || kMode == kMoments ? 1 : 2;

  static int64_t rows_that_fit(const Problem& p) {
    const int64_t fit = kTileBytes / (Layout<Sim>(p.D).row * static_cast<int64_t>(sizeof(Real)));
    return max64(16, min64(fit / 16 * 16, (p.K + 15) / 16 * 16));
  }

  void carve(const Problem& p, Carver& carver) {
    const Layout<Sim> at(p.D);
    capacity = rows_that_fit(p);
    rows = carver.take<Real>(capacity * at.row);
    masks = carver.take<uint8_t>(masked(kMode) ? capacity * at.mask_row : 0);
    shares = carver.take<Real>(kMode == kShare ? capacity : 0);
    inverses = carver.take<Real>(capacity * kInverses * at.half_padded);
    if (rows != nullptr) __builtin_memset(rows, 0, sizeof(Real) * capacity * at.row);
  }

  // Whether the arrays hold the negatives of group g from `from` on, and what depends on row b.
  bool holds(int64_t g, int64_t b, int64_t from) const {
    const bool of_group = (kMode == kPlain || kMode == kMoments) && !Sim::kCoupled;
    return group == g && first == from && (of_group || scored_row == b);
  }

  // Fills the arrays, a few negatives at a time, and calls body(k, n) while negatives k .. k + n − 1 of the tile are
  // in the L1 cache.
  template <class Body>
  void stream(const Problem& p, const Random& random, int64_t g, int64_t b, int64_t from, int64_t count, Body&& body) {
    const Layout<Sim> at(p.D);
    const bool gathered = group == g && first == from, complete = holds(g, b, from);
    group = g, first = from, scored_row = b;
    U64 lane = {};
    for (int i = 0; i < kMaskLanes; ++i) lane[i] = static_cast<uint64_t>(from + i);
    const U64 row = U64{} + (p.draws.row_offset + static_cast<uint64_t>(b));
    for (int64_t k = 0; k < count; k += kStreamRows) {
      const int64_t n = min64(kStreamRows, count - k);
      if (!gathered) gather_rows(p, at, p.negative + g * p.K + from, k, n, count);
      if (kMode != kPlain && !complete) {
        for (int64_t i = k; i < k + n; i += kMaskLanes) {
          const U64 ks = lane + static_cast<uint64_t>(i);
          if (masked(kMode)) random.draw_masks(ks, row, masks + i * at.mask_row, at.mask_row);
          if (kMode == kShare) random.template draw_shares<F>(ks, row, shares + i);
        }
      }
      body(k, n);
    }
  }

  void gather_rows(const Problem& p, const Layout<Sim>& at, const int64_t* ids, int64_t k, int64_t n, int64_t count) {
    with_table<F>(p, [&](auto* table) {
      const int64_t bytes = min64(p.D * static_cast<int64_t>(sizeof(*table)), kPrefetchBytes);
      for (int64_t i = k; i < k + n; ++i) {
        // One row at a time: many prefetches at once would fill the queue of misses, and delay the loads below.
        const int64_t later = i + kPrefetchRows < count ? ids[i + kPrefetchRows] : -1;
        if (later >= 0) prefetch_row(table + later * p.table_stride, bytes);
        if (ids[i] >= 0) {
          gather_from<F, Sim>(at, table + ids[i] * p.table_stride, rows + i * at.row);
        } else {
          __builtin_memset(rows + i * at.row, 0, sizeof(Real) * static_cast<size_t>(at.row));
        }
      }
    });
  }
};

// 1 − ρ and ρ (1 − ρ) of row b, padded.
template <class Sim, class Real>
static void load_rates(const Problem& p, const Layout<Sim>& at, int64_t b, Real* keep, Real* spread) {
  const Real* rate = static_cast<const Real*>(p.draws.rate) + (p.draws.rate_rows > 1 ? b * at.units() : 0);
  const int64_t each = p.draws.rate_units > 1;
  for (int i = 0; i < at.kSums; ++i) {
    for (int64_t j = 0; j < at.half_padded; ++j) {
      const Real r = j < at.half ? rate[(i * at.half + j) * each] : 0;
      keep[i * at.half_padded + j] = 1 - r;
      spread[i * at.half_padded + j] = r * (1 - r);
    }
  }
}

// What one thread needs to work on a row.
template <class F, class Sim, Mode kMode>
struct RowScratch {
  using Real = typename F::Real;
  static constexpr int kSums = Sums<Sim>::kCount;
  Tile<F, Sim, kMode> tile;
  // (row,) each. positive_term: the positive's terms; for coupled terms the differences that they are functions of.
  // share: for kSelect Σ_k ŵ_k λ_k, for kMoments Σ_k v_k (t_k − p) with v_k the weight of V/2, else the part of the
  // positive's gradient that comes from mutated negatives.
  Real *query, *factor, *positive, *positive_term, *gradient, *share, *factor_gradient;
  // (row,) each, for kMoments: 1 − ρ, ρ (1 − ρ), the positive's terms p (coupled ones too), and ρ's gradient.
  Real *keep, *spread, *own_term, *grad_rate;
  bool uniform;  // whether all components have the same rate, by which loops then multiply only at the end
  Real uniform_keep, uniform_spread;
  Real from_positive[kSums];  // Σ_j ρ_j p_j
  // (K rounded up to whole vectors,) each. plain and mutated hold sums, then scores, then weights of scores. If a score
  // is not simply its only sum, `value` holds the sums (or minus their roots) and `weight` the weights of the sums.
  // Coupled terms have a `value` too, so that a tile can be scored again once the weights are computed.
  // With moments `mutated` has the means, `cumulant` what goes into the logsumexp, and `variance` that of each sum.
  Real *plain, *mutated, *cumulant;
  Real *plain_value[kSums], *mutated_value[kSums], *plain_weight[kSums], *mutated_weight[kSums];
  Real *variance[kSums], *variance_weight[kSums];
  Real positive_value[kSums], positive_weight[kSums];

  RowScratch(const Problem& p, Carver& carver) {
    const int64_t row = Layout<Sim>(p.D).row, kp = (p.K + 15) / 16 * 16;
    tile.carve(p, carver);
    Real** const arrays[] = {&query, &factor, &positive, &positive_term, &gradient, &share, &factor_gradient};
    for (Real** a : arrays) {
      *a = carver.take<Real>(row);
      if (*a != nullptr) __builtin_memset(*a, 0, sizeof(Real) * row);
    }
    keep = spread = grad_rate = nullptr, own_term = positive_term;
    if (kMode == kMoments) {
      keep = carver.take<Real>(row), spread = carver.take<Real>(row), grad_rate = carver.take<Real>(row);
      if (Sim::kCoupled) own_term = carver.take<Real>(row);
      Real* const zeroed[] = {keep, spread, own_term};
      for (Real* a : zeroed) {
        if (carver.base != nullptr) __builtin_memset(a, 0, sizeof(Real) * row);
      }
      if (carver.base != nullptr && p.draws.rate_rows == 1) load_rates(p, Layout<Sim>(p.D), 0, keep, spread);
    }
    plain = carver.take<Real>(kp);
    mutated = carver.take<Real>(kp);
    cumulant = carver.take<Real>(kMode == kMoments ? kp : 0);
    for (int s = 0; s < kSums; ++s) {
      plain_value[s] = plain_weight[s] = plain;
      mutated_value[s] = mutated_weight[s] = mutated;
      if (!Sums<Sim>::kDirect || Sim::kCoupled) {
        plain_value[s] = carver.take<Real>(kp);
        mutated_value[s] = carver.take<Real>(kp);
      }
      if (!Sums<Sim>::kDirect) {
        plain_weight[s] = carver.take<Real>(kp);
        mutated_weight[s] = carver.take<Real>(kp);
      }
      variance[s] = carver.take<Real>(kMode == kMoments ? kp : 0);
      variance_weight[s] = Sums<Sim>::kDirect ? cumulant : carver.take<Real>(kMode == kMoments ? kp : 0);
    }
    uniform = kMode == kMoments && p.draws.rate_units == 1 && p.draws.rate_rows == 1;
    if (uniform && carver.base != nullptr) uniform_keep = keep[0], uniform_spread = spread[0];
    if (carver.base != nullptr && !Sim::kBilinear) load_factor<F, Sim>(p, Layout<Sim>(p.D), 0, factor);
  }

  static int64_t bytes(const Problem& p) {
    Carver counter{nullptr};
    RowScratch counted(p, counter);
    return counter.used;
  }

  void load_row(const Problem& p, int64_t b) {
    const Layout<Sim> at(p.D);
    load_query<F, Sim>(p, at, b, query);
    if (p.scale != nullptr) load_factor<F, Sim>(p, at, b, factor);
    gather<F, Sim>(p, at, p.positive[b], positive);
    if (kMode == kMoments && p.draws.rate_rows > 1) load_rates(p, at, b, keep, spread);
  }
};

// A RowScratch for each thread slot.
template <class F, class Sim, Mode kMode>
class Workers {
  using Worker = RowScratch<F, Sim, kMode>;

 public:
  explicit Workers(const Problem& p)
      : memory_(p.place.threads, static_cast<int64_t>(sizeof(Worker)) + 64 + Worker::bytes(p)) {
    for (int t = 0; t < p.place.threads; ++t) {
      Carver carver{memory_.slot(t)};
      Worker* place = carver.take<Worker>(1);
      new (place) Worker(p, carver);
    }
  }
  Worker& operator[](int slot) const { return *reinterpret_cast<Worker*>(memory_.slot(slot)); }

 private:
  Scratch memory_;
};

// --- scores --------------------------------------------------------------------------------------------

// Sums of half h over R consecutive rows of a tile: Σ_j term(u), plain and mutated. One accumulator for each sum is
// enough: R = 4 rows hide the latency.
template <class F, class Sim, Mode kMode, int h, int R, bool kUniform = false>
EMU_INLINE void score_half(const RowScratch<F, Sim, kMode>& s, const Layout<Sim>& at, int64_t k,
                           typename F::Real* plain, typename F::Real* mutated, typename F::Real* variance) {
  using V = typename F::V;
  const int64_t first = h * at.half_padded;
  const typename F::Real* rows = s.tile.rows + k * at.row + first;
  const uint8_t* masks = s.tile.masks + k * at.mask_row + h * at.half;
  V sum[R] = {}, mutated_sum[R] = {}, squares[R] = {}, share[R] = {};
  if (kMode == kShare) {
    for (int r = 0; r < R; ++r) share[r] = F::broadcast(s.tile.shares[k + r]);
  }
  for (int64_t j = 0; j < at.half; j += F::kLanes) {
    const V q = load<V>(s.query + first + j);
    const V keep = kMode == kMoments ? load<V>(s.keep + first + j) : V{};
    const V spread = kMode == kMoments ? load<V>(s.spread + first + j) : V{};
    const V own_term = kMode == kMoments ? load<V>(s.own_term + first + j) : V{};
    const V a = Sim::kBilinear ? V{} : load<V>(s.factor + first + j);
    const V positive = kMode == kShare ? load<V>(s.positive + first + j) : V{};
    const V from_positive = kMode == kSelect ? load<V>(s.positive_term + first + j) : V{};
    for (int r = 0; r < R; ++r) {
      const V c = load<V>(rows + r * at.row + j);
      const V term = Sim::template term<h, F>(difference<Sim, h>(q, a, c));
      sum[r] += term;
      if (kMode == kSelect) {
        mutated_sum[r] += F::select(F::load_mask(masks + r * at.mask_row + j), from_positive, term);
      } else if (kMode == kMoments) {
        const V gap = term - own_term;
        if (!kUniform) mutated_sum[r] = F::fma(keep, term, mutated_sum[r]);
        squares[r] = F::fma(kUniform ? gap : spread * gap, gap, squares[r]);
      } else if (kMode == kShare) {
        const V mixed = mix(positive, c, share[r]);
        mutated_sum[r] += Sim::template term<h, F>(difference<Sim, h>(q, a, mixed));
      }
    }
  }
  horizontal_sums<F, R>(sum, plain);
  if (kMode != kPlain && !kUniform) horizontal_sums<F, R>(mutated_sum, mutated);
  if (kMode == kMoments) horizontal_sums<F, R>(squares, variance);
}

// The same if a term is a function of both halves. Leaves the terms' inverses in the tile.
template <class F, class Sim, Mode kMode, int R, bool kUniform = false>
EMU_INLINE void score_coupled(const RowScratch<F, Sim, kMode>& s, const Layout<Sim>& at, int64_t k,
                              typename F::Real* plain, typename F::Real* mutated, typename F::Real* variance) {
  using V = typename F::V;
  constexpr int kInverses = Tile<F, Sim, kMode>::kInverses;
  const typename F::Real* rows = s.tile.rows + k * at.row;
  const uint8_t* masks = s.tile.masks + k * at.mask_row;
  typename F::Real* inverses = s.tile.inverses + k * kInverses * at.half_padded;
  V sum[R] = {}, mutated_sum[R] = {}, squares[R] = {}, share[R] = {};
  if (kMode == kShare) {
    for (int r = 0; r < R; ++r) share[r] = F::broadcast(s.tile.shares[k + r]);
  }
  for (int64_t j = 0; j < at.half; j += F::kLanes) {
    V q[2], a[2], positive[2], positive_square[2];
    for (int h = 0; h < 2; ++h) {
      q[h] = load<V>(s.query + h * at.half_padded + j);
      a[h] = load<V>(s.factor + h * at.half_padded + j);
      positive[h] = load<V>((kMode == kShare ? s.positive : s.positive_term) + h * at.half_padded + j);
      positive_square[h] = positive[h] * positive[h];
    }
    for (int r = 0; r < R; ++r) {
      V square[2], mixed[2];
      for (int h = 0; h < 2; ++h) {
        const V c = load<V>(rows + r * at.row + h * at.half_padded + j);
        const V u = difference<Sim, 0>(q[h], a[h], c);
        square[h] = u * u;
        if (kMode == kMask) {
          const auto mask = F::load_mask(masks + r * at.mask_row + h * at.half + j);
          mixed[h] = F::select(mask, positive_square[h], square[h]);
        } else if (kMode == kShare) {
          const V v = difference<Sim, 0>(q[h], a[h], mix(positive[h], c, share[r]));
          mixed[h] = v * v;
        }
      }
      const auto add = [&](V& to, V of, int which) {
        const V inverse = Sim::template inverse<F>(of);
        const V term = Sim::value(of, inverse);
        to += term;
        store(inverses + (r * kInverses + which) * at.half_padded + j, inverse);
        return term;
      };
      const V term = add(sum[r], square[0] + square[1], 0);
      if (kMode == kMoments) {
        const V gap = term - load<V>(s.own_term + j);
        if (!kUniform) mutated_sum[r] = F::fma(load<V>(s.keep + j), term, mutated_sum[r]);
        squares[r] = F::fma(kUniform ? gap : load<V>(s.spread + j) * gap, gap, squares[r]);
      } else if (kMode != kPlain) {
        add(mutated_sum[r], mixed[0] + mixed[1], 1);
      }
    }
  }
  horizontal_sums<F, R>(sum, plain);
  if (kMode != kPlain && !kUniform) horizontal_sums<F, R>(mutated_sum, mutated);
  if (kMode == kMoments) horizontal_sums<F, R>(squares, variance);
}

template <class F, class Sim, Mode kMode, int R, bool kUniform>
EMU_INLINE void score_rows(const RowScratch<F, Sim, kMode>& s, const Layout<Sim>& at, int64_t k, int64_t to) {
  const auto out = [&](auto& sums, int i) { return sums[i] + to; };
  if constexpr (Sim::kCoupled) {
    score_coupled<F, Sim, kMode, R, kUniform>(s, at, k, out(s.plain_value, 0), out(s.mutated_value, 0),
                                              out(s.variance, 0));
  } else {
    score_half<F, Sim, kMode, 0, R, kUniform>(s, at, k, out(s.plain_value, 0), out(s.mutated_value, 0),
                                              out(s.variance, 0));
    if constexpr (Sim::kHalves > 1) {
      score_half<F, Sim, kMode, 1, R, kUniform>(s, at, k, out(s.plain_value, 1), out(s.mutated_value, 1),
                                                out(s.variance, 1));
    }
  }
}

template <class F, class Sim, Mode kMode, int R>
EMU_INLINE void score_rows(const RowScratch<F, Sim, kMode>& s, const Layout<Sim>& at, int64_t k, int64_t to) {
  if constexpr (kMode == kMoments) {
    if (s.uniform) return score_rows<F, Sim, kMode, R, true>(s, at, k, to);
  }
  score_rows<F, Sim, kMode, R, false>(s, at, k, to);
}

// The terms of half h of one padded candidate, and their sum.
template <class F, class Sim, int h>
EMU_INLINE typename F::Real half_terms(const Layout<Sim>& at, const typename F::Real* query,
                                       const typename F::Real* factor, const typename F::Real* candidate,
                                       typename F::Real* terms) {
  using V = typename F::V;
  V sum = {};
  for (int64_t j = h * at.half_padded; j < (h + 1) * at.half_padded; j += F::kLanes) {
    const V a = Sim::kBilinear ? V{} : load<V>(factor + j);
    const V term = Sim::template term<h, F>(difference<Sim, h>(load<V>(query + j), a, load<V>(candidate + j)));
    store(terms + j, term);
    sum += term;
  }
  return horizontal_sum<F>(sum);
}

// The same if a term is a function of both halves. Writes the terms, and the differences that they are functions of,
// unless these are null.
template <class F, class Sim>
EMU_INLINE typename F::Real coupled_terms(const Layout<Sim>& at, const typename F::Real* query,
                                          const typename F::Real* factor, const typename F::Real* candidate,
                                          typename F::Real* differences, typename F::Real* terms) {
  using V = typename F::V;
  V sum = {};
  for (int64_t j = 0; j < at.half_padded; j += F::kLanes) {
    V u[2];
    for (int h = 0; h < 2; ++h) {
      const int64_t i = h * at.half_padded + j;
      u[h] = difference<Sim, 0>(load<V>(query + i), load<V>(factor + i), load<V>(candidate + i));
      if (differences != nullptr) store(differences + i, u[h]);
    }
    const V term = Sim::template term<F>(u[0], u[1]);
    sum += term;
    if (terms != nullptr) store(terms + j, term);
  }
  return horizontal_sum<F>(sum);
}

template <class F, class Sim, Mode kMode>
EMU_INLINE void score_positive(RowScratch<F, Sim, kMode>& s, const Layout<Sim>& at) {
  using V = typename F::V;
  if constexpr (Sim::kCoupled) {
    s.positive_value[0] = coupled_terms<F>(at, s.query, s.factor, s.positive, s.positive_term,
                                           kMode == kMoments ? s.own_term : static_cast<typename F::Real*>(nullptr));
  } else {
    s.positive_value[0] = half_terms<F, Sim, 0>(at, s.query, s.factor, s.positive, s.positive_term);
    if constexpr (Sim::kHalves > 1) {
      s.positive_value[1] = half_terms<F, Sim, 1>(at, s.query, s.factor, s.positive, s.positive_term);
    }
  }
  if constexpr (kMode == kMoments) {
    for (int i = 0; i < at.kSums; ++i) {
      V taken = {};
      for (int64_t j = i * at.half_padded; j < (i + 1) * at.half_padded; j += F::kLanes) {
        taken = F::fma(1 - load<V>(s.keep + j), load<V>(s.own_term + j), taken);
      }
      s.from_positive[i] = horizontal_sum<F>(taken);
    }
  }
}

template <class F, class Sim, class Body>
EMU_INLINE void for_moments(const Problem& p, const RowScratch<F, Sim, kMoments>& s, Body&& body) {
  using V = typename F::V;
  const typename F::Real* weights = static_cast<const typename F::Real*>(p.weights);
  for (int i = 0; i < Sums<Sim>::kCount; ++i) {
    const V w = F::broadcast(Sim::kWeights > 0 && weights != nullptr ? weights[i] : 1);
    for (int64_t k = 0; k < p.K; k += F::kLanes) {  // the arrays are padded to whole vectors
      const V m = load<V>(s.mutated_value[i] + k), v = load<V>(s.variance[i] + k);
      if (Sim::root(i)) {
        body(i, k, w, moments_of_root(m, v, F::inverse_root(m)));
      } else {
        body(i, k, w, Moments<V>{m, v, V{} + 1, V{}, V{}, V{} + 2});
      }
    }
  }
}

// From each sum's M and V to the means and cumulants of the scores.
template <class F, class Sim>
static void finish_moments(const Problem& p, RowScratch<F, Sim, kMoments>& s) {
  using V = typename F::V;
  for (int i = 0; i < Sums<Sim>::kCount; ++i) {
    const V taken = F::broadcast(s.from_positive[i]);
    for (int64_t k = 0; k < p.K; k += F::kLanes) {
      V m = load<V>(s.mutated_value[i] + k);
      if (s.uniform) {
        m = load<V>(s.plain_value[i] + k) * s.uniform_keep;
        store(s.variance[i] + k, load<V>(s.variance[i] + k) * s.uniform_spread);
      }
      store(s.mutated_value[i] + k, m + taken);
    }
  }
  for_moments<F, Sim>(p, s, [&](int i, int64_t k, V w, const Moments<V>& of) {
    V mean = w * of.mean, half = w * w * of.variance * static_cast<typename F::Real>(0.5);
    if (i > 0) mean += load<V>(s.mutated + k), half += load<V>(s.cumulant + k);
    store(s.mutated + k, mean);
    store(s.cumulant + k, half);
  });
  for (int64_t k = 0; k < p.K; k += F::kLanes) {
    store(s.cumulant + k, load<V>(s.mutated + k) + load<V>(s.cumulant + k));
  }
}

// From the weights of means and cumulants to those of each sum's M and V/2; adds to the gradient of w.
template <class F, class Sim>
static void finish_moment_weights(const Problem& p, RowScratch<F, Sim, kMoments>& s, typename F::Real* grad_weights) {
  using V = typename F::V;
  const auto half = static_cast<typename F::Real>(0.5);
  V of_weight[Sums<Sim>::kCount] = {};
  for_moments<F, Sim>(p, s, [&](int i, int64_t k, V w, const Moments<V>& of) {
    const V of_cumulant = load<V>(s.cumulant + k), of_mean = load<V>(s.mutated + k) + of_cumulant;
    const V of_variance = of_cumulant * half;
    V weight = w * (of_mean * of.mean_by_m + w * of_variance * of.variance_by_m);
    V variance_weight = w * (of_mean * of.mean_by_v + w * of_variance * of.variance_by_v);
    const V product = of_mean * of.mean + 2 * w * of_variance * of.variance;
    const int64_t real = min64(F::kLanes, p.K - k);  // lanes beyond these hold garbage
    for (int64_t lane = 0; lane < real; ++lane) of_weight[i][lane] += product[lane];
    store(s.mutated_weight[i] + k, weight);
    store(s.variance_weight[i] + k, variance_weight);
  });
  if (grad_weights == nullptr) return;
  for (int i = 0; i < Sums<Sim>::kCount; ++i) grad_weights[i] += horizontal_sum<F>(of_weight[i]);
}

// From sums to scores: Σ_s w_s S_s. Leaves in `weight` the derivatives of the scores by the sums (for a root, minus
// those by half of the sums), and returns the positive's score.
template <class F, class Sim, Mode kMode>
static typename F::Real finish_scores(const Problem& p, RowScratch<F, Sim, kMode>& s) {
  using Real = typename F::Real;
  constexpr int kSums = Sums<Sim>::kCount;
  if constexpr (kMode == kMoments) finish_moments<F, Sim>(p, s);
  if constexpr (Sums<Sim>::kDirect) {
    if (Sim::kCoupled) copy(s.plain, s.plain_value[0], p.K);
    if (Sim::kCoupled && kMode != kPlain && kMode != kMoments) copy(s.mutated, s.mutated_value[0], p.K);
    return s.positive_value[0];
  } else {
    using V = typename F::V;
    const Real* weights = static_cast<const Real*>(p.weights);
    Real positive = 0;
    for (int i = 0; i < kSums; ++i) {
      const Real w = Sim::kWeights > 0 && weights != nullptr ? weights[i] : Real{1};
      const V w_v = F::broadcast(w);
      const auto finish = [&](V& value, V& weight) {
        weight = w_v;
        if (Sim::root(i)) {
          const V inverse = F::inverse_root(value);
          value = -(value * inverse);
          weight = w_v * inverse;
        }
      };
      const auto finish_all = [&](Real* score, Real* values, Real* weights_of) {
        for (int64_t k = 0; k < p.K; k += F::kLanes) {  // the arrays are padded to whole vectors
          V value = load<V>(values + k), weight;
          finish(value, weight);
          store(values + k, value);
          store(weights_of + k, weight);
          store(score + k, i > 0 ? load<V>(score + k) + w_v * value : w_v * value);
        }
      };
      V value = F::broadcast(s.positive_value[i]), weight;
      finish(value, weight);
      s.positive_value[i] = value[0];
      s.positive_weight[i] = weight[0];
      positive += w * value[0];
      finish_all(s.plain, s.plain_value[i], s.plain_weight[i]);
      if (kMode != kPlain && kMode != kMoments) finish_all(s.mutated, s.mutated_value[i], s.mutated_weight[i]);
    }
    return positive;
  }
}

// From the weights of scores (in scratch.plain and .mutated) to those of the sums, and the gradient of w.
template <class F, class Sim, Mode kMode>
static void finish_weights(const Problem& p, RowScratch<F, Sim, kMode>& s, typename F::Real positive_weight,
                           typename F::Real* grad_weights) {
  using Real = typename F::Real;
  using V = typename F::V;
  if constexpr (Sums<Sim>::kDirect) {
    s.positive_weight[0] = positive_weight;
    if constexpr (kMode == kMoments) finish_moment_weights<F, Sim>(p, s, nullptr);
    return;
  }
  for (int i = 0; i < Sums<Sim>::kCount; ++i) {
    Real sum = positive_weight * s.positive_value[i];
    s.positive_weight[i] *= positive_weight;
    const auto apply = [&](const Real* of_score, const Real* values, Real* weights) {
      for (int64_t k = 0; k < p.K; k += F::kLanes) {
        store(weights + k, load<V>(weights + k) * load<V>(of_score + k));
      }
      if (grad_weights == nullptr) return;
      for (int64_t k = 0; k < p.K; ++k) sum += of_score[k] * values[k];
    };
    apply(s.plain, s.plain_value[i], s.plain_weight[i]);
    if (kMode != kPlain && kMode != kMoments) apply(s.mutated, s.mutated_value[i], s.mutated_weight[i]);
    if (grad_weights != nullptr) grad_weights[i] = sum;
  }
  if constexpr (kMode == kMoments) finish_moment_weights<F, Sim>(p, s, grad_weights);
}

// The sums of row b's negatives from, ..., from + count − 1, which fill a tile.
template <class F, class Sim, Mode kMode>
static void score_tile(const Problem& p, const Random& random, RowScratch<F, Sim, kMode>& s, int64_t b, int64_t from,
                       int64_t count) {
  const Layout<Sim> at(p.D);
  s.tile.stream(p, random, b / p.rows_per_group(), b, from, count, [&](int64_t k, int64_t n) {
    const int64_t end = k + n;
    for (; k + 4 <= end; k += 4) score_rows<F, Sim, kMode, 4>(s, at, k, from + k);
    for (; k < end; ++k) score_rows<F, Sim, kMode, 1>(s, at, k, from + k);
  });
}

// Scores of row b into scratch.plain and scratch.mutated; returns s⁺.
template <class F, class Sim, Mode kMode>
static typename F::Real score_row(const Problem& p, const Random& random, RowScratch<F, Sim, kMode>& s, int64_t b) {
  score_positive<F, Sim, kMode>(s, Layout<Sim>(p.D));
  for (int64_t from = 0; from < p.K; from += s.tile.capacity) {
    score_tile<F, Sim, kMode>(p, random, s, b, from, min64(s.tile.capacity, p.K - from));
  }
  return finish_scores<F, Sim, kMode>(p, s);
}

// Sets the scores of padding to −inf; returns how many negatives are real.
template <class F, class Sim, Mode kMode>
static int64_t blank_padding(const Problem& p, int64_t b, RowScratch<F, Sim, kMode>& s) {
  const int64_t* ids = p.negative + b / p.rows_per_group() * p.K;
  int64_t real = 0;
  for (int64_t k = 0; k < p.K; ++k) real += ids[k] >= 0;
  if (real == p.K) return real;
  for (int64_t k = 0; k < p.K; ++k) {
    if (ids[k] >= 0) continue;
    s.plain[k] = -static_cast<typename F::Real>(__builtin_inf());
    if (kMode != kPlain) s.mutated[k] = s.plain[k];
    if (kMode == kMoments) s.cumulant[k] = s.plain[k];
  }
  return real;
}
