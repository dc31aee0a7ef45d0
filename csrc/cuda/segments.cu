// The sparse form of the table's gradient: which touched row each piece begins in, and how many there are.
#include "cuda/operators.cuh"

namespace emu::cuda {
namespace {

constexpr int kCountThreads = 128;

// ordinals[run] = how many touched rows begin in a run, the entries of one piece (chunks of rows share them).
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

// From these counts: ordinals[run] = which touched row the run begins in; ordinals[runs] = how many there are in all.
__global__ void __launch_bounds__(kWarp)
    number_segments(SortedIds sorted, int64_t runs, int64_t entries_a_piece, int64_t* ordinals) {
  const int lane = static_cast<int>(threadIdx.x);
  int64_t before = 0;
  for (int64_t from = 0; from < runs; from += kWarp) {
    const int64_t run = from + lane;
    const int64_t own = run < runs ? ordinals[run] : 0;
    int64_t sum = own;
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int64_t other = __shfl_up_sync(kAllLanes, sum, distance);
      if (lane >= distance) sum += other;
    }
    if (run < runs) {
      const int64_t e = run * entries_a_piece;
      const bool begins = e == 0 || sorted.key[e] != sorted.key[e - 1];
      ordinals[run] = before + sum - own - (begins ? 0 : 1);
    }
    before += from_lane(sum, kWarp - 1);
  }
  if (lane == 0) ordinals[runs] = before;
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
  EMU_LAUNCH(number_segments, "number_segments", 1, kWarp, 0, p.place.stream, sorted, runs, pieces.entries_a_piece,
             ordinals);
  return runs * int64_t{sizeof(int64_t)};
}

}  // namespace emu::cuda
