// An optimizer's step of one row of the table, with torch's arithmetic: the same operations in the same order.

template <class F>
class RowStep {
  using Real = typename F::Real;
  using V = typename F::V;

 public:
  RowStep(const Problem& p, const StepArgs& a)
      : rate_(F::broadcast(static_cast<Real>(a.lr))),
        eps_(F::broadcast(static_cast<Real>(a.eps))),
        optimizer_(a.optimizer),
        dim_(p.D),
        stride_(p.table_stride),
        table_(static_cast<Real*>(a.table)),
        sums_(static_cast<Real*>(a.sums)),
        more_(a) {}

  bool is_on() const { return optimizer_ != Optimizer::kNone; }

  // The next of the further gradients, in the order of ids; a padded row to work in.
  struct More {
    int64_t next;
    Real* row;
  };

  int64_t find(int64_t id) const {  // the first further gradient of an id that is not below this
    int64_t from = 0, to = more_.count;
    while (from < to) {
      const int64_t middle = (from + to) / 2;
      if (more_.ids[middle] < id) {
        from = middle + 1;
      } else {
        to = middle;
      }
    }
    return from;
  }

  // Steps a touched row by `gradient`, a padded row, to which its further gradients are added.
  template <class Sim>
  void run_with(const Layout<Sim>& at, int64_t id, Real* gradient, More& more) const {
    for (; more.next < more_.count && more_.ids[more.next] == id; ++more.next) {
      const Real* row = static_cast<const Real*>(more_.rows) + more_.order[more.next] * dim_;
      for (int h = 0; h < at.H; ++h) {
        for (int64_t j = 0; j < at.half; ++j) gradient[h * at.half_padded + j] += row[h * at.half + j];
      }
    }
    run(at, id, gradient);
  }

  // Steps rows below `end` that are not touched but have further gradients.
  template <class Sim>
  void run_until(const Layout<Sim>& at, int64_t end, More& more) const {
    while (more.next < more_.count && more_.ids[more.next] < end) {
      __builtin_memset(more.row, 0, sizeof(Real) * static_cast<size_t>(at.row));
      run_with(at, more_.ids[more.next], more.row, more);
    }
  }

 private:
  // `gradient` is a padded row.
  template <class Sim>
  void run(const Layout<Sim>& at, int64_t id, const Real* gradient) const {
    Real* const row = table_ + id * stride_;
    V divisor = {};
    if (optimizer_ == Optimizer::kRowwiseAdagrad) {
      V squares = {};
      for (int h = 0; h < at.H; ++h) {
        const Real* g = gradient + h * at.half_padded;
        for (int64_t j = 0; j < at.half; j += F::kLanes) {
          const V part = load_some(g + j, min64(at.half - j, F::kLanes));
          squares = F::fma(part, part, squares);
        }
      }
      sums_[id] += horizontal_sum<F>(squares) / static_cast<Real>(dim_);
      divisor = F::root(F::broadcast(sums_[id])) + eps_;
    }
    for (int h = 0; h < at.H; ++h) {
      const int64_t from = h * at.half;
      const Real* g = gradient + h * at.half_padded;
      switch (optimizer_) {
        case Optimizer::kNone: break;
        case Optimizer::kSgd: components<Optimizer::kSgd>(row + from, nullptr, g, at.half, divisor); break;
        case Optimizer::kRowwiseAdagrad:
          components<Optimizer::kRowwiseAdagrad>(row + from, nullptr, g, at.half, divisor);
          break;
        case Optimizer::kAdagrad:
          components<Optimizer::kAdagrad>(row + from, sums_ + id * dim_ + from, g, at.half, divisor);
          break;
      }
    }
  }

  struct Stepped {
    V x, sum;
  };

  EMU_INLINE V load_some(const Real* from, int64_t count) {
    if (count == F::kLanes) return load<V>(from);
    V v = {};
    __builtin_memcpy(&v, from, sizeof(Real) * static_cast<size_t>(count));
    return v;
  }

  template <Optimizer kOptimizer>
  Stepped step(V x, V sum, V g, V divisor) const {
    if (kOptimizer == Optimizer::kSgd) return {F::fma(-rate_, g, x), sum};
    if (kOptimizer == Optimizer::kAdagrad) {
      sum = F::fma(g, g, sum);
      divisor = F::root(sum) + eps_;
    }
    return {x - rate_ * g / divisor, sum};
  }

  // `count` adjacent components. The last vector overlaps the one before, and is computed before that is stored.
  template <Optimizer kOptimizer>
  void components(Real* x, Real* sums, const Real* g, int64_t count, V divisor) const {
    constexpr bool kSums = kOptimizer == Optimizer::kAdagrad;
    if (count < F::kLanes) {
      const V sum = kSums ? load_some(sums, count) : V{};
      const Stepped to = step<kOptimizer>(load_some(x, count), sum, load_some(g, count), divisor);
      __builtin_memcpy(x, &to.x, sizeof(Real) * static_cast<size_t>(count));
      if (kSums) __builtin_memcpy(sums, &to.sum, sizeof(Real) * static_cast<size_t>(count));
      return;
    }
    const auto stepped = [&](int64_t j) {
      return step<kOptimizer>(load<V>(x + j), kSums ? load<V>(sums + j) : V{}, load<V>(g + j), divisor);
    };
    const auto put = [&](int64_t j, const Stepped& to) {
      store(x + j, to.x);
      if (kSums) store(sums + j, to.sum);
    };
    const int64_t last = count - F::kLanes;
    const Stepped end = stepped(last);
    for (int64_t j = 0; j < last; j += F::kLanes) put(j, stepped(j));
    put(last, end);
  }

  const V rate_, eps_;
  const Optimizer optimizer_;
  const int64_t dim_, stride_;
  Real *const table_, *const sums_;
  const StepArgs& more_;
};
