// What the lists of similarities and of mutation rules are written with, for GCC, Clang and nvcc.
#pragma once

// EMU_MEMBER: a function for host and device. EMU_INNER: a function of the inner loops, for the device under nvcc,
// otherwise for the host. Both are always inlined, so that no two CPU instruction sets can share a compiled copy.
#if defined(__CUDACC__)
#define EMU_MEMBER __host__ __device__ __forceinline__
#define EMU_INNER __device__ static __forceinline__
#else
#define EMU_MEMBER inline __attribute__((always_inline))
#define EMU_INNER static inline __attribute__((always_inline))
#endif

namespace emu {

// Types that are chosen at run time by their index in the list.
template <class... Entries>
struct List {};

// Calls body with the entry at an index of the list.
template <class Body, class First, class... Rest>
auto with_entry(List<First, Rest...>, int place, Body&& body) {
  if constexpr (sizeof...(Rest) > 0) {
    if (place > 0) return with_entry(List<Rest...>{}, place - 1, body);
  }
  return body(First{});
}

// A value as a type, for a generic lambda to take.
template <auto kValue>
struct Constant {
  static constexpr auto value = kValue;
};

}  // namespace emu
