// Masks and shares as emu_kernels/mask.py specifies them, for several (row, negative) pairs at once.

constexpr int kMaskLanes = kVectorBytes / 8;  // (row, negative) pairs drawn at once

// A mask has a byte for each component: 0xFF if it is mutated, else 0.
//
// The counter's words are (block, k, row, stream). After the first round two words depend on the block alone and two
// on (k, row) alone. So the first two rounds are done once for each block and once for each pair, not for each
// combination of the two.
class Random {
 public:
  Random(const Draws& draws, int64_t dim)
      : draws_(draws),
        half_(draws.pairs ? dim / 2 : 0),
        units_(padded(draws.pairs ? dim / 2 : dim)),
        memory_(1, units_ / kComponentsPerCall * int64_t{sizeof(Block)}) {
    const uint64_t seed = static_cast<uint64_t>(*draws.seed);
    for (int r = 0; r < kPhiloxRounds; ++r) {
      key0_[r] = U64{} + (static_cast<uint32_t>(seed) + static_cast<uint32_t>(r) * kPhiloxW0);
      key1_[r] = U64{} + (static_cast<uint32_t>(seed >> 32) + static_cast<uint32_t>(r) * kPhiloxW1);
    }
    blocks_ = reinterpret_cast<Block*>(memory_.slot(0));
    const int64_t units = draws.pairs ? dim / 2 : dim;
    for (int64_t i = 0; i < units_ / kComponentsPerCall; ++i) {
      blocks_[i] = second_round(static_cast<uint32_t>(i), kMaskStream);
      for (int64_t at = 0; at < kComponentsPerCall; ++at) {
        const int64_t unit = i * kComponentsPerCall + at;
        const int threshold = draws.thresholds == nullptr || unit >= units ? 0 : draws.thresholds[unit];
        blocks_[i].last[at] = static_cast<uint8_t>(threshold > 0 ? threshold - 1 : 0);
        blocks_[i].allowed[at] = threshold > 0 ? 0xFF : 0;
      }
    }
  }

  // Masks of kMaskLanes pairs, `stride` bytes apart; k and row in 64-bit lanes.
  void draw_masks(U64 k, U64 row, uint8_t* out, int64_t stride) const {
    if (draws_.thresholds == nullptr && (draws_.threshold <= 0 || draws_.threshold >= 256)) {
      for (int i = 0; i < kMaskLanes; ++i) {
        __builtin_memset(out + i * stride, draws_.threshold > 0 ? 0xFF : 0, static_cast<size_t>(stride));
      }
      return;
    }
    U64 p0, p1;
    first_round(k, row, p0, p1);
    if (draws_.thresholds == nullptr) {
      draw_blocks<false>(p0, p1, out, stride);
    } else {
      draw_blocks<true>(p0, p1, out, stride);
    }
    if (half_ > 0) {
      for (int i = 0; i < kMaskLanes; ++i) {
        __builtin_memcpy(out + i * stride + half_, out + i * stride, static_cast<size_t>(half_));
      }
    }
  }

  // Shares of kMaskLanes pairs.
  template <class F>
  void draw_shares(U64 k, U64 row, typename F::Real* out) const {
    using Pairs = typename F::Pairs;
    U64 p0, p1, words[4];
    first_round(k, row, p0, p1);
    rounds(second_round(0, kShareStream), p0, p1, words);
    Pairs uniform[4];
    for (int w = 0; w < 4; ++w) {
      const U64 top = (words[w] & 0xFFFFFFFFu) >> kUniformShift;
      uniform[w] = __builtin_convertvector(top, Pairs) * static_cast<typename F::Real>(kUniformUnit);
    }
    store(out, share_of(Mutations{}, draws_.rule, uniform, draws_));
  }

 private:
  struct Block {
    uint64_t c0, c1, c2;                                            // the block's part of the second round's words
    uint8_t last[kComponentsPerCall], allowed[kComponentsPerCall];  // threshold − 1; 0xFF, or 0 for threshold 0
  };

  Block second_round(uint32_t block, uint32_t stream) const {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * block;
    const uint64_t c2 = (p0 >> 32) ^ stream ^ key1_[0][0];
    const uint64_t p1 = kPhiloxM1 * c2;
    return {(p1 >> 32) ^ key0_[1][0], p1, (p0 & 0xFFFFFFFFu) ^ key1_[1][0], {}, {}};
  }

  void first_round(U64 k, U64 row, U64& p0, U64& p1) const {
    p1 = multiply_low_halves(U64{} + kPhiloxM1, row);
    p0 = multiply_low_halves(U64{} + kPhiloxM0, (p1 >> 32) ^ k ^ key0_[0]);
  }

  EMU_MEMBER void rounds(const Block& own, U64 pair_p0, U64 pair_p1, U64 (&c)[4]) const {
    c[0] = pair_p1 ^ own.c0, c[1] = U64{} + own.c1, c[2] = (pair_p0 >> 32) ^ own.c2, c[3] = pair_p0;
    for (int r = 2; r < kPhiloxRounds; ++r) round(r, c);
  }

  EMU_MEMBER void round(int r, U64 (&c)[4]) const {
    const U64 p0 = multiply_low_halves(U64{} + kPhiloxM0, c[0]);
    const U64 p1 = multiply_low_halves(U64{} + kPhiloxM1, c[2]);
    c[0] = (p1 >> 32) ^ c[1] ^ key0_[r];
    c[1] = p1;
    c[2] = (p0 >> 32) ^ c[3] ^ key1_[r];
    c[3] = p0;
  }

  template <bool kEach>
  void draw_blocks(U64 p0, U64 p1, uint8_t* out, int64_t stride) const {
    const int64_t blocks = units_ / kComponentsPerCall;
    int64_t block = 0;
    for (; block + 2 <= blocks; block += 2) draw_blocks<kEach, 2>(block, p0, p1, out, stride);
    for (; block < blocks; ++block) draw_blocks<kEach, 1>(block, p0, p1, out, stride);
  }

  // Components 16·block .. 16·(block + N) − 1. Two independent chains hide the latency of one.
  template <bool kEach, int N>
  EMU_MEMBER void draw_blocks(int64_t block, U64 pair_p0, U64 pair_p1, uint8_t* out, int64_t stride) const {
    U64 c[N][4];
    for (int n = 0; n < N; ++n) {
      const Block& own = blocks_[block + n];
      c[n][0] = pair_p1 ^ own.c0, c[n][1] = U64{} + own.c1;
      c[n][2] = (pair_p0 >> 32) ^ own.c2, c[n][3] = pair_p0;
    }
    for (int r = 2; r < kPhiloxRounds; ++r) {
      for (int n = 0; n < N; ++n) round(r, c[n]);
    }
    for (int n = 0; n < N; ++n) {
      U64 halves[2] = {join_low_halves(c[n][0], c[n][1]), join_low_halves(c[n][2], c[n][3])};
      for (int i = 0; i < 2; ++i) {
        if (kEach) {
          const Block& own = blocks_[block + n];
          const U8 last = (U8)(U64{} + load<uint64_t>(own.last + 8 * i));
          halves[i] = (U64)((U8)halves[i] <= last) & (U64{} + load<uint64_t>(own.allowed + 8 * i));
        } else {
          halves[i] = (U64)((U8)halves[i] <= U8{} + static_cast<uint8_t>(draws_.threshold - 1));
        }
      }
      store_pairs(halves[0], halves[1], out + (block + n) * kComponentsPerCall, stride);
    }
  }

  U64 key0_[kPhiloxRounds], key1_[kPhiloxRounds];  // each round's key, in every lane
  Draws draws_;
  int64_t half_, units_;
  Scratch memory_;
  Block* blocks_;
};
