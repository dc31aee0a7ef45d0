// A small thread pool of our own, so that torch's OpenMP runtime is not joined by a second one, and so
// that it survives fork(): a child starts with a fresh pool.
#pragma once

#include <cstdint>

namespace emu {

using Task = void (*)(void* context, int64_t item, int slot);

// Runs task(context, item, slot) for every item in [0, items), on at most `threads` threads; slot < threads
// is the same for all that one thread runs. Items are handed out dynamically, so what an item computes
// must not depend on the slot. Called from several threads at once, one gets the pool and the others run
// alone.
void parallel_for(int threads, int64_t items, Task task, void* context);

template <class F>
inline void parallel(int threads, int64_t items, F&& body) {
  parallel_for(
      threads, items, [](void* f, int64_t item, int slot) { (*static_cast<F*>(f))(item, slot); },
      &body);
}

}  // namespace emu
