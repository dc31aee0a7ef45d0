// Entity-major: the gradient of the table. A piece is a number of consecutive sorted entries. A team sums their
// contributions in registers, segment by segment, and writes each touched row once. A segment that spans several pieces
// leaves partial sums, which are joined in order: no atomics, the same bits every time.
//
// Another way to compute a dense fp32 gradient (kAtomic): entries are not sorted, and each contribution is added to its
// row with atomics.
#pragma once

#include "cuda/rows.cuh"
#include "cuda/sort.h"

namespace emu::cuda {

constexpr int kBatch = 32;  // contributions whose weights are looked up together
constexpr int kFewestPairs = 32;
constexpr int64_t kMostPieces = 8192;  // so that the memory of partial sums depends on D only

// How sorted entries are cut into pieces. If many rows share a set of negatives, each entry is also cut, into chunks of
// rows.
struct Pieces {
  int64_t entries, entries_a_piece, rows_a_piece, chunks;

  EMU_MEMBER int64_t count() const { return (entries + entries_a_piece - 1) / entries_a_piece * chunks; }
};

inline Pieces cut_pieces(const Problem& p, int64_t entries) {
  const int64_t rows = p.rows_per_group() > 0 ? p.rows_per_group() : 1;
  const int64_t pairs = entries * rows;
  const int64_t each = pairs / kMostPieces > kFewestPairs ? pairs / kMostPieces : kFewestPairs;
  Pieces pieces{entries, each / rows > 0 ? each / rows : 1, rows, 1};
  if (rows > each) {
    pieces.chunks = (rows + each - 1) / each;
    pieces.rows_a_piece = (rows + pieces.chunks - 1) / pieces.chunks;
  }
  return pieces;
}

struct TableGradientKernelArgs {
  Problem p;
  Plan plan;
  Pieces pieces;
  SortedIds sorted;
  const void *row_scale, *weight, *mutated_weight, *variance_weight, *grad_positive;
  const int64_t* ordinals;  // (pieces / chunks,), in the sparse form: the number of the touched row each begins in
  int64_t* ids;             // the sparse form, or null
  void* out;
  void* partials;  // (pieces, 2, D) real: of the first and of the last segment
};

// One piece: where it begins and ends, and whether its first and its last segment are also in other pieces.
struct Piece {
  int64_t index, first, last, row, rows;  // entries first, ..., last − 1, rows row, ..., row + rows − 1 of each
  bool continues, goes_on, one_segment, empty;
  bool opens;  // has the positives among its entries

  EMU_DEVICE Piece(const TableGradientKernelArgs& a, int64_t at) : index(at) {
    const Pieces& cut = a.pieces;
    const int64_t chunk = at % cut.chunks, group_rows = a.p.rows_per_group();
    first = at / cut.chunks * cut.entries_a_piece;
    last = first + cut.entries_a_piece < cut.entries ? first + cut.entries_a_piece : cut.entries;
    row = chunk * cut.rows_a_piece;
    rows = row + cut.rows_a_piece < group_rows ? cut.rows_a_piece : group_rows - row;
    const uint32_t* key = a.sorted.key;
    empty = key[first] >= a.p.N;
    opens = chunk == 0;
    one_segment = key[first] == key[last - 1];
    continues = chunk > 0 || (first > 0 && key[first - 1] == key[first]);
    goes_on = key[last - 1] < a.p.N && (chunk + 1 < cut.chunks || (last < cut.entries && key[last] == key[last - 1]));
  }
};

template <class Sim, class T, Mode kMode, bool kAtomic>
struct TableGradient {
  using Real = typename Sum<T>::Real;
  using M = Maths<Real>;
  using S = Shape<Sim, T, kMode>;
  static constexpr int H = S::H, V = S::V, kSums = Sums<Sim>::kCount;
  static constexpr bool kMutated = kMode != Mode::kPlain;
  static constexpr bool kMixed = kMode == Mode::kShare || kMode == Mode::kMask;
  static constexpr bool kMoments = kMode == Mode::kMoments;
  static constexpr bool kNeedsPositive = (kMixed && !Sim::kBilinear) || kMoments;
  static constexpr int R = S::R > 4 ? 4 : S::R;  // rows of queries loaded at a time

  // Contributions to rows of the table: from negative k of row b; from row b's positive; or none.
  static constexpr uint32_t kPositive = 0xFFFFFFFFu, kNothing = 0xFFFFFFFEu;
  struct Pairs {
    Real plain[kSums][kBatch];                 // g_b w_bk
    Real mutated[kSums][kBatch];               // g_b ŵ_bk; for kSelect g_b (w_bk + ŵ_bk)
    Real share[kMoments ? kSums : 1][kBatch];  // for kShare; for kMoments g_b v_bk
    uint32_t key[kBatch], row[kBatch], k[kBatch];
  };

  static EMU_MEMBER size_t masks(const Plan& plan) {
    return masked(kMode) ? static_cast<size_t>(R) * MaskTile<Sim>::row_bytes(plan.tile) : 0;
  }
  static EMU_MEMBER size_t memory(const Plan& plan) { return (masks(plan) + sizeof(Pairs) + 15) / 16 * 16; }

  const TableGradientKernelArgs& a;
  const Problem& p;
  const Plan& plan;
  const Team team;
  MaskTile<Sim> tile;
  Pairs& pairs;
  int j;
  Real sum[H][V];
  Chunk<T, V> candidate[H];
  Rates<Sim, T, V> rates;  // for moments, without the positive's terms

  EMU_DEVICE TableGradient(const TableGradientKernelArgs& args, unsigned char* shared)
      : a(args),
        p(args.p),
        plan(args.plan),
        team(plan.team_threads),
        tile(p, plan.tile, shared + team.index * memory(plan)),
        pairs(*reinterpret_cast<Pairs*>(tile.bytes + masks(plan))),
        j(static_cast<int>(blockIdx.y) * plan.tile + team.at * V) {}

  EMU_DEVICE void clear() {
#pragma unroll
    for (int h = 0; h < H; ++h) {
#pragma unroll
      for (int i = 0; i < V; ++i) sum[h][i] = 0;
    }
  }
  EMU_DEVICE void load_candidate(uint32_t key) {
    if constexpr (!Sim::kBilinear || kMoments) {
      const T* row = static_cast<const T*>(p.table) + static_cast<int64_t>(key) * p.table_stride;
#pragma unroll
      for (int h = 0; h < H; ++h) {
        candidate[h] = load_chunk<T, V>(row + h * plan.half, j, plan.half, plan.width);
      }
    }
  }

  EMU_DEVICE void run() {
    const int64_t index = static_cast<int64_t>(blockIdx.x) * plan.teams + team.index;
    if (index >= a.pieces.count()) return;  // for all threads of a team
    const Piece piece(a, index);
    if (piece.empty && !kAtomic) return;
    if (masked(kMode)) tile.move_to(team, static_cast<int>(blockIdx.y) * plan.tile);
    if (masked(kMode) || kMode == Mode::kShare) tile.seed.load(p.draws);
    int64_t ordinal = a.ids != nullptr ? a.ordinals[index / a.pieces.chunks] : 0;
    uint32_t key = a.sorted.key[piece.first];
    bool at_first = true;
    clear();
    if constexpr (!kAtomic) load_candidate(key);
    if constexpr (kMoments) rates.load(p, plan, 0, j, plan.whole_reals);
    // Pair n: row n % rows of entry n / rows.
    int64_t pairs_in_piece = (piece.last - piece.first) * piece.rows;
    if (a.pieces.chunks > 1 && a.sorted.entry[piece.first] >= p.G * p.K) pairs_in_piece = piece.opens ? 1 : 0;
    for (int64_t from = 0; from < pairs_in_piece; from += kBatch) {
      team.sync();
      if (team.at < kBatch) look_up(piece, from + team.at, pairs_in_piece);
      team.sync();
      for (int r0 = 0; r0 < kBatch; r0 += R) {
        if (from + r0 >= pairs_in_piece || (!kAtomic && pairs.key[r0] >= p.N)) break;
        if constexpr (masked(kMode)) {
          if (r0 > 0) team.sync();
          tile.draw(R, [&](int r, uint32_t& k, uint32_t& row) {
            k = pairs.k[r0 + r], row = p.draws.row_offset + pairs.row[r0 + r];
            return k < kNothing;
          });
          team.sync();
        }
        Real query[R][H][V];
        Chunk<T, V> positive[R][H];  // loaded here for moments, otherwise where it is used
#pragma unroll
        for (int r = 0; r < R; ++r) {
          load_query(r0 + r, query[r]);
          if constexpr (kMoments) load_positive(r0 + r, positive[r]);
        }
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const int at = r0 + r;
          if (kAtomic) {
            if (pairs.k[at] == kNothing) continue;
            clear();
            load_candidate(pairs.key[at]);
            add_pair(r, at, query[r], positive[r]);
            add_to_row(pairs.key[at]);
            continue;
          }
          if (pairs.key[at] >= p.N) break;
          if (pairs.key[at] != key) {
            write_segment(piece, key, ordinal, at_first, false);
            key = pairs.key[at];
            ++ordinal;
            at_first = false;
            clear();
            load_candidate(key);
          }
          add_pair(r, at, query[r], positive[r]);
        }
      }
    }
    if constexpr (!kAtomic) write_segment(piece, key, ordinal, at_first, true);
  }

  EMU_DEVICE void add_to_row(uint32_t key) {
    if constexpr (kAtomic) {
      float* const to = static_cast<float*>(a.out) + static_cast<int64_t>(key) * p.D;
#pragma unroll
      for (int h = 0; h < H; ++h) {
        const int at = h * plan.half + j;
        if (plan.whole_out && j < plan.half) {
          add_vector(to + at, sum[h][0], sum[h][1], sum[h][2], sum[h][3]);
          continue;
        }
#pragma unroll
        for (int i = 0; i < V; ++i) {
          if (j + i < plan.half) atomicAdd(to + at + i, sum[h][i]);
        }
      }
    }
  }

  // Reads one contribution for each thread. The key N stands for none.
  EMU_DEVICE void look_up(const Piece& piece, int64_t n, int64_t count) {
    const int at = team.at;
    pairs.key[at] = static_cast<uint32_t>(p.N);
    pairs.row[at] = 0, pairs.k[at] = kNothing;
    if (n >= count) return;
    const int64_t entry = piece.first + n / piece.rows, i = n % piece.rows;
    const uint32_t e = a.sorted.entry[entry];
    const int64_t negatives = p.G * p.K;
    const Real* scale = static_cast<const Real*>(a.row_scale);
    pairs.key[at] = a.sorted.key[entry];
    if (pairs.key[at] >= p.N) return;
    if (e >= negatives) {
      if (i > 0) return;  // a positive is the first of its entry's pairs; the others are none
      pairs.row[at] = static_cast<uint32_t>(e - negatives), pairs.k[at] = kPositive;
      pairs.plain[0][at] = scale[e - negatives];
      return;
    }
    const uint32_t g = e / static_cast<uint32_t>(p.K);
    const uint32_t k = e - g * static_cast<uint32_t>(p.K);
    const int64_t row = g * p.rows_per_group() + piece.row + i;
    pairs.row[at] = static_cast<uint32_t>(row), pairs.k[at] = k;
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      const int64_t of = (s * p.B + row) * p.K + k;
      const Real w = static_cast<const Real*>(a.weight)[of];
      pairs.plain[s][at] = scale[row] * w;
      if constexpr (kMutated) {
        const Real mutated = static_cast<const Real*>(a.mutated_weight)[of];
        pairs.mutated[s][at] = scale[row] * (kMode == Mode::kSelect ? w + mutated : mutated);
      }
      if constexpr (kMoments) {
        pairs.share[s][at] = scale[row] * static_cast<const Real*>(a.variance_weight)[of];
      }
    }
    if constexpr (kMode == Mode::kShare) {
      pairs.share[0][at] = draw_share<Real>(p.draws, tile.seed, k, p.draws.row_offset + static_cast<uint32_t>(row));
    }
  }

  // The query of a contribution's row; for a positive, the gradient by it.
  EMU_DEVICE void load_query(int at, Real (&to)[H][V]) {
    const bool positive = pairs.k[at] == kPositive;
    const Real* from =
        static_cast<const Real*>(positive ? a.grad_positive : p.query) + static_cast<int64_t>(pairs.row[at]) * p.D;
#pragma unroll
    for (int h = 0; h < H; ++h) {
      load_reals<V>(from + h * plan.half, j, plan.half, plan.whole_reals, to[h]);
      if (Sim::factor(h) == Factor::kPhase && !positive) {
#pragma unroll
        for (int i = 0; i < V; ++i) to[h][i] *= static_cast<Real>(p.phase_scale / 2);
      }
    }
  }

  template <int h>
  EMU_DEVICE void load_factor(int at, Real (&to)[V]) const {
    const Real one = Sim::factor(h) == Factor::kPhase ? static_cast<Real>(p.phase_scale / 2) : Real{1};
#pragma unroll
    for (int i = 0; i < V; ++i) to[i] = one;
    if constexpr (Sim::factor(h) == Factor::kScale) {
      if (p.scale == nullptr) return;
      const Real* from = static_cast<const Real*>(p.scale) + static_cast<int64_t>(pairs.row[at]) * plan.half;
      load_reals<V>(from, j, plan.half, plan.whole_reals, to);
    }
  }

  EMU_DEVICE void load_positive(int at, Chunk<T, V> (&to)[H]) const {
    bool bad;
    const T* row = find_row<T>(p, p.positive[pairs.row[at]], 0, bad);
#pragma unroll
    for (int h = 0; h < H; ++h) to[h] = load_row<T, V>(row, h * plan.half, j, plan.half, plan.width);
  }

  EMU_DEVICE void add_pair(int r, int at, const Real (&query)[H][V], Chunk<T, V> (&positive)[H]) {
    if (pairs.k[at] == kNothing) return;
    if (pairs.k[at] == kPositive) {
      const Real scale = pairs.plain[0][at];
#pragma unroll
      for (int h = 0; h < H; ++h) {
#pragma unroll
        for (int i = 0; i < V; ++i) sum[h][i] += scale * query[h][i];
      }
      return;
    }
    if constexpr (kNeedsPositive && !kMoments) load_positive(at, positive);
    if constexpr (kMoments) {
      if (p.draws.rate_rows > 1) rates.load(p, plan, pairs.row[at], j, plan.whole_reals);
    }
    if constexpr (Sim::kCoupled) {
      add_coupled(r, at, query, positive);
    } else {
      add_half<0>(r, at, query[0], positive[0]);
      if constexpr (H > 1) add_half<H - 1>(r, at, query[H - 1], positive[H - 1]);
    }
  }

  template <int h>
  EMU_DEVICE void add_half(int r, int at, const Real (&query)[V], const Chunk<T, V>& positive) {
    Real w = pairs.plain[h][at];
    const Real hat = kMutated ? pairs.mutated[h][at] : Real{0};
    const Real share = kMode == Mode::kShare ? pairs.share[0][at] : Real{0};
    if (Sim::kBilinear && kMode == Mode::kShare) w += hat * share;
    uint32_t words[S::kWords];
    if constexpr (kMode == Mode::kSelect) tile.template load<V>(r, h, j, words);
    Real factor[V];
    load_factor<h>(at, factor);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const Real q = query[i], f = factor[i];
      Real d = q;
      if constexpr (!Sim::kBilinear) {
        d = f * Sim::template slope<h, M>(difference<Sim, h>(q, f, candidate[h].at(i)));
      }
      if constexpr (kMode == Mode::kSelect) {
        sum[h][i] += (tile.limit.mutated(words[i / 4], i % 4) ? w : hat) * d;
      } else if constexpr (kMoments) {
        const auto term = [&](Real c) { return Sim::template term<h, M>(difference<Sim, h>(q, f, c)); };
        sum[h][i] += spread_weight(h, at, i, term(candidate[h].at(i)) - term(positive.at(i))) * d;
      } else {
        sum[h][i] += w * d;
      }
      if constexpr (kMode == Mode::kShare && !Sim::kBilinear) {
        const Real z = positive.at(i), c = candidate[h].at(i);
        const Real mixed = z + multiply(share, subtract(c, z));
        sum[h][i] += hat * share * (f * Sim::template slope<h, M>(difference<Sim, h>(q, f, mixed)));
      }
    }
  }

  // With moments, what replaces the plain weight, from t − p.
  EMU_DEVICE Real spread_weight(int s, int at, int i, Real gap) const {
    return pairs.plain[s][at] + rates.keep[s][i] * pairs.mutated[s][at] +
           rates.spread[s][i] * (pairs.share[kMoments ? s : 0][at] * gap);
  }

  EMU_DEVICE void add_coupled(int r, int at, const Real (&query)[H][V], const Chunk<T, V> (&positive)[H]) {
    const Real w = pairs.plain[0][at], hat = kMutated ? pairs.mutated[0][at] : Real{0};
    const Real share = kMode == Mode::kShare ? pairs.share[0][at] : Real{0};
    uint32_t words[2][S::kWords];
    if constexpr (kMode == Mode::kMask) {
      tile.template load<V>(r, 0, j, words[0]);
      tile.template load<V>(r, 1, j, words[1]);
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {
      Real u[2], mixed[2], slope[2], mixed_slope[2];
      bool mutated[2] = {};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const Real c = candidate[h].at(i);
        u[h] = difference<Sim, 0>(query[h][i], Real{1}, c);
        if constexpr (kMutated) {
          const Real z = positive[h].at(i);
          if (kMode == Mode::kMask) mutated[h] = tile.limit.mutated(words[h][i / 4], i % 4);
          const bool taken = kMoments || mutated[h];
          const Real candidate_mixed = kMode == Mode::kShare ? z + multiply(share, subtract(c, z)) : taken ? z : c;
          mixed[h] = difference<Sim, 0>(query[h][i], Real{1}, candidate_mixed);
        }
      }
      if constexpr (kMoments) {  // `mixed` is the positive's
        const Real square = u[0] * u[0] + u[1] * u[1], inverse = Sim::template inverse<M>(square);
        const Real gap = Sim::value(square, inverse) - Sim::template term<M>(mixed[0], mixed[1]);
        const Real x = spread_weight(0, at, i, gap);
        sum[0][i] += x * (u[0] * inverse);
        sum[1][i] += x * (u[1] * inverse);
        continue;
      }
      Sim::template slopes<M>(u[0], u[1], slope[0], slope[1]);
      if (kMutated) Sim::template slopes<M>(mixed[0], mixed[1], mixed_slope[0], mixed_slope[1]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sum[h][i] += w * slope[h];
        if (kMode == Mode::kMask) sum[h][i] += (mutated[h] ? Real{0} : hat) * mixed_slope[h];
        if (kMode == Mode::kShare) sum[h][i] += hat * share * mixed_slope[h];
      }
    }
  }

  EMU_DEVICE void write_segment(const Piece& piece, uint32_t key, int64_t ordinal, bool is_first, bool is_last) {
    const bool to_head = is_first && piece.continues, to_tail = is_last && piece.goes_on;
    if (to_head || to_tail) {
      Real* const to = static_cast<Real*>(a.partials) + (piece.index * 2 + (to_head ? 0 : 1)) * p.D;
#pragma unroll
      for (int h = 0; h < H; ++h) store_reals<V>(to + h * plan.half, j, plan.half, plan.whole_reals, sum[h]);
      return;
    }
    if (a.ids != nullptr && team.at == 0 && blockIdx.y == 0) a.ids[ordinal] = key;
    T* const to = static_cast<T*>(a.out) + (a.ids != nullptr ? ordinal : static_cast<int64_t>(key)) * p.D;
#pragma unroll
    for (int h = 0; h < H; ++h) write_row(to + h * plan.half, sum[h]);
  }
  EMU_DEVICE void write_row(T* to, const Real (&from)[V]) {
    if constexpr (sizeof(T) == sizeof(Real)) {
      store_reals<V>(to, j, plan.half, plan.whole_reals, from);
    } else {
      Chunk<T, V> chunk{};
#pragma unroll
      for (int i = 0; i < V; ++i) {
        T narrowed;
        narrow(from[i], &narrowed);
        chunk.set(i, narrowed);
        if (!plan.whole_out && j + i < plan.half) to[j + i] = narrowed;
      }
      if (!plan.whole_out || j >= plan.half) return;
      if constexpr (sizeof(T) * V == 16) {
        *reinterpret_cast<uint4*>(to + j) = {chunk.words[0], chunk.words[1], chunk.words[2], chunk.words[3]};
      } else {
        *reinterpret_cast<uint2*>(to + j) = {chunk.words[0], chunk.words[1]};
      }
    }
  }
};

template <class Sim, class T, Mode kMode, bool kAtomic>
__global__ void __launch_bounds__(kMostTeamThreads, 1)
    add_segments(const __grid_constant__ TableGradientKernelArgs args) {
  EMU_SHARED_MEMORY(shared);
  TableGradient<Sim, T, kMode, kAtomic>(args, shared).run();
}

// --- segments that cross pieces -------------------------------------------------------------------------------

constexpr int kJoinThreads = 128;

// One block for each piece. If a segment begins in the piece and goes on in others, sums up the segment's partial sums
// and writes its row.
template <class T>
__global__ void __launch_bounds__(kJoinThreads) join_pieces(const __grid_constant__ TableGradientKernelArgs a) {
  using Real = typename Sum<T>::Real;
  const Piece piece(a, blockIdx.x);
  if (piece.empty || !piece.goes_on || (piece.one_segment && piece.continues)) return;
  const uint32_t key = a.sorted.key[piece.last - 1];
  const int64_t D = a.p.D, pieces = a.pieces.count();
  const Real* const partials = static_cast<const Real*>(a.partials);
  int64_t end = piece.index + 1;  // one past the last piece of the segment
  for (; end < pieces; ++end) {
    const Piece next(a, end);
    if (!(next.one_segment && next.goes_on)) break;
  }
  // The number of the touched row: the next piece begins with this segment, but this piece may begin with another.
  const int64_t next_of_entry = (piece.index + 1) / a.pieces.chunks;
  const int64_t ordinal = a.ids == nullptr      ? static_cast<int64_t>(key)
                          : a.pieces.chunks > 1 ? a.ordinals[piece.index / a.pieces.chunks]
                                                : a.ordinals[next_of_entry];
  if (a.ids != nullptr && threadIdx.x == 0) a.ids[ordinal] = key;
  T* const to = static_cast<T*>(a.out) + ordinal * D;
  for (int64_t j = threadIdx.x; j < D; j += kJoinThreads) {
    Real sum = partials[(piece.index * 2 + (piece.one_segment && piece.continues ? 0 : 1)) * D + j];
    for (int64_t at = piece.index + 1; at <= end && at < pieces; ++at) sum += partials[at * 2 * D + j];
    narrow(sum, to + j);
  }
}

}  // namespace emu::cuda
