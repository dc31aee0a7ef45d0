#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

#if defined(EMU_HAS_AVX2) || defined(EMU_HAS_AVX512)
#include <cpuid.h>
#endif

namespace emu {

#if defined(EMU_HAS_AVX2) || defined(EMU_HAS_AVX512)
// The same as __builtin_cpu_supports, which finds nothing in programs that Zig has linked.
struct Found {
  bool avx2, avx512;
};
static Found find_instruction_sets() {
  const auto bit = [](unsigned word, int place) { return (word >> place & 1) != 0; };
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27)) return {};  // no xgetbv
  const bool fma = bit(c, 12) && bit(c, 29);                      // and F16C
  unsigned saved, high;                                           // the registers that the system keeps
  __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return {};
  const bool f = bit(b, 16), dq = bit(b, 17), bw = bit(b, 30), vl = bit(b, 31);
  return {fma && bit(b, 5) && (saved & 0x06) == 0x06, fma && f && dq && bw && vl && (saved & 0xE6) == 0xE6};
}
#endif

int runnable_kernels(const Kernels* out[3]) {
  int count = 0;
#if defined(EMU_HAS_AVX2) || defined(EMU_HAS_AVX512)
  const Found found = find_instruction_sets();
#endif
#if defined(EMU_HAS_AVX512)
  if (found.avx512) out[count++] = &kAvx512Kernels;
#endif
#if defined(EMU_HAS_AVX2)
  if (found.avx2) out[count++] = &kAvx2Kernels;
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
