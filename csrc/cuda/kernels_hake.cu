#include "cuda/operators.cuh"

namespace emu::cuda {

Kernels hake_kernels() { return make_kernels<Hake>(); }

}  // namespace emu::cuda
