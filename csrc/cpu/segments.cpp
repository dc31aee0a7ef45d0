#include "cpu/segments.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "cpu/threads.h"

namespace emu {
namespace {

constexpr int64_t kMinChunk = 16384;

int bit_width(uint64_t v) {
  int bits = 0;
  for (; v; v >>= 1) ++bits;
  return bits;
}

// Bits of a digit: as few passes as possible, with a histogram that fits the L2 cache and is well below the number of
// entries.
int choose_digit_bits(int bits, int64_t entries) {
  int most = 8;
  while (most < 15 && (int64_t{1} << (most + 3)) <= entries) ++most;
  const int passes = (bits + most - 1) / most;
  return (bits + passes - 1) / passes;
}

}  // namespace

// A stable least-significant-digit radix sort with a histogram for each chunk.
Segments::Segments(const Problem& p) {
  const int64_t negatives = p.G * p.K;
  const int64_t n = negatives + p.B;
  if (n >= (int64_t{1} << 32) - 1 || p.N >= (int64_t{1} << 32) - 1) {
    throw std::invalid_argument("negative: the cpu backend takes at most 2**32 - 2 ids and table rows a call");
  }
  if (p.B == 0) return;                                    // a set of negatives without a row contributes nothing
  const int bits = bit_width(static_cast<uint64_t>(p.N));  // keys 0..N; N is padding
  const int digit_bits = choose_digit_bits(bits, n);
  const uint32_t bins = 1u << digit_bits;
  const int chunks = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(p.place.threads, n / kMinChunk)));
  std::vector<uint32_t> histogram(static_cast<size_t>(chunks) * bins);
  storage_.reset(new uint64_t[bits > digit_bits ? 2 * n : n]);
  uint64_t* to = storage_.get();
  uint64_t* from = bits > digit_bits ? to + n : nullptr;

  const auto unsorted = [&](int64_t e) {
    const int64_t id = e < negatives ? p.negative[e] : p.positive[e - negatives];
    return static_cast<uint64_t>(id < 0 ? p.N : id) << 32 | static_cast<uint64_t>(e);
  };
  const auto pass = [&](int shift, auto&& source) {
    std::fill(histogram.begin(), histogram.end(), 0);
    parallel(p.place.threads, chunks, [&](int64_t chunk, int) {
      uint32_t* counts = histogram.data() + chunk * bins;
      for (int64_t e = n * chunk / chunks; e < n * (chunk + 1) / chunks; ++e) {
        ++counts[(source(e) >> shift) & (bins - 1)];
      }
    });
    uint32_t total = 0;
    for (uint32_t bin = 0; bin < bins; ++bin) {
      for (int chunk = 0; chunk < chunks; ++chunk) {
        uint32_t& count = histogram[static_cast<size_t>(chunk) * bins + bin];
        const uint32_t c = count;
        count = total;
        total += c;
      }
    }
    parallel(p.place.threads, chunks, [&](int64_t chunk, int) {
      uint32_t* front = histogram.data() + chunk * bins;
      for (int64_t e = n * chunk / chunks; e < n * (chunk + 1) / chunks; ++e) {
        const uint64_t record = source(e);
        to[front[(record >> shift) & (bins - 1)]++] = record;
      }
    });
  };

  pass(32, unsorted);
  for (int done = digit_bits; done < bits; done += digit_bits) {
    std::swap(from, to);
    pass(32 + done, [from](int64_t e) { return from[e]; });
  }
  sorted_ = to;
  size_ = std::lower_bound(to, to + n, static_cast<uint64_t>(p.N) << 32) - to;
}

int64_t Segments::touched() const {
  int64_t count = 0;
  for (int64_t e = 0; e < size_; ++e) {
    count += e == 0 || sorted_[e] >> 32 != sorted_[e - 1] >> 32;
  }
  return count;
}

}  // namespace emu
