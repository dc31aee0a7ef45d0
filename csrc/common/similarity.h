// The similarities φ(query, candidate), one small functor each, for scalars and vectors alike.
//
// φ is a sum of terms, one a component, so a mutated candidate's term is either the candidate's or the
// positive's, and the gradients are component-wise too.
#pragma once

#if defined(__CUDACC__)
#define EMU_SIM __host__ __device__ static __forceinline__
#else
#define EMU_SIM static inline __attribute__((always_inline))
#endif

namespace emu {

// φ = Σ_j q_j c_j
struct Dot {
  static constexpr const char* name = "dot";
  template <class V>
  EMU_SIM V term(V q, V c) {
    return q * c;
  }
  template <class V>
  EMU_SIM V d_query(V, V c) {  // ∂term/∂q
    return c;
  }
  template <class V>
  EMU_SIM V d_candidate(V q) {  // ∂term/∂c
    return q;
  }
};

}  // namespace emu
