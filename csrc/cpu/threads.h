// Threads: torch's own. If its OpenMP runtime is not found, and in the child of a fork(), where that runtime does not
// work, a call runs on its caller's thread alone.
#pragma once

#include <cstdint>

namespace emu {

using Task = void (*)(void* context, int64_t item, int slot);

// Runs task(context, item, slot) for every item in [0, items), on at most `threads` threads; slot < threads is the
// same for all items that one thread runs. Items are handed out dynamically, so what an item computes must not depend
// on the slot.
void parallel_for(int threads, int64_t items, Task task, void* context);

// Whether torch's threads were found and can be used.
bool joins_torch();

template <class F>
inline void parallel(int threads, int64_t items, F&& body) {
  parallel_for(threads, items, [](void* f, int64_t item, int slot) { (*static_cast<F*>(f))(item, slot); }, &body);
}

}  // namespace emu
