// Mutation alone.
#include "cuda/operators.h"
#include "cuda/shape.cuh"

namespace emu::cuda {
namespace {

constexpr int kThreads = 128;

// How rows are cut: into the sixteen components that one Philox call decides; if masks are of pairs, each half is cut
// by itself.
struct Cut {
  int64_t units, blocks, parts;

  EMU_MEMBER explicit Cut(const MutateArgs& a)
      : units(a.D / (a.draws.pairs ? 2 : 1)),
        blocks((units + kComponentsPerCall - 1) / kComponentsPerCall),
        parts(a.draws.pairs ? 2 : 1) {}
  EMU_MEMBER int64_t count() const { return blocks * parts; }
};

struct Bits {
  const MutateArgs& a;
  const Limit limit;
  const int block;
  const int64_t from, count;  // the first component, and how many there are
  Seed seed;
  uint32_t words[4];

  EMU_DEVICE Bits(const MutateArgs& args, const Cut& cut, int64_t index)
      : a(args),
        limit(args.draws),
        block(static_cast<int>(index % cut.blocks)),
        from(index / cut.blocks * cut.units + block * int64_t{kComponentsPerCall}),
        count(cut.units - block * int64_t{kComponentsPerCall}) {
    seed.load(a.draws);
  }

  EMU_DEVICE void draw(int64_t b, int64_t k) {
    draw_block(seed.value(), static_cast<uint32_t>(block), static_cast<uint32_t>(k),
               a.draws.row_offset + static_cast<uint32_t>(b), words);
    limit.decide(a.draws, static_cast<int>(block * kComponentsPerCall + count), block, words);
  }
  EMU_DEVICE bool mutated(int i) const { return limit.mutated(words[i / 4], i % 4); }
};

// T: an unsigned integer as wide as an element, whose value does not matter.
template <class T>
__global__ void __launch_bounds__(kThreads) mutate_rows(const __grid_constant__ MutateArgs a) {
  const Cut cut(a);
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= a.B * a.K * cut.count()) return;
  const int64_t row = at / cut.count(), b = row / a.K;
  Bits bits(a, cut, at % cut.count());
  bits.draw(b, row % a.K);
  const T* positive = static_cast<const T*>(a.positive) + b * a.D + bits.from;
  const T* negative = static_cast<const T*>(a.negative) + row * a.D + bits.from;
  T* out = static_cast<T*>(a.out) + row * a.D + bits.from;
#pragma unroll
  for (int i = 0; i < kComponentsPerCall; ++i) {
    if (i < bits.count) out[i] = bits.mutated(i) ? positive[i] : negative[i];
  }
}

// One block for sixteen components of a row of the batch; its threads divide the negatives among themselves.
template <class T>
__global__ void __launch_bounds__(kThreads) mutate_rows_gradient(const __grid_constant__ MutateArgs a) {
  using Real = typename Sum<T>::Real;
  EMU_SHARED_MEMORY(shared);
  Real* const scratch = reinterpret_cast<Real*>(shared);
  const Cut cut(a);
  const int64_t b = blockIdx.x / cut.count();
  Bits bits(a, cut, blockIdx.x % cut.count());
  Real sum[kComponentsPerCall] = {};
  for (int64_t k = threadIdx.x; k < a.K; k += kThreads) {
    bits.draw(b, k);
    const int64_t row = (b * a.K + k) * a.D + bits.from;
    const T* grad = static_cast<const T*>(a.negative) + row;
    T* out = static_cast<T*>(a.grad_negative) + row;
#pragma unroll
    for (int i = 0; i < kComponentsPerCall; ++i) {
      if (i >= bits.count) continue;
      const T g = grad[i];
      if (bits.mutated(i)) sum[i] += widen(g);
      out[i] = bits.mutated(i) ? T{} : g;
    }
  }
#pragma unroll
  for (int i = 0; i < kComponentsPerCall; ++i) {
    const Real total = block_sum(sum[i], scratch);
    if (threadIdx.x == 0 && i < bits.count) {
      narrow(total, static_cast<T*>(a.grad_positive) + b * a.D + bits.from + i);
    }
  }
}

template <class T>
void run_forward(const MutateArgs& a) {
  const int64_t threads = a.B * a.K * Cut(a).count();
  if (threads == 0) return;
  EMU_LAUNCH(mutate_rows<T>, "mutate_rows", grid((threads + kThreads - 1) / kThreads), kThreads, 0, a.place.stream, a);
}

template <class T>
void run_backward(const MutateArgs& a) {
  if (a.B == 0) return;
  EMU_LAUNCH(mutate_rows_gradient<T>, "mutate_rows_gradient", grid(a.B * Cut(a).count()), kThreads,
             kThreads / kWarp * sizeof(double), a.place.stream, a);
}

}  // namespace

void mutate_forward(const MutateArgs& a) {
  switch (a.dtype) {
    case DType::kBFloat16:
    case DType::kHalf: return run_forward<uint16_t>(a);
    case DType::kFloat: return run_forward<uint32_t>(a);
    case DType::kDouble: return run_forward<uint64_t>(a);
  }
}

void mutate_backward(const MutateArgs& a) {
  switch (a.dtype) {
    case DType::kBFloat16: return run_backward<BFloat16>(a);
    case DType::kHalf: return run_backward<Half>(a);
    case DType::kFloat: return run_backward<float>(a);
    case DType::kDouble: return run_backward<double>(a);
  }
}

}  // namespace emu::cuda
