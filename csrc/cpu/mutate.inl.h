// Mutation alone.

EMU_INLINE void draw_row_masks(const Random& random, const MutateArgs& a, int64_t b, int64_t from, int64_t dp,
                               uint8_t* masks) {
  U64 lane = {};
  for (int i = 0; i < kMaskLanes; ++i) lane[i] = static_cast<uint64_t>(from + i);
  random.draw_masks(lane, U64{} + (a.draws.row_offset + static_cast<uint64_t>(b)), masks, dp);
}

// T: an unsigned integer as wide as an element, whose value does not matter.
template <class T>
static void mutate_forward_as(const MutateArgs& a) {
  const Random random(a.draws, a.D);
  const int64_t dp = padded(a.D);
  Scratch scratch(a.place.threads, kMaskLanes * dp);
  parallel(a.place.threads, a.B, [&](int64_t b, int slot) {
    uint8_t* masks = scratch.slot(slot);
    const T* positive = static_cast<const T*>(a.positive) + b * a.D;
    for (int64_t from = 0; from < a.K; from += kMaskLanes) {
      draw_row_masks(random, a, b, from, dp, masks);
      for (int64_t k = from; k < min64(a.K, from + kMaskLanes); ++k) {
        const uint8_t* mask = masks + (k - from) * dp;
        const T* negative = static_cast<const T*>(a.negative) + (b * a.K + k) * a.D;
        T* out = static_cast<T*>(a.out) + (b * a.K + k) * a.D;
        for (int64_t j = 0; j < a.D; ++j) out[j] = mask[j] ? positive[j] : negative[j];
      }
    }
  });
}

static void mutate_forward(const MutateArgs& a) {
  switch (element_size(a.dtype)) {
    case 2: return mutate_forward_as<uint16_t>(a);
    case 4: return mutate_forward_as<uint32_t>(a);
    default: return mutate_forward_as<uint64_t>(a);
  }
}

template <class T, class Real>
static void mutate_backward_as(const MutateArgs& a) {
  const Random random(a.draws, a.D);
  const int64_t dp = padded(a.D);
  Scratch scratch(a.place.threads, kMaskLanes * dp + dp * static_cast<int64_t>(sizeof(Real)));
  parallel(a.place.threads, a.B, [&](int64_t b, int slot) {
    Real* sum = reinterpret_cast<Real*>(scratch.slot(slot));
    uint8_t* masks = reinterpret_cast<uint8_t*>(sum + dp);
    __builtin_memset(sum, 0, sizeof(Real) * static_cast<size_t>(dp));
    for (int64_t from = 0; from < a.K; from += kMaskLanes) {
      draw_row_masks(random, a, b, from, dp, masks);
      for (int64_t k = from; k < min64(a.K, from + kMaskLanes); ++k) {
        const uint8_t* mask = masks + (k - from) * dp;
        const T* grad = static_cast<const T*>(a.negative) + (b * a.K + k) * a.D;
        T* out = static_cast<T*>(a.grad_negative) + (b * a.K + k) * a.D;
        for (int64_t j = 0; j < a.D; ++j) {
          sum[j] += mask[j] ? widen(grad[j]) : Real{0};
          out[j] = mask[j] ? T{} : grad[j];
        }
      }
    }
    T* grad_positive = static_cast<T*>(a.grad_positive) + b * a.D;
    for (int64_t j = 0; j < a.D; ++j) narrow(sum[j], grad_positive + j);
  });
}

static void mutate_backward(const MutateArgs& a) {
  switch (a.dtype) {
    case DType::kFloat: return mutate_backward_as<float, float>(a);
    case DType::kBFloat16: return mutate_backward_as<BFloat16, float>(a);
    case DType::kHalf: return mutate_backward_as<Half, float>(a);
    case DType::kDouble: return mutate_backward_as<double, double>(a);
  }
}
