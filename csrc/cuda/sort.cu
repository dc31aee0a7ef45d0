#include "cuda/sort.h"

#include "cuda/operators.h"
#include "cuda/platform.h"

#if defined(__CUDACC__)
#include <cub/device/device_radix_sort.cuh>
#else
#include <algorithm>
#include <numeric>
#include <vector>
#endif

namespace emu::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kAligned = 256;

int64_t padded(int64_t bytes) { return (bytes + kAligned - 1) / kAligned * kAligned; }

int bit_width(uint64_t v) {
  int bits = 0;
  for (; v != 0; v >>= 1) ++bits;
  return bits;
}

struct Buffers {
  uint32_t *key, *entry, *unsorted_key, *unsorted_entry;
  void* rest;

  Buffers(const Problem& p, void* workspace) {
    const int64_t each = padded(count_entries(p) * 4);
    char* at = static_cast<char*>(workspace);
    uint32_t** const arrays[] = {&key, &entry, &unsorted_key, &unsorted_entry};
    for (uint32_t** array : arrays) *array = reinterpret_cast<uint32_t*>(at), at += each;
    rest = at;
  }
};

__global__ void __launch_bounds__(kThreads)
    list_entries(const __grid_constant__ Problem p, int64_t entries, uint32_t* keys, uint32_t* values) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (e >= entries) return;
  const int64_t negatives = p.G * p.K;
  const int64_t id = e < negatives ? p.negative[e] : p.positive[e - negatives];
  keys[e] = static_cast<uint32_t>(id < 0 || id >= p.N ? p.N : id);
  values[e] = static_cast<uint32_t>(e);
}

void list(const Problem& p, int64_t entries, uint32_t* keys, uint32_t* values) {
  EMU_LAUNCH(list_entries, "list_entries", grid((entries + kThreads - 1) / kThreads), kThreads, 0, p.place.stream, p,
             entries, keys, values);
}

#if defined(__CUDACC__)

// If memory is null, only returns how much it needs.
size_t sort_pairs(void* memory, size_t bytes, const Buffers& b, int64_t entries, int bits, void* stream) {
  check(cub::DeviceRadixSort::SortPairs(memory, bytes, b.unsorted_key, b.key, b.unsorted_entry, b.entry, entries, 0,
                                        bits, static_cast<cudaStream_t>(stream)),
        "sort_ids");
  return bytes;
}

#else

size_t sort_pairs(void* memory, size_t bytes, const Buffers& b, int64_t entries, int, void*) {
  if (memory == nullptr) return 1;
  (void)bytes;
  std::vector<uint32_t> order(static_cast<size_t>(entries));
  std::iota(order.begin(), order.end(), 0u);
  std::stable_sort(order.begin(), order.end(),
                   [&](uint32_t x, uint32_t y) { return b.unsorted_key[x] < b.unsorted_key[y]; });
  for (int64_t i = 0; i < entries; ++i) {
    b.key[i] = b.unsorted_key[order[static_cast<size_t>(i)]];
    b.entry[i] = b.unsorted_entry[order[static_cast<size_t>(i)]];
  }
  return bytes;
}

#endif

}  // namespace

int64_t count_entries(const Problem& p) {
  const int64_t entries = p.B > 0 ? p.G * p.K + p.B : 0;  // a set of negatives without a row contributes nothing
  constexpr int64_t kMost = (int64_t{1} << 32) - 2;
  if (entries > kMost || p.N > kMost) {
    throw std::invalid_argument("negative: the cuda backend takes at most 2**32 - 2 ids and table rows a call");
  }
  return entries;
}

int64_t sort_workspace(const Problem& p) {
  const int64_t entries = count_entries(p), each = padded(entries * 4);
  if (entries == 0) return 0;
  const int bits = bit_width(static_cast<uint64_t>(p.N));
  const size_t rest = sort_pairs(nullptr, 0, Buffers(p, nullptr), entries, bits, nullptr);
  return 4 * each + static_cast<int64_t>(rest);
}

void sort_ids(const Problem& p, void* workspace) {
  const int64_t entries = count_entries(p);
  if (entries == 0) return;
  const Buffers b(p, workspace);
  list(p, entries, b.unsorted_key, b.unsorted_entry);
  const size_t bytes = static_cast<size_t>(sort_workspace(p) - 4 * padded(entries * 4));
  sort_pairs(b.rest, bytes, b, entries, bit_width(static_cast<uint64_t>(p.N)), p.place.stream);
}

void list_ids(const Problem& p, void* workspace) {
  const int64_t entries = count_entries(p);
  const Buffers b(p, workspace);
  if (entries > 0) list(p, entries, b.key, b.entry);
}

SortedIds sorted_ids(const Problem& p, const void* workspace) {
  const Buffers b(p, const_cast<void*>(workspace));
  return {b.key, b.entry, count_entries(p)};
}

}  // namespace emu::cuda
