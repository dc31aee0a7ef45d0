// What vec.h and kernels.inl.h need from outside the namespace that they are included in.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "common/philox.h"
#include "common/similarity.h"
#include "cpu/problem.h"
#include "cpu/segments.h"
#include "cpu/threads.h"

namespace emu {

[[noreturn]] void throw_out_of_memory();  // dispatch.cpp

}  // namespace emu
