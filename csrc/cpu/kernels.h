// The kernels of one instruction set, and what their sources need from outside the namespace into which vec.h and
// kernels.inl.h are included.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "common/philox.h"
#include "common/problem.h"
#include "common/similarity.h"
#include "cpu/threads.h"

namespace emu {

struct Kernels {
  const char* name;
  void (*loss_forward)(const Problem&, const LossArgs&);
  void (*scores_forward)(const Problem&, const ScoreArgs&);
  void (*query_gradient)(const Problem&, const QueryGradientArgs&);
  void (*table_gradient)(const Problem&, const TableGradientArgs&);
  void (*mutate_forward)(const MutateArgs&);
  void (*mutate_backward)(const MutateArgs&);
  void (*relational)(const RelationalArgs&);
};

extern const Kernels kBaselineKernels;
#if defined(EMU_HAS_AVX2)
extern const Kernels kAvx2Kernels;
#endif
#if defined(EMU_HAS_AVX512)
extern const Kernels kAvx512Kernels;
#endif

// dispatch.cpp: the kernels in use, chosen at the first call: the best that the machine can run, or those named by the
// environment variable EMU_KERNELS_CPU. Throws std::invalid_argument if those cannot run here.
const Kernels& kernels();
int runnable_kernels(const Kernels* out[3]);  // best first; returns how many

[[noreturn]] void throw_out_of_memory();  // dispatch.cpp

}  // namespace emu
