// The least data that a training step must move: a lower bound of the fused kernels' time on a CPU.
// Gather: copy the B·K rows of the table that the ids name, one row of the batch after the other, into a tile of each
// thread that stays in its L2 cache. Scatter: add B·K rows (the batch row's query, as for a dot product with all
// weights one) into a dense (N, D) gradient, and write its zeros. No scores, no softmax, no masks.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

constexpr int64_t kLineFloats = 64 / sizeof(float);
constexpr int64_t kTileFloats = 256 * 1024 / sizeof(float);
constexpr int64_t kAhead = 8;  // rows to prefetch

static void prefetch(const float* row, int64_t dim) {
  for (int64_t j = 0; j < dim; j += kLineFloats) __builtin_prefetch(row + j);
}

// table (N, D), query (B, D), ids (B, K) in [0, N), gradient (N, D).
extern "C" void gather_scatter(const float* table, const float* query, const int64_t* ids, int64_t B, int64_t K,
                               int64_t D, int64_t N, int threads, float* gradient) {
  std::vector<uint32_t> next(threads * N);  // how often each thread has an id, then where these go
  std::vector<uint32_t> begin(N + 1);       // where the segment of an id begins
  std::vector<uint32_t> rows(B * K);        // rows of the batch, sorted by id
#pragma omp parallel num_threads(threads)
  {
    // A static schedule gives a thread the same elements in each loop over them.
    uint32_t* mine = next.data() + omp_get_thread_num() * N;
    std::vector<float> tile(std::max(kTileFloats / D, int64_t{1}) * D);
    size_t at = 0;
#pragma omp for schedule(static)
    for (int64_t e = 0; e < B * K; ++e) {
      if (e + kAhead < B * K) prefetch(table + ids[e + kAhead] * D, D);
      std::memcpy(tile.data() + at, table + ids[e] * D, D * sizeof(float));
      at = at + D < tile.size() ? at + D : 0;
    }
    asm volatile("" : : "r"(tile.data()) : "memory");  // or the compiler drops the copies

    // A counting sort of the ids; then each row of the gradient is summed in the L1 cache and written once.
#pragma omp for schedule(static)
    for (int64_t e = 0; e < B * K; ++e) ++mine[ids[e]];
#pragma omp single
    {
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
#pragma omp for schedule(static)
    for (int64_t e = 0; e < B * K; ++e) rows[mine[ids[e]]++] = static_cast<uint32_t>(e / K);
    std::vector<float> sums(D);
    float* __restrict sum = sums.data();
#pragma omp for schedule(static)
    for (int64_t id = 0; id < N; ++id) {
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t e = begin[id]; e < begin[id + 1]; ++e) {
        if (e + kAhead < B * K) prefetch(query + rows[e + kAhead] * D, D);
        const float* __restrict row = query + rows[e] * D;
        for (int64_t j = 0; j < D; ++j) sum[j] += row[j];
      }
      std::memcpy(gradient + id * D, sum, D * sizeof(float));
    }
  }
}
