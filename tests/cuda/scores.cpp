// Prints the scores of one small batch, computed with a given order of threads. test_emulation.py compiles it with a
// kernel that lacks a barrier.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/operators.cuh"

using namespace emu;
using namespace emu::cuda;

int main(int, char** arguments) {
  host::set_order(arguments[1], static_cast<uint64_t>(std::atoi(arguments[2])));
  constexpr int64_t B = 2, K = 6, D = 300, N = 5;  // three warps a row
  std::vector<float> query(B * D), table(N * D);
  for (size_t i = 0; i < query.size(); ++i) query[i] = static_cast<float>(i % 17) - 8;
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<float>(i % 13) - 6;
  const std::vector<int64_t> positive{0, 1}, negative{2, 3, 4, 1, 0, 2, 4, 3, 2, 1, 0, 4};
  const int64_t seed = 7;
  std::vector<float> scores(B), negatives(B * K), mutated(B * K);

  Problem p{};
  p.query = query.data(), p.table = table.data();
  p.positive = positive.data(), p.negative = negative.data();
  p.table_stride = D, p.N = N, p.B = B, p.D = D, p.G = B, p.K = K;
  p.phase_scale = 1;
  p.draws.seed = &seed, p.draws.threshold = 128;
  p.place.processors = 1;
  Operators<Dot, float, Mode::kSelect>::scores_forward(p, {scores.data(), negatives.data(), mutated.data(), nullptr});
  for (float x : scores) std::printf("%a\n", static_cast<double>(x));
  for (float x : negatives) std::printf("%a\n", static_cast<double>(x));
  for (float x : mutated) std::printf("%a\n", static_cast<double>(x));
}
