#include "cuda/operators.cuh"

namespace emu::cuda {

Kernels dot_kernels() { return make_kernels<Dot>(); }

}  // namespace emu::cuda
