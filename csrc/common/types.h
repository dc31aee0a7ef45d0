// What every implementation calls by the same names.
#pragma once

namespace emu {

enum class DType { kFloat, kBFloat16, kHalf, kDouble };
enum class Reduction { kNone, kSum, kMean };
enum class Mutation { kNone, kMask, kMixup };

}  // namespace emu
