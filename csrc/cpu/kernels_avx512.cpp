// Compiled with -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c.
#include <immintrin.h>

#include "cpu/kernels.h"

namespace emu {
namespace avx512 {
#include "cpu/vec.h"
//
#include "cpu/kernels.inl.h"
}  // namespace avx512

const Kernels kAvx512Kernels = avx512::make_kernels("avx512");

}  // namespace emu
