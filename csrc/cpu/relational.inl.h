// Messages along the edges of a graph, aggregated at their targets, and the gradients. No array has a number for each
// edge and component: a message is computed again where it is needed. A row of a result is summed by one thread in the
// edges' order, so results do not depend on the number of threads.
//
// The rows of all queries of a node are adjacent. Queries are processed in chunks, such that all nodes' rows of a chunk
// fit in the last-level cache, from which a node's rows are read once for each of its edges.

constexpr int64_t kChunkBytes = 6 << 20;  // of all nodes' rows of a chunk of queries
constexpr int64_t kChunkRow = 512;        // the most components of a node in a chunk, so that accumulators stay in L1
constexpr int64_t kReads = 8;             // of a row in a pass, on average: with fewer, a cache gains nothing
constexpr int64_t kNodesPerItem = 16;

// Calls take(j, message) for the components of one query; for complex numbers take(j, real part, half + j, imaginary
// part). Both passes compute messages here, as the backward pass needs the same bits to find minima and maxima.
template <Message kMessage, class Real, class Take>
EMU_INLINE void for_messages(const Real* __restrict x, const Real* __restrict r, Real w, int64_t dim, Take&& take) {
  if constexpr (kMessage == Message::kRotate) {
    const int64_t half = dim / 2;
    EMU_INDEPENDENT
    for (int64_t j = 0; j < half; ++j) {
      const int64_t i = half + j;
      take(j, w * (x[j] * r[j] - x[i] * r[i]), i, w * (x[j] * r[i] + x[i] * r[j]));
    }
  } else {
    EMU_INDEPENDENT
    for (int64_t j = 0; j < dim; ++j) take(j, w * (kMessage == Message::kTransE ? x[j] + r[j] : x[j] * r[j]));
  }
}

// NaN if one of them is.
template <class Real>
EMU_INLINE Real smaller(Real a, Real b) {
  return ((a <= b) | (a != a)) ? a : b;
}
template <class Real>
EMU_INLINE Real larger(Real a, Real b) {
  return ((a >= b) | (a != a)) ? a : b;
}

template <class Real>
struct Relational {
  const RelationalArgs& a;
  const int64_t L;      // components of a node in all queries
  const int64_t chunk;  // queries
  const int64_t chunks;
  const Real *nodes, *relations, *own, *weight, *share, *grad, *result;
  const Real least_deviation;

  explicit Relational(const RelationalArgs& args)
      : a(args),
        L(args.B * args.D),
        chunk(queries_a_chunk(args)),
        chunks((args.B + chunk - 1) / chunk),
        nodes(static_cast<const Real*>(args.nodes)),
        relations(static_cast<const Real*>(args.relations)),
        own(static_cast<const Real*>(args.own)),
        weight(static_cast<const Real*>(args.weight)),
        share(static_cast<const Real*>(args.share)),
        grad(static_cast<const Real*>(args.grad)),
        result(static_cast<const Real*>(args.result)),
        least_deviation(square_root(static_cast<Real>(args.epsilon))) {}

  static int64_t queries_a_chunk(const RelationalArgs& a) {
    const int64_t row = a.D * static_cast<int64_t>(sizeof(Real));
    const int64_t most = max64(1, kChunkRow / a.D);
    if (a.size < kReads * a.N) return min64(a.B, most);
    // At least so many that a row's pieces are as long as what a processor fetches at a time.
    return min64(a.B, max64(min64(kChunkBytes / (a.N * row), most), max64(1, 128 / row)));
  }

  const Real* relation(int64_t r, int64_t b) const {
    return relations + (a.relation_rows > 1 ? r * L + b * a.D : r * a.D);
  }
  bool left_out(int64_t e) const { return a.keep != nullptr && a.keep[e] == 0; }
  // How many messages a node receives; needs edges sorted by target.
  int64_t received(int64_t v) const {
    int64_t number = own != nullptr;
    for (int64_t i = a.start[v]; i < a.start[v + 1]; ++i) number += !left_out(a.edge[i]);
    return number;
  }
  Real weight_of(int64_t e) const { return weight != nullptr ? weight[e] : Real{1}; }
  Real share_of(int64_t v) const { return share != nullptr ? share[v] : Real{1}; }

  EMU_INLINE Real square_root(Real x) {
    if constexpr (sizeof(Real) == 8) return __builtin_sqrt(x);
    return __builtin_sqrtf(x);
  }

  // Calls body(first query, number of queries, first node, last node, slot); chunk by chunk.
  template <class Body>
  void for_nodes(Body&& body) const {
    const int64_t items = (a.N + kNodesPerItem - 1) / kNodesPerItem;
    parallel(a.threads, chunks * items, [&](int64_t item, int slot) {
      const int64_t b = item / items * chunk, from = item % items * kNodesPerItem;
      body(b, min64(chunk, a.B - b), from, min64(a.N, from + kNodesPerItem), slot);
    });
  }

  template <Message kMessage, Aggregate kAggregate>
  void forward() const {
    constexpr bool kAll = kAggregate == Aggregate::kPna;
    constexpr bool kSum = kAll || kAggregate == Aggregate::kSum;
    constexpr bool kMin = kAll || kAggregate == Aggregate::kMin, kMax = kAll || kAggregate == Aggregate::kMax;
    constexpr int kSections = kAll ? 4 : 1;  // of the result: mean, minimum, maximum, standard deviation
    const int64_t width = chunk * a.D;
    Scratch scratch(a.threads, kSections * width * static_cast<int64_t>(sizeof(Real)));
    for_nodes([&](int64_t first, int64_t queries, int64_t from, int64_t to, int slot) {
      Real* const sums = reinterpret_cast<Real*>(scratch.slot(slot));
      Real* __restrict sum = sums;
      Real* __restrict low = sums + (kAll ? width : 0);
      Real* __restrict high = sums + (kAll ? 2 * width : 0);
      Real* __restrict square = sums + (kAll ? 3 * width : 0);
      for (int64_t v = from; v < to; ++v) {
        const int64_t number = received(v);
        const bool empty = number == 0;
        for (int64_t j = 0; j < width; ++j) {
          if (kSum) sum[j] = 0;
          if (kAll) square[j] = 0;
          if (kMin) low[j] = empty ? 0 : HUGE_REAL;
          if (kMax) high[j] = empty ? 0 : -HUGE_REAL;
        }
        const auto add = [&](int64_t at, Real m) {
          if (kSum) sum[at] += m;
          if (kAll) square[at] += m * m;
          if (kMin) low[at] = smaller(low[at], m);
          if (kMax) high[at] = larger(high[at], m);
        };
        if (own != nullptr) {
          const Real* __restrict row = own + v * L + first * a.D;
          EMU_INDEPENDENT
          for (int64_t j = 0; j < queries * a.D; ++j) add(j, row[j]);
        }
        for (int64_t i = a.start[v]; i < a.start[v + 1]; ++i) {
          if (i + 2 < a.size) prefetch_row(nodes + a.other[i + 2] * L + first * a.D, queries * a.D * sizeof(Real));
          const int64_t e = a.edge[i];
          if (left_out(e)) continue;
          const Real w = weight_of(e);
          const Real* row = nodes + a.other[i] * L + first * a.D;
          for (int64_t b = 0; b < queries; ++b) {
            const int64_t at = b * a.D;
            const Real* r = relation(a.relation[i], first + b);
            if constexpr (kMessage == Message::kRotate) {
              for_messages<kMessage>(row + at, r, w, a.D, [&](int64_t j, Real re, int64_t l, Real im) {
                add(at + j, re);
                add(at + l, im);
              });
            } else {
              for_messages<kMessage>(row + at, r, w, a.D, [&](int64_t j, Real m) { add(at + j, m); });
            }
          }
        }
        if constexpr (kAll) {
          const Real share = Real{1} / static_cast<Real>(max64(number, 1)), least = static_cast<Real>(a.epsilon);
          for (int64_t j = 0; j < queries * a.D; ++j) {
            const Real mean = sum[j] * share, variance = square[j] * share - mean * mean;
            sum[j] = mean;
            square[j] = empty ? 0 : square_root(variance < least ? least : variance);
          }
        }
        for (int64_t b = 0; b < queries; ++b) {
          Real* out = static_cast<Real*>(a.out) + (v * a.B + first + b) * kSections * a.D;
          for (int s = 0; s < kSections; ++s) copy(out + s * a.D, sums + s * width + b * a.D, a.D);
        }
      }
    });
  }

  // The gradient of a message m to a target, whose sections have the gradients g; `share` is the message's share of the
  // mean. If m is the minimum or the maximum, it gets the whole gradient of that.
  template <Aggregate kAggregate>
  EMU_INLINE Real pull(const Real* g, const Real* out, int64_t dim, int64_t j, Real m, Real share, Real least) {
    if constexpr (kAggregate == Aggregate::kSum) return g[j] * share;
    if constexpr (kAggregate == Aggregate::kMin || kAggregate == Aggregate::kMax) return m == out[j] ? g[j] : Real{0};
    const Real low = m == out[dim + j] ? g[dim + j] : Real{0}, high = m == out[2 * dim + j] ? g[2 * dim + j] : Real{0};
    // Where the variance was raised to epsilon it is a constant.
    const Real deviation = out[3 * dim + j], slope = deviation <= least ? Real{0} : g[3 * dim + j] / deviation;
    return share * (g[j] + slope * (m - out[j])) + low + high;
  }

  // The gradient of `own`.
  template <Aggregate kAggregate>
  void own_gradient() const {
    constexpr int64_t kSections = kAggregate == Aggregate::kPna ? 4 : 1;
    const int64_t dim = a.D;
    for_nodes([&](int64_t first, int64_t queries, int64_t from, int64_t to, int) {
      for (int64_t v = from; v < to; ++v) {
        for (int64_t b = first; b < first + queries; ++b) {
          const int64_t row = (v * a.B + b) * dim;
          const Real* __restrict g = grad + kSections * row;
          const Real* __restrict found = result + kSections * row;
          Real* __restrict to_own = static_cast<Real*>(a.out) + row;
          const Real part = share_of(v);
          EMU_INDEPENDENT
          for (int64_t j = 0; j < dim; ++j) {
            to_own[j] = pull<kAggregate>(g, found, dim, j, own[row + j], part, least_deviation);
          }
        }
      }
    });
  }

  // to_x += the gradient of x, to_r += that of r.
  template <Message kMessage, Aggregate kAggregate>
  EMU_INLINE void add_gradients(const Real* __restrict x, const Real* __restrict r, Real w, Real part, Real least,
                                int64_t dim, const Real* __restrict g, const Real* __restrict out,
                                Real* __restrict to_x, Real* __restrict to_r) {
    const auto pulled = [&](int64_t j, Real m) { return w * pull<kAggregate>(g, out, dim, j, m, part, least); };
    if constexpr (kMessage == Message::kRotate) {
      for_messages<kMessage>(x, r, w, dim, [&](int64_t j, Real re, int64_t i, Real im) {
        const Real of_re = pulled(j, re), of_im = pulled(i, im);
        to_x[j] += of_re * r[j] + of_im * r[i];
        to_x[i] += of_im * r[j] - of_re * r[i];
        to_r[j] += of_re * x[j] + of_im * x[i];
        to_r[i] += of_im * x[j] - of_re * x[i];
      });
    } else {
      for_messages<kMessage>(x, r, w, dim, [&](int64_t j, Real m) {
        const Real d = pulled(j, m);
        to_x[j] += kMessage == Message::kTransE ? d : d * r[j];
        to_r[j] += kMessage == Message::kTransE ? d : d * x[j];
      });
    }
  }

  // Edges are sorted by source: `other` is the target. A thread goes over all edges for some of the queries, so that no
  // other thread adds to the same row.
  template <Message kMessage, Aggregate kAggregate>
  void backward() const {
    constexpr int64_t kSections = kAggregate == Aggregate::kPna ? 4 : 1;
    const bool shared = a.relation_rows == 1;
    const int64_t each = min64(chunk, (a.B + a.threads - 1) / a.threads);
    // After so many edges the recent sums are added to the relations' totals, as long sums lose precision.
    const int64_t every = max64(1024, 32 * a.R);
    Scratch parts(1, shared ? a.R * L * static_cast<int64_t>(sizeof(Real)) : 0);
    Scratch scratch(a.threads, a.R * each * a.D * static_cast<int64_t>(sizeof(Real)));
    Real* const totals = shared ? reinterpret_cast<Real*>(parts.slot(0)) : static_cast<Real*>(a.relation_gradient);
    parallel(a.threads, (a.B + each - 1) / each, [&](int64_t item, int slot) {
      const int64_t first = item * each, queries = min64(each, a.B - first), lane = first * a.D;
      const int64_t width = queries * a.D;
      const size_t bytes = static_cast<size_t>(width) * sizeof(Real);
      Real* const of_relations = reinterpret_cast<Real*>(scratch.slot(slot));
      const auto add_up = [&](bool begin) {
        for (int64_t r = 0; r < a.R; ++r) {
          Real* __restrict total = totals + r * L + lane;
          Real* __restrict recent = of_relations + r * width;
          for (int64_t j = 0; j < width; ++j) total[j] = begin ? 0 : total[j] + recent[j];
          __builtin_memset(recent, 0, bytes);
        }
      };
      add_up(true);
      for (int64_t u = 0; u < a.N; ++u) {
        const Real* x = nodes + u * L + lane;
        Real* sum = static_cast<Real*>(a.out) + u * L + lane;
        __builtin_memset(sum, 0, bytes);
        for (int64_t i = a.start[u]; i < a.start[u + 1]; ++i) {
          if (i % every == every - 1) add_up(false);
          if (i + 1 < a.size) {
            const int64_t next = (a.other[i + 1] * a.B + first) * kSections * a.D;
            prefetch_row(grad + next, kSections * bytes);
            if (kAggregate != Aggregate::kSum) prefetch_row(result + next, kSections * bytes);
          }
          const int64_t e = a.edge[i], r = a.relation[i];
          if (left_out(e)) continue;
          const Real w = weight_of(e), part = share_of(a.other[i]);
          for (int64_t b = 0; b < queries; ++b) {
            const int64_t at = (a.other[i] * a.B + first + b) * kSections * a.D;
            add_gradients<kMessage, kAggregate>(x + b * a.D, relation(r, first + b), w, part, least_deviation, a.D,
                                                grad + at, result + at, sum + b * a.D,
                                                of_relations + r * width + b * a.D);
          }
        }
      }
      add_up(false);
    });
    if (!shared) return;
    Real* const out = static_cast<Real*>(a.relation_gradient);
    for (int64_t r = 0; r < a.R; ++r) {
      for (int64_t j = 0; j < a.D; ++j) {
        Real sum = 0;
        for (int64_t b = 0; b < a.B; ++b) sum += totals[r * L + b * a.D + j];
        out[r * a.D + j] = sum;
      }
    }
  }

  static constexpr Real HUGE_REAL =
      sizeof(Real) == 8 ? static_cast<Real>(__builtin_huge_val()) : static_cast<Real>(__builtin_huge_valf());
};

template <class Real, Message kMessage, Aggregate kAggregate>
static void relational_of(const RelationalArgs& a) {
  const Relational<Real> task(a);
  switch (a.task) {
    case RelationalTask::kForward: return task.template forward<kMessage, kAggregate>();
    case RelationalTask::kBackward: return task.template backward<kMessage, kAggregate>();
    case RelationalTask::kOwn: return task.template own_gradient<kAggregate>();
  }
}

template <class Real, Message kMessage>
static void relational_with(const RelationalArgs& a) {
  switch (a.aggregate) {
    case Aggregate::kSum: return relational_of<Real, kMessage, Aggregate::kSum>(a);
    case Aggregate::kMin: return relational_of<Real, kMessage, Aggregate::kMin>(a);
    case Aggregate::kMax: return relational_of<Real, kMessage, Aggregate::kMax>(a);
    case Aggregate::kPna: return relational_of<Real, kMessage, Aggregate::kPna>(a);
  }
}

template <class Real>
static void relational_as(const RelationalArgs& a) {
  switch (a.message) {
    case Message::kDistMult: return relational_with<Real, Message::kDistMult>(a);
    case Message::kTransE: return relational_with<Real, Message::kTransE>(a);
    case Message::kRotate: return relational_with<Real, Message::kRotate>(a);
  }
}

static void relational(const RelationalArgs& a) {
  if (a.dtype != DType::kDouble) return relational_as<float>(a);
#if defined(EMU_DOUBLES)
  relational_as<double>(a);
#else
  kBaselineKernels.relational(a);
#endif
}
