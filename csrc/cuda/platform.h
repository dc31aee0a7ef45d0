// The parts of CUDA that the kernels use. Under nvcc they are the real ones; the tests compile the same sources as
// plain C++ against tests/cuda/host_execution.h, which defines the same names, and run them on the CPU.
//
// So kernels get their shared memory from EMU_SHARED_MEMORY and are launched by EMU_LAUNCH, use only whole warps
// in shuffles and __syncwarp, never wait by spinning, and use PTX only through the functions here.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define EMU_DEVICE __device__ __forceinline__
#define EMU_SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]
#define EMU_LAUNCH(kernel, name, grid, block, shared, stream, ...)                   \
  do {                                                                               \
    kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__); \
    ::emu::cuda::check(cudaGetLastError(), name);                                    \
  } while (false)

namespace emu::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(status));
}

inline void fill_zero(void* to, size_t bytes, void* stream, const char* what) {
  if (bytes > 0) check(cudaMemsetAsync(to, 0, bytes, static_cast<cudaStream_t>(stream)), what);
}

// to[0..3] += x, y, z, w, 16-byte aligned, in one transaction if the hardware can do so.
EMU_DEVICE void add_vector(float* to, float x, float y, float z, float w) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x), "f"(y), "f"(z), "f"(w) : "memory");
#else
  atomicAdd(to, x), atomicAdd(to + 1, y), atomicAdd(to + 2, z), atomicAdd(to + 3, w);
#endif
}

// Hides from the compiler where a word came from, so that it recomputes what it would otherwise keep in registers,
// which are scarce.
EMU_DEVICE void forget(uint32_t& word) { asm volatile("" : "+r"(word)); }

EMU_DEVICE float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
EMU_DEVICE float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
EMU_DEVICE uint16_t float_to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }
EMU_DEVICE uint16_t float_to_bfloat16(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }

// Products and differences that are each rounded: the compiler does not contract them.
EMU_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
EMU_DEVICE double multiply(double a, double b) { return __dmul_rn(a, b); }
EMU_DEVICE float subtract(float a, float b) { return __fsub_rn(a, b); }
EMU_DEVICE double subtract(double a, double b) { return __dsub_rn(a, b); }
EMU_DEVICE float reciprocal_root(float x) { return rsqrtf(x); }
EMU_DEVICE double reciprocal_root(double x) { return rsqrt(x); }

}  // namespace emu::cuda

#else

#include "host_execution.h"

#endif
