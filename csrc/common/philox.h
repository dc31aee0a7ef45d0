// Philox-4x32 with 7 rounds (Salmon et al., SC'11): the constants, and one scalar call for host and device. The CPU
// kernels have a vector form (cpu/random.inl.h). emu_kernels/mask.py states what is drawn with it.
#pragma once

#include <cstdint>

#include "common/list.h"

namespace emu {

constexpr int kPhiloxRounds = 7;
constexpr uint32_t kPhiloxM0 = 0xD2511F53u;
constexpr uint32_t kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxW1 = 0xBB67AE85u;
constexpr int kComponentsPerCall = 16;  // each takes one byte of the four output words
constexpr uint32_t kMaskStream = 0, kShareStream = 1;

// (word >> kUniformShift) · kUniformUnit is a number in [0, 1) that a float holds exactly.
constexpr int kUniformShift = 8;
constexpr double kUniformUnit = 0x1p-24;

EMU_MEMBER void philox4x32(const uint32_t counter[4], uint64_t seed, uint32_t out[4]) {
  uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int r = 0; r < kPhiloxRounds; ++r) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c0;
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

}  // namespace emu
