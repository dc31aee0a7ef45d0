// For the sparse form of the table's gradient: numbers the touched rows, and finds the one each piece begins in.
#include "cuda/operators.cuh"

namespace emu::cuda {
namespace {

constexpr int kCountThreads = 128, kNumberThreads = 1024;
constexpr int kRunsAThread = 8;  // so that the usual number of pieces takes one turn

// ordinals[run] = how many touched rows begin in a run: the entries of a piece, which its chunks of rows share.
__global__ void __launch_bounds__(kCountThreads)
    count_segments(SortedIds sorted, int64_t rows, int64_t entries_a_piece, int64_t* ordinals) {
  EMU_SHARED_MEMORY(shared);
  const int64_t first = blockIdx.x * entries_a_piece;
  const int64_t end = first + entries_a_piece < sorted.entries ? first + entries_a_piece : sorted.entries;
  int begun = 0;
  for (int64_t e = first + threadIdx.x; e < end; e += kCountThreads) {
    begun += sorted.key[e] < rows && (e == 0 || sorted.key[e] != sorted.key[e - 1]);
  }
  begun = block_sum(begun, reinterpret_cast<int*>(shared));
  if (threadIdx.x == 0) ordinals[blockIdx.x] = begun;
}

// From these counts: ordinals[run] = the number of the touched row that the run begins in; ordinals[runs] = how many
// touched rows there are. One block scans the counts; each thread takes a few adjacent runs at a time.
__global__ void __launch_bounds__(kNumberThreads)
    number_segments(SortedIds sorted, int64_t runs, int64_t entries_a_piece, int64_t* ordinals) {
  EMU_SHARED_MEMORY(shared);
  int64_t* const of_warps = reinterpret_cast<int64_t*>(shared);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  int64_t before = 0;  // touched rows that begin in earlier runs, the same in all threads
  for (int64_t from = 0; from < runs; from += kNumberThreads * kRunsAThread) {
    const int64_t first = from + thread * kRunsAThread;
    int begun[kRunsAThread];
    bool goes_on[kRunsAThread];  // whether the run begins inside a segment
    int64_t own = 0;
#pragma unroll
    for (int i = 0; i < kRunsAThread; ++i) {
      const int64_t run = first + i, e = run * entries_a_piece;
      begun[i] = run < runs ? static_cast<int>(ordinals[run]) : 0;
      goes_on[i] = run > 0 && run < runs && sorted.key[e] == sorted.key[e - 1];
      own += begun[i];
    }
    int64_t sum = own;
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int64_t other = __shfl_up_sync(kAllLanes, sum, distance);
      if (lane >= distance) sum += other;
    }
    __syncthreads();  // the last sums have been read
    if (lane == kWarp - 1) of_warps[warp] = sum;
    __syncthreads();
    int64_t ordinal = before + sum - own;
    for (int w = 0; w < kNumberThreads / kWarp; ++w) {
      if (w < warp) ordinal += of_warps[w];
      before += of_warps[w];
    }
#pragma unroll
    for (int i = 0; i < kRunsAThread; ++i) {
      if (first + i < runs) ordinals[first + i] = ordinal - goes_on[i];
      ordinal += begun[i];
    }
  }
  if (thread == 0) ordinals[runs] = before;
}

}  // namespace

int64_t partials_workspace(const Problem& p) {
  const Pieces pieces = cut_pieces(p, count_entries(p));
  Carver carver{nullptr};
  carver.take<int64_t>(pieces.count() / pieces.chunks + 1);
  const int64_t reals = pieces.count() * 2 * p.D;
  if (p.dtype == DType::kDouble) {
    carver.take<double>(reals);
  } else {
    carver.take<float>(reals);
  }
  return carver.used;
}

int64_t count_touched(const Problem& p, const TableGradientArgs& a) {
  const SortedIds sorted = sorted_ids(p, a.sorted);
  const Pieces pieces = cut_pieces(p, sorted.entries);
  const int64_t runs = pieces.count() / pieces.chunks;
  int64_t* const ordinals = static_cast<int64_t*>(a.partials);
  if (runs > 0) {
    EMU_LAUNCH(count_segments, "count_segments", grid(runs), kCountThreads, kCountThreads / kWarp * sizeof(int),
               p.place.stream, sorted, p.N, pieces.entries_a_piece, ordinals);
  }
  EMU_LAUNCH(number_segments, "number_segments", 1, kNumberThreads, kNumberThreads / kWarp * sizeof(int64_t),
             p.place.stream, sorted, runs, pieces.entries_a_piece, ordinals);
  return runs * int64_t{sizeof(int64_t)};
}

}  // namespace emu::cuda
