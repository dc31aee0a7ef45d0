// The mutation rules, one small struct each, for scalars and vectors, host and device. To add one, write its struct
// here and put it into the list below; its own parameters are fields of Draws. emu_kernels/mutation.py describes the
// same rules.
//
// A rule has: name; kDraw, what it draws for each negative of a row; for masks kPairs, whether a unit of the mask is
// the pair of components j and D/2 + j; for shares the function share(u, draws) from four uniform numbers in [0, 1)
// to the share; and read_parameters, which fills in its own parameters from Python's keyword arguments.
#pragma once

#include <cstdint>

#include "common/list.h"

namespace emu {

enum class Draw {
  kNone,
  kMask,    // a byte for each unit, which is mutated (taken from the positive) if its byte is below a threshold
  kShare,   // one number for each negative: how much of itself it keeps
  kMoments  // nothing: the mean and the variance of the scores that masks would give are taken
};

// What one call draws. emu_kernels/mask.py says how the generator's counter follows from seed and row.
struct Draws {
  int rule;             // its index in the list
  Draw kind;            // the rule's kDraw
  bool pairs;           // the rule's kPairs
  const int64_t* seed;  // (1,), read when a kernel runs, so that a replayed CUDA graph uses the seed's new value
  uint32_t row_offset;
  // The parameters of all rules.
  int threshold;              // for all bytes, 0..256
  const int16_t* thresholds;  // one for each unit, or null
  int order;                  // 1..4
  const void* rate;           // real: (1, 1), or (1 or B, U), U = D, or D/2 where a term is a function of both halves
  int rate_rows, rate_units;  // its shape
  bool learned;               // whether rate gets a gradient
};

struct NoMutation {
  static constexpr const char* name = "none";
  static constexpr Draw kDraw = Draw::kNone;
  static constexpr bool kPairs = false;
  template <class Read>
  static void read_parameters(Draws&, Read&&) {}
};

struct Component {
  static constexpr const char* name = "component";
  static constexpr Draw kDraw = Draw::kMask;
  static constexpr bool kPairs = false;
  template <class Read>
  static void read_parameters(Draws& draws, Read&& read) {
    read("threshold", draws.threshold);
    read("thresholds", draws.thresholds);
  }
};

struct Pair : Component {
  static constexpr const char* name = "pair";
  static constexpr bool kPairs = true;
};

// The largest of `order` uniform numbers, which is distributed as Beta(order, 1).
struct Mixup {
  static constexpr const char* name = "mixup";
  static constexpr Draw kDraw = Draw::kShare;
  static constexpr bool kPairs = false;
  template <class Read>
  static void read_parameters(Draws& draws, Read&& read) {
    read("order", draws.order);
  }
  template <class V>
  EMU_INNER V share(const V (&uniform)[4], const Draws& draws) {
    V largest = uniform[0];
    for (int w = 1; w < 4; ++w) {
      if (w < draws.order) largest = uniform[w] > largest ? uniform[w] : largest;
    }
    return largest;
  }
};

// The mean and the variance over all masks of Component (of Pair, where terms are coupled).
struct Expected {
  static constexpr const char* name = "expected";
  static constexpr Draw kDraw = Draw::kMoments;
  static constexpr bool kPairs = false;
  template <class Read>
  static void read_parameters(Draws& draws, Read&& read) {
    read("rate", draws.rate);
    read("rate_rows", draws.rate_rows);
    read("rate_units", draws.rate_units);
    read("learned", draws.learned);
  }
};

using Mutations = List<NoMutation, Component, Pair, Mixup, Expected>;

// --- how the kernels use the list -----------------------------------------------------------------------------

// The share that the call's rule computes from four uniform numbers.
template <class V, class First, class... Rest>
EMU_INNER V share_of(List<First, Rest...>, int place, const V (&uniform)[4], const Draws& draws) {
  if constexpr (sizeof...(Rest) > 0) {
    if constexpr (First::kDraw == Draw::kShare) {
      if (place == 0) return First::share(uniform, draws);
    }
    return share_of(List<Rest...>{}, place - 1, uniform, draws);
  } else if constexpr (First::kDraw == Draw::kShare) {
    return First::share(uniform, draws);
  } else {
    return uniform[0];  // not reached: the rule draws shares
  }
}

// Mean and variance of a sum's value (the sum itself, or minus the root of a sum of squares), and their derivatives by
// M and V/2, where M and V are the mean and the variance of the sum. For a root, the derivatives are multiplied by −2,
// like a sum's weights.
template <class V>
struct Moments {
  V mean, variance, mean_by_m, mean_by_v, variance_by_m, variance_by_v;
};
// Those of minus a root, by the delta method; inverse is 1/√M (0 for M = 0).
template <class V>
EMU_INNER Moments<V> moments_of_root(V m, V v, V inverse) {
  const V square = inverse * inverse, cube = square * inverse;
  return {v * cube * 0.125f - m * inverse,      v * square * 0.25f,  //
          inverse + v * cube * square * 0.375f, cube * -0.5f,        //
          v * square * square * 0.5f,           -square};
}

// How the inner loops mutate a negative. If a term is a function of one component, the mutated term is either the
// negative's or the positive's (kSelect); otherwise components are exchanged before terms are computed (kMask). With a
// share, every component is mixed. With moments, the sums of ẑ are means M, and each has a variance V: with t the
// negative's terms and p the positive's, M = Σ_j ρ_j p_j + (1 − ρ_j) t_j and V = Σ_j ρ_j (1 − ρ_j) (p_j − t_j)².
enum Mode { kPlain, kSelect, kMask, kShare, kMoments };

constexpr bool masked(Mode mode) { return mode == kSelect || mode == kMask; }

template <class Sim, class Body>
auto with_mode(Draw draw, Body&& body) {
  switch (draw) {
    case Draw::kNone: return body(Constant<kPlain>{});
    case Draw::kMask: return body(Constant<Sim::kCoupled ? kMask : kSelect>{});
    case Draw::kMoments: return body(Constant<kMoments>{});
    default: return body(Constant<kShare>{});
  }
}

}  // namespace emu
