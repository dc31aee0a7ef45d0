// Elements of tables and of sums, how a thread loads its components of a row, and the mathematics of a scalar.
#pragma once

#include <cstring>

#include "common/problem.h"
#include "common/similarity.h"
#include "cuda/platform.h"

namespace emu::cuda {

// A table's 16-bit elements.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

EMU_DEVICE float widen(float x) { return x; }
EMU_DEVICE double widen(double x) { return x; }
EMU_DEVICE float widen(BFloat16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
EMU_DEVICE float widen(Half x) { return half_to_float(x.bits); }
EMU_DEVICE void narrow(float x, float* to) { *to = x; }
EMU_DEVICE void narrow(double x, double* to) { *to = x; }
EMU_DEVICE void narrow(float x, BFloat16* to) { to->bits = float_to_bfloat16(x); }
EMU_DEVICE void narrow(float x, Half* to) { to->bits = float_to_half(x); }

// What a table's contributions are summed in.
template <class T>
struct Sum {
  using Real = float;
};
template <>
struct Sum<double> {
  using Real = double;
};

// --- a thread's components of a row ---------------------------------------------------------------------------

// V consecutive components, in as few registers as they take in memory.
template <class T, int V>
struct Chunk {
  using Real = typename Sum<T>::Real;
  static constexpr int kWords = static_cast<int>(sizeof(T)) * V / 4;
  uint32_t words[kWords];

  EMU_DEVICE Real at(int i) const {
    if constexpr (sizeof(T) == 8) {
      double x;
      memcpy(&x, words + 2 * i, 8);
      return x;
    } else if constexpr (sizeof(T) == 4) {
      return bits_to_float(words[i]);
    } else {
      const uint32_t word = words[i / 2];
      return widen(T{static_cast<uint16_t>(i % 2 == 0 ? word : word >> 16)});
    }
  }
  EMU_DEVICE void set(int i, T x) {
    if constexpr (sizeof(T) == 2) {
      words[i / 2] |= static_cast<uint32_t>(x.bits) << (16 * (i % 2));
    } else {
      memcpy(words + i * kWords / V, &x, sizeof(T));
    }
  }
  // Makes the compiler recompute what was computed from this, instead of keeping it in registers.
  EMU_DEVICE void forget() {
#pragma unroll
    for (uint32_t& word : words) emu::cuda::forget(word);
  }
};

// How the chunks of a row may be loaded: whole, 8 bytes at a time, or element by element.
enum class Width { kWhole, kHalves, kElements };

// Components j, ..., j + V − 1; zeros from `end` on.
template <class T, int V>
EMU_DEVICE Chunk<T, V> load_chunk(const T* from, int j, int end, Width width) {
  constexpr int kBytes = static_cast<int>(sizeof(T)) * V;
  static_assert(kBytes == 8 || kBytes == 16);
  Chunk<T, V> chunk{};
  if (width == Width::kWhole) {
    if (j >= end) return chunk;
    if constexpr (kBytes == 16) {
      const uint4 words = __ldg(reinterpret_cast<const uint4*>(from + j));
      chunk.words[0] = words.x, chunk.words[1] = words.y, chunk.words[2] = words.z, chunk.words[3] = words.w;
    } else {
      const uint2 words = __ldg(reinterpret_cast<const uint2*>(from + j));
      chunk.words[0] = words.x, chunk.words[1] = words.y;
    }
    return chunk;
  }
  if constexpr (kBytes == 16 && sizeof(T) < 8) {
    if (width == Width::kHalves) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const int at = j + part * (V / 2);
        if (at >= end) continue;
        const uint2 words = __ldg(reinterpret_cast<const uint2*>(from + at));
        chunk.words[2 * part] = words.x, chunk.words[2 * part + 1] = words.y;
      }
      return chunk;
    }
  }
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if (j + i < end) chunk.set(i, from[j + i]);
  }
  return chunk;
}

// The same for query, scale and gradients; `whole`: whether 16 bytes may be loaded at once.
template <int V, class Real>
EMU_DEVICE void load_reals(const Real* from, int j, int end, bool whole, Real (&to)[V]) {
  constexpr int kStep = 16 / sizeof(Real);
  if (whole && V % kStep == 0) {
#pragma unroll
    for (int at = 0; at < V; at += kStep) {
      uint4 words{};
      if (j + at < end) words = *reinterpret_cast<const uint4*>(from + j + at);
      memcpy(to + at, &words, 16);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < V; ++i) to[i] = j + i < end ? from[j + i] : Real{};
}

template <int V, class Real>
EMU_DEVICE void store_reals(Real* to, int j, int end, bool whole, const Real (&from)[V]) {
  constexpr int kStep = 16 / sizeof(Real);
  if (whole && V % kStep == 0) {
#pragma unroll
    for (int at = 0; at < V; at += kStep) {
      uint4 words;
      memcpy(&words, from + at, 16);
      if (j + at < end) *reinterpret_cast<uint4*>(to + j + at) = words;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if (j + i < end) to[j + i] = from[i];
  }
}

// --- mathematics ----------------------------------------------------------------------------------------------

// The M of common/similarity.h.
template <class Real>
struct Maths;

template <>
struct Maths<float> {
  EMU_DEVICE static float abs(float x) { return fabsf(x); }
  EMU_DEVICE static float sign(float x) { return static_cast<float>((x > 0) - (x < 0)); }
  // x^(−1/2); 0 below the smallest normal number.
  EMU_DEVICE static float inverse_root(float x) { return x < 1.17549435e-38f ? 0.0f : reciprocal_root(x); }
  // x − n·π, |result| <= π/2, n whole. Far from 0 it uses doubles, as the method of sinf needs local memory there.
  EMU_DEVICE static float reduce_by_pi(float x) {
    if (fabsf(x) > 8192.0f) {
      const double n = rint(static_cast<double>(x) * 0.31830988618379067);
      return static_cast<float>(fma(n, -1.2246467991473532e-16, fma(n, -3.141592653589793, static_cast<double>(x))));
    }
    const float n = rintf(x * 0.318309886f);
    // π in three parts; n times the first one is exact.
    return fmaf(n, -1.509957990978376432e-7f, fmaf(n, -9.67502593994140625e-4f, fmaf(n, -3.140625f, x)));
  }
  // sin of −π/2..π/2 (minimax of degree 9).
  EMU_DEVICE static float sin_reduced(float r) {
    const float s = r * r;
    float y = 2.6083159809786593541503e-06f;
    y = y * s - 0.0001981069071916863322258f;
    y = y * s + 0.00833307858556509017944336f;
    y = y * s - 0.166666597127914428710938f;
    return r + r * (s * y);
  }
  EMU_DEVICE static float abs_sin(float x) { return fabsf(sin_reduced(reduce_by_pi(x))); }
  // Its derivative, 0 where sin x = 0.
  EMU_DEVICE static float abs_sin_slope(float x) {
    const float r = reduce_by_pi(x);
    return sign(r) * sin_reduced(1.57079633f - fabsf(r));
  }
  EMU_DEVICE static float exp(float x) { return expf(x); }
  EMU_DEVICE static float log(float x) { return logf(x); }
};

template <>
struct Maths<double> {
  EMU_DEVICE static double abs(double x) { return fabs(x); }
  EMU_DEVICE static double sign(double x) { return static_cast<double>((x > 0) - (x < 0)); }
  EMU_DEVICE static double inverse_root(double x) { return x > 0 ? 1 / sqrt(x) : x * 0; }
  EMU_DEVICE static double abs_sin(double x) { return fabs(sin(x)); }
  EMU_DEVICE static double abs_sin_slope(double x) {
    const double s = sin(x);
    return s == 0 ? 0 : s > 0 ? cos(x) : -cos(x);
  }
  EMU_DEVICE static double exp(double x) { return ::exp(x); }
  EMU_DEVICE static double log(double x) { return ::log(x); }
};

// The difference that a term is a function of; for a bilinear similarity, the term itself.
template <class Sim, int h, class Real>
EMU_DEVICE Real difference(Real q, Real a, Real c) {
  if constexpr (Sim::kBilinear) return multiply(q, c);
  if constexpr (Sim::factor(h) == Factor::kNone) return subtract(q, c);
  return subtract(q, multiply(a, c));
}

}  // namespace emu::cuda
