// Lets the tests choose the order of a block's threads.
#include "host_execution.h"

extern "C" __attribute__((visibility("default"))) void emu_set_order(const char* name, uint64_t seed) {
  emu::cuda::host::set_order(name, seed);
}
