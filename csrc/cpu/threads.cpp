#include "cpu/threads.h"

#include <pthread.h>

#include <atomic>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>

#include <cstring>
#include <string>
#endif

namespace emu {
namespace {

// The function that compilers call for `#pragma omp parallel`; the OpenMP runtimes of GCC, LLVM and Intel all have it.
// Threads of our own would find the processors busy: after each parallel operation, torch's threads spin for a
// millisecond or more, waiting for the next one.
using Fork = void (*)(void (*body)(void*), void* context, unsigned threads, unsigned flags);

Fork find_fork() {
#if defined(__linux__)
  constexpr char kName[] = "GOMP_parallel";
  std::string torch;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        if (std::strstr(info->dlpi_name, "/libtorch_cpu.so") == nullptr) return 0;
        *static_cast<std::string*>(out) = info->dlpi_name;
        return 1;
      },
      &torch);
  if (torch.empty()) return nullptr;
  // A preloaded runtime takes precedence over torch's own, as it does for torch itself.
  void* found = dlsym(RTLD_DEFAULT, kName);
  if (found == nullptr) {
    if (void* library = dlopen(torch.c_str(), RTLD_LAZY | RTLD_NOLOAD)) found = dlsym(library, kName);
  }
  return reinterpret_cast<Fork>(found);
#else
  return nullptr;
#endif
}

std::atomic<bool> g_forked{false};  // whether this process is the child of a fork()

[[maybe_unused]] const int g_registered = pthread_atfork(nullptr, nullptr, [] { g_forked.store(true); });

Fork torch_fork() {
  if (g_forked.load(std::memory_order_relaxed)) return nullptr;
  static const Fork found = find_fork();
  return found;
}

struct Region {
  Task task;
  void* context;
  int64_t items;
  std::atomic<int64_t> next{0};
  std::atomic<int> slots{0};

  static void work(void* region) {
    Region& r = *static_cast<Region*>(region);
    const int slot = r.slots.fetch_add(1, std::memory_order_relaxed);
    for (int64_t i; (i = r.next.fetch_add(1, std::memory_order_relaxed)) < r.items;) {
      r.task(r.context, i, slot);
    }
  }
};

}  // namespace

bool joins_torch() { return torch_fork() != nullptr; }

void parallel_for(int threads, int64_t items, Task task, void* context) {
  const Fork fork = threads > 1 && items > 1 ? torch_fork() : nullptr;
  if (fork == nullptr) {
    for (int64_t i = 0; i < items; ++i) task(context, i, 0);
    return;
  }
  // Use all of torch's threads, even for fewer items: GCC's runtime ends the threads that a smaller team leaves out,
  // and starts new ones for the next operation.
  Region region{task, context, items};
  fork(&Region::work, &region, static_cast<unsigned>(threads), 0);
}

}  // namespace emu
