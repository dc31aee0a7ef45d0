#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace emu {

int runnable_kernels(const Kernels* out[3]) {
  int count = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
#if defined(EMU_HAS_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    out[count++] = &kAvx512Kernels;
  }
#endif
#if defined(EMU_HAS_AVX2)
  // Every processor with AVX2 and FMA has F16C.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) out[count++] = &kAvx2Kernels;
#endif
  out[count++] = &kBaselineKernels;
  return count;
}

static const Kernels* choose() {
  const Kernels* runnable[3];
  const int count = runnable_kernels(runnable);
  const char* wanted = std::getenv("EMU_KERNELS_CPU");
  if (wanted == nullptr || *wanted == '\0') return runnable[0];
  std::string names;
  for (int i = 0; i < count; ++i) {
    if (std::string(wanted) == runnable[i]->name) return runnable[i];
    names += (i ? ", " : "") + std::string(runnable[i]->name);
  }
  throw std::invalid_argument(
      "EMU_KERNELS_CPU: expected one of the instruction sets that this build and "
      "this machine have (" +
      names + "), got '" + wanted + "'");
}

[[noreturn]] void throw_out_of_memory() { throw std::bad_alloc(); }

const Kernels& kernels() {
  static const Kernels* const chosen = choose();
  return *chosen;
}

}  // namespace emu
