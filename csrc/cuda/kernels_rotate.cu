#include "cuda/operators.cuh"

namespace emu::cuda {

Kernels rotate_kernels() { return make_kernels<Rotate>(); }

}  // namespace emu::cuda
