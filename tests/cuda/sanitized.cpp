// Runs every kernel on one small batch, on arrays of exactly the required length. test_sanitizers.py compiles it with
// AddressSanitizer and UBSan.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <type_traits>
#include <vector>

#include "cuda/operators.cuh"

using namespace emu;
using namespace emu::cuda;

namespace {

// Memory whose end the sanitizer knows to the byte.
template <class X>
struct Array {
  std::unique_ptr<X[]> own;
  size_t size;
  explicit Array(int64_t count) : own(new X[static_cast<size_t>(count)]), size(static_cast<size_t>(count)) {}
  X* get() const { return own.get(); }
};

template <class T>
T number(int64_t i) {
  T x;
  narrow(static_cast<typename Sum<T>::Real>((i * 7919 % 31 - 15) / 16.0), &x);
  return x;
}

template <class Rule, class... Rules>
constexpr int place_of(List<Rules...>) {
  int place = 0;
  static_cast<void>(((std::is_same_v<Rule, Rules> || (++place, false)) || ...));
  return place;
}

template <class Sim, class T, Mode kMode>
void run(int64_t D, bool pairs, bool each) {
  using Real = typename Sum<T>::Real;
  using Of = Operators<Sim, T, kMode>;
  constexpr int64_t B = 6, K = 11, G = 3, N = 5, S = Sums<Sim>::kCount, W = Sim::kWeights;
  const int64_t units = S * D / Sim::kHalves;
  Array<Real> query(B * D), scale(B * D / Sim::kHalves), weights(W > 0 ? W : 1), row_scale(B), rate(B * units);
  Array<T> table(N * D);
  Array<int64_t> positive(B), negative(G * K), seed(1);
  Array<int16_t> thresholds(D);
  for (int64_t i = 0; i < B * D; ++i) query.get()[i] = number<Real>(i);
  for (int64_t i = 0; i < B * D / Sim::kHalves; ++i) scale.get()[i] = number<Real>(i + 3);
  for (int64_t i = 0; i < N * D; ++i) table.get()[i] = number<T>(i + 5);
  for (int64_t i = 0; i < B * units; ++i) rate.get()[i] = static_cast<Real>(i % 17) / 16;
  for (int64_t i = 0; i < D; ++i) thresholds.get()[i] = static_cast<int16_t>(i * 8 % 257);
  for (int64_t i = 0; i < B; ++i) positive.get()[i] = i % N;
  for (int64_t i = 0; i < G * K; ++i) negative.get()[i] = i * 3 % (N + 1) - 1;
  for (int64_t i = 0; i < (W > 0 ? W : 1); ++i) weights.get()[i] = 1;
  seed.get()[0] = 7;

  Problem p{};
  p.query = query.get(), p.table = table.get();
  p.scale = Sums<Sim>::kScaled && each ? scale.get() : nullptr;
  p.weights = W > 0 ? weights.get() : nullptr;
  p.positive = positive.get(), p.negative = negative.get();
  p.table_stride = D, p.N = N, p.B = B, p.D = D, p.G = G, p.K = K;
  p.phase_scale = 1;
  p.draws.pairs = pairs, p.draws.seed = seed.get(), p.draws.row_offset = 3;
  p.draws.threshold = 100, p.draws.thresholds = each ? thresholds.get() : nullptr;
  p.draws.rule = place_of<Mixup>(Mutations{}), p.draws.order = 2;  // for kernels that draw shares
  p.draws.rate = kMode == Mode::kMoments ? rate.get() : nullptr;
  p.draws.rate_rows = each ? B : 1, p.draws.rate_units = units, p.draws.learned = kMode == Mode::kMoments && each;
  p.place.processors = 1;

  Array<Real> weight(S * B * K), mutated_weight(S * B * K), variance_weight(S * B * K), grad_rate(B * units);
  Array<Real> grad_query(B * D), grad_positive(B * D);
  Array<Real> grad_scale(B * D), grad_weights(B * 2), loss(B), terms(2), ones(B);
  const GradientArgs gradient{weight.get(),
                              mutated_weight.get(),
                              variance_weight.get(),
                              p.draws.learned ? grad_rate.get() : nullptr,
                              grad_query.get(),
                              grad_positive.get(),
                              p.scale != nullptr ? grad_scale.get() : nullptr,
                              W > 0 ? grad_weights.get() : nullptr};
  const Array<Real> positive_log_q(B), negative_log_q(G * K);
  for (const bool need_grad : {false, true}) {
    const Array<char> workspace(Of::loss_workspace(p, need_grad));
    Of::loss_forward(
        p, {0.3, 0.2, nullptr, nullptr, each ? positive_log_q.get() : nullptr, each ? negative_log_q.get() : nullptr,
            Reduction::kNone, need_grad, loss.get(), terms.get(), row_scale.get(), gradient, workspace.get()});
  }

  Array<char> sorted(sort_workspace(p));
  const Pieces pieces = cut_pieces(p, count_entries(p));
  Array<char> partials((pieces.count() + 1) * (8 + 2 * D * static_cast<int64_t>(sizeof(Real))) + 512);
  TableGradientArgs table_args{};
  table_args.row_scale = row_scale.get(), table_args.grad_positive = grad_positive.get();
  table_args.weight = weight.get(), table_args.mutated_weight = mutated_weight.get();
  table_args.variance_weight = variance_weight.get();
  table_args.sorted = sorted.get(), table_args.partials = partials.get();
  Array<T> dense(N * D);
  table_args.out = dense.get();
  sort_ids(p, sorted.get());
  Of::table_gradient(p, table_args);
  const int64_t at = count_touched(p, table_args);
  const int64_t touched = *reinterpret_cast<const int64_t*>(partials.get() + at);
  Array<int64_t> ids(touched);
  Array<T> values(touched * D);
  table_args.ids = ids.get(), table_args.out = values.get();
  Of::table_gradient(p, table_args);
  for (int64_t i = 0; i < touched * D; ++i) {
    const int64_t of = ids.get()[i / D] * D + i % D;
    if (widen(values.get()[i]) != widen(dense.get()[of]) || !std::isfinite(widen(values.get()[i]))) {
      std::fprintf(stderr, "%s: the sparse gradient is not the dense one\n", Sim::name);
      std::exit(1);
    }
  }
  if constexpr (sizeof(T) == 4 && kMode != Mode::kShare) {
    list_ids(p, sorted.get());
    table_args.ids = nullptr, table_args.out = dense.get();
    Of::table_gradient_atomic(p, table_args);
  }

  Array<Real> plain(B * K), mutated(B * K), cumulant(B * K);
  Of::scores_forward(p, {loss.get(), plain.get(), mutated.get(), cumulant.get()});
  for (int64_t i = 0; i < B * K; ++i) plain.get()[i] = mutated.get()[i] = cumulant.get()[i] = number<Real>(i);
  for (int64_t i = 0; i < B; ++i) ones.get()[i] = 1;
  const Array<char> workspace(Of::query_gradient_workspace(p));
  Of::query_gradient(p, {ones.get(), plain.get(), mutated.get(), cumulant.get(), gradient, workspace.get()});
}

template <class T>
void mutate(DType dtype, bool pairs) {
  constexpr int64_t B = 2, K = 3, D = 22;
  Array<T> positive(B * D), negative(B * K * D), out(B * K * D), grad_positive(B * D);
  for (int64_t i = 0; i < B * D; ++i) positive.get()[i] = number<T>(i);
  for (int64_t i = 0; i < B * K * D; ++i) negative.get()[i] = number<T>(i);
  const Array<int64_t> seed(1);
  seed.get()[0] = 7;
  MutateArgs a{};
  a.positive = positive.get(), a.negative = negative.get(), a.out = out.get();
  a.grad_positive = grad_positive.get(), a.grad_negative = out.get();
  a.dtype = dtype, a.B = B, a.K = K, a.D = D;
  a.draws.pairs = pairs, a.draws.seed = seed.get(), a.draws.threshold = 100;
  mutate_forward(a);
  mutate_backward(a);
}

}  // namespace

int main() {
  host::set_order("random", 1);
  run<Dot, BFloat16, Mode::kSelect>(38, true, true);
  run<L2, float, Mode::kShare>(7, false, true);
  run<Rotate, float, Mode::kMask>(36, false, false);
  run<Hake, float, Mode::kSelect>(136, false, true);
  run<Dot, double, Mode::kPlain>(1, false, false);
  run<Dot, BFloat16, Mode::kMoments>(38, false, false);
  run<Rotate, float, Mode::kMoments>(36, false, true);
  run<Hake, float, Mode::kMoments>(1030, false, true);
  run<L2, float, Mode::kMoments>(7, false, false);
  mutate<float>(DType::kFloat, false);
  mutate<BFloat16>(DType::kBFloat16, true);
}
