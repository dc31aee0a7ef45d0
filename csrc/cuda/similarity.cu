// The kernels of one similarity: compiled with EMU_SIMILARITY defined as each entry of the list in common/similarity.h.
#include "cuda/operators.cuh"

namespace emu::cuda {

template Kernels make_kernels<EMU_SIMILARITY>();

}  // namespace emu::cuda
