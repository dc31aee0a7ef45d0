// The least that a training step must move, and nothing else: a yardstick for the fused kernels on a CPU.
//
// Gather: copy the B·K rows of the table that the ids name, row by row of the batch, into a tile a thread that
// stays in its L2 cache. Scatter: add the B·K rows of the gradient (here a row's query, as for a dot product with
// all weights one) into a dense (N, D) gradient, zeros included. No scores, no softmax, no masks. Two ways to
// scatter; the caller keeps the faster.

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
constexpr int64_t kAhead = 8;     // rows asked of the memory before they are needed
constexpr int64_t kChunk = 4096;  // ids looked at before their rows are added

struct Problem {
  const float* table;  // (N, D)
  const float* query;  // (B, D)
  const int64_t* ids;  // (B, K), each in [0, N)
  int64_t B, K, D, N;
  float* gradient;  // (N, D)
  int threads;
};

struct Range {
  int64_t begin, end;
};

Range share(int64_t items, int thread, int threads) {
  return {items * thread / threads, items * (thread + 1) / threads};
}

void prefetch(const float* row, int64_t dim) {
  for (int64_t j = 0; j < dim; j += kLineFloats) __builtin_prefetch(row + j);
}

void gather(const Problem& p, int thread) {
  const int64_t capacity = std::max<int64_t>(1, std::min(p.K, kTileFloats / p.D));
  std::vector<float> tile(static_cast<size_t>(capacity * p.D));
  const Range rows = share(p.B, thread, p.threads);
  const int64_t end = rows.end * p.K;
  for (int64_t b = rows.begin; b < rows.end; ++b) {
    for (int64_t k = 0, to = 0; k < p.K; ++k) {
      const int64_t e = b * p.K + k;
      if (e + kAhead < end) prefetch(p.table + p.ids[e + kAhead] * p.D, p.D);
      std::memcpy(&tile[static_cast<size_t>(to * p.D)], p.table + p.ids[e] * p.D,
                  static_cast<size_t>(p.D) * sizeof(float));
      if (++to == capacity) to = 0;
    }
    asm volatile("" : : "r"(tile.data()) : "memory");  // the tile counts as read
  }
}

// Each thread owns a range of the table's rows, scans all ids and adds those that it owns.
void scatter_by_owner(const Problem& p, int thread) {
  const Range owned = share(p.N, thread, p.threads);
  std::memset(p.gradient + owned.begin * p.D, 0,
              static_cast<size_t>((owned.end - owned.begin) * p.D) * sizeof(float));
  std::vector<int64_t> mine(kChunk + 1);
  for (int64_t from = 0; from < p.B * p.K; from += kChunk) {
    const int64_t to = std::min(from + kChunk, p.B * p.K);
    int64_t count = 0;
    for (int64_t e = from; e < to; ++e) {  // no branch: which ids are owned cannot be predicted
      mine[static_cast<size_t>(count)] = e;
      count += p.ids[e] >= owned.begin && p.ids[e] < owned.end;
    }
    for (int64_t i = 0; i < count; ++i) {
      if (i + kAhead < count) {
        prefetch(p.gradient + p.ids[mine[static_cast<size_t>(i + kAhead)]] * p.D, p.D);
      }
      const int64_t e = mine[static_cast<size_t>(i)];
      const float* __restrict from_row = p.query + e / p.K * p.D;
      float* __restrict to_row = p.gradient + p.ids[e] * p.D;
      for (int64_t j = 0; j < p.D; ++j) to_row[j] += from_row[j];
    }
  }
}

// What the threads of a scatter by segment share.
struct Sorted {
  std::vector<uint32_t> next;   // (threads, N): how many of an id a thread has, then where they go
  std::vector<uint32_t> begin;  // (N + 1,): where the segment of a row of the table begins
  std::vector<uint32_t> rows;   // (B·K,): rows of the batch, sorted by id

  explicit Sorted(const Problem& p)
      : next(static_cast<size_t>(p.threads * p.N)),
        begin(static_cast<size_t>(p.N + 1)),
        rows(static_cast<size_t>(p.B * p.K)) {}
};

// A counting sort of the ids, then each row of the table is summed in the L1 cache and written once.
void scatter_by_segment(const Problem& p, int thread, Sorted& s, std::barrier<>& wait) {
  const Range batch = share(p.B, thread, p.threads);
  uint32_t* next = s.next.data() + thread * p.N;
  for (int64_t b = batch.begin; b < batch.end; ++b) {
    for (int64_t k = 0; k < p.K; ++k) ++next[p.ids[b * p.K + k]];
  }
  wait.arrive_and_wait();
  if (thread == 0) {
    uint32_t total = 0;
    for (int64_t id = 0; id < p.N; ++id) {
      s.begin[static_cast<size_t>(id)] = total;
      for (int t = 0; t < p.threads; ++t) {
        uint32_t& count = s.next[static_cast<size_t>(t * p.N + id)];
        total += count;
        count = total - count;
      }
    }
    s.begin[static_cast<size_t>(p.N)] = total;
  }
  wait.arrive_and_wait();
  for (int64_t b = batch.begin; b < batch.end; ++b) {
    for (int64_t k = 0; k < p.K; ++k) {
      s.rows[next[p.ids[b * p.K + k]]++] = static_cast<uint32_t>(b);
    }
  }
  wait.arrive_and_wait();
  const Range owned = share(p.N, thread, p.threads);
  std::vector<float> sums(static_cast<size_t>(p.D));
  for (int64_t id = owned.begin; id < owned.end; ++id) {
    const uint32_t end = s.begin[static_cast<size_t>(id + 1)];
    float* __restrict sum = sums.data();
    std::memset(sum, 0, static_cast<size_t>(p.D) * sizeof(float));
    for (int64_t e = s.begin[static_cast<size_t>(id)]; e < end; ++e) {
      if (e + kAhead < p.B * p.K) {
        prefetch(p.query + s.rows[static_cast<size_t>(e + kAhead)] * p.D, p.D);
      }
      const float* __restrict row = p.query + s.rows[static_cast<size_t>(e)] * p.D;
      for (int64_t j = 0; j < p.D; ++j) sum[j] += row[j];
    }
    std::memcpy(p.gradient + id * p.D, sum, static_cast<size_t>(p.D) * sizeof(float));
  }
}

}  // namespace

// Returns 0, or 1 where there is no memory. by_segment picks the scatter. The gradient comes uninitialised.
extern "C" int gather_scatter(const float* table, const float* query, const int64_t* ids, int64_t B,
                              int64_t K, int64_t D, int64_t N, int threads, int by_segment,
                              float* gradient) try {
  const Problem p{table, query, ids, B, K, D, N, gradient, threads};
  std::barrier<> wait(threads);
  Sorted sorted(by_segment ? p : Problem{});
  const auto work = [&](int thread) {
    gather(p, thread);
    if (by_segment) {
      scatter_by_segment(p, thread, sorted, wait);
    } else {
      scatter_by_owner(p, thread);
    }
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(work, t);
  work(0);
  for (std::thread& other : others) other.join();
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}
