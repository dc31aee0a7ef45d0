// The CPU kernels, compiled once for each instruction set (see vec.h for the rules that follow from that).
//
// Forward, row by row: gather a row's negatives into a tile that stays in the cache, draw its masks, score,
// softmax, and, from the same tile, the gradients of the query and of the positive. Backward, entity by
// entity over sorted segments, with the masks drawn again: each touched row is written once.

constexpr int64_t kTileBytes = 256 * 1024;  // of a gathered tile: half of a common L2 cache
constexpr int kAccumulators = 6;            // vectors of components summed in registers at a time
constexpr int kStreamRows = 8;    // gathered, masked and scored together
constexpr int kPrefetchRows = 8;  // ahead of them
constexpr int64_t kPrefetchBytes = 1024;  // of a row; the processor goes on by itself

// --- memory -----------------------------------------------------------------------------------------

// Scratch memory, one part a thread slot; freed at the end of the call.
class Scratch {
 public:
  Scratch(int slots, int64_t bytes_each) : stride_((bytes_each + 63) / 64 * 64) {
    base_ = static_cast<uint8_t*>(aligned_alloc(64, static_cast<size_t>(slots * stride_ + 64)));
    if (base_ == nullptr) throw_out_of_memory();
  }
  ~Scratch() { free(base_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  uint8_t* slot(int index) const { return base_ + index * stride_; }

 private:
  uint8_t* base_;
  int64_t stride_;
};

// Hands out aligned arrays of one slot, or counts their bytes where base is null.
struct Carver {
  uint8_t* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(base == nullptr ? nullptr : base + used);
    used += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return p;
  }
};

EMU_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
EMU_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
// Components padded to whole calls of the random number generator, which is whole vectors too.
EMU_INLINE int64_t padded(int64_t dim) { return (dim + 15) / 16 * 16; }

template <class F, class T>
EMU_INLINE void gather_row(typename F::Real* to, const T* from, int64_t dim) {
  int64_t j = 0;
  for (; j + F::kLanes <= dim; j += F::kLanes) store(to + j, load_wide(from + j));
  if (j == dim) return;
  if (dim >= F::kLanes) {  // the last vector overlaps the one before
    store(to + dim - F::kLanes, load_wide(from + dim - F::kLanes));
  } else {
    for (; j < dim; ++j) to[j] = widen(from[j]);
  }
}

// Calls body(pointer to the table's first element) with the pointer's true type.
template <class F, class Body>
EMU_INLINE void with_table(const Problem& p, Body&& body) {
  if constexpr (sizeof(typename F::Real) == 8) {
    body(static_cast<const double*>(p.table));
  } else {
    switch (p.dtype) {
      case DType::kBFloat16: return body(static_cast<const BFloat16*>(p.table));
      case DType::kHalf: return body(static_cast<const Half*>(p.table));
      default: return body(static_cast<const float*>(p.table));
    }
  }
}

EMU_INLINE int64_t element_size(DType dtype) {
  return dtype == DType::kDouble ? 8 : dtype == DType::kFloat ? 4 : 2;
}

EMU_INLINE void prefetch_row(const void* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(row) + i);
}

template <class Real>
static void write_row(DType dtype, void* out, int64_t at, const Real* from, int64_t dim) {
  if constexpr (sizeof(Real) == 8) {
    __builtin_memcpy(static_cast<double*>(out) + at, from, static_cast<size_t>(dim) * 8);
  } else {
    switch (dtype) {
      case DType::kBFloat16:
        for (int64_t j = 0; j < dim; ++j) narrow(from[j], static_cast<BFloat16*>(out) + at + j);
        return;
      case DType::kHalf:
        for (int64_t j = 0; j < dim; ++j) narrow(from[j], static_cast<Half*>(out) + at + j);
        return;
      default:
        __builtin_memcpy(static_cast<float*>(out) + at, from, static_cast<size_t>(dim) * 4);
    }
  }
}

// --- masks ------------------------------------------------------------------------------------------

constexpr int kMaskLanes = kVectorBytes / 8;  // (row, negative) pairs drawn at once

// One byte a component: 0xFF where mutated, else 0.
//
// The counter's words are (block, k, row, 0). After the first round two words depend on the block alone and
// two on (k, row) alone, so two of the rounds are done once a block and once a pair, not once for both.
class Masks {
 public:
  Masks(uint64_t seed, int threshold, int64_t dim)
      : threshold_(threshold), blocks_memory_(1, padded(dim) / kComponentsPerCall * int64_t{sizeof(Block)}) {
    for (int r = 0; r < kPhiloxRounds; ++r) {
      key0_[r] = U64{} + (static_cast<uint32_t>(seed) + static_cast<uint32_t>(r) * kPhiloxW0);
      key1_[r] = U64{} + (static_cast<uint32_t>(seed >> 32) + static_cast<uint32_t>(r) * kPhiloxW1);
    }
    blocks_ = reinterpret_cast<Block*>(blocks_memory_.slot(0));
    for (int64_t i = 0; i < padded(dim) / kComponentsPerCall; ++i) {
      const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * static_cast<uint32_t>(i);
      const uint64_t c2 = (p0 >> 32) ^ key1_[0][0];
      const uint64_t p1 = kPhiloxM1 * c2;
      blocks_[i] = {(p1 >> 32) ^ key0_[1][0], p1, (p0 & 0xFFFFFFFFu) ^ key1_[1][0]};
    }
  }

  // Masks of kMaskLanes pairs, `stride` bytes apart; k and row in 64-bit lanes.
  void draw(U64 k, U64 row, int64_t dim_padded, uint8_t* out, int64_t stride) const {
    if (threshold_ <= 0 || threshold_ >= 256) {
      for (int i = 0; i < kMaskLanes; ++i) {
        __builtin_memset(out + i * stride, threshold_ > 0 ? 0xFF : 0, static_cast<size_t>(dim_padded));
      }
      return;
    }
    const U64 p1 = multiply_low_halves(U64{} + kPhiloxM1, row);
    const U64 p0 = multiply_low_halves(U64{} + kPhiloxM0, (p1 >> 32) ^ k ^ key0_[0]);
    int64_t block = 0;
    for (; block + 2 <= dim_padded / kComponentsPerCall; block += 2) {
      draw_blocks<2>(block, p0, p1, out, stride);
    }
    for (; block < dim_padded / kComponentsPerCall; ++block) draw_blocks<1>(block, p0, p1, out, stride);
  }

 private:
  struct Block {  // what the second round adds to a pair's words
    uint64_t c0, c1, c2;
  };

  // Components 16·block .. 16·(block + N) − 1. Two independent chains hide the latency of one.
  template <int N>
  __attribute__((always_inline)) void draw_blocks(int64_t block, U64 pair_p0, U64 pair_p1, uint8_t* out,
                                                  int64_t stride) const {
    const U64 m0 = U64{} + kPhiloxM0, m1 = U64{} + kPhiloxM1;
    const U8 last = U8{} + static_cast<uint8_t>(threshold_ - 1);
    U64 c0[N], c1[N], c2[N], c3[N];
    for (int n = 0; n < N; ++n) {
      const Block& own = blocks_[block + n];
      c0[n] = pair_p1 ^ own.c0, c1[n] = U64{} + own.c1, c2[n] = (pair_p0 >> 32) ^ own.c2, c3[n] = pair_p0;
    }
    for (int r = 2; r < kPhiloxRounds; ++r) {
      for (int n = 0; n < N; ++n) {
        const U64 p0 = multiply_low_halves(m0, c0[n]), p1 = multiply_low_halves(m1, c2[n]);
        c0[n] = (p1 >> 32) ^ c1[n] ^ key0_[r];
        c1[n] = p1;
        c2[n] = (p0 >> 32) ^ c3[n] ^ key1_[r];
        c3[n] = p0;
      }
    }
    for (int n = 0; n < N; ++n) {
      store_pairs((U64)((U8)join_low_halves(c0[n], c1[n]) <= last),
                  (U64)((U8)join_low_halves(c2[n], c3[n]) <= last),
                  out + (block + n) * kComponentsPerCall, stride);
    }
  }

  U64 key0_[kPhiloxRounds], key1_[kPhiloxRounds];  // ready in every lane
  int threshold_;
  Scratch blocks_memory_;
  Block* blocks_;
};

// --- a tile of gathered negatives -----------------------------------------------------------------------

template <class F>
struct Tile {
  using Real = typename F::Real;
  Real* rows;      // (capacity, dim_padded), zero beyond D and where padding
  uint8_t* masks;  // (capacity rounded up to kMaskLanes, dim_padded)
  int64_t capacity;
  int64_t group = -1, first = -1, masked_row = -1;  // what the arrays hold now

  static int64_t rows_that_fit(const Problem& p) {
    const int64_t fit = kTileBytes / (padded(p.D) * static_cast<int64_t>(sizeof(Real)));
    return max64(16, min64(fit / 16 * 16, (p.K + 15) / 16 * 16));
  }

  void carve(const Problem& p, Carver& carver) {
    capacity = rows_that_fit(p);
    rows = carver.take<Real>(capacity * padded(p.D));
    masks = carver.take<uint8_t>(p.mutated() ? capacity * padded(p.D) : 0);
    if (rows != nullptr) __builtin_memset(rows, 0, sizeof(Real) * capacity * padded(p.D));
  }

  // Whether the arrays hold the negatives from `from` on of group g, with the masks of row b.
  bool holds(const Problem& p, int64_t g, int64_t b, int64_t from) const {
    return group == g && first == from && (!p.mutated() || masked_row == b);
  }

  // Makes the arrays hold them, a few at a time, and has body(k, n) use negatives k .. k + n of the tile
  // while they are in the L1.
  template <class Body>
  void stream(const Problem& p, const Masks& draw, int64_t g, int64_t b, int64_t from, int64_t count,
              Body&& body) {
    const bool gathered = group == g && first == from, complete = holds(p, g, b, from);
    group = g, first = from, masked_row = b;
    U64 lane;
    for (int i = 0; i < kMaskLanes; ++i) lane[i] = static_cast<uint64_t>(from + i);
    const U64 row = U64{} + (p.row_offset + static_cast<uint64_t>(b));
    for (int64_t k = 0; k < count; k += kStreamRows) {
      const int64_t n = min64(kStreamRows, count - k);
      if (!gathered) gather_rows(p, p.negative + g * p.K + from, k, n, count);
      if (p.mutated() && !complete) {
        for (int64_t i = k; i < k + n; i += kMaskLanes) {
          draw.draw(lane + static_cast<uint64_t>(i), row, padded(p.D), masks + i * padded(p.D),
                    padded(p.D));
        }
      }
      body(k, n);
    }
  }

  void gather_rows(const Problem& p, const int64_t* ids, int64_t k, int64_t n, int64_t count) {
    const int64_t dp = padded(p.D), ahead = min64(k + kPrefetchRows + n, count);
    with_table<F>(p, [&](auto* table) {
      const int64_t bytes = min64(p.D * static_cast<int64_t>(sizeof(*table)), kPrefetchBytes);
      for (int64_t i = k + kPrefetchRows; i < ahead; ++i) {
        if (ids[i] >= 0) prefetch_row(table + ids[i] * p.table_stride, bytes);
      }
      for (int64_t i = k; i < k + n; ++i) {
        if (ids[i] >= 0) {
          gather_row<F>(rows + i * dp, table + ids[i] * p.table_stride, p.D);
        } else {
          __builtin_memset(rows + i * dp, 0, sizeof(Real) * static_cast<size_t>(dp));
        }
      }
    });
  }
};

// --- scores -----------------------------------------------------------------------------------------

// Scores of R consecutive rows of a tile: Σ_j term(q, c) and, mutated, Σ_j of the positive's term where
// the mask says so. Two accumulators a score would be more; R = 4 rows hide the latency already.
template <class F, class Sim, bool kMutated, int R>
EMU_INLINE void score_rows(const typename F::Real* query, const typename F::Real* positive_term,
                           const typename F::Real* rows, const uint8_t* masks, int64_t dim,
                           typename F::Real* plain, typename F::Real* mutated) {
  using V = typename F::V;
  const int64_t dp = padded(dim);
  V sum[R] = {}, mutated_sum[R] = {};
  for (int64_t j = 0; j < dim; j += F::kLanes) {
    const V q = load<V>(query + j);
    const V from_positive = kMutated ? load<V>(positive_term + j) : V{};
    for (int r = 0; r < R; ++r) {
      const V term = Sim::term(q, load<V>(rows + r * dp + j));
      sum[r] += term;
      if (kMutated) {
        mutated_sum[r] += F::select(F::load_mask(masks + r * dp + j), from_positive, term);
      }
    }
  }
  horizontal_sums<F, R>(sum, plain);
  if (kMutated) horizontal_sums<F, R>(mutated_sum, mutated);
}

// What one thread needs to work on a row.
template <class F>
struct RowScratch {
  using Real = typename F::Real;
  Tile<F> tile;
  Real *query, *positive, *positive_term, *share, *gradient;  // (dim_padded,) each
  Real *plain, *mutated;                                      // (K rounded up to a vector,) each

  RowScratch(const Problem& p, Carver& carver) {
    const int64_t dp = padded(p.D), kp = (p.K + 15) / 16 * 16;
    tile.carve(p, carver);
    Real** const arrays[] = {&query, &positive, &positive_term, &share, &gradient};
    for (Real** a : arrays) {
      *a = carver.take<Real>(dp);
      if (*a != nullptr) __builtin_memset(*a, 0, sizeof(Real) * dp);
    }
    plain = carver.take<Real>(kp);
    mutated = carver.take<Real>(kp);
  }

  static int64_t bytes(const Problem& p) {
    Carver counter{nullptr};
    RowScratch counted(p, counter);
    return counter.used;
  }

  void load_row(const Problem& p, int64_t b) {
    __builtin_memcpy(query, static_cast<const Real*>(p.query) + b * p.D,
                     sizeof(Real) * static_cast<size_t>(p.D));
    with_table<F>(p, [&](auto* table) {
      gather_row<F>(positive, table + p.positive[b] * p.table_stride, p.D);
    });
  }
};

// A RowScratch for each thread slot.
template <class F>
class Workers {
 public:
  explicit Workers(const Problem& p)
      : memory_(p.threads, static_cast<int64_t>(sizeof(RowScratch<F>)) + 64 + RowScratch<F>::bytes(p)) {
    for (int t = 0; t < p.threads; ++t) {
      Carver carver{memory_.slot(t)};
      RowScratch<F>* place = carver.take<RowScratch<F>>(1);
      new (place) RowScratch<F>(p, carver);
    }
  }
  RowScratch<F>& operator[](int slot) const {
    return *reinterpret_cast<RowScratch<F>*>(memory_.slot(slot));
  }

 private:
  Scratch memory_;
};

// Scores of row b into scratch.plain and scratch.mutated; returns s⁺.
template <class F, class Sim, bool kMutated>
static typename F::Real score_row(const Problem& p, const Masks& draw, RowScratch<F>& s, int64_t b) {
  using V = typename F::V;
  const int64_t dp = padded(p.D), g = b / p.rows_per_group();
  V sum = {};
  for (int64_t j = 0; j < dp; j += F::kLanes) {
    const V term = Sim::term(load<V>(s.query + j), load<V>(s.positive + j));
    store(s.positive_term + j, term);
    sum += term;
  }
  for (int64_t from = 0; from < p.K; from += s.tile.capacity) {
    const int64_t count = min64(s.tile.capacity, p.K - from);
    s.tile.stream(p, draw, g, b, from, count, [&](int64_t k, int64_t n) {
      const int64_t end = k + n;
      for (; k + 4 <= end; k += 4) {
        score_rows<F, Sim, kMutated, 4>(s.query, s.positive_term, s.tile.rows + k * dp,
                                        s.tile.masks + k * dp, p.D, s.plain + from + k,
                                        s.mutated + from + k);
      }
      for (; k < end; ++k) {
        score_rows<F, Sim, kMutated, 1>(s.query, s.positive_term, s.tile.rows + k * dp,
                                        s.tile.masks + k * dp, p.D, s.plain + from + k,
                                        s.mutated + from + k);
      }
    });
  }
  return horizontal_sum<F>(sum);
}

// Sets the scores of padding to −inf; returns how many negatives are real.
template <class Real, bool kMutated>
static int64_t blank_padding(const Problem& p, int64_t b, Real* plain, Real* mutated) {
  const int64_t* ids = p.negative + b / p.rows_per_group() * p.K;
  int64_t real = 0;
  for (int64_t k = 0; k < p.K; ++k) real += ids[k] >= 0;
  if (real == p.K) return real;
  for (int64_t k = 0; k < p.K; ++k) {
    if (ids[k] >= 0) continue;
    plain[k] = -static_cast<Real>(__builtin_inf());
    if (kMutated) mutated[k] = -static_cast<Real>(__builtin_inf());
  }
  return real;
}

// --- softmax ----------------------------------------------------------------------------------------

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

// Statistics of softmax(positive, scores) where all but padding is finite. With `powers`, e^(s_k − max).
template <class F>
static Softmax<typename F::Real> softmax(typename F::Real positive, const typename F::Real* scores,
                                         int64_t count, typename F::Real* powers) {
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

// --- gradients of the query and of the positive -----------------------------------------------------------

// Over the negatives of a tile, for N vectors of components from j on:
//   gradient += (w_k + ŵ_k (1 − λ_k)) ∂φ/∂q(q, c_k)      share += ŵ_k λ_k
template <class F, class Sim, bool kMutated, int N>
static void accumulate_query(const typename F::Real* query, const typename F::Real* rows,
                             const uint8_t* masks, int64_t dp, int64_t count,
                             const typename F::Real* weight, const typename F::Real* mutated_weight,
                             typename F::Real* gradient, typename F::Real* share) {
  using V = typename F::V;
  V g[N], s[N];
  for (int n = 0; n < N; ++n) {
    g[n] = load<V>(gradient + n * F::kLanes);
    s[n] = load<V>(share + n * F::kLanes);
  }
  for (int64_t k = 0; k < count; ++k) {
    const V w = F::broadcast(weight[k]);
    const V hat = kMutated ? F::broadcast(mutated_weight[k]) : V{};
    const V both = w + hat;
    for (int n = 0; n < N; ++n) {
      const V d = Sim::d_query(load<V>(query + n * F::kLanes), load<V>(rows + k * dp + n * F::kLanes));
      if (kMutated) {
        const auto mask = F::load_mask(masks + k * dp + n * F::kLanes);
        g[n] = F::fma(F::select(mask, w, both), d, g[n]);
        s[n] += F::keep(mask, hat);
      } else {
        g[n] = F::fma(w, d, g[n]);
      }
    }
  }
  for (int n = 0; n < N; ++n) {
    store(gradient + n * F::kLanes, g[n]);
    store(share + n * F::kLanes, s[n]);
  }
}

// Calls f(j, std::integral_constant-like N) over blocks of at most kAccumulators vectors, evenly cut.
template <int N>
struct Vectors {
  static constexpr int value = N;
};
template <class Body>
EMU_INLINE void for_blocks(int64_t vectors, Body&& body) {
  const int64_t blocks = (vectors + kAccumulators - 1) / kAccumulators;
  for (int64_t i = 0, at = 0; i < blocks; ++i) {
    const int64_t n = (vectors - at + blocks - i - 1) / (blocks - i);
    switch (n) {
      case 1: body(at, Vectors<1>{}); break;
      case 2: body(at, Vectors<2>{}); break;
      case 3: body(at, Vectors<3>{}); break;
      case 4: body(at, Vectors<4>{}); break;
      case 5: body(at, Vectors<5>{}); break;
      default: body(at, Vectors<6>{}); break;
    }
    at += n;
  }
}

// Gradients of row b (scored just before, so its tile is at hand) for the weights given.
template <class F, class Sim, bool kMutated>
static void query_gradient_row(const Problem& p, const Masks& draw, RowScratch<F>& s, int64_t b,
                               typename F::Real positive_weight, const typename F::Real* weight,
                               const typename F::Real* mutated_weight, typename F::Real* grad_query,
                               typename F::Real* grad_positive) {
  using V = typename F::V;
  using Real = typename F::Real;
  const int64_t dp = padded(p.D), g = b / p.rows_per_group();
  const int64_t vectors = (p.D + F::kLanes - 1) / F::kLanes;
  __builtin_memset(s.gradient, 0, sizeof(Real) * static_cast<size_t>(dp));
  __builtin_memset(s.share, 0, sizeof(Real) * static_cast<size_t>(dp));
  for (int64_t from = 0; from < p.K; from += s.tile.capacity) {
    const int64_t count = min64(s.tile.capacity, p.K - from);
    if (!s.tile.holds(p, g, b, from)) {
      s.tile.stream(p, draw, g, b, from, count, [](int64_t, int64_t) {});
    }
    for_blocks(vectors, [&](int64_t at, auto n) {
      const int64_t j = at * F::kLanes;
      accumulate_query<F, Sim, kMutated, decltype(n)::value>(
          s.query + j, s.tile.rows + j, s.tile.masks + j, dp, count, weight + from,
          mutated_weight + from, s.gradient + j, s.share + j);
    });
  }
  const V own = F::broadcast(positive_weight);
  for (int64_t j = 0; j < dp; j += F::kLanes) {
    const V q = load<V>(s.query + j), c = load<V>(s.positive + j);
    const V share = load<V>(s.share + j) + own;
    store(s.gradient + j, F::fma(share, Sim::d_query(q, c), load<V>(s.gradient + j)));
    store(s.share + j, share * Sim::d_candidate(q));
  }
  __builtin_memcpy(grad_query, s.gradient, sizeof(Real) * static_cast<size_t>(p.D));
  __builtin_memcpy(grad_positive, s.share, sizeof(Real) * static_cast<size_t>(p.D));
}

// --- the loss ---------------------------------------------------------------------------------------

template <class Real>
struct RowLoss {
  Real uls, vanilla, positive_weight;
};

// Loss of one row from its scores, and with need_grad its derivatives by every score, in place of them:
//   ∂/∂s⁻_k = α p_k      ∂/∂ŝ_k = ((1 + βK) p̂_k − β)/K      ∂/∂s⁺ = ((1 + βK) p̂_0 − 1)/K + α (p_0 − 1)
template <class F, bool kMutated>
static RowLoss<typename F::Real> row_loss(const LossArgs& a, typename F::Real positive,
                                          typename F::Real* plain, typename F::Real* mutated,
                                          int64_t count, int64_t real) {
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
  if (kMutated && real > 0) {
    const Real inverse = 1 / static_cast<Real>(real);
    const Softmax<Real> s = softmax<F>(positive, mutated, count, mutated);
    const Real log_sum = s.log_sum();
    out.uls = ((s.max - positive) + log_sum) * inverse + beta * (s.gaps * inverse + log_sum);
    if (a.need_grad) {
      const Real mass = inverse + beta;  // (1 + βK)/K
      const V factor = F::broadcast(mass / s.sum), label = F::broadcast(beta * inverse);
      for (int64_t k = 0; k < count; k += F::kLanes) {
        store(mutated + k, load<V>(mutated + k) * factor - label);
      }
      const V own = exp_nonpositive(F::broadcast(positive - s.max));
      out.positive_weight += mass * (own[0] / s.sum) - inverse;
    }
  }
  return out;
}

template <class F, class Sim, bool kMutated>
static void loss_forward(const Problem& p, const LossArgs& a) {
  using Real = typename F::Real;
  const Masks draw(p.seed, p.threshold, p.D);
  const int64_t K = p.K, kp = (K + 15) / 16 * 16;
  Workers<F> workers(p);
  Scratch rows_scratch(1, 2 * p.B * static_cast<int64_t>(sizeof(Real)));
  Real* uls = reinterpret_cast<Real*>(rows_scratch.slot(0));
  Real* vanilla = uls + p.B;

  parallel(p.threads, p.B, [&](int64_t b, int slot) {
    RowScratch<F>& s = workers[slot];
    s.load_row(p, b);
    const Real positive = score_row<F, Sim, kMutated>(p, draw, s, b);
    bool finite = positive * 0 == 0 && all_finite<F>(s.plain, K);
    if (kMutated) finite = finite && all_finite<F>(s.mutated, K);
    RowLoss<Real> loss;
    if (finite) {
      const int64_t real = blank_padding<Real, kMutated>(p, b, s.plain, s.mutated);
      loss = row_loss<F, kMutated>(a, positive, s.plain, s.mutated, K, real);
      if (real < K && kMutated && a.need_grad) {
        const int64_t* ids = p.negative + b / p.rows_per_group() * K;
        for (int64_t k = 0; k < K; ++k) {
          if (ids[k] < 0) s.mutated[k] = 0;
        }
      }
    } else {
      const Real nan = static_cast<Real>(__builtin_nan(""));
      loss = {nan, nan, nan};
      for (int64_t k = 0; k < kp; ++k) s.plain[k] = s.mutated[k] = nan;
    }
    uls[b] = loss.uls;
    vanilla[b] = loss.vanilla;
    if (a.need_grad) {
      query_gradient_row<F, Sim, kMutated>(
          p, draw, s, b, loss.positive_weight, s.plain, s.mutated,
          static_cast<Real*>(a.grad_query) + b * p.D, static_cast<Real*>(a.grad_positive) + b * p.D);
      const size_t bytes = sizeof(Real) * static_cast<size_t>(K);
      __builtin_memcpy(static_cast<Real*>(a.weight) + b * K, s.plain, bytes);
      if (kMutated) __builtin_memcpy(static_cast<Real*>(a.mutated_weight) + b * K, s.mutated, bytes);
    }
  });

  // In order, whatever the threads did.
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

// --- scores alone, with a backward for any upstream gradient -----------------------------------------------

template <class F, class Sim, bool kMutated>
static void scores_forward(const Problem& p, const ScoreArgs& a) {
  using Real = typename F::Real;
  const Masks draw(p.seed, p.threshold, p.D);
  Workers<F> workers(p);
  parallel(p.threads, p.B, [&](int64_t b, int slot) {
    RowScratch<F>& s = workers[slot];
    s.load_row(p, b);
    static_cast<Real*>(a.positive)[b] = score_row<F, Sim, kMutated>(p, draw, s, b);
    blank_padding<Real, kMutated>(p, b, s.plain, s.mutated);
    const size_t bytes = sizeof(Real) * static_cast<size_t>(p.K);
    __builtin_memcpy(static_cast<Real*>(a.negative) + b * p.K, s.plain, bytes);
    if (kMutated) __builtin_memcpy(static_cast<Real*>(a.mutated) + b * p.K, s.mutated, bytes);
  });
}

template <class F, class Sim, bool kMutated>
static void query_gradient(const Problem& p, const QueryGradientArgs& a) {
  using Real = typename F::Real;
  const Masks draw(p.seed, p.threshold, p.D);
  Workers<F> workers(p);
  parallel(p.threads, p.B, [&](int64_t b, int slot) {
    RowScratch<F>& s = workers[slot];
    s.load_row(p, b);
    query_gradient_row<F, Sim, kMutated>(
        p, draw, s, b, static_cast<const Real*>(a.positive_weight)[b],
        static_cast<const Real*>(a.weight) + b * p.K,
        static_cast<const Real*>(a.mutated_weight) + b * p.K,
        static_cast<Real*>(a.grad_query) + b * p.D, static_cast<Real*>(a.grad_positive) + b * p.D);
  });
}

// --- gradient of the table ------------------------------------------------------------------------------

constexpr int64_t kPiecePairs = 2048;  // contributions that one task sums
constexpr int kBuffer = 64;            // contributions at a time, masks and weights at hand

// One contribution to a row of the table: of negative k of row b, or (k = −1) of row b's positive.
template <class F>
struct Pairs {
  using Real = typename F::Real;
  uint32_t key[kBuffer];
  int64_t row[kBuffer];
  int64_t k[kBuffer];
  Real plain[kBuffer];    // g_b w_bk
  Real both[kBuffer];     // g_b (w_bk + ŵ_bk)
  uint8_t* masks;         // (kBuffer, dim_padded)
  int count;
};

// Σ over pairs of (w + ŵ (1 − λ)) ∂φ/∂c, for N vectors of components.
template <class F, class Sim, bool kMutated, int N>
static void accumulate_candidate(const Pairs<F>& pairs, int from, int to, const typename F::Real* queries,
                                 int64_t dp, int64_t j, typename F::Real* sum) {
  using V = typename F::V;
  V s[N];
  for (int n = 0; n < N; ++n) s[n] = load<V>(sum + n * F::kLanes);
  for (int i = from; i < to; ++i) {
    const V w = F::broadcast(pairs.plain[i]), both = F::broadcast(pairs.both[i]);
    const typename F::Real* query = queries + pairs.row[i] * dp + j;
    for (int n = 0; n < N; ++n) {
      const V d = Sim::d_candidate(load<V>(query + n * F::kLanes));
      if (kMutated) {
        const auto mask = F::load_mask(pairs.masks + i * dp + j + n * F::kLanes);
        s[n] = F::fma(F::select(mask, w, both), d, s[n]);
      } else {
        s[n] = F::fma(w, d, s[n]);
      }
    }
  }
  for (int n = 0; n < N; ++n) store(sum + n * F::kLanes, s[n]);
}

template <class F, class Sim, bool kMutated>
struct TableGradient {
  using Real = typename F::Real;
  using V = typename F::V;

  const Problem& p;
  const TableGradientArgs& a;
  const Masks draw;
  const int64_t dp, group_rows, entries_per_piece, pieces;
  const uint64_t* sorted;
  const int64_t size;
  // A piece is a fixed number of sorted entries, so its sums do not depend on the threads. A segment that
  // crosses pieces leaves partial sums, which are added up in order at the end.
  Scratch queries_memory, partials_memory, ordinals_memory, slots_memory;
  Real* queries;      // (B, dim_padded)
  Real* partials;     // (pieces, 2, dim_padded): of the first and of the last segment
  int64_t* ordinals;  // (pieces,) which touched row a piece begins in

  TableGradient(const Problem& problem, const TableGradientArgs& args)
      : p(problem),
        a(args),
        draw(problem.seed, problem.threshold, problem.D),
        dp(padded(problem.D)),
        group_rows(problem.rows_per_group()),
        entries_per_piece(max64(1, kPiecePairs / max64(1, problem.rows_per_group()))),
        pieces((args.segments->size() + entries_per_piece - 1) / entries_per_piece),
        sorted(args.segments->sorted()),
        size(args.segments->size()),
        queries_memory(1, problem.B * dp * static_cast<int64_t>(sizeof(Real))),
        partials_memory(1, pieces * 2 * dp * static_cast<int64_t>(sizeof(Real))),
        ordinals_memory(1, pieces * 8),
        slots_memory(problem.threads, slot_bytes()) {
    queries = reinterpret_cast<Real*>(queries_memory.slot(0));
    partials = reinterpret_cast<Real*>(partials_memory.slot(0));
    ordinals = reinterpret_cast<int64_t*>(ordinals_memory.slot(0));
  }

  int64_t slot_bytes() const {
    return static_cast<int64_t>(sizeof(Pairs<F>)) + 128 + kBuffer * dp +
           dp * static_cast<int64_t>(sizeof(Real));
  }

  void run() {
    parallel(p.threads, (p.B + 63) / 64, [&](int64_t block, int) {
      for (int64_t b = block * 64; b < min64(p.B, block * 64 + 64); ++b) {
        const size_t bytes = sizeof(Real) * static_cast<size_t>(p.D);
        __builtin_memcpy(queries + b * dp, static_cast<const Real*>(p.query) + b * p.D, bytes);
        __builtin_memset(queries + b * dp + p.D, 0, sizeof(Real) * static_cast<size_t>(dp - p.D));
      }
    });
    if (a.ids != nullptr) {
      int64_t ordinal = -1;
      for (int64_t e = 0; e < size; ++e) {
        ordinal += e == 0 || key_at(e) != key_at(e - 1);
        if (e % entries_per_piece == 0) ordinals[e / entries_per_piece] = ordinal;
      }
    } else if (size == 0) {
      zero_rows(0, p.N);
    }
    parallel(p.threads, pieces, [&](int64_t piece, int slot) { sum_piece(piece, slot); });
    join_partials();
  }

  uint32_t key_at(int64_t e) const { return static_cast<uint32_t>(sorted[e] >> 32); }
  int64_t begin(int64_t piece) const { return piece * entries_per_piece; }
  int64_t end(int64_t piece) const { return min64(size, begin(piece) + entries_per_piece); }
  // Whether the piece's first segment began in the one before, and its last goes on in the one after.
  bool continues(int64_t piece) const {
    return begin(piece) > 0 && key_at(begin(piece) - 1) == key_at(begin(piece));
  }
  bool goes_on(int64_t piece) const {
    return end(piece) < size && key_at(end(piece)) == key_at(end(piece) - 1);
  }
  bool one_segment(int64_t piece) const { return key_at(begin(piece)) == key_at(end(piece) - 1); }

  void zero_rows(int64_t from, int64_t to) {
    const int64_t bytes_a_row = p.D * element_size(p.dtype);
    if (to > from) {
      __builtin_memset(static_cast<char*>(a.out) + from * bytes_a_row, 0,
                       static_cast<size_t>((to - from) * bytes_a_row));
    }
  }

  void write(uint32_t key, int64_t ordinal, const Real* sum) {
    if (a.ids != nullptr) a.ids[ordinal] = key;
    write_row(p.dtype, a.out, (a.ids != nullptr ? ordinal : static_cast<int64_t>(key)) * p.D, sum, p.D);
  }

  void sum_piece(int64_t piece, int slot) {
    Carver carver{slots_memory.slot(slot)};
    Pairs<F>& pairs = *carver.take<Pairs<F>>(1);
    pairs.masks = carver.take<uint8_t>(kBuffer * dp);
    Real* sum = carver.take<Real>(dp);

    const int64_t first = begin(piece), last = end(piece);
    int64_t ordinal = a.ids != nullptr ? ordinals[piece] : 0;
    uint32_t key = key_at(first);
    bool at_first = true;
    if (a.ids == nullptr && !continues(piece)) zero_rows(first ? key_at(first - 1) + int64_t{1} : 0, key);
    __builtin_memset(sum, 0, sizeof(Real) * static_cast<size_t>(dp));

    int64_t entry = first, row_in_group = 0;
    while (entry < last) {
      fill(pairs, entry, row_in_group, last);
      for (int from = 0, to; from < pairs.count; from = to) {
        for (to = from + 1; to < pairs.count && pairs.key[to] == pairs.key[from];) ++to;
        if (pairs.key[from] != key) {
          finish_segment(piece, key, ordinal, at_first, false, sum);
          if (a.ids == nullptr) zero_rows(key + int64_t{1}, pairs.key[from]);
          key = pairs.key[from];
          ++ordinal;
          at_first = false;
          __builtin_memset(sum, 0, sizeof(Real) * static_cast<size_t>(dp));
        }
        add_run(pairs, from, to, sum);
      }
    }
    finish_segment(piece, key, ordinal, at_first, true, sum);
    if (a.ids == nullptr && last == size) zero_rows(key + int64_t{1}, p.N);
  }

  void finish_segment(int64_t piece, uint32_t key, int64_t ordinal, bool is_first, bool is_last,
                      const Real* sum) {
    if (is_first && continues(piece)) {
      __builtin_memcpy(partials + piece * 2 * dp, sum, sizeof(Real) * static_cast<size_t>(dp));
    } else if (is_last && goes_on(piece)) {
      __builtin_memcpy(partials + (piece * 2 + 1) * dp, sum, sizeof(Real) * static_cast<size_t>(dp));
    } else {
      write(key, ordinal, sum);
    }
  }

  // The next contributions, at most kBuffer, with their weights and masks.
  void fill(Pairs<F>& pairs, int64_t& entry, int64_t& row_in_group, int64_t last) {
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
        pairs.plain[n] = scale[row] * weight[row * p.K + k];
        if (kMutated) {
          pairs.both[n] = scale[row] * (weight[row * p.K + k] + mutated_weight[row * p.K + k]);
        }
        __builtin_prefetch(queries + row * dp);
        if (++row_in_group == group_rows) row_in_group = 0, ++entry;
      }
      ++n;
    }
    pairs.count = n;
    if (!kMutated) return;
    for (int i = 0; i < n; i += kMaskLanes) {
      U64 k, row;
      for (int lane = 0; lane < kMaskLanes; ++lane) {
        const int at = i + lane < n ? i + lane : n - 1;
        k[lane] = static_cast<uint64_t>(pairs.k[at]);
        row[lane] = p.row_offset + static_cast<uint64_t>(pairs.row[at]);
      }
      draw.draw(k, row, dp, pairs.masks + i * dp, dp);
    }
  }

  // Contributions from .. to, all of one segment, in which negatives come before positives.
  void add_run(const Pairs<F>& pairs, int from, int to, Real* sum) {
    int negatives = from;
    while (negatives < to && pairs.k[negatives] >= 0) ++negatives;
    if (negatives > from) {
      for_blocks((p.D + F::kLanes - 1) / F::kLanes, [&](int64_t at, auto n) {
        const int64_t j = at * F::kLanes;
        accumulate_candidate<F, Sim, kMutated, decltype(n)::value>(pairs, from, negatives, queries, dp, j,
                                                                   sum + j);
      });
    }
    for (int i = negatives; i < to; ++i) {
      const Real scale = static_cast<const Real*>(a.row_scale)[pairs.row[i]];
      const Real* own = static_cast<const Real*>(a.grad_positive) + pairs.row[i] * p.D;
      for (int64_t j = 0; j < p.D; ++j) sum[j] += scale * own[j];
    }
  }

  void join_partials() {
    Real* sum = nullptr;
    for (int64_t piece = 0; piece < pieces; ++piece) {
      Real* head = partials + piece * 2 * dp;
      const bool through = one_segment(piece) && goes_on(piece);
      if (continues(piece)) {
        for (int64_t j = 0; j < dp; ++j) sum[j] += head[j];
        if (!through) {
          write(key_at(begin(piece)), a.ids != nullptr ? ordinals[piece] : 0, sum);
        }
      }
      if (goes_on(piece) && !(one_segment(piece) && continues(piece))) sum = head + dp;
    }
  }
};

template <class F, class Sim, bool kMutated>
static void table_gradient(const Problem& p, const TableGradientArgs& a) {
  TableGradient<F, Sim, kMutated>(p, a).run();
}

// --- mutation alone -------------------------------------------------------------------------------------

EMU_INLINE void draw_row_masks(const Masks& draw, const MutateArgs& a, int64_t b, int64_t from,
                               int64_t dp, uint8_t* masks) {
  U64 lane;
  for (int i = 0; i < kMaskLanes; ++i) lane[i] = static_cast<uint64_t>(from + i);
  draw.draw(lane, U64{} + (a.row_offset + static_cast<uint64_t>(b)), dp, masks, dp);
}

// T: an unsigned integer as wide as an element, whose value does not matter.
template <class T>
static void mutate_forward_as(const MutateArgs& a) {
  const Masks draw(a.seed, a.threshold, a.D);
  const int64_t dp = padded(a.D);
  Scratch scratch(a.threads, kMaskLanes * dp);
  parallel(a.threads, a.B, [&](int64_t b, int slot) {
    uint8_t* masks = scratch.slot(slot);
    const T* positive = static_cast<const T*>(a.positive) + b * a.D;
    for (int64_t from = 0; from < a.K; from += kMaskLanes) {
      draw_row_masks(draw, a, b, from, dp, masks);
      for (int64_t k = from; k < min64(a.K, from + kMaskLanes); ++k) {
        const uint8_t* mask = masks + (k - from) * dp;
        const T* negative = static_cast<const T*>(a.negative) + (b * a.K + k) * a.D;
        T* out = static_cast<T*>(a.out) + (b * a.K + k) * a.D;
        for (int64_t j = 0; j < a.D; ++j) out[j] = mask[j] ? positive[j] : negative[j];
      }
    }
  });
}

static void mutate_forward(const MutateArgs& a) {
  switch (element_size(a.dtype)) {
    case 2: return mutate_forward_as<uint16_t>(a);
    case 4: return mutate_forward_as<uint32_t>(a);
    default: return mutate_forward_as<uint64_t>(a);
  }
}

template <class T, class Real>
static void mutate_backward_as(const MutateArgs& a) {
  const Masks draw(a.seed, a.threshold, a.D);
  const int64_t dp = padded(a.D);
  Scratch scratch(a.threads, kMaskLanes * dp + dp * static_cast<int64_t>(sizeof(Real)));
  parallel(a.threads, a.B, [&](int64_t b, int slot) {
    Real* sum = reinterpret_cast<Real*>(scratch.slot(slot));
    uint8_t* masks = reinterpret_cast<uint8_t*>(sum + dp);
    __builtin_memset(sum, 0, sizeof(Real) * static_cast<size_t>(dp));
    for (int64_t from = 0; from < a.K; from += kMaskLanes) {
      draw_row_masks(draw, a, b, from, dp, masks);
      for (int64_t k = from; k < min64(a.K, from + kMaskLanes); ++k) {
        const uint8_t* mask = masks + (k - from) * dp;
        const T* grad = static_cast<const T*>(a.negative) + (b * a.K + k) * a.D;
        T* out = static_cast<T*>(a.grad_negative) + (b * a.K + k) * a.D;
        for (int64_t j = 0; j < a.D; ++j) {
          sum[j] += mask[j] ? widen(grad[j]) : Real{0};
          out[j] = mask[j] ? T{} : grad[j];
        }
      }
    }
    T* grad_positive = static_cast<T*>(a.grad_positive) + b * a.D;
    for (int64_t j = 0; j < a.D; ++j) narrow(sum[j], grad_positive + j);
  });
}

static void mutate_backward(const MutateArgs& a) {
  switch (a.dtype) {
    case DType::kFloat: return mutate_backward_as<float, float>(a);
    case DType::kBFloat16: return mutate_backward_as<BFloat16, float>(a);
    case DType::kHalf: return mutate_backward_as<Half, float>(a);
    case DType::kDouble: return mutate_backward_as<double, double>(a);
  }
}

// --- from run-time values to template arguments -------------------------------------------------------------

template <template <class, class, bool> class Kernel, class Args>
static void specialise(const Problem& p, const Args& a) {
  const bool wide = p.dtype == DType::kDouble;
  if (p.mutated()) {
    wide ? Kernel<F64, Dot, true>::run(p, a) : Kernel<F32, Dot, true>::run(p, a);
  } else {
    wide ? Kernel<F64, Dot, false>::run(p, a) : Kernel<F32, Dot, false>::run(p, a);
  }
}

#define EMU_KERNEL(function, Args)                                                             \
  template <class F, class Sim, bool kMutated>                                                 \
  struct function##_kernel {                                                                   \
    static void run(const Problem& p, const Args& a) { function<F, Sim, kMutated>(p, a); }     \
  };                                                                                           \
  static void function##_any(const Problem& p, const Args& a) { specialise<function##_kernel>(p, a); }

EMU_KERNEL(loss_forward, LossArgs)
EMU_KERNEL(scores_forward, ScoreArgs)
EMU_KERNEL(query_gradient, QueryGradientArgs)
EMU_KERNEL(table_gradient, TableGradientArgs)
#undef EMU_KERNEL

constexpr Kernels make_kernels(const char* name) {
  return {name,           loss_forward_any, scores_forward_any, query_gradient_any, table_gradient_any,
          mutate_forward, mutate_backward};
}
