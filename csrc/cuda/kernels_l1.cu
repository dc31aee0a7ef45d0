#include "cuda/operators.cuh"

namespace emu::cuda {

Kernels l1_kernels() { return make_kernels<L1>(); }

}  // namespace emu::cuda
