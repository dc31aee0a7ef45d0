// Masks and shares, as emu_kernels/mask.py specifies them.
//
// One Philox call decides sixteen components, more than one thread has of a row. So a team draws the bytes of a few
// rows into shared memory, where each thread makes some of the calls; then each thread reads its components' bytes.
#pragma once

#include "common/philox.h"
#include "cuda/elements.cuh"
#include "cuda/team.cuh"

namespace emu::cuda {

EMU_DEVICE void draw_block(uint64_t seed, uint32_t block, uint32_t k, uint32_t row, uint32_t (&words)[4]) {
  const uint32_t counter[4] = {block, k, row, kMaskStream};
  philox4x32(counter, seed, words);
}

// The seed in two registers. Each use hides where it comes from: otherwise the compiler would also keep the keys of all
// rounds, for which there are too few registers.
struct Seed {
  uint32_t low = 0, high = 0;

  EMU_DEVICE void load(const Draws& draws) {
    const uint64_t seed = static_cast<uint64_t>(*draws.seed);
    low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
  }
  EMU_DEVICE uint64_t value() const {
    uint32_t own_low = low, own_high = high;
    forget(own_low), forget(own_high);
    return static_cast<uint64_t>(own_high) << 32 | own_low;
  }
};

// The share of negative k of a row.
template <class Real>
EMU_DEVICE Real draw_share(const Draws& draws, const Seed& seed, uint32_t k, uint32_t row) {
  const uint32_t counter[4] = {0, k, row, kShareStream};
  uint32_t words[4];
  philox4x32(counter, seed.value(), words);
  Real uniform[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    uniform[w] = static_cast<Real>(words[w] >> kUniformShift) * static_cast<Real>(kUniformUnit);
  }
  return share_of(Mutations{}, draws.rule, uniform, draws);
}

// A component is mutated if its byte, shifted to the top of a word, is at most `top`.
struct Limit {
  uint32_t top;
  bool decided;  // bytes are drawn as 0 for mutated and 255 for not

  EMU_DEVICE explicit Limit(const Draws& draws)
      : top(static_cast<uint32_t>(draws.threshold) * (1u << 24) - 1),
        decided(draws.thresholds != nullptr || draws.threshold <= 0) {
    if (decided) top = (1u << 24) - 1;
  }
  EMU_DEVICE bool mutated(uint32_t word, int byte) const { return word << (24 - 8 * byte) <= top; }

  // If bytes cannot be compared with one limit later, decides the sixteen of one call now.
  EMU_DEVICE void decide(const Draws& draws, int units, int block, uint32_t (&words)[4]) const {
    if (!decided) return;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      uint32_t out = 0;
      for (int i = 0; i < 4; ++i) {
        const int unit = block * kComponentsPerCall + 4 * w + i;
        const int threshold = draws.thresholds != nullptr && unit < units ? draws.thresholds[unit] : 0;
        out |= static_cast<int>(words[w] >> (8 * i) & 0xFF) < threshold ? 0 : 0xFFu << (8 * i);
      }
      words[w] = out;
    }
  }
};

// The bytes of a few rows' components c0, ..., c0 + tile − 1 of each half.
template <class Sim>
struct MaskTile {
  static constexpr int H = Sim::kHalves;
  const Draws& draws;
  const Limit limit;
  unsigned char* const bytes;  // (rows, row_bytes)
  const int tile, half, units, region;
  Seed seed;
  int c0 = 0;
  // Philox blocks of each half's components. Not arrays: those indexed at run time would be in local memory.
  int first0 = 0, first1 = 0, blocks0 = 0, blocks1 = 0;
  // What a thread draws: the place of its first call, and the step to the next. To save registers, one word holds a
  // row and a block of it.
  static constexpr uint32_t kBlockBits = 22, kOneRow = 1u << kBlockBits;
  uint32_t first_place, step;

  static EMU_MEMBER int row_bytes(int tile) { return H * (tile + kComponentsPerCall); }

  EMU_DEVICE MaskTile(const Problem& p, int tile_size, unsigned char* memory)
      : draws(p.draws),
        limit(p.draws),
        bytes(memory),
        tile(tile_size),
        half(static_cast<int>(p.D) / H),
        units(static_cast<int>(p.D) / (p.draws.pairs ? 2 : 1)),
        region(tile_size + kComponentsPerCall) {}

  // If a row is not in halves but masks are of pairs, the two components of a pair may be in different tiles.
  EMU_DEVICE bool scattered() const { return H == 1 && draws.pairs; }

  EMU_DEVICE void move_to(const Team& team, int column) {
    c0 = column;
    const int width = tile < half - c0 ? tile : half - c0;
    first0 = c0 / kComponentsPerCall;
    blocks0 = (c0 + width + kComponentsPerCall - 1) / kComponentsPerCall - first0;
    if (H > 1 && !draws.pairs) {
      first1 = (half + c0) / kComponentsPerCall;
      blocks1 = (half + c0 + width + kComponentsPerCall - 1) / kComponentsPerCall - first1;
    }
    if (scattered()) first0 = 0, blocks0 = (units + kComponentsPerCall - 1) / kComponentsPerCall;
    const int all = blocks0 + blocks1;
    const auto place = [&](int n) { return static_cast<uint32_t>(n / all) * kOneRow + static_cast<uint32_t>(n % all); };
    first_place = place(team.at), step = place(team.threads);
  }

  // counter(r, k, row) sets the counter's words for row r; if it returns false, nothing is drawn.
  template <class Counter>
  EMU_DEVICE void draw(int rows, Counter&& counter) {
    const int all = blocks0 + blocks1;
#pragma unroll 1
    for (uint32_t place = first_place; place < static_cast<uint32_t>(rows) * kOneRow;) {
      const int r = static_cast<int>(place / kOneRow), at = static_cast<int>(place % kOneRow);
      uint32_t k, row;
      if (counter(r, k, row)) {
        const int h = H > 1 && at >= blocks0 ? 1 : 0;
        const int local = at - h * blocks0, block = (h == 0 ? first0 : first1) + local;
        uint32_t words[4];
        draw_block(seed.value(), static_cast<uint32_t>(block), k, row, words);
        limit.decide(draws, units, block, words);
        if (scattered()) {
          scatter(r, block, words);
        } else {
          uint4 packed;
          memcpy(&packed, words, 16);
          *reinterpret_cast<uint4*>(bytes + r * H * region + h * region + local * kComponentsPerCall) = packed;
        }
      }
      place += step;
      if (place % kOneRow >= static_cast<uint32_t>(all)) place += kOneRow - static_cast<uint32_t>(all);
    }
  }

  EMU_DEVICE void scatter(int r, int block, const uint32_t (&words)[4]) {
#pragma unroll
    for (int i = 0; i < kComponentsPerCall; ++i) {
      const int unit = block * kComponentsPerCall + i;
      if (unit >= units) break;
      const unsigned char byte = static_cast<unsigned char>(words[i / 4] >> (8 * (i % 4)));
      for (int part = 0; part < 2; ++part) {
        const int j = unit + part * units - c0;
        if (j >= 0 && j < tile) bytes[r * region + j] = byte;
      }
    }
  }

  // The words that hold row r's bytes of components j, ..., j + V − 1 of half h.
  template <int V, int kWords>
  EMU_DEVICE void load(int r, int h, int j, uint32_t (&words)[kWords]) const {
    const int of = h == 1 && draws.pairs ? 0 : h;
    const int at =
        of * region + (of * half + j) - (scattered() ? c0 : (of == 0 ? first0 : first1) * kComponentsPerCall);
    const unsigned char* from = bytes + r * H * region + at;
    if constexpr (V < 4) {
      words[0] = 0;
#pragma unroll
      for (int i = 0; i < V; ++i) words[0] |= static_cast<uint32_t>(from[i]) << (8 * i);
    } else {
      const int shift = H > 1 ? 8 * (at & 3) : 0;
      const uint32_t* aligned = reinterpret_cast<const uint32_t*>(from - (H > 1 ? at & 3 : 0));
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        words[w] = aligned[w];
        if constexpr (H > 1) {
          if (shift > 0) words[w] = words[w] >> shift | aligned[w + 1] << (32 - shift);
        }
      }
    }
  }
};

}  // namespace emu::cuda
