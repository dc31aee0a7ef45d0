#include "cuda/operators.cuh"

namespace emu::cuda {

Kernels l2_kernels() { return make_kernels<L2>(); }

}  // namespace emu::cuda
