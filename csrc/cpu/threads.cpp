#include "cpu/threads.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace emu {
namespace {

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
// may be held for ever, so the child forgets the pool (and leaks a few hundred bytes).
std::atomic<Pool*> g_pool{nullptr};

Pool* pool() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { g_pool.store(nullptr); });
  (void)registered;
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

void parallel_for(int threads, int64_t items, Task task, void* context) {
  if (threads > items) threads = static_cast<int>(items);
  if (threads > 1) {
    Pool* p = pool();
    std::unique_lock<std::mutex> lock(p->use, std::try_to_lock);
    if (lock.owns_lock()) {
      p->run(threads, items, task, context);
      return;
    }
  }
  for (int64_t i = 0; i < items; ++i) task(context, i, 0);
}

}  // namespace emu
