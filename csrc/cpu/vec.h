// Vectors of one instruction set. Included by each kernels_*.cpp inside a namespace of its own, so that no
// function compiled for one instruction set can be merged with another's. Hence no standard library
// templates here or in kernels.inl.h.
//
// F32 and F64 stand for the types of lanes, with V a vector, M a mask of its lanes, kLanes their number; Pairs is a
// vector of as many numbers as U64 has lanes. U64 is for the random number generator: 32-bit words in the low halves of
// 64-bit lanes, high halves undefined.

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#define EMU_INLINE static inline __attribute__((always_inline))
// Before a loop: no iteration reads or writes what another one writes.
#ifdef __clang__
#define EMU_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define EMU_INDEPENDENT _Pragma("GCC ivdep")
#endif

typedef float VF __attribute__((vector_size(kVectorBytes)));
typedef double VD __attribute__((vector_size(kVectorBytes)));
typedef int32_t VI __attribute__((vector_size(kVectorBytes)));
typedef int64_t VL __attribute__((vector_size(kVectorBytes)));
typedef uint64_t U64 __attribute__((vector_size(kVectorBytes)));
typedef uint8_t U8 __attribute__((vector_size(kVectorBytes)));

template <class V>
EMU_INLINE V load(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(V));
  return v;
}
template <class V>
EMU_INLINE void store(void* to, V v) {
  __builtin_memcpy(to, &v, sizeof(V));
}

struct F32 {
  using Real = float;
  using V = VF;
  typedef float Pairs __attribute__((vector_size(kVectorBytes / 2)));
  static constexpr int kLanes = kVectorBytes / 4;
#if defined(__AVX512F__)
  using M = __mmask16;
  EMU_INLINE M load_mask(const uint8_t* bytes) {
    return _mm_movepi8_mask(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  }
  EMU_INLINE V select(M m, V yes, V no) { return (V)_mm512_mask_blend_ps(m, (__m512)no, (__m512)yes); }
  EMU_INLINE V keep(M m, V v) { return (V)_mm512_maskz_mov_ps(m, (__m512)v); }
  EMU_INLINE V fma(V a, V b, V c) { return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#elif defined(__AVX2__)
  using M = VI;
  EMU_INLINE M load_mask(const uint8_t* bytes) {
    return (M)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
  }
  EMU_INLINE V select(M m, V yes, V no) { return (V)_mm256_blendv_ps((__m256)no, (__m256)yes, (__m256)m); }
  EMU_INLINE V keep(M m, V v) { return (V)((VI)v & m); }
  EMU_INLINE V fma(V a, V b, V c) { return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#else
  using M = VI;
  EMU_INLINE M load_mask(const uint8_t* bytes) {
    typedef int8_t Bytes __attribute__((vector_size(kLanes)));
    return __builtin_convertvector(load<Bytes>(bytes), VI);
  }
  EMU_INLINE V select(M m, V yes, V no) { return (V)(((VI)yes & m) | ((VI)no & ~m)); }
  EMU_INLINE V keep(M m, V v) { return (V)((VI)v & m); }
#if defined(__aarch64__)
  EMU_INLINE V fma(V a, V b, V c) { return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
#else
  EMU_INLINE V fma(V a, V b, V c) { return a * b + c; }
#endif
#endif
  EMU_INLINE V broadcast(float x) { return V{} + x; }
  EMU_INLINE V root(V x) {
#if defined(__AVX512F__)
    return (V)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
    return (V)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
    return (V)_mm_sqrt_ps((__m128)x);
#elif defined(__aarch64__)
    return (V)vsqrtq_f32((float32x4_t)x);
#else
    for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
  }

  EMU_INLINE V abs(V x) { return (V)((VI)x & 0x7FFFFFFF); }
  // 0 for 0.
  EMU_INLINE V sign(V x) { return (V)((((VI)x & INT32_MIN) | (VI)broadcast(1)) & (VI)(x != 0)); }
  // x^(−1/2) to about 3 ulp; 0 below the smallest normal number.
  EMU_INLINE V inverse_root(V x) {
#if defined(__AVX512F__)
    V y = (V)_mm512_rsqrt14_ps((__m512)x);
#elif defined(__AVX2__)
    V y = (V)_mm256_rsqrt_ps((__m256)x);
#elif defined(__SSE2__)
    V y = (V)_mm_rsqrt_ps((__m128)x);
#elif defined(__aarch64__)
    V y = (V)vrsqrteq_f32((float32x4_t)x);
    y = y * (V)vrsqrtsq_f32((float32x4_t)(x * y), (float32x4_t)y);
#else
    V y;
    for (int i = 0; i < kLanes; ++i) y[i] = 1 / __builtin_sqrtf(x[i]);
#endif
    y = y * fma(x * y, y * -0.5f, broadcast(1.5f));  // Newton
#if defined(__AVX512F__)
    // "Not below" instead of "above or equal", so that NaN is kept.
    return keep(_mm512_cmp_ps_mask((__m512)x, (__m512)broadcast(1.17549435e-38f), _CMP_NLT_UQ), y);
#else
    return (V)((VI)y & ~(VI)(x < 1.17549435e-38f));
#endif
  }
  // x − n·π, |result| <= π/2, n whole.
  EMU_INLINE V reduce_by_pi(V x) {
    const V magic = broadcast(12582912.0f);  // 1.5·2^23: adding it rounds to a whole number
    const V n = fma(x, broadcast(0.318309886f), magic) - magic;
    // π in three parts; n times the first one is exact.
    V r = fma(n, broadcast(-3.140625f), x);
    r = fma(n, broadcast(-9.67502593994140625e-4f), r);
    return fma(n, broadcast(-1.509957990978376432e-7f), r);
  }
  // sin of 0..π/2 (minimax of degree 9), and of −0..−π/2.
  EMU_INLINE V sin_reduced(V r) {
    const V s = r * r;
    V y = broadcast(2.6083159809786593541503e-06f);
    y = fma(y, s, broadcast(-0.0001981069071916863322258f));
    y = fma(y, s, broadcast(0.00833307858556509017944336f));
    y = fma(y, s, broadcast(-0.166666597127914428710938f));
    return fma(r, s * y, r);
  }
  EMU_INLINE bool far(V x) {  // whether reduce_by_pi is too inexact in some lane
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)abs(x), (__m512)broadcast(8192.0f), _CMP_GT_OQ) != 0;
#else
    const auto beyond = abs(x) > 8192.0f;
#if defined(__AVX2__)
    return _mm256_movemask_ps((__m256)beyond) != 0;
#elif defined(__SSE2__)
    return _mm_movemask_ps((__m128)beyond) != 0;
#elif defined(__aarch64__)
    return vmaxvq_u32((uint32x4_t)beyond) != 0;
#else
    int32_t lanes[kLanes], any = 0;
    store(lanes, beyond);
    for (int32_t lane : lanes) any |= lane;
    return any != 0;
#endif
#endif
  }
  // |sin x|
  EMU_INLINE V abs_sin(V x) {
    if (far(x)) return abs_sin_far(x);
    return abs(sin_reduced(reduce_by_pi(x)));
  }
  // Its derivative, 0 where sin x = 0.
  EMU_INLINE V abs_sin_slope(V x) {
    if (far(x)) return abs_sin_slope_far(x);
    const V r = reduce_by_pi(x), one = sign(r);
    return one * sin_reduced(1.57079633f - abs(r));
  }
  __attribute__((noinline)) static V abs_sin_far(V x) {
    for (int i = 0; i < kLanes; ++i) x[i] = __builtin_fabsf(__builtin_sinf(x[i]));
    return x;
  }
  __attribute__((noinline)) static V abs_sin_slope_far(V x) {
    for (int i = 0; i < kLanes; ++i) {
      const float s = __builtin_sinf(x[i]);
      x[i] = s == 0 ? 0 : s > 0 ? __builtin_cosf(x[i]) : -__builtin_cosf(x[i]);
    }
    return x;
  }
};

struct F64 {
  using Real = double;
  using V = VD;
  using Pairs = VD;
  using M = VL;
  static constexpr int kLanes = kVectorBytes / 8;
  EMU_INLINE M load_mask(const uint8_t* bytes) {
    M m = {};
    for (int i = 0; i < kLanes; ++i) m[i] = -static_cast<int64_t>(bytes[i] != 0);
    return m;
  }
  EMU_INLINE V select(M m, V yes, V no) { return (V)(((VL)yes & m) | ((VL)no & ~m)); }
  EMU_INLINE V keep(M m, V v) { return (V)((VL)v & m); }
  EMU_INLINE V fma(V a, V b, V c) { return a * b + c; }
  EMU_INLINE V broadcast(double x) { return V{} + x; }
  EMU_INLINE V root(V x) {
    for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrt(x[i]);
    return x;
  }

  EMU_INLINE V abs(V x) { return (V)((VL)x & INT64_MAX); }
  EMU_INLINE V sign(V x) { return (V)((((VL)x & INT64_MIN) | (VL)broadcast(1)) & (VL)(x != 0)); }
  EMU_INLINE V inverse_root(V x) {
    for (int i = 0; i < kLanes; ++i) x[i] = x[i] > 0 ? 1 / __builtin_sqrt(x[i]) : x[i] * 0;
    return x;
  }
  EMU_INLINE V abs_sin(V x) {
    for (int i = 0; i < kLanes; ++i) x[i] = __builtin_fabs(__builtin_sin(x[i]));
    return x;
  }
  EMU_INLINE V abs_sin_slope(V x) {
    for (int i = 0; i < kLanes; ++i) {
      const double s = __builtin_sin(x[i]);
      x[i] = s == 0 ? 0 : s > 0 ? __builtin_cos(x[i]) : -__builtin_cos(x[i]);
    }
    return x;
  }
};

#if defined(__AVX2__)
EMU_INLINE __m256 eight_lanes(VF v) {
#if defined(__AVX512F__)
  return _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
#else
  return (__m256)v;
#endif
}
#endif

// Adds in the order of horizontal_sums: equal rows have equal scores, wherever they are in a batch.
template <class F>
EMU_INLINE typename F::Real horizontal_sum(typename F::V v) {
#if defined(__AVX2__)
  if constexpr (sizeof(typename F::Real) == 4) {
    const __m256 eight = eight_lanes(v), pairs = _mm256_hadd_ps(eight, eight), sums = _mm256_hadd_ps(pairs, pairs);
    return _mm_cvtss_f32(_mm_add_ss(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
  }
#endif
  typename F::Real lanes[F::kLanes];
  store(lanes, v);
  for (int width = F::kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

// Sums of R vectors.
template <class F, int R>
EMU_INLINE void horizontal_sums(const typename F::V* v, typename F::Real* to) {
#if defined(__AVX2__)
  if constexpr (R == 4 && sizeof(typename F::Real) == 4) {
    __m256 half[4];
    for (int r = 0; r < 4; ++r) half[r] = eight_lanes(v[r]);
    const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
    return;
  }
#endif
  for (int r = 0; r < R; ++r) to[r] = horizontal_sum<F>(v[r]);
}

// e^x for finite x <= 0 and x = −inf, to about 1 ulp; below the smallest normal number, 0.
EMU_INLINE VF exp_nonpositive(VF x) {
  const VF low = VF{} - 87.33f;  // e^-87.33 is just above the smallest normal float
  const VI in_range = x >= low;
  x = (VF)(((VI)x & in_range) | ((VI)low & ~in_range));
  // x = n·ln 2 + r, |r| <= ln 2 / 2; ln 2 in two parts so that n·hi is exact.
  const VI n = __builtin_convertvector(x * 1.44269504f - 0.5f, VI);  // rounds to nearest: x <= 0
  const VF nf = __builtin_convertvector(n, VF);
  const VF r = (x - nf * 0.693359375f) - nf * -2.12194440e-4f;
  VF y = VF{} + 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  const VI power = (n + 127) << 23;
  return (VF)((VI)(y * (VF)power) & in_range);
}
EMU_INLINE VD exp_nonpositive(VD x) {
  for (int i = 0; i < F64::kLanes; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// Product of the low halves.
EMU_INLINE U64 multiply_low_halves(U64 a, U64 b) {
#if defined(__AVX512F__)
  return (U64)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (U64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (U64)_mm_mul_epu32((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
  return (U64)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
#else
  return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

// The low halves of `low` with those of `high` above them.
EMU_INLINE U64 join_low_halves(U64 low, U64 high) {
#if defined(__AVX512F__)
  return (U64)_mm512_mask_mov_epi32((__m512i)low, 0xAAAA, (__m512i)(high << 32));
#elif defined(__AVX2__)
  return (U64)_mm256_blend_epi32((__m256i)low, (__m256i)(high << 32), 0xAA);
#else
  return (low & 0xFFFFFFFFu) | (high << 32);
#endif
}

// out[lane * stride + 0..15] = the 16 bytes a[lane], b[lane].
EMU_INLINE void store_pairs(U64 a, U64 b, uint8_t* out, int64_t stride) {
#if defined(__AVX512F__)
  const __m512i even = _mm512_unpacklo_epi64((__m512i)a, (__m512i)b);
  const __m512i odd = _mm512_unpackhi_epi64((__m512i)a, (__m512i)b);
  store(out + 0 * stride, _mm512_extracti64x2_epi64(even, 0));
  store(out + 1 * stride, _mm512_extracti64x2_epi64(odd, 0));
  store(out + 2 * stride, _mm512_extracti64x2_epi64(even, 1));
  store(out + 3 * stride, _mm512_extracti64x2_epi64(odd, 1));
  store(out + 4 * stride, _mm512_extracti64x2_epi64(even, 2));
  store(out + 5 * stride, _mm512_extracti64x2_epi64(odd, 2));
  store(out + 6 * stride, _mm512_extracti64x2_epi64(even, 3));
  store(out + 7 * stride, _mm512_extracti64x2_epi64(odd, 3));
#elif defined(__AVX2__)
  const __m256i even = _mm256_unpacklo_epi64((__m256i)a, (__m256i)b);
  const __m256i odd = _mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
  store(out + 0 * stride, _mm256_castsi256_si128(even));
  store(out + 1 * stride, _mm256_castsi256_si128(odd));
  store(out + 2 * stride, _mm256_extracti128_si256(even, 1));
  store(out + 3 * stride, _mm256_extracti128_si256(odd, 1));
#else
  for (int i = 0; i < kVectorBytes / 8; ++i) {
    const uint64_t both[2] = {a[i], b[i]};
    __builtin_memcpy(out + i * stride, both, 16);
  }
#endif
}

// --- 16-bit floats ----------------------------------------------------------------------------------

EMU_INLINE float bits_to_float(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
EMU_INLINE uint32_t float_to_bits(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return u;
}

EMU_INLINE float from_bfloat16(uint16_t h) { return bits_to_float(static_cast<uint32_t>(h) << 16); }
EMU_INLINE uint16_t to_bfloat16(float f) {  // to nearest, ties to even
  const uint32_t u = float_to_bits(f);
  if (f != f) return static_cast<uint16_t>((u >> 16) | 0x40);
  return static_cast<uint16_t>((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
}

#if defined(__F16C__)
EMU_INLINE float from_half(uint16_t h) { return _cvtsh_ss(h); }
EMU_INLINE uint16_t to_half(float f) { return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__aarch64__)
EMU_INLINE float from_half(uint16_t h) {
  __fp16 v;
  __builtin_memcpy(&v, &h, 2);
  return v;
}
EMU_INLINE uint16_t to_half(float f) {
  const __fp16 v = static_cast<__fp16>(f);
  uint16_t h;
  __builtin_memcpy(&h, &v, 2);
  return h;
}
#else
EMU_INLINE float from_half(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t rest = h & 0x7FFF;
  if (rest >= 0x7C00) return bits_to_float(sign | 0x7F800000 | (rest & 0x3FF) << 13);
  // A half's exponent and fraction read as a float's are too small by 2^112, subnormals included.
  const float magnitude = bits_to_float(rest << 13) * 0x1p112f;
  return bits_to_float(sign | float_to_bits(magnitude));
}
EMU_INLINE uint16_t to_half(float f) {  // to nearest, ties to even
  const uint32_t u = float_to_bits(f);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000);
  const uint32_t rest = u & 0x7FFFFFFF;
  if (rest > 0x7F800000) return sign | 0x7E00;
  if (rest >= 0x477FF000) return sign | 0x7C00;  // rounds to 65536 or more
  if (rest < 0x38800000) {                       // subnormal half: let float addition round
    const float shifted = bits_to_float(rest) + 0.5f;
    return sign | static_cast<uint16_t>(float_to_bits(shifted) - float_to_bits(0.5f));
  }
  return sign | static_cast<uint16_t>((rest - 0x38000000 + 0xFFF + ((rest >> 13) & 1)) >> 13);
}
#endif

// One vector of components in the table's dtype, widened. Element types: float, double, BFloat16, Half.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};
EMU_INLINE float widen(float x) { return x; }
EMU_INLINE double widen(double x) { return x; }
EMU_INLINE float widen(BFloat16 x) { return from_bfloat16(x.bits); }
EMU_INLINE float widen(Half x) { return from_half(x.bits); }
EMU_INLINE void narrow(float x, float* to) { *to = x; }
EMU_INLINE void narrow(double x, double* to) { *to = x; }
EMU_INLINE void narrow(float x, BFloat16* to) { to->bits = to_bfloat16(x); }
EMU_INLINE void narrow(float x, Half* to) { to->bits = to_half(x); }

EMU_INLINE VF load_wide(const float* from) { return load<VF>(from); }
EMU_INLINE VD load_wide(const double* from) { return load<VD>(from); }
EMU_INLINE VF load_wide(const BFloat16* from) {
  typedef uint16_t Shorts __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
  return (VF)(__builtin_convertvector(load<Shorts>(from), Words) << 16);
}
EMU_INLINE VF load_wide(const Half* from) {
#if defined(__AVX512F__)
  return (VF)_mm512_cvtph_ps(load<__m256i>(from));
#elif defined(__F16C__)
  return (VF)_mm256_cvtph_ps(load<__m128i>(from));
#else
  VF v;
  for (int i = 0; i < F32::kLanes; ++i) v[i] = from_half(from[i].bits);
  return v;
#endif
}
