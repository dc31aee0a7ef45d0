// A team of threads works on a row together. It is one of a block's warps, or all warps of a block.
#pragma once

#include "cuda/platform.h"

namespace emu::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

struct Team {
  int threads, index, count;  // count > 1 only for teams of one warp
  int at, lane;               // this thread's index in its team and in its warp

  EMU_DEVICE explicit Team(int size)
      : threads(size),
        index(static_cast<int>(threadIdx.x) / size),
        count(static_cast<int>(blockDim.x) / size),
        at(static_cast<int>(threadIdx.x) % size),
        lane(static_cast<int>(threadIdx.x) % kWarp) {}

  EMU_DEVICE bool one_warp() const { return threads == kWarp; }
  EMU_DEVICE void sync() const {
    if (one_warp()) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }
};

template <class Real>
EMU_DEVICE Real from_lane(Real x, int lane) {
  return __shfl_sync(kAllLanes, x, lane);
}
template <class Real>
EMU_DEVICE Real from_partner(Real x, int distance) {
  return __shfl_xor_sync(kAllLanes, x, distance);
}

// Sums N values at once over a warp, in 2N shuffles instead of 5N: lane l gets the sum of value l / (32 / N). At each
// step a lane sends half of its values to a partner, which sends it the other half.
template <int kDistance, int N, class Real>
EMU_DEVICE Real warp_sums_from(Real (&v)[N], int lane) {
  if constexpr (kDistance == 0) {
    return v[0];
  } else if constexpr (N == 1) {
    v[0] += from_partner(v[0], kDistance);
    return warp_sums_from<kDistance / 2>(v, lane);
  } else {
    const bool upper = lane & kDistance;
    Real halved[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const Real low = v[i], high = v[i + N / 2];
      halved[i] = (upper ? high : low) + from_partner(upper ? low : high, kDistance);
    }
    return warp_sums_from<kDistance / 2>(halved, lane);
  }
}
template <int N, class Real>
EMU_DEVICE Real warp_sums(Real (&v)[N], int lane) {
  static_assert(N <= kWarp && (N & (N - 1)) == 0);
  return warp_sums_from<kWarp / 2>(v, lane);
}

// The same over a team; `scratch` holds a value for each of its threads.
template <int N, class Real>
EMU_DEVICE Real team_sums(const Team& team, Real (&v)[N], Real* scratch) {
  Real sum = warp_sums(v, team.lane);
  if (team.one_warp()) return sum;
  scratch[team.at] = sum;
  team.sync();
  sum = 0;
  for (int at = team.lane; at < team.threads; at += kWarp) sum += scratch[at];
  return sum;
}

// Joins the values of all threads of a block, for all of them; `scratch` holds a value for each warp.
template <class Real, class Join>
EMU_DEVICE Real block_join(Real x, Real* scratch, Join&& join) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int distance = kWarp / 2; distance >= 1; distance /= 2) x = join(x, from_partner(x, distance));
  __syncthreads();  // the scratch may be in use
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  x = scratch[0];
  for (int w = 1; w < static_cast<int>(blockDim.x) / kWarp; ++w) x = join(x, scratch[w]);
  return x;
}
template <class Real>
EMU_DEVICE Real block_sum(Real x, Real* scratch) {
  return block_join(x, scratch, [](Real a, Real b) { return a + b; });
}
template <class Real>
EMU_DEVICE Real block_max(Real x, Real* scratch) {
  return block_join(x, scratch, [](Real a, Real b) { return a > b ? a : b; });
}

}  // namespace emu::cuda
