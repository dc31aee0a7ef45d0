// How rows lie in scratch memory, and the arithmetic that all inner loops share.

// Each half is padded: component j of half h is at h·half_padded + j. Mask bytes are not padded by half: they have the
// table's order.
template <class Sim>
struct Layout {
  static constexpr int H = Sim::kHalves;
  static constexpr int kSums = Sums<Sim>::kCount;

  int64_t half, half_padded, row, mask_row;

  explicit Layout(int64_t dim)
      : half(dim / H),
        half_padded(padded(dim / H)),
        row(H * padded(dim / H)),
        mask_row(padded(dim) + (H > 1 ? 16 : 0)) {}  // as loading half 1's masks may read beyond them

  int64_t units() const { return kSums * half; }  // how many rates a row has, with moments

  int64_t scale_width() const {  // the width of a query's scale
    int64_t width = 0;
    for (int h = 0; h < H; ++h) width += Sim::factor(h) == Factor::kScale ? half : 0;
    return width;
  }
};

// From a row in the table's order to a padded row, and back. The padding itself is not written: it stays zero.
template <class Sim, class Real>
EMU_INLINE void spread(const Layout<Sim>& at, Real* to, const Real* from) {
  for (int h = 0; h < at.H; ++h) {
    copy(to + h * at.half_padded, from + h * at.half, at.half);
  }
}
template <class Sim, class Real>
EMU_INLINE void collect(const Layout<Sim>& at, Real* to, const Real* from) {
  for (int h = 0; h < at.H; ++h) {
    copy(to + h * at.half, from + h * at.half_padded, at.half);
  }
}

// The table's row that begins at `from`, widened.
template <class F, class Sim, class T>
EMU_INLINE void gather_from(const Layout<Sim>& at, const T* from, typename F::Real* to) {
  for (int h = 0; h < at.H; ++h) gather_row<F>(to + h * at.half_padded, from + h * at.half, at.half);
}

// The table's row `id`, widened.
template <class F, class Sim>
EMU_INLINE void gather(const Problem& p, const Layout<Sim>& at, int64_t id, typename F::Real* to) {
  with_table<F>(p, [&](auto* table) { gather_from<F, Sim>(at, table + id * p.table_stride, to); });
}

// Row b's query as the inner loops take it: phases are multiplied by κ/2.
template <class F, class Sim>
EMU_INLINE void load_query(const Problem& p, const Layout<Sim>& at, int64_t b, typename F::Real* to) {
  using Real = typename F::Real;
  spread(at, to, static_cast<const Real*>(p.query) + b * p.D);
  const Real half_scale = static_cast<Real>(p.phase_scale / 2);
  for (int h = 0; h < at.H; ++h) {
    if (Sim::factor(h) != Factor::kPhase) continue;
    for (int64_t j = 0; j < at.half; ++j) to[h * at.half_padded + j] *= half_scale;
  }
}

// What row b's candidates are multiplied by: the scale a (ones if there is none), or κ/2 for phases.
template <class F, class Sim>
EMU_INLINE void load_factor(const Problem& p, const Layout<Sim>& at, int64_t b, typename F::Real* to) {
  using Real = typename F::Real;
  const Real* scale = static_cast<const Real*>(p.scale) + b * at.scale_width();
  for (int h = 0; h < at.H; ++h) {
    Real* half = to + h * at.half_padded;
    if (Sim::factor(h) == Factor::kScale && p.scale != nullptr) {
      for (int64_t j = 0; j < at.half; ++j) half[j] = scale[j];
      scale += at.half;
    } else {
      const Real value = Sim::factor(h) == Factor::kPhase ? static_cast<Real>(p.phase_scale / 2) : Real{1};
      for (int64_t j = 0; j < at.half; ++j) half[j] = value;
    }
  }
}

// --- what the inner loops share ------------------------------------------------------------------------

template <class Sim, int h, class V>
EMU_INLINE V difference(V q, V a, V c) {
  if constexpr (Sim::kBilinear) return q * c;
  if constexpr (Sim::factor(h) == Factor::kNone) return q - c;
  return q - a * c;
}

// A negative mixed with the positive; `share` is the negative's part.
template <class V>
EMU_INLINE V mix(V positive, V negative, V share) {
  return positive + share * (negative - positive);
}
