// Each similarity's kernels are compiled in a file of their own: kernels_*.cu.
#include "cuda/operators.cuh"

namespace emu::cuda {

Kernels dot_kernels();
Kernels l1_kernels();
Kernels l2_kernels();
Kernels rotate_kernels();
Kernels hake_kernels();
Kernels protate_kernels();

namespace {

constexpr Kernels (*kOf(Dot))() { return dot_kernels; }
constexpr Kernels (*kOf(L1))() { return l1_kernels; }
constexpr Kernels (*kOf(L2))() { return l2_kernels; }
constexpr Kernels (*kOf(Rotate))() { return rotate_kernels; }
constexpr Kernels (*kOf(Hake))() { return hake_kernels; }
constexpr Kernels (*kOf(PRotate))() { return protate_kernels; }

template <class... Sims>
Kernels find(List<Sims...>, int place) {
  constexpr Kernels (*all[])() = {kOf(Sims{})...};
  return all[place]();
}

// --- the sparse form's numbering ------------------------------------------------------------------------------

constexpr int kCountThreads = 128;

// ordinals[block] = how many touched rows begin after the first entry of a run of entries, and up to its next's.
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

// Of runs' counts c: ordinals[i] = which touched row run i begins in; and the count of all of them at [runs].
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

// --- dispatch -------------------------------------------------------------------------------------------------

Kernels kernels(const Launch& launch) { return find(Similarities{}, launch.similarity); }

}  // namespace

int64_t loss_workspace(const Problem& p, const Launch& launch, bool need_grad) {
  return kernels(launch).loss_workspace(p, launch, need_grad);
}
int64_t query_gradient_workspace(const Problem& p, const Launch& launch) {
  return kernels(launch).query_gradient_workspace(p, launch);
}
void loss_forward(const Problem& p, const LossArgs& a, const Launch& launch) {
  kernels(launch).loss_forward(p, a, launch);
}
void scores_forward(const Problem& p, const ScoreArgs& a, const Launch& launch) {
  kernels(launch).scores_forward(p, a, launch);
}
void query_gradient(const Problem& p, const QueryGradientArgs& a, const Launch& launch) {
  kernels(launch).query_gradient(p, a, launch);
}
void table_gradient(const Problem& p, const TableGradientArgs& a, const Launch& launch) {
  kernels(launch).table_gradient(p, a, launch);
}

void table_gradient_atomic(const Problem& p, const TableGradientArgs& a, const Launch& launch) {
  kernels(launch).table_gradient_atomic(p, a, launch);
}

int64_t partials_workspace(const Problem& p, const Launch& launch) {
  const Pieces pieces = cut_pieces(p, count_entries(p));
  Carver carver{nullptr};
  carver.take<int64_t>(pieces.count() / pieces.chunks + 1);
  const int64_t reals = pieces.count() * 2 * p.D;
  if (launch.dtype == DType::kDouble) {
    carver.take<double>(reals);
  } else {
    carver.take<float>(reals);
  }
  return carver.used;
}

int64_t count_touched(const Problem& p, const TableGradientArgs& a, const Launch& launch) {
  const SortedIds sorted = sorted_ids(p, a.sorted);
  const Pieces pieces = cut_pieces(p, sorted.entries);
  const int64_t runs = pieces.count() / pieces.chunks;
  int64_t* const ordinals = static_cast<int64_t*>(a.partials);
  if (runs > 0) {
    EMU_LAUNCH(count_segments, "count_segments", grid(runs), kCountThreads, kCountThreads / kWarp * sizeof(int),
               launch.stream, sorted, p.N, pieces.entries_a_piece, ordinals);
  }
  EMU_LAUNCH(number_segments, "number_segments", 1, kWarp, 0, launch.stream, sorted, runs, pieces.entries_a_piece,
             ordinals);
  return runs * int64_t{sizeof(int64_t)};
}

}  // namespace emu::cuda
