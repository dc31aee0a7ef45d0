#include "cuda/operators.cuh"

namespace emu::cuda {

Kernels protate_kernels() { return make_kernels<PRotate>(); }

}  // namespace emu::cuda
