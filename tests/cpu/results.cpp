// Prints what the CPU kernels give for small calls of every kind: a line for each result, with its name, its type and
// its bytes. test_neon.py compares the lines of builds for two processors.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/segments.h"

using namespace emu;

namespace {

template <DType kType>
struct Of {
  using T = uint16_t;
  using Real = float;
  static constexpr const char* name = kType == DType::kHalf ? "float16" : "bfloat16";
};
template <>
struct Of<DType::kFloat> {
  using T = float;
  using Real = float;
  static constexpr const char* name = "float32";
};
template <>
struct Of<DType::kDouble> {
  using T = double;
  using Real = double;
  static constexpr const char* name = "float64";
};

// Multiples of 1/64 in [-1, 1): exact in every dtype, and so are their differences and products.
template <DType kType>
typename Of<kType>::T number(uint64_t i) {
  const float x = (static_cast<float>((i + 1) * 0x9E3779B97F4A7C15u >> 57) - 64) / 64;
  if constexpr (kType == DType::kFloat || kType == DType::kDouble) return x;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (kType == DType::kBFloat16) return static_cast<uint16_t>(bits >> 16);
  const uint32_t rest = bits & 0x7FFFFFFF;
  return static_cast<uint16_t>((bits >> 16 & 0x8000) | (rest == 0 ? 0 : (rest - 0x38000000) >> 13));
}
template <DType kType>
std::vector<typename Of<kType>::T> numbers(int64_t count, uint64_t from) {
  std::vector<typename Of<kType>::T> all;
  for (int64_t i = 0; i < count; ++i) all.push_back(number<kType>(from + static_cast<uint64_t>(i)));
  return all;
}

template <class T>
void write(const std::string& name, const char* type, const std::vector<T>& values) {
  std::printf("%s %s ", name.c_str(), type);
  for (const T& value : values) {
    uint8_t bytes[sizeof(T)];
    std::memcpy(bytes, &value, sizeof(T));
    for (const uint8_t byte : bytes) std::printf("%02x", byte);
  }
  std::printf("\n");
}

constexpr int64_t kSeed = 20250327;

template <class Sim, class Rule, DType kType>
void scores_and_loss(int similarity, int rule, bool each) {
  using T = typename Of<kType>::T;
  using Real = typename Of<kType>::Real;
  constexpr DType kReal = kType == DType::kDouble ? DType::kDouble : DType::kFloat;
  constexpr int64_t B = 6, K = 37, G = 3, N = 9, D = 38, S = Sums<Sim>::kCount, W = Sim::kWeights, H = Sim::kHalves;
  constexpr int64_t U = S * D / H;
  constexpr bool kMoments = Rule::kDraw == Draw::kMoments;

  const auto query = numbers<kReal>(B * D, 100), scale = numbers<kReal>(B * D / H, 4000);
  const auto sample_weight = numbers<kReal>(B, 500), log_q = numbers<kReal>(B + G * K, 700);
  const auto table = numbers<kType>(N * D, 9000);
  const std::vector<Real> weights{1.25, 0.75};
  std::vector<Real> rate;
  for (const Real x : numbers<kReal>(B * U, 3000)) rate.push_back((x + 1) / 2);
  std::vector<int64_t> positive, negative;
  for (int64_t i = 0; i < B; ++i) positive.push_back(i * 4 % N);
  for (int64_t i = 0; i < G * K; ++i) negative.push_back(i * 7 % (N + 1) - 1);
  std::vector<int16_t> thresholds;
  for (int64_t i = 0; i < D; ++i) thresholds.push_back(static_cast<int16_t>(i * 8 % 257));

  Problem p{};
  p.query = query.data(), p.table = table.data();
  p.scale = Sums<Sim>::kScaled && each ? scale.data() : nullptr;
  p.weights = W > 0 && each ? weights.data() : nullptr;
  p.positive = positive.data(), p.negative = negative.data();
  p.dtype = kType, p.similarity = similarity;
  p.table_stride = D, p.N = N, p.B = B, p.D = D, p.G = G, p.K = K;
  p.phase_scale = each ? 0x1p25 : 2.5;  // the first has sines of large numbers, which are exact in fp32
  p.draws.rule = rule, p.draws.kind = Rule::kDraw, p.draws.pairs = Rule::kPairs;
  p.draws.seed = &kSeed, p.draws.row_offset = 3;
  p.draws.threshold = 100, p.draws.thresholds = each ? thresholds.data() : nullptr, p.draws.order = 3;
  p.draws.rate = rate.data(), p.draws.rate_rows = each ? B : 1, p.draws.rate_units = each ? U : 1;
  p.draws.learned = kMoments && each;
  p.place.threads = 1;

  std::vector<Real> weight(S * B * K), mutated_weight(S * B * K), variance_weight(S * B * K);
  std::vector<Real> grad_rate(B * U), grad_query(B * D), grad_positive(B * D), grad_scale(B * D / H);
  std::vector<Real> grad_weights(B * 2);
  const GradientArgs gradient{weight.data(),
                              mutated_weight.data(),
                              variance_weight.data(),
                              p.draws.learned ? grad_rate.data() : nullptr,
                              grad_query.data(),
                              grad_positive.data(),
                              p.scale != nullptr ? grad_scale.data() : nullptr,
                              p.weights != nullptr ? grad_weights.data() : nullptr};
  const std::string name = std::string(Sim::name) + "-" + Rule::name + (each ? "-each-" : "-") + Of<kType>::name;
  const char* const real = Of<kReal>::name;
  const auto write_gradients = [&](const std::string& of) {
    write(name + of + "-query", real, grad_query);
    write(name + of + "-positive", real, grad_positive);
    if (gradient.grad_rate != nullptr) write(name + of + "-rate", real, grad_rate);
    if (gradient.grad_scale != nullptr) write(name + of + "-scale", real, grad_scale);
    if (gradient.grad_weights != nullptr) write(name + of + "-weights", real, grad_weights);
  };

  std::vector<Real> loss(B), terms(2), row_scale(B);
  kernels().loss_forward(p, {0.3, 0.2, nullptr, each ? sample_weight.data() : nullptr, each ? log_q.data() : nullptr,
                             each ? log_q.data() + B : nullptr, Reduction::kNone, true, loss.data(), terms.data(),
                             row_scale.data(), gradient, nullptr});
  write(name + "-loss", real, loss);
  write_gradients("-loss");

  const Segments segments(p);
  std::vector<T> dense(N * D), sparse(segments.touched() * D);
  std::vector<int64_t> ids(segments.touched());
  TableGradientArgs of_table{};
  of_table.row_scale = row_scale.data(), of_table.grad_positive = grad_positive.data();
  of_table.weight = weight.data(), of_table.mutated_weight = mutated_weight.data();
  of_table.variance_weight = variance_weight.data();
  of_table.sorted = segments.sorted(), of_table.sorted_size = segments.size();
  of_table.out = dense.data();
  kernels().table_gradient(p, of_table);
  of_table.out = sparse.data(), of_table.ids = ids.data();
  kernels().table_gradient(p, of_table);
  write(name + "-table", Of<kType>::name, dense);
  write(name + "-sparse", Of<kType>::name, sparse);
  write(name + "-ids", "int64", ids);

  if constexpr (kType == kReal) {
    const std::vector<int64_t> more{0, 3, 3, N - 1}, order{2, 0, 3, 1};
    of_table.ids = nullptr, of_table.out = nullptr;
    for (const Optimizer optimizer : {Optimizer::kSgd, Optimizer::kAdagrad, Optimizer::kRowwiseAdagrad}) {
      auto stepped = table;
      std::vector<Real> sums(N * D, 1);
      of_table.step = {optimizer, 0.1, 1e-10, stepped.data(), sums.data(), 4, more.data(), order.data(), query.data()};
      kernels().table_gradient(p, of_table);
      write(name + "-step-" + std::to_string(static_cast<int>(optimizer)), real, stepped);
      write(name + "-sums-" + std::to_string(static_cast<int>(optimizer)), real, sums);
    }
  }

  std::vector<Real> scores(B), plain(B * K), mutated(B * K), cumulant(B * K);
  kernels().scores_forward(p, {scores.data(), plain.data(), mutated.data(), cumulant.data()});
  write(name + "-scores", real, scores);
  write(name + "-plain", real, plain);
  write(name + "-mutated", real, mutated);
  write(name + "-cumulant", real, cumulant);
  const auto upstream = numbers<kReal>(B + 3 * B * K, 6000);
  const Real* const u = upstream.data() + B;
  kernels().query_gradient(p, {upstream.data(), u, u + B * K, u + 2 * B * K, gradient, nullptr});
  write_gradients("-scores");
}

template <class... Rules, class Sim>
void every_rule(List<Rules...>, int similarity, Sim) {
  for (const bool each : {false, true}) {
    int rule = 0;
    (((scores_and_loss<Sim, Rules, DType::kFloat>(similarity, rule, each),
       scores_and_loss<Sim, Rules, DType::kDouble>(similarity, rule, each),
       scores_and_loss<Sim, Rules, DType::kBFloat16>(similarity, rule, each),
       scores_and_loss<Sim, Rules, DType::kHalf>(similarity, rule, each)),
      ++rule),
     ...);
  }
}
template <class... Sims>
void every_similarity(List<Sims...>) {
  int similarity = 0;
  (every_rule(Mutations{}, similarity++, Sims{}), ...);
}

// Mixup's shares, bit for bit: the product of 1 and a mixture of 1 with 0.
void shares() {
  constexpr int64_t K = 301;
  const float query = 1, table[2] = {0, 1};
  const int64_t positive = 0;
  const std::vector<int64_t> negative(K, 1);
  Problem p{};
  p.query = &query, p.table = table, p.positive = &positive, p.negative = negative.data();
  p.table_stride = 1, p.N = 2, p.B = 1, p.D = 1, p.G = 1, p.K = K, p.phase_scale = 1;
  p.draws.rule = 3, p.draws.kind = Draw::kShare, p.draws.seed = &kSeed, p.draws.order = 4;
  p.place.threads = 1;
  std::vector<float> score(1), plain(K), mutated(K);
  kernels().scores_forward(p, {score.data(), plain.data(), mutated.data(), nullptr});
  write("shares", "float32", mutated);
}

template <DType kType>
void mutate(bool pairs, bool each) {
  constexpr int64_t B = 3, K = 19, D = 102;
  const auto positive = numbers<kType>(B * D, 1), negative = numbers<kType>(B * K * D, 5000);
  auto out = negative, grad_positive = positive;
  std::vector<int16_t> thresholds;
  for (int64_t i = 0; i < D; ++i) thresholds.push_back(static_cast<int16_t>(i * 8 % 257));
  MutateArgs a{};
  a.positive = positive.data(), a.negative = negative.data(), a.out = a.grad_negative = out.data();
  a.grad_positive = grad_positive.data();
  a.dtype = kType, a.B = B, a.K = K, a.D = D, a.place.threads = 1;
  a.draws.rule = pairs ? 2 : 1, a.draws.kind = Draw::kMask, a.draws.pairs = pairs;
  a.draws.seed = &kSeed, a.draws.row_offset = 0xFFFFFFF0;
  a.draws.threshold = 100, a.draws.thresholds = each ? thresholds.data() : nullptr;
  const std::string name = std::string("mutate") + (pairs ? "-pairs-" : "-") + (each ? "each-" : "") + Of<kType>::name;
  kernels().mutate_forward(a);
  write(name, Of<kType>::name, out);
  kernels().mutate_backward(a);
  write(name + "-grad-negative", Of<kType>::name, out);
  write(name + "-grad-positive", Of<kType>::name, grad_positive);
}

// A graph's edges, in the order of one of their ends, or of their relations.
struct Order {
  std::vector<int64_t> start{0}, edge;
  Order(const std::vector<int64_t>& by, int64_t count) {
    for (int64_t v = 0; v < count; ++v) {
      for (size_t e = 0; e < by.size(); ++e) {
        if (by[e] == v) edge.push_back(static_cast<int64_t>(e));
      }
      start.push_back(static_cast<int64_t>(edge.size()));
    }
  }
  std::vector<int64_t> of(const std::vector<int64_t>& ends) const {
    std::vector<int64_t> sorted;
    for (const int64_t e : edge) sorted.push_back(ends[static_cast<size_t>(e)]);
    return sorted;
  }
};

template <DType kType>
void relational(Message message, Aggregate aggregate, bool full) {
  using Real = typename Of<kType>::Real;
  constexpr int64_t N = 21, R = 3, B = 2, D = 22, E = 120;
  const int64_t S = aggregate == Aggregate::kPna ? 4 : 1, rows = full ? B : 1;
  std::vector<int64_t> source, target, relation;
  std::vector<uint8_t> keep;
  for (int64_t e = 0; e < E; ++e) {
    source.push_back(e * 5 % N), target.push_back(e * e % (N - 1)), relation.push_back(e % 7 % R);
    keep.push_back(e % 5 != 2);
  }
  const auto nodes = numbers<kType>(N * B * D, 10), relations = numbers<kType>(R * rows * D, 5000);
  const auto own = numbers<kType>(N * B * D, 6000), weight = numbers<kType>(E, 8000);
  const auto grad = numbers<kType>(N * B * S * D, 9000);
  std::vector<Real> result(static_cast<size_t>(N * B * S * D)), of_nodes(N * B * D);
  std::vector<Real> share(static_cast<size_t>(N)), of_own(of_nodes.size());
  for (int64_t v = 0; v < N; ++v) share[static_cast<size_t>(v)] = Real{1} / static_cast<Real>(1 + v % 4);
  std::vector<Real> of_relations(static_cast<size_t>(R * rows * D));

  RelationalArgs a{};
  a.message = message, a.aggregate = aggregate, a.dtype = kType, a.threads = 1;
  a.N = N, a.R = R, a.B = B, a.D = D, a.size = E, a.relation_rows = rows;
  a.nodes = nodes.data(), a.relations = relations.data();
  if (full) a.own = own.data(), a.weight = weight.data(), a.keep = keep.data();
  a.grad = grad.data(), a.result = result.data(), a.epsilon = 1e-6;
  a.relation_gradient = of_relations.data();
  const auto run = [&](RelationalTask task, const Order& order, const std::vector<int64_t>& ends, void* out) {
    const std::vector<int64_t> other = order.of(ends), relations_of = order.of(relation);
    a.task = task, a.start = order.start.data(), a.edge = order.edge.data(), a.out = out;
    a.other = other.data(), a.relation = relations_of.data();
    kernels().relational(a);
  };
  run(RelationalTask::kForward, Order(target, N), source, result.data());
  if (full || aggregate == Aggregate::kPna) a.share = share.data();
  if (full) run(RelationalTask::kOwn, Order(target, N), source, of_own.data());
  run(RelationalTask::kBackward, Order(source, N), target, of_nodes.data());
  const std::string name = "relational-" + std::to_string(static_cast<int>(message)) + "-" +
                           std::to_string(static_cast<int>(aggregate)) + (full ? "-full-" : "-") + Of<kType>::name;
  write(name, Of<kType>::name, result);
  if (full) write(name + "-own", Of<kType>::name, of_own);
  write(name + "-nodes", Of<kType>::name, of_nodes);
  write(name + "-relations", Of<kType>::name, of_relations);
}

}  // namespace

int main() {
  every_similarity(Similarities{});
  shares();
  for (const bool pairs : {false, true}) {
    for (const bool each : {false, true}) {
      mutate<DType::kFloat>(pairs, each);
      mutate<DType::kDouble>(pairs, each);
      mutate<DType::kBFloat16>(pairs, each);
      mutate<DType::kHalf>(pairs, each);
    }
  }
  for (const Message message : {Message::kDistMult, Message::kTransE, Message::kRotate}) {
    for (const Aggregate aggregate : {Aggregate::kSum, Aggregate::kMin, Aggregate::kMax, Aggregate::kPna}) {
      for (const bool full : {false, true}) {
        relational<DType::kFloat>(message, aggregate, full);
        relational<DType::kDouble>(message, aggregate, full);
      }
    }
  }
}
