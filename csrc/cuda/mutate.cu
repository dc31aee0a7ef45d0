// Mutation alone.
#include "cuda/operators.h"
#include "cuda/shape.cuh"

namespace emu::cuda {
namespace {

constexpr int kThreads = 128;

// A thread's masks of sixteen components in a row of the output.
struct Bits {
  const MaskSpec& spec;
  const Limit limit;
  const uint64_t seed;
  int units, block = -1;
  uint32_t words[4];

  EMU_DEVICE Bits(const MutateArgs& a)
      : spec(a.mask),
        limit(a.mask),
        seed(static_cast<uint64_t>(*a.mask.seed)),
        units(static_cast<int>(a.D) / (a.mask.pairs ? 2 : 1)) {}

  EMU_DEVICE bool mutated(int64_t b, int64_t k, int j) {
    const int unit = j < units ? j : j - units;
    if (unit / kComponentsPerCall != block) {
      block = unit / kComponentsPerCall;
      draw_block(seed, static_cast<uint32_t>(block), static_cast<uint32_t>(k),
                 spec.row_offset + static_cast<uint32_t>(b), words);
      limit.decide(spec, units, block, words);
    }
    const int at = unit % kComponentsPerCall;
    uint32_t word = words[0];
#pragma unroll
    for (int w = 1; w < 4; ++w) word = at / 4 == w ? words[w] : word;
    return limit.mutated(word, at % 4);
  }
};

// T: an unsigned integer as wide as an element, whose value does not matter.
template <class T>
__global__ void __launch_bounds__(kThreads) mutate_rows(const __grid_constant__ MutateArgs a) {
  const int64_t blocks = (a.D + kComponentsPerCall - 1) / kComponentsPerCall;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= a.B * a.K * blocks) return;
  const int64_t row = at / blocks, b = row / a.K, k = row % a.K;
  const int64_t from = at % blocks * kComponentsPerCall;
  Bits bits(a);
  const T* positive = static_cast<const T*>(a.positive) + b * a.D;
  const T* negative = static_cast<const T*>(a.negative) + row * a.D;
  T* out = static_cast<T*>(a.out) + row * a.D;
#pragma unroll
  for (int i = 0; i < kComponentsPerCall; ++i) {
    const int64_t j = from + i;
    if (j < a.D) out[j] = bits.mutated(b, k, static_cast<int>(j)) ? positive[j] : negative[j];
  }
}

// A block for sixteen components of a row of the batch: its threads share the negatives.
template <class T>
__global__ void __launch_bounds__(kThreads) mutate_rows_gradient(const __grid_constant__ MutateArgs a) {
  using Real = typename Sum<T>::Real;
  EMU_SHARED_MEMORY(shared);
  Real* const scratch = reinterpret_cast<Real*>(shared);
  const int64_t blocks = (a.D + kComponentsPerCall - 1) / kComponentsPerCall;
  const int64_t b = blockIdx.x / blocks, from = blockIdx.x % blocks * kComponentsPerCall;
  Bits bits(a);
  Real sum[kComponentsPerCall] = {};
  for (int64_t k = threadIdx.x; k < a.K; k += kThreads) {
    bits.block = -1;
    const T* grad = static_cast<const T*>(a.negative) + (b * a.K + k) * a.D;
    T* out = static_cast<T*>(a.grad_negative) + (b * a.K + k) * a.D;
#pragma unroll
    for (int i = 0; i < kComponentsPerCall; ++i) {
      const int64_t j = from + i;
      if (j >= a.D) continue;
      const bool mutated = bits.mutated(b, k, static_cast<int>(j));
      const T g = grad[j];
      if (mutated) sum[i] += widen(g);
      out[j] = mutated ? T{} : g;
    }
  }
#pragma unroll
  for (int i = 0; i < kComponentsPerCall; ++i) {
    const Real total = block_sum(sum[i], scratch);
    if (threadIdx.x == 0 && from + i < a.D) {
      narrow(total, static_cast<T*>(a.grad_positive) + b * a.D + from + i);
    }
  }
}

int64_t blocks_of(const MutateArgs& a) { return (a.D + kComponentsPerCall - 1) / kComponentsPerCall; }

template <class T>
void run_forward(const MutateArgs& a, void* stream) {
  const int64_t threads = a.B * a.K * blocks_of(a);
  if (threads == 0) return;
  EMU_LAUNCH(mutate_rows<T>, "mutate_rows", grid((threads + kThreads - 1) / kThreads), kThreads, 0, stream, a);
}

template <class T>
void run_backward(const MutateArgs& a, void* stream) {
  if (a.B == 0) return;
  EMU_LAUNCH(mutate_rows_gradient<T>, "mutate_rows_gradient", grid(a.B * blocks_of(a)), kThreads,
             kThreads / kWarp * sizeof(double), stream, a);
}

}  // namespace

void mutate_forward(const MutateArgs& a, const Launch& launch) {
  switch (launch.dtype) {
    case DType::kBFloat16:
    case DType::kHalf: return run_forward<uint16_t>(a, launch.stream);
    case DType::kFloat: return run_forward<uint32_t>(a, launch.stream);
    case DType::kDouble: return run_forward<uint64_t>(a, launch.stream);
  }
}

void mutate_backward(const MutateArgs& a, const Launch& launch) {
  switch (launch.dtype) {
    case DType::kBFloat16: return run_backward<BFloat16>(a, launch.stream);
    case DType::kHalf: return run_backward<Half>(a, launch.stream);
    case DType::kFloat: return run_backward<float>(a, launch.stream);
    case DType::kDouble: return run_backward<double>(a, launch.stream);
  }
}

}  // namespace emu::cuda
