// Runs the CUDA kernels' sources, compiled as plain C++, on the CPU. Only for tests, on machines without a GPU.
//
// Blocks run one after another. A block's threads are fibres of one thread. Each runs until a barrier or a shuffle, in
// an order that the test chooses: forward, reverse, or random, drawn anew for each round. So a missing barrier causes a
// wrong result, the same in every run. Shared memory is filled with NaNs before each block. A barrier that some threads
// never reach throws.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define EMU_DEVICE inline

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emu::cuda::host {

enum class Order { kForward, kReverse, kRandom };

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 * 1024;

struct Barrier {
  int arrived = 0;
  uint64_t generation = 0;
};

#if defined(__x86_64__)
using Context = void*;  // the stack pointer; the registers are saved on the stack
__attribute__((naked, noinline, unused)) static void switch_stacks(Context*, Context*) {
  asm volatile(
      "pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
      "movq %rsp, (%rdi)\n\tmovq (%rsi), %rsp\n\t"
      "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}
inline void prepare(Context& context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
  top[-1] = nullptr;  // entry's return address; it never returns
  top[-2] = reinterpret_cast<void*>(entry);
  for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
  context = top - 8;
}
#else
using Context = ucontext_t;
inline void switch_stacks(Context* from, Context* to) { swapcontext(from, to); }
inline void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

struct Fibre {
  Context context;
  char* stack = nullptr;
  const Barrier* waits_for = nullptr;
  uint64_t generation = 0;  // of that barrier: the thread waits until it changes
  uint64_t shuffles = 0;
  bool ended = false;
  void* fake_stack = nullptr;
};

struct Schedule {
  Order order = Order::kForward;
  uint64_t seed = 1;
};
inline Schedule schedule;

// One for each thread of the process that launches kernels.
struct Machine {
  std::mt19937_64 random;
  std::vector<Fibre> fibres;
  std::vector<Barrier> warps;
  std::vector<uint64_t> slots;  // (warps, 2, 32) of shuffles
  std::vector<uint4> shared;
  Barrier block;
  Context scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  int threads = 0, current = 0;
  void (*job)(void*) = nullptr;
  void* job_data = nullptr;

  ~Machine() {
    for (const Fibre& fibre : fibres) {
      if (fibre.stack != nullptr) munmap(fibre.stack, kStackBytes);
    }
  }
};
inline thread_local Machine machine;

inline void enter(void** fake_stack, const void* stack, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake_stack, stack, bytes);
#else
  (void)fake_stack, (void)stack, (void)bytes;
#endif
}
inline void entered(void* fake_stack, const void** stack, size_t* bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, stack, bytes);
#else
  (void)fake_stack, (void)stack, (void)bytes;
#endif
}

// From a fibre back to the scheduler.
inline void suspend() {
  Machine& m = machine;
  Fibre& own = m.fibres[static_cast<size_t>(m.current)];
  enter(own.ended ? nullptr : &own.fake_stack, m.scheduler_stack, m.scheduler_stack_bytes);
  switch_stacks(&own.context, &m.scheduler);
  entered(own.fake_stack, &m.scheduler_stack, &m.scheduler_stack_bytes);
}

inline void wait(Barrier& barrier, int expected) {
  Fibre& own = machine.fibres[static_cast<size_t>(machine.current)];
  const uint64_t generation = barrier.generation;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  own.waits_for = &barrier, own.generation = generation;
  suspend();
  own.waits_for = nullptr;
}

inline void run_fibre() {
  entered(nullptr, &machine.scheduler_stack, &machine.scheduler_stack_bytes);
  machine.job(machine.job_data);
  machine.fibres[static_cast<size_t>(machine.current)].ended = true;
  suspend();
  std::abort();  // an ended fibre is not resumed
}

inline void resume(int thread) {
  Machine& m = machine;
  Fibre& fibre = m.fibres[static_cast<size_t>(thread)];
  m.current = thread;
  threadIdx = dim3(static_cast<unsigned>(thread), 0, 0);
  enter(&m.scheduler_fake_stack, fibre.stack, kStackBytes);
  switch_stacks(&m.scheduler, &fibre.context);
  entered(m.scheduler_fake_stack, nullptr, nullptr);
}

inline void run_block(const char* name) {
  Machine& m = machine;
  const int n = m.threads;
  for (int t = 0; t < n; ++t) {
    Fibre& fibre = m.fibres[static_cast<size_t>(t)];
    if (fibre.stack == nullptr) {
      void* stack =
          mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (stack == MAP_FAILED) throw std::bad_alloc();
      fibre.stack = static_cast<char*>(stack);
    }
    prepare(fibre.context, fibre.stack, run_fibre);
    fibre.waits_for = nullptr, fibre.shuffles = 0, fibre.ended = false;
  }
  m.block = Barrier{};
  std::fill(m.warps.begin(), m.warps.end(), Barrier{});
  std::fill(m.shared.begin(), m.shared.end(), uint4{~0u, ~0u, ~0u, ~0u});
  int ended = 0;
  while (ended < n) {
    int start = 0, step = 1;
    if (schedule.order == Order::kReverse) start = n - 1, step = n - 1;
    if (schedule.order == Order::kRandom) {
      start = static_cast<int>(m.random() % static_cast<uint64_t>(n));
      do {
        step = 1 + static_cast<int>(m.random() % static_cast<uint64_t>(n));
      } while (std::gcd(step, n) != 1);
    }
    bool moved = false;
    for (int i = 0, t = start; i < n; ++i, t = (t + step) % n) {
      Fibre& fibre = m.fibres[static_cast<size_t>(t)];
      if (fibre.ended) continue;
      if (fibre.waits_for != nullptr && fibre.waits_for->generation == fibre.generation) continue;
      moved = true;
      resume(t);
      ended += fibre.ended;
    }
    if (!moved) throw std::runtime_error(std::string(name) + ": a barrier that some threads do not reach");
  }
}

inline void launch(const char* name, dim3 grid, int threads, size_t shared, void (*job)(void*), void* data) {
  Machine& m = machine;
  if (threads % kWarp != 0 || threads > 1024) throw std::invalid_argument(std::string(name) + ": threads a block");
  if (shared > 48 * 1024) throw std::invalid_argument(std::string(name) + ": too much shared memory");
  m.threads = threads;
  m.random.seed(schedule.seed);
  if (m.fibres.size() < static_cast<size_t>(threads)) m.fibres.resize(static_cast<size_t>(threads));
  m.warps.resize(static_cast<size_t>(threads / kWarp));
  m.slots.resize(static_cast<size_t>(threads) * 2);
  // Exactly as much as requested, so that a sanitizer finds accesses beyond it.
  m.shared = std::vector<uint4>((shared + sizeof(uint4) - 1) / sizeof(uint4));
  m.job = job, m.job_data = data;
  blockDim = dim3(static_cast<unsigned>(threads)), gridDim = grid;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t at = schedule.order == Order::kReverse ? blocks - 1 - i : i;
    blockIdx = dim3(static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
                    static_cast<unsigned>(at / grid.x / grid.y));
    run_block(name);
  }
}

template <class Job>
void launch(const char* name, dim3 grid, int threads, size_t shared, Job&& job) {
  launch(name, grid, threads, shared, [](void* data) { (*static_cast<std::remove_reference_t<Job>*>(data))(); }, &job);
}

// The value of another lane of the same warp; all of its lanes have to call it.
template <class X>
X shuffle(X x, int lane) {
  static_assert(sizeof(X) <= 8);
  Machine& m = machine;
  Fibre& own = m.fibres[static_cast<size_t>(m.current)];
  const int warp = m.current / kWarp;
  // Two sets of slots, used alternately: a lane may write for the next shuffle while another still reads.
  uint64_t* slots = m.slots.data() + (warp * 2 + static_cast<int>(own.shuffles++ % 2)) * kWarp;
  std::memcpy(slots + m.current % kWarp, &x, sizeof(X));
  wait(m.warps[static_cast<size_t>(warp)], kWarp);
  std::memcpy(&x, slots + lane % kWarp, sizeof(X));
  return x;
}

inline int lane() { return machine.current % kWarp; }

inline void set_order(const std::string& name, uint64_t seed) {
  schedule.order = name == "reverse" ? Order::kReverse : name == "random" ? Order::kRandom : Order::kForward;
  schedule.seed = seed;
}

}  // namespace emu::cuda::host

inline void __syncthreads() { emu::cuda::host::wait(emu::cuda::host::machine.block, emu::cuda::host::machine.threads); }
inline void __syncwarp() {
  emu::cuda::host::Machine& m = emu::cuda::host::machine;
  emu::cuda::host::wait(m.warps[static_cast<size_t>(m.current / emu::cuda::host::kWarp)], emu::cuda::host::kWarp);
}
template <class X>
X __shfl_sync(unsigned, X x, int lane) {
  return emu::cuda::host::shuffle(x, lane);
}
template <class X>
X __shfl_xor_sync(unsigned, X x, int mask) {
  return emu::cuda::host::shuffle(x, emu::cuda::host::lane() ^ mask);
}
template <class X>
X __shfl_up_sync(unsigned, X x, int by) {
  const int lane = emu::cuda::host::lane();
  return emu::cuda::host::shuffle(x, lane >= by ? lane - by : lane);
}
inline void atomicAdd(float* to, float x) { *to += x; }
template <class X>
X __ldg(const X* from) {
  return *from;
}

#define EMU_SHARED_MEMORY(name) \
  unsigned char* const name = reinterpret_cast<unsigned char*>(::emu::cuda::host::machine.shared.data())
#define EMU_LAUNCH(kernel, name, grid, block, shared, stream, ...) \
  ((void)(stream), ::emu::cuda::host::launch(name, dim3(grid), block, shared, [&] { kernel(__VA_ARGS__); }))

namespace emu::cuda {

inline void fill_zero(void* to, size_t bytes, void*, const char*) {
  if (bytes > 0) std::memset(to, 0, bytes);
}

inline void add_vector(float* to, float x, float y, float z, float w) {
  to[0] += x, to[1] += y, to[2] += z, to[3] += w;
}

inline void forget(uint32_t&) {}

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline uint16_t float_to_bfloat16(float x) {
  const uint32_t u = float_to_bits(x);
  if (x != x) return static_cast<uint16_t>((u >> 16) | 0x40);
  return static_cast<uint16_t>((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
}
inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = h & 0x7FFF;
  if (rest >= 0x7C00) return bits_to_float(sign | 0x7F800000 | (rest & 0x3FF) << 13);
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 0x1p112f));
}
inline uint16_t float_to_half(float x) {
  const uint32_t u = float_to_bits(x), rest = u & 0x7FFFFFFF;
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000);
  if (rest > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);
  if (rest >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);  // rounds to 65536 or more
  if (rest < 0x38800000) {                                              // subnormal half: let float addition round
    return static_cast<uint16_t>(sign | (float_to_bits(bits_to_float(rest) + 0.5f) - float_to_bits(0.5f)));
  }
  return static_cast<uint16_t>(sign | ((rest - 0x38000000 + 0xFFF + ((rest >> 13) & 1)) >> 13));
}

// Compiled with -ffp-contract=off, so each is rounded.
template <class Real>
Real multiply(Real a, Real b) {
  return a * b;
}
template <class Real>
Real subtract(Real a, Real b) {
  return a - b;
}
template <class Real>
Real reciprocal_root(Real x) {
  return 1 / std::sqrt(x);
}

}  // namespace emu::cuda
