// Threads: torch's, where its OpenMP runtime is found in the process. Elsewhere, in the child of a fork(), which
// that runtime does not survive, and with EMU_KERNELS_THREADS=own in the environment, a small pool of our own.
#pragma once

#include <cstdint>

namespace emu {

using Task = void (*)(void* context, int64_t item, int slot);

// Runs task(context, item, slot) for every item in [0, items), on at most `threads` threads; slot < threads
// is the same for all that one thread runs. Items are handed out dynamically, so what an item computes
// must not depend on the slot. Called from several threads at once, one gets our own pool and the others run
// alone.
void parallel_for(int threads, int64_t items, Task task, void* context);

// Whether they are torch's. Throws std::invalid_argument where EMU_KERNELS_THREADS says neither.
bool joins_torch();

template <class F>
inline void parallel(int threads, int64_t items, F&& body) {
  parallel_for(
      threads, items, [](void* f, int64_t item, int slot) { (*static_cast<F*>(f))(item, slot); },
      &body);
}

}  // namespace emu
