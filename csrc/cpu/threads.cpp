#include "cpu/threads.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>

#include <cstring>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace emu {
namespace {

// --- torch's threads ------------------------------------------------------------------------------------

// After each of its parallel operations torch's threads wait for the next one by spinning, for a millisecond or
// more: a second set of threads would find the processors busy. So its own run our regions too, through the
// function that compilers call for `#pragma omp parallel`; GCC's runtime has it, and LLVM's and Intel's do.
using Fork = void (*)(void (*body)(void*), void* context, unsigned threads, unsigned flags);

Fork find_fork() {
  const char* wanted = std::getenv("EMU_KERNELS_THREADS");
  const std::string choice = wanted == nullptr || *wanted == '\0' ? "torch" : wanted;
  if (choice == "own") return nullptr;
  if (choice != "torch") {
    throw std::invalid_argument("EMU_KERNELS_THREADS: expected torch or own, got '" + choice + "'");
  }
#if defined(__linux__)
  constexpr char kName[] = "GOMP_parallel";
  // What is preloaded comes before a library's own dependency, for torch as for this search.
  std::string torch;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        if (std::strstr(info->dlpi_name, "/libtorch_cpu.so") == nullptr) return 0;
        *static_cast<std::string*>(out) = info->dlpi_name;
        return 1;
      },
      &torch);
  if (torch.empty()) return nullptr;
  void* found = dlsym(RTLD_DEFAULT, kName);
  if (found == nullptr) {
    if (void* library = dlopen(torch.c_str(), RTLD_LAZY | RTLD_NOLOAD)) found = dlsym(library, kName);
  }
  return reinterpret_cast<Fork>(found);
#else
  return nullptr;
#endif
}

std::atomic<bool> g_alone{false};  // in the child of a fork()

Fork torch_fork() {
  if (g_alone.load(std::memory_order_relaxed)) return nullptr;
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

// --- our own --------------------------------------------------------------------------------------------

inline void pause_briefly() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

constexpr int kSpins = 2000;  // some tens of microseconds: back-to-back regions find workers awake

struct Pool {
  std::mutex use;  // held by the caller whose region runs

  std::mutex mutex;
  std::condition_variable wake;
  std::atomic<uint64_t> generation{0};
  int workers = 0;

  // The region that runs, valid while remaining > 0.
  Task task = nullptr;
  void* context = nullptr;
  int64_t items = 0;
  int active = 0;  // workers that take part
  std::atomic<int64_t> next{0};
  std::atomic<int> remaining{0};  // workers that have not finished

  void drain(int slot) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) {
      task(context, i, slot);
    }
  }

  void work(int index, uint64_t seen) {
    for (;;) {
      for (int s = 0; s < kSpins && generation.load(std::memory_order_acquire) == seen; ++s) {
        pause_briefly();
      }
      if (generation.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex);
        wake.wait(lock, [&] { return generation.load(std::memory_order_acquire) != seen; });
      }
      seen = generation.load(std::memory_order_acquire);
      if (index < active) drain(index + 1);
      remaining.fetch_sub(1, std::memory_order_acq_rel);
    }
  }

  void grow(int count) {
    while (workers < count) {
      const uint64_t now = generation.load();
      std::thread([this, index = workers, now] { work(index, now); }).detach();
      ++workers;
    }
  }

  void run(int threads, int64_t count, Task t, void* c) {
    grow(threads - 1);
    task = t, context = c, items = count, active = threads - 1;
    next.store(0, std::memory_order_relaxed);
    remaining.store(workers, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex);
      generation.fetch_add(1, std::memory_order_acq_rel);
    }
    wake.notify_all();
    drain(0);
    for (int s = 0; remaining.load(std::memory_order_acquire) > 0; ++s) {
      if (s < kSpins) {
        pause_briefly();
      } else {
        std::this_thread::yield();
      }
    }
  }
};

// Never destroyed: its workers may outlive main(). In a forked child the workers do not exist and a lock
// may be held for ever, so the child forgets the pool (and leaks a few hundred bytes), and torch's threads too.
std::atomic<Pool*> g_pool{nullptr};

[[maybe_unused]] const int g_registered = pthread_atfork(nullptr, nullptr, [] {
  g_pool.store(nullptr);
  g_alone.store(true);
});

Pool* pool() {
  Pool* p = g_pool.load(std::memory_order_acquire);
  if (p == nullptr) {
    Pool* fresh = new Pool;
    if (g_pool.compare_exchange_strong(p, fresh)) {
      p = fresh;
    } else {
      delete fresh;
    }
  }
  return p;
}

}  // namespace

bool joins_torch() { return torch_fork() != nullptr; }

void parallel_for(int threads, int64_t items, Task task, void* context) {
  if (threads > 1 && items > 1) {
    if (const Fork fork = torch_fork()) {
      // As many as torch has, even for fewer items: GCC's runtime ends the threads that a smaller team leaves
      // over, and starts them anew for the next operation.
      Region region{task, context, items};
      fork(&Region::work, &region, static_cast<unsigned>(threads), 0);
      return;
    }
    Pool* p = pool();
    std::unique_lock<std::mutex> lock(p->use, std::try_to_lock);
    if (lock.owns_lock()) {
      p->run(static_cast<int>(threads < items ? threads : items), items, task, context);
      return;
    }
  }
  for (int64_t i = 0; i < items; ++i) task(context, i, 0);
}

}  // namespace emu
