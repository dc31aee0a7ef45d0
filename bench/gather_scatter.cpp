// The least that a training step must move: a lower bound of the time of the fused kernels on a CPU.
// Gather: copy the B·K rows of the table that the ids name, row by row of the batch, into a tile of each thread
// that stays in its L2 cache. Scatter: add B·K rows (a row's query, as for a dot product with all weights one)
// into a dense (N, D) gradient, zeros included. No scores, no softmax, no masks.

#include <algorithm>
#include <barrier>
#include <cstdint>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kLineFloats = 64 / sizeof(float);
constexpr int64_t kTileFloats = 256 * 1024 / sizeof(float);
constexpr int64_t kAhead = 8;  // rows to prefetch

struct Range {
  int64_t begin, end;
};

Range share(int64_t items, int thread, int threads) {
  return {items * thread / threads, items * (thread + 1) / threads};
}

void prefetch(const float* row, int64_t dim) {
  for (int64_t j = 0; j < dim; j += kLineFloats) __builtin_prefetch(row + j);
}

struct Problem {
  const float* table;  // (N, D)
  const float* query;  // (B, D)
  const int64_t* ids;  // (B, K), each in [0, N)
  int64_t B, K, D, N;
  int threads;
  float* gradient;             // (N, D)
  std::vector<uint32_t> next;  // (threads, N): how many of an id a thread has, then where they go
  std::vector<int64_t> begin;  // (N + 1): where the segment of an id begins
  std::vector<uint32_t> rows;  // (B·K): rows of the batch, sorted by id

  void gather(int thread) const {
    const int64_t capacity = std::max<int64_t>(1, kTileFloats / D);
    std::vector<float> tile(capacity * D);
    const auto [first, last] = share(B * K, thread, threads);
    for (int64_t e = first; e < last; ++e) {
      if (e + kAhead < last) prefetch(table + ids[e + kAhead] * D, D);
      std::memcpy(&tile[(e - first) % capacity * D], table + ids[e] * D, D * sizeof(float));
    }
    asm volatile("" : : "r"(tile.data()) : "memory");  // or the compiler drops the copies
  }

  // A counting sort of the ids; then each row of the gradient is summed in the L1 cache and written once.
  void scatter(int thread, std::barrier<>& wait) {
    const auto [first, last] = share(B * K, thread, threads);
    uint32_t* mine = next.data() + thread * N;
    for (int64_t e = first; e < last; ++e) ++mine[ids[e]];
    wait.arrive_and_wait();
    if (thread == 0) {
      uint32_t total = 0;
      for (int64_t id = 0; id < N; ++id) {
        begin[id] = total;
        for (int t = 0; t < threads; ++t) {
          uint32_t& count = next[t * N + id];
          total += count;
          count = total - count;
        }
      }
      begin[N] = total;
    }
    wait.arrive_and_wait();
    for (int64_t e = first; e < last; ++e) rows[mine[ids[e]]++] = static_cast<uint32_t>(e / K);
    wait.arrive_and_wait();
    std::vector<float> sums(D);
    float* __restrict sum = sums.data();
    const auto [low, high] = share(N, thread, threads);
    for (int64_t id = low; id < high; ++id) {
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t e = begin[id]; e < begin[id + 1]; ++e) {
        if (e + kAhead < B * K) prefetch(query + rows[e + kAhead] * D, D);
        const float* __restrict row = query + rows[e] * D;
        for (int64_t j = 0; j < D; ++j) sum[j] += row[j];
      }
      std::memcpy(gradient + id * D, sum, D * sizeof(float));
    }
  }
};

}  // namespace

// Returns 0, or 1 where there is no memory.
extern "C" int gather_scatter(const float* table, const float* query, const int64_t* ids, int64_t B,
                              int64_t K, int64_t D, int64_t N, int threads, float* gradient) try {
  Problem p{table, query, ids, B, K, D, N, threads, gradient, {}, {}, {}};
  p.next.resize(threads * N);
  p.begin.resize(N + 1);
  p.rows.resize(B * K);
  std::barrier<> wait(threads);
  const auto work = [&](int thread) {
    p.gather(thread);
    p.scatter(thread, wait);
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(work, t);
  work(0);
  for (std::thread& other : others) other.join();
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}
