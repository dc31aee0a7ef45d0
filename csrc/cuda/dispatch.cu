// From a similarity's place in the list to its kernels.
#include "common/similarity.h"
#include "cuda/operators.h"

namespace emu::cuda {

Kernels kernels(const Problem& p) {
  return with_entry(Similarities{}, p.similarity, [](auto sim) { return make_kernels<decltype(sim)>(); });
}

}  // namespace emu::cuda
