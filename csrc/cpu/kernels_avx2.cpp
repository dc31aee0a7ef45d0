// Compiled with -mavx2 -mfma -mf16c.
#include <immintrin.h>

#include "cpu/kernels.h"

namespace emu {
namespace avx2 {
#include "cpu/vec.h"
//
#include "cpu/kernels.inl.h"
}  // namespace avx2

const Kernels kAvx2Kernels = avx2::make_kernels("avx2");

}  // namespace emu
