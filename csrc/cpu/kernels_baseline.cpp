// The instruction set that every processor of the architecture has: SSE2 on x86-64, NEON on 64-bit ARM.
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cpu/kernels.h"

#define EMU_DOUBLES

namespace emu {
namespace baseline {
#include "cpu/vec.h"
//
#include "cpu/kernels.inl.h"
}  // namespace baseline

const Kernels kBaselineKernels = baseline::make_kernels("baseline");

}  // namespace emu
