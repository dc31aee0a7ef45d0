// How the components of rows are divided among threads.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/mask.cuh"
#include "cuda/team.cuh"

namespace emu::cuda {

// A thread has V components of each half, and R rows of candidates at a time: 16 bytes of a row and eight loads in
// flight, if there are enough registers.
template <class Sim, class T, Mode kMode>
struct Shape {
  static constexpr int H = Sim::kHalves;
  static constexpr int V = sizeof(T) == 8 ? 2 : sizeof(T) == 2 && H == 1 ? 8 : 4;
  static constexpr int R = H == 2 && kMode != Mode::kPlain                     ? 2
                           : sizeof(T) == 4 && H == 1 && kMode == Mode::kPlain ? 8
                                                                               : 4;
  static constexpr int kWords = V < 4 ? 1 : V / 4;
};

constexpr int kMostTeamThreads = 256;

struct Plan {
  int half;          // components of a half
  int team_threads;  // a whole number of warps
  int teams;         // per block
  int tile;          // components of each half that a team has at a time
  int splits;        // blocks that share a row's negatives
  Width width;       // of the table's rows
  bool whole_reals;  // whether query, scale and gradients may be moved 16 bytes at a time
  bool whole_out;    // whether the table's gradient may, a chunk at a time

  EMU_MEMBER int tiles() const { return (half + tile - 1) / tile; }
  EMU_MEMBER int threads() const { return team_threads * teams; }
};

// The query's side of a thread's components.
template <class Sim, class T, int V>
struct Columns {
  using Real = typename Sum<T>::Real;
  static constexpr int H = Sim::kHalves;
  Real query[H][V];   // phases are multiplied by κ/2
  Real factor[H][V];  // what multiplies the candidate: a, 1 or κ/2
  int j, end;         // the first component in its half, and the half's end

  EMU_DEVICE void load(const Problem& p, const Plan& plan, int64_t b, int column) {
    load(p, plan, b, column, plan.whole_reals);
  }
  EMU_DEVICE void load(const Problem& p, const Plan& plan, int64_t b, int column, bool whole) {
    j = column, end = plan.half;
    const Real* from = static_cast<const Real*>(p.query) + b * p.D;
    const Real half_scale = static_cast<Real>(p.phase_scale / 2);
    load_half<0>(p, plan, b, from, half_scale, whole);
    if constexpr (H > 1) load_half<H - 1>(p, plan, b, from, half_scale, whole);
  }

  template <int h>
  EMU_DEVICE void load_half(const Problem& p, const Plan& plan, int64_t b, const Real* from, Real half_scale,
                            bool whole) {
    load_reals<V>(from + h * plan.half, j, end, whole, query[h]);
    if constexpr (Sim::factor(h) == Factor::kScale) {
      if (p.scale != nullptr) {  // no similarity scales more than one half
        load_reals<V>(static_cast<const Real*>(p.scale) + b * plan.half, j, end, whole, factor[h]);
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if constexpr (Sim::factor(h) == Factor::kPhase) {
        query[h][i] *= half_scale;
        factor[h][i] = half_scale;
      } else {
        factor[h][i] = 1;
      }
    }
  }
};

// What moments need for a row's components: 1 − ρ, ρ (1 − ρ), and the terms p of the positive. Coupled halves share
// them.
template <class Sim, class T, int V>
struct Rates {
  using Real = typename Sum<T>::Real;
  static constexpr int kSums = Sums<Sim>::kCount;
  Real keep[kSums][V], spread[kSums][V], own_term[kSums][V];

  EMU_DEVICE void load(const Problem& p, const Plan& plan, int64_t b, int j, bool whole) {
    const Real* from = static_cast<const Real*>(p.draws.rate);
    if (p.draws.rate_rows > 1) from += b * kSums * plan.half;
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      Real rate[V];
      if (p.draws.rate_units == 1) {
        for (int i = 0; i < V; ++i) rate[i] = *from;  // the same for all components
      } else {
        load_reals<V>(from + s * plan.half, j, plan.half, whole, rate);
      }
#pragma unroll
      for (int i = 0; i < V; ++i) {
        keep[s][i] = 1 - rate[i];
        spread[s][i] = rate[i] * (1 - rate[i]);
      }
    }
  }
};

// Mean and variance of a sum's value, and their derivatives, from M and V.
template <class Sim, class Real>
EMU_DEVICE Moments<Real> moments_of(int s, Real m, Real v) {
  if (Sim::root(Sim::kCoupled ? 0 : s)) return moments_of_root(m, v, Maths<Real>::inverse_root(m));
  return {m, v, 1, 0, 0, 2};
}

// Reads row `row` of the table, or zeros for a null one.
template <class T, int V>
EMU_DEVICE Chunk<T, V> load_row(const T* row, int offset, int j, int end, Width width) {
  return row != nullptr ? load_chunk<T, V>(row + offset, j, end, width) : Chunk<T, V>{};
}

// The table's row of an id, or null for padding. Ids out of range are reported, and `bad` set.
template <class T>
EMU_DEVICE const T* find_row(const Problem& p, int64_t id, int place, bool& bad) {
  bad = id >= p.N || id < (place == 0 ? 0 : -1);
  if (bad && p.report != nullptr) *static_cast<volatile int64_t*>(p.report + place) = id;
  return bad || id < 0 ? nullptr : static_cast<const T*>(p.table) + id * p.table_stride;
}

}  // namespace emu::cuda
