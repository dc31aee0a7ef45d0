// The similarities φ(query, candidate), one small struct each, for scalars and vectors, host and device. To add one,
// write its struct here and put it into the list below; CMake compiles CUDA kernels for each entry of the list.
// emu_kernels/similarity.py describes the same similarities.
//
// φ = Σ_s w_s S_s, where S_s is a sum of terms over components, or minus the root of a sum of squares. A term
// is either u = q·c (kBilinear), or a function of u = q − a·c that is 0 at 0 (as padding is summed too). A row may be
// two halves of D/2 components each, with a sum each; or a term may be a function of both halves (kCoupled), such as of
// both parts of a complex number.
//
// Each has: name, kHalves, kCoupled, kBilinear, kWeights (how many w it takes), root(s) (whether sum s is of squares
// under a root), factor(h), and the terms and slopes from which scores and gradients are computed; M is the class of
// the mathematical functions of V:
//   uncoupled: term<h, M>(u), slope<h, M>(u) = −∂term/∂u (for a square, u itself); a bilinear one needs no slope
//   coupled:   a function of u0² + u1²: inverse<M>(square), value(square, inverse), where −∂term/∂u_h = u_h · inverse;
//              and the same from the parts: term<M>(u0, u1), slopes<M>(u0, u1, s0, s1)
// Code that does not need M uses only operators that scalars and vectors both have.
#pragma once

#include "common/list.h"

namespace emu {

// What a half of the candidate is multiplied by: nothing, the query's scale a, or κ/2 (the query is too).
enum class Factor { kNone, kScale, kPhase };

struct OneSum {
  static constexpr int kHalves = 1, kWeights = 0;
  static constexpr bool kCoupled = false, kBilinear = false;
  static constexpr bool root(int) { return false; }
  static constexpr Factor factor(int) { return Factor::kScale; }
};

// Σ_j q_j c_j
struct Dot : OneSum {
  static constexpr const char* name = "dot";
  static constexpr bool kBilinear = true;
  static constexpr Factor factor(int) { return Factor::kNone; }
  template <int h, class M, class V>
  EMU_INNER V term(V u) {
    return u;
  }
};

// −Σ_j |q_j − a_j c_j|
struct L1 : OneSum {
  static constexpr const char* name = "l1";
  template <int h, class M, class V>
  EMU_INNER V term(V u) {
    return -M::abs(u);
  }
  template <int h, class M, class V>
  EMU_INNER V slope(V u) {
    return M::sign(u);
  }
};

// −‖q − a ⊙ c‖₂
struct L2 : OneSum {
  static constexpr const char* name = "l2";
  static constexpr bool root(int) { return true; }
  template <int h, class M, class V>
  EMU_INNER V term(V u) {
    return u * u;
  }
  template <int h, class M, class V>
  EMU_INNER V slope(V u) {
    return u;
  }
};

// −Σ_j |q_j − c_j|, complex, re‖im
struct Rotate : OneSum {
  static constexpr const char* name = "rotate";
  static constexpr int kHalves = 2;
  static constexpr bool kCoupled = true;
  static constexpr Factor factor(int) { return Factor::kNone; }
  template <class M, class V>
  EMU_INNER V inverse(V square) {
    return M::inverse_root(square);
  }
  template <class V>
  EMU_INNER V value(V square, V inverse) {
    return -(square * inverse);
  }
  template <class M, class V>
  EMU_INNER V term(V re, V im) {
    const V square = re * re + im * im;
    return value(square, inverse<M>(square));
  }
  template <class M, class V>
  EMU_INNER void slopes(V re, V im, V& s_re, V& s_im) {
    const V i = inverse<M>(re * re + im * im);
    s_re = re * i;
    s_im = im * i;
  }
};

// −w_0 Σ_j |sin(u_j)| of the phases, u = (q − c) κ/2, − w_1 ‖q − a ⊙ c‖₂ of the moduli, phase‖modulus
struct Hake {
  static constexpr const char* name = "hake";
  static constexpr int kHalves = 2, kWeights = 2;
  static constexpr bool kCoupled = false, kBilinear = false;
  static constexpr bool root(int h) { return h == 1; }
  static constexpr Factor factor(int h) { return h == 1 ? Factor::kScale : Factor::kPhase; }
  template <int h, class M, class V>
  EMU_INNER V term(V u) {
    if constexpr (h == 1) return u * u;
    return -M::abs_sin(u);
  }
  template <int h, class M, class V>
  EMU_INNER V slope(V u) {
    if constexpr (h == 1) return u;
    return M::abs_sin_slope(u);
  }
};

// −w_0 Σ_j |sin(u_j)| of phases, u = (q − c) κ/2
struct PRotate : OneSum {
  static constexpr const char* name = "protate";
  static constexpr int kWeights = 1;
  static constexpr Factor factor(int) { return Factor::kPhase; }
  template <int h, class M, class V>
  EMU_INNER V term(V u) {
    return -M::abs_sin(u);
  }
  template <int h, class M, class V>
  EMU_INNER V slope(V u) {
    return M::abs_sin_slope(u);
  }
};

using Similarities = List<Dot, L1, L2, Rotate, Hake, PRotate>;

// What follows from a similarity's members.
template <class Sim>
struct Sums {
  static_assert(Sim::kHalves == 1 || Sim::factor(0) != Factor::kScale, "only the last half can have a scale");
  static_assert(!Sim::kCoupled || Sim::factor(1) == Factor::kNone, "coupled halves are not multiplied");
  static constexpr int kCount = Sim::kCoupled ? 1 : Sim::kHalves;
  // Whether the score is simply its only sum.
  static constexpr bool kDirect = kCount == 1 && !Sim::root(0) && Sim::kWeights == 0;
  // Whether the last half of the candidate is multiplied by the query's scale.
  static constexpr bool kScaled = Sim::factor(Sim::kHalves - 1) == Factor::kScale;
};

}  // namespace emu
