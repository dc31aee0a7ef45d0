// Large pages for large results. At each step the system provides the memory of a large gradient anew, page by page as
// it is first written. With pages of 4 KiB that takes longer than writing the gradient itself.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace emu {

// Below this size malloc may reuse memory: glibc's threshold for mapping each allocation anew grows up to this.
constexpr size_t kAlwaysMapped = size_t{32} << 20;

// Asks the system for large pages. It may decline.
inline void prefer_huge_pages(void* memory, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < kAlwaysMapped) return;
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace emu
