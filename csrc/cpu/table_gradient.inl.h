// Entity-major: the gradient of the table; each touched row is written once, or stepped by an optimizer instead.

constexpr int64_t kPiecePairs = 2048;  // contributions that one task sums
constexpr int kBuffer = 64;            // contributions whose masks and weights are kept at a time

// Contributions to rows of the table: from negative k of row b, or (k = −1) from row b's positive.
template <class F, class Sim>
struct Pairs {
  using Real = typename F::Real;
  static constexpr int kSums = Sums<Sim>::kCount;
  uint32_t key[kBuffer];
  int64_t row[kBuffer];
  int64_t k[kBuffer];
  Real plain[kSums][kBuffer];     // g_b w_bk
  Real mutated[kSums][kBuffer];   // g_b ŵ_bk; for kSelect g_b (w_bk + ŵ_bk)
  Real variance[kSums][kBuffer];  // for kMoments: g_b v_bk
  Real shares[kBuffer];           // for kShare
  uint8_t* masks;                 // (kBuffer, mask_row)
  int count;
};

// Padded rows of all queries, of the candidates' factors and, if candidates are mixed with them, of positives.
template <class Real>
struct RowData {
  Real *queries, *factors, *positives;  // (B, row)
  Real *own_terms, *keep, *spread;      // with moments: the positives' terms p, 1 − ρ and ρ (1 − ρ)
  int64_t factor_stride, rate_stride;   // 0 if all rows share one
};

template <class Sim, Mode kMode>
constexpr bool kNeedsCandidate = !Sim::kBilinear || kMode == kMoments;

// sum += Σ over pairs of (w + ŵ (1 − λ)) ∂φ/∂c, for N vectors of half h's components from component j on.
// If all components have the same rate (kUniform), `plain` is g (w + ŵ (1 − ρ)) and `variance` is g v ρ (1 − ρ).
template <class F, class Sim, Mode kMode, int h, int N, bool kUniform>
static void accumulate_candidate(const Pairs<F, Sim>& pairs, int from, int to, const RowData<typename F::Real>& rows,
                                 const Layout<Sim>& at, int64_t j, const typename F::Real* candidate,
                                 typename F::Real* sum) {
  using V = typename F::V;
  const int64_t first = h * at.half_padded + j;
  V s[N], c[N];
  for (int n = 0; n < N; ++n) {
    s[n] = load<V>(sum + first + n * F::kLanes);
    c[n] = kNeedsCandidate<Sim, kMode> ? load<V>(candidate + first + n * F::kLanes) : V{};
  }
  for (int i = from; i < to; ++i) {
    V w = F::broadcast(pairs.plain[h][i]);
    const V hat = kMode != kPlain ? F::broadcast(pairs.mutated[h][i]) : V{};
    const V share = kMode == kShare ? F::broadcast(pairs.shares[i]) : V{};
    if (Sim::kBilinear && kMode == kShare) w += hat * share;
    const V of_variance = kMode == kMoments ? F::broadcast(pairs.variance[h][i]) : V{};
    const typename F::Real* own_term = rows.own_terms + pairs.row[i] * at.row + first;
    const typename F::Real* keep = rows.keep + pairs.row[i] * rows.rate_stride + first;
    const typename F::Real* spread = rows.spread + pairs.row[i] * rows.rate_stride + first;
    const typename F::Real* query = rows.queries + pairs.row[i] * at.row + first;
    const typename F::Real* factor = rows.factors + pairs.row[i] * rows.factor_stride + first;
    for (int n = 0; n < N; ++n) {
      const V q = load<V>(query + n * F::kLanes);
      V d = q, a = {};
      if constexpr (!Sim::kBilinear) {
        a = load<V>(factor + n * F::kLanes);
        d = a * Sim::template slope<h, F>(difference<Sim, h>(q, a, c[n]));
      }
      if constexpr (kMode == kSelect) {
        const auto mask = F::load_mask(pairs.masks + i * at.mask_row + h * at.half + j + n * F::kLanes);
        s[n] = F::fma(F::select(mask, w, hat), d, s[n]);
      } else if constexpr (kMode == kMoments) {
        const int64_t l = n * F::kLanes;
        V gap;
        if constexpr (Sim::kBilinear) {
          gap = F::fma(q, c[n], -load<V>(own_term + l));
        } else {
          gap = Sim::template term<h, F>(difference<Sim, h>(q, a, c[n])) - load<V>(own_term + l);
        }
        V x = F::fma(of_variance, gap, w);
        if (!kUniform) x = F::fma(load<V>(spread + l), of_variance * gap, F::fma(load<V>(keep + l), hat, w));
        s[n] = F::fma(x, d, s[n]);
      } else {
        s[n] = F::fma(w, d, s[n]);
      }
      if constexpr (kMode == kShare && !Sim::kBilinear) {
        const V positive = load<V>(rows.positives + pairs.row[i] * at.row + first + n * F::kLanes);
        const V mixed = mix(positive, c[n], share);
        s[n] = F::fma(hat * share, a * Sim::template slope<h, F>(difference<Sim, h>(q, a, mixed)), s[n]);
      }
    }
  }
  for (int n = 0; n < N; ++n) store(sum + first + n * F::kLanes, s[n]);
}

template <class F, class Sim, Mode kMode, int N>
static void accumulate_candidate_coupled(const Pairs<F, Sim>& pairs, int from, int to,
                                         const RowData<typename F::Real>& rows, const Layout<Sim>& at, int64_t j,
                                         const typename F::Real* candidate, typename F::Real* sum) {
  using V = typename F::V;
  const int64_t first[2] = {j, at.half_padded + j};
  V s[2][N], c[2][N];
  for (int h = 0; h < 2; ++h) {
    for (int n = 0; n < N; ++n) {
      s[h][n] = load<V>(sum + first[h] + n * F::kLanes);
      c[h][n] = load<V>(candidate + first[h] + n * F::kLanes);
    }
  }
  for (int i = from; i < to; ++i) {
    const V w = F::broadcast(pairs.plain[0][i]);
    const V hat = kMode != kPlain ? F::broadcast(pairs.mutated[0][i]) : V{};
    const V share = kMode == kShare ? F::broadcast(pairs.shares[i]) : V{};
    const typename F::Real* query = rows.queries + pairs.row[i] * at.row;
    const typename F::Real* factor = rows.factors + pairs.row[i] * rows.factor_stride;
    const typename F::Real* positives = rows.positives + pairs.row[i] * at.row;
    const V of_variance = kMode == kMoments ? F::broadcast(pairs.variance[0][i]) : V{};
    const typename F::Real* own_term = rows.own_terms + pairs.row[i] * at.row + j;
    const typename F::Real* keep = rows.keep + pairs.row[i] * rows.rate_stride + j;
    const typename F::Real* spread = rows.spread + pairs.row[i] * rows.rate_stride + j;
    for (int n = 0; n < N; ++n) {
      const int64_t l = n * F::kLanes;
      V u[2], mixed[2], slope[2], mixed_slope[2];
      for (int h = 0; h < 2; ++h) {
        const V q = load<V>(query + first[h] + l), a = load<V>(factor + first[h] + l);
        u[h] = difference<Sim, 0>(q, a, c[h][n]);
        if (kMode == kPlain || kMode == kMoments) continue;
        const V positive = load<V>(positives + first[h] + l);
        if (kMode == kMask) {
          const auto mask = F::load_mask(pairs.masks + i * at.mask_row + h * at.half + j + l);
          mixed[h] = difference<Sim, 0>(q, a, F::select(mask, positive, c[h][n]));
        } else {
          mixed[h] = difference<Sim, 0>(q, a, mix(positive, c[h][n], share));
        }
      }
      V x = w;
      if constexpr (kMode == kMoments) {
        const V square = u[0] * u[0] + u[1] * u[1], inverse = Sim::template inverse<F>(square);
        const V pull = of_variance * (Sim::value(square, inverse) - load<V>(own_term + l));
        x = F::fma(load<V>(spread + l), pull, F::fma(load<V>(keep + l), hat, w));
        for (int h = 0; h < 2; ++h) slope[h] = u[h] * inverse;
      } else {
        Sim::template slopes<F>(u[0], u[1], slope[0], slope[1]);
        if (kMode != kPlain) Sim::template slopes<F>(mixed[0], mixed[1], mixed_slope[0], mixed_slope[1]);
      }
      for (int h = 0; h < 2; ++h) {
        s[h][n] = F::fma(x, slope[h], s[h][n]);
        if (kMode == kMask) {
          const auto mask = F::load_mask(pairs.masks + i * at.mask_row + h * at.half + j + l);
          s[h][n] = F::fma(F::select(mask, V{}, hat), mixed_slope[h], s[h][n]);
        } else if (kMode == kShare) {
          s[h][n] = F::fma(hat * share, mixed_slope[h], s[h][n]);
        }
      }
    }
  }
  for (int h = 0; h < 2; ++h) {
    for (int n = 0; n < N; ++n) store(sum + first[h] + n * F::kLanes, s[h][n]);
  }
}

template <class F, class Sim, Mode kMode>
struct TableGradient {
  using Real = typename F::Real;
  using V = typename F::V;
  using More = typename RowStep<F>::More;

  const Problem& p;
  const TableGradientArgs& a;
  const Random random;
  const Layout<Sim> at;
  const RowStep<F> step;
  const bool uniform;  // whether moments have the same rate for all components
  const int64_t group_rows, entries_per_piece, pieces;
  const uint64_t* sorted;
  const int64_t size;
  // A piece is a fixed number of sorted entries, so its sums do not depend on the number of threads. A segment that
  // spans several pieces leaves partial sums, which are added up in order at the end.
  Scratch rows_memory, partials_memory, ordinals_memory, slots_memory;
  RowData<Real> rows;
  Real* partials;     // (pieces, 2, row): of the first and of the last segment
  int64_t* ordinals;  // (pieces,) the index, among touched rows, of the row that a piece begins in

  TableGradient(const Problem& problem, const TableGradientArgs& args)
      : p(problem),
        a(args),
        random(problem.draws, problem.D),
        at(problem.D),
        step(problem, args.step),
        uniform(kMode == kMoments && !Sim::kCoupled && problem.draws.rate_units == 1 && problem.draws.rate_rows == 1),
        group_rows(problem.rows_per_group()),
        entries_per_piece(max64(1, kPiecePairs / max64(1, problem.rows_per_group()))),
        pieces((args.sorted_size + entries_per_piece - 1) / entries_per_piece),
        sorted(static_cast<const uint64_t*>(args.sorted)),
        size(args.sorted_size),
        rows_memory(1, row_bytes(nullptr)),
        partials_memory(1, pieces * 2 * at.row * static_cast<int64_t>(sizeof(Real))),
        ordinals_memory(1, pieces * 8),
        slots_memory(problem.place.threads, slot_bytes()) {
    row_bytes(rows_memory.slot(0));
    partials = reinterpret_cast<Real*>(partials_memory.slot(0));
    ordinals = reinterpret_cast<int64_t*>(ordinals_memory.slot(0));
  }

  static constexpr bool kMixed = (kMode == kMask || kMode == kShare) && !Sim::kBilinear;
  static constexpr bool kCandidate = kNeedsCandidate<Sim, kMode>;

  // Lays out `rows` from base on, if it is not null; returns the bytes that they take.
  int64_t row_bytes(uint8_t* base) {
    Carver carver{base};
    rows.queries = carver.take<Real>(p.B * at.row);
    rows.factor_stride = p.scale != nullptr ? at.row : 0;
    rows.factors = carver.take<Real>((p.scale != nullptr ? p.B : 1) * at.row);
    rows.positives = carver.take<Real>(kMixed ? p.B * at.row : 0);
    rows.own_terms = carver.take<Real>(kMode == kMoments ? p.B * at.row : 0);
    rows.rate_stride = kMode == kMoments && p.draws.rate_rows > 1 ? at.row : 0;
    const int64_t rates = kMode != kMoments ? 0 : (rows.rate_stride > 0 ? p.B : 1) * at.row;
    rows.keep = carver.take<Real>(rates);
    rows.spread = carver.take<Real>(rates);
    return carver.used;
  }

  int64_t slot_bytes() const {
    return static_cast<int64_t>(sizeof(Pairs<F, Sim>)) + 256 + (masked(kMode) ? kBuffer * at.mask_row : 0) +
           3 * at.row * static_cast<int64_t>(sizeof(Real));
  }

  // Loads what moments need of row b. `own` is a padded row of zeros, for the positive.
  void load_moments(int64_t b, Real* own) {
    gather<F, Sim>(p, at, p.positive[b], own);
    const Real *query = rows.queries + b * at.row, *factor = rows.factors + b * rows.factor_stride;
    Real* terms = rows.own_terms + b * at.row;
    if constexpr (Sim::kCoupled) {
      coupled_terms<F>(at, query, factor, own, static_cast<Real*>(nullptr), terms);
    } else {
      half_terms<F, Sim, 0>(at, query, factor, own, terms);
      if constexpr (Sim::kHalves > 1) half_terms<F, Sim, 1>(at, query, factor, own, terms);
    }
    if (b > 0 && rows.rate_stride == 0) return;
    load_rates(p, at, b, rows.keep + b * rows.rate_stride, rows.spread + b * rows.rate_stride);
  }

  void run() {
    const size_t row_size = sizeof(Real) * static_cast<size_t>(at.row);
    if (!Sim::kBilinear && p.scale == nullptr) {
      __builtin_memset(rows.factors, 0, row_size);
      load_factor<F, Sim>(p, at, 0, rows.factors);
    }
    parallel(p.place.threads, (p.B + 63) / 64, [&](int64_t block, int slot) {
      Real* own = reinterpret_cast<Real*>(slots_memory.slot(slot));
      if (kMode == kMoments) __builtin_memset(own, 0, row_size);
      for (int64_t b = block * 64; b < min64(p.B, block * 64 + 64); ++b) {
        __builtin_memset(rows.queries + b * at.row, 0, row_size);
        load_query<F, Sim>(p, at, b, rows.queries + b * at.row);
        if (!Sim::kBilinear && p.scale != nullptr) {
          __builtin_memset(rows.factors + b * at.row, 0, row_size);
          load_factor<F, Sim>(p, at, b, rows.factors + b * at.row);
        }
        if (kMixed) {
          __builtin_memset(rows.positives + b * at.row, 0, row_size);
          gather<F, Sim>(p, at, p.positive[b], rows.positives + b * at.row);
        }
        if constexpr (kMode == kMoments) load_moments(b, own);
      }
    });
    if (a.ids != nullptr) {
      int64_t ordinal = -1;
      for (int64_t e = 0; e < size; ++e) {
        ordinal += e == 0 || key_at(e) != key_at(e - 1);
        if (e % entries_per_piece == 0) ordinals[e / entries_per_piece] = ordinal;
      }
    } else if (size == 0) {
      More more{0, reinterpret_cast<Real*>(slots_memory.slot(0))};
      fill_gap(0, p.N, more);
    }
    parallel(p.place.threads, pieces, [&](int64_t piece, int slot) { sum_piece(piece, slot); });
    join_partials();
  }

  uint32_t key_at(int64_t e) const { return static_cast<uint32_t>(sorted[e] >> 32); }
  int64_t begin(int64_t piece) const { return piece * entries_per_piece; }
  int64_t end(int64_t piece) const { return min64(size, begin(piece) + entries_per_piece); }
  // Whether the piece's first segment began in the piece before; whether its last one goes on in the piece after.
  bool continues(int64_t piece) const { return begin(piece) > 0 && key_at(begin(piece) - 1) == key_at(begin(piece)); }
  bool goes_on(int64_t piece) const { return end(piece) < size && key_at(end(piece)) == key_at(end(piece) - 1); }
  bool one_segment(int64_t piece) const { return key_at(begin(piece)) == key_at(end(piece) - 1); }

  // Zeroes the rows between two touched ones; with an optimizer, steps those that have further gradients instead.
  void fill_gap(int64_t from, int64_t to, More& more) {
    if (step.is_on()) return step.run_until(at, to, more);
    const int64_t bytes_a_row = p.D * element_size(p.dtype);
    if (to > from) {
      __builtin_memset(static_cast<char*>(a.out) + from * bytes_a_row, 0,
                       static_cast<size_t>((to - from) * bytes_a_row));
    }
  }

  void write(uint32_t key, int64_t ordinal, Real* sum, More& more) {
    if (step.is_on()) return step.run_with(at, key, sum, more);
    if (a.ids != nullptr) a.ids[ordinal] = key;
    const int64_t to = (a.ids != nullptr ? ordinal : static_cast<int64_t>(key)) * p.D;
    for (int h = 0; h < at.H; ++h) {
      write_row(p.dtype, a.out, to + h * at.half, sum + h * at.half_padded, at.half);
    }
  }

  void sum_piece(int64_t piece, int slot) {
    Carver carver{slots_memory.slot(slot)};
    Pairs<F, Sim>& pairs = *carver.take<Pairs<F, Sim>>(1);
    pairs.masks = carver.take<uint8_t>(masked(kMode) ? kBuffer * at.mask_row : 0);
    Real* sum = carver.take<Real>(at.row);
    Real* candidate = carver.take<Real>(at.row);
    Real* gap = carver.take<Real>(at.row);

    const int64_t first = begin(piece), last = end(piece);
    int64_t ordinal = a.ids != nullptr ? ordinals[piece] : 0;
    uint32_t key = key_at(first);
    bool at_first = true;
    const int64_t after = first > 0 ? key_at(first - 1) + int64_t{1} : 0;
    More more{step.find(after), gap};
    if (a.ids == nullptr && !continues(piece)) fill_gap(after, key, more);
    const size_t row_size = sizeof(Real) * static_cast<size_t>(at.row);
    __builtin_memset(sum, 0, row_size);
    __builtin_memset(candidate, 0, row_size);
    if (kCandidate) gather<F, Sim>(p, at, key, candidate);

    int64_t entry = first, row_in_group = 0;
    while (entry < last) {
      fill(pairs, entry, row_in_group, last);
      for (int from = 0, to; from < pairs.count; from = to) {
        for (to = from + 1; to < pairs.count && pairs.key[to] == pairs.key[from];) ++to;
        if (pairs.key[from] != key) {
          finish_segment(piece, key, ordinal, at_first, false, sum, more);
          if (a.ids == nullptr) fill_gap(key + int64_t{1}, pairs.key[from], more);
          key = pairs.key[from];
          ++ordinal;
          at_first = false;
          __builtin_memset(sum, 0, row_size);
          if (kCandidate) gather<F, Sim>(p, at, key, candidate);
        }
        add_run(pairs, from, to, candidate, sum);
      }
    }
    finish_segment(piece, key, ordinal, at_first, true, sum, more);
    if (a.ids == nullptr && last == size) fill_gap(key + int64_t{1}, p.N, more);
  }

  void finish_segment(int64_t piece, uint32_t key, int64_t ordinal, bool is_first, bool is_last, Real* sum,
                      More& more) {
    if (is_first && continues(piece)) {
      copy(partials + piece * 2 * at.row, sum, at.row);
    } else if (is_last && goes_on(piece)) {
      copy(partials + (piece * 2 + 1) * at.row, sum, at.row);
    } else {
      write(key, ordinal, sum, more);
    }
  }

  // Reads the next contributions, at most kBuffer, with their weights and masks.
  void fill(Pairs<F, Sim>& pairs, int64_t& entry, int64_t& row_in_group, int64_t last) {
    const Real* weight = static_cast<const Real*>(a.weight);
    const Real* mutated_weight = static_cast<const Real*>(a.mutated_weight);
    const Real* scale = static_cast<const Real*>(a.row_scale);
    const int64_t negatives = p.G * p.K;
    int n = 0;
    while (n < kBuffer && entry < last) {
      const uint32_t e = static_cast<uint32_t>(sorted[entry]);
      pairs.key[n] = key_at(entry);
      if (e >= negatives) {
        pairs.row[n] = e - negatives;
        pairs.k[n] = -1;
        ++entry;
      } else {
        const uint32_t g = e / static_cast<uint32_t>(p.K);
        const int64_t k = e - int64_t{g} * p.K, row = g * group_rows + row_in_group;
        pairs.row[n] = row;
        pairs.k[n] = k;
        for (int i = 0; i < at.kSums; ++i) {
          const int64_t from = (i * p.B + row) * p.K + k;
          pairs.plain[i][n] = scale[row] * weight[from];
          if (kMode == kSelect) pairs.mutated[i][n] = scale[row] * (weight[from] + mutated_weight[from]);
          if (kMode == kMask || kMode == kShare || kMode == kMoments) {
            pairs.mutated[i][n] = scale[row] * mutated_weight[from];
          }
          if (kMode == kMoments) {
            pairs.variance[i][n] = scale[row] * static_cast<const Real*>(a.variance_weight)[from];
            if (uniform) {
              pairs.plain[i][n] += rows.keep[0] * pairs.mutated[i][n];
              pairs.variance[i][n] *= rows.spread[0];
            }
          }
        }
        __builtin_prefetch(rows.queries + row * at.row);
        if (kMode == kMoments) __builtin_prefetch(rows.own_terms + row * at.row);
        if (++row_in_group == group_rows) row_in_group = 0, ++entry;
      }
      ++n;
    }
    pairs.count = n;
    if (kMode == kPlain || kMode == kMoments) return;
    for (int i = 0; i < n; i += kMaskLanes) {
      U64 k, row;
      for (int lane = 0; lane < kMaskLanes; ++lane) {
        const int at = i + lane < n ? i + lane : n - 1;
        k[lane] = static_cast<uint64_t>(pairs.k[at]);
        row[lane] = p.draws.row_offset + static_cast<uint64_t>(pairs.row[at]);
      }
      if (masked(kMode)) random.draw_masks(k, row, pairs.masks + i * at.mask_row, at.mask_row);
      if (kMode == kShare) random.template draw_shares<F>(k, row, pairs.shares + i);
    }
  }

  // Adds contributions from, ..., to − 1, all of one segment, in which negatives come before positives.
  void add_run(const Pairs<F, Sim>& pairs, int from, int to, const Real* candidate, Real* sum) {
    int negatives = from;
    while (negatives < to && pairs.k[negatives] >= 0) ++negatives;
    if (negatives > from) {
      if (uniform) {
        add_negatives<kMode == kMoments>(pairs, from, negatives, candidate, sum);
      } else {
        add_negatives<false>(pairs, from, negatives, candidate, sum);
      }
    }
    for (int i = negatives; i < to; ++i) {
      const Real scale = static_cast<const Real*>(a.row_scale)[pairs.row[i]];
      const Real* own = static_cast<const Real*>(a.grad_positive) + pairs.row[i] * p.D;
      for (int h = 0; h < at.H; ++h) {
        for (int64_t j = 0; j < at.half; ++j) sum[h * at.half_padded + j] += scale * own[h * at.half + j];
      }
    }
  }

  template <bool kUniform>
  void add_negatives(const Pairs<F, Sim>& pairs, int from, int to, const Real* candidate, Real* sum) {
    const int64_t vectors = (at.half + F::kLanes - 1) / F::kLanes;
    for_blocks<accumulators<Sim, kMode>()>(vectors, [&](int64_t first, auto n) {
      constexpr int N = decltype(n)::value;
      const int64_t j = first * F::kLanes;
      if constexpr (Sim::kCoupled) {
        accumulate_candidate_coupled<F, Sim, kMode, N>(pairs, from, to, rows, at, j, candidate, sum);
      } else {
        accumulate_candidate<F, Sim, kMode, 0, N, kUniform>(pairs, from, to, rows, at, j, candidate, sum);
        if constexpr (Sim::kHalves > 1) {
          accumulate_candidate<F, Sim, kMode, 1, N, kUniform>(pairs, from, to, rows, at, j, candidate, sum);
        }
      }
    });
  }

  void join_partials() {
    Real* sum = nullptr;
    for (int64_t piece = 0; piece < pieces; ++piece) {
      Real* head = partials + piece * 2 * at.row;
      const bool through = one_segment(piece) && goes_on(piece);
      if (continues(piece)) {
        for (int64_t j = 0; j < at.row; ++j) sum[j] += head[j];
        if (!through) {
          const uint32_t key = key_at(begin(piece));
          More more{step.find(key), nullptr};
          write(key, a.ids != nullptr ? ordinals[piece] : 0, sum, more);
        }
      }
      if (goes_on(piece) && !(one_segment(piece) && continues(piece))) sum = head + at.row;
    }
  }
};

template <class F, class Sim, Mode kMode>
static void table_gradient(const Problem& p, const TableGradientArgs& a) {
  TableGradient<F, Sim, kMode>(p, a).run();
}
