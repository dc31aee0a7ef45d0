// Scratch memory, and rows of the table in it.

// Scratch memory with one part for each thread slot; freed at the end of the call.
class Scratch {
 public:
  Scratch(int slots, int64_t bytes_each) : stride_((bytes_each + 63) / 64 * 64) {
    base_ = static_cast<uint8_t*>(aligned_alloc(64, static_cast<size_t>(slots * stride_ + 64)));
    if (base_ == nullptr) throw_out_of_memory();
  }
  ~Scratch() { free(base_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  uint8_t* slot(int index) const { return base_ + index * stride_; }

 private:
  uint8_t* base_;
  int64_t stride_;
};

// Hands out aligned arrays of one slot, or only counts their bytes if base is null.
struct Carver {
  uint8_t* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(base == nullptr ? nullptr : base + used);
    used += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return p;
  }
};

EMU_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
EMU_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
// memcpy of elements; both addresses may be null if the count is 0.
template <class T>
EMU_INLINE void copy(T* to, const T* from, int64_t count) {
  if (count > 0) __builtin_memcpy(to, from, sizeof(T) * static_cast<size_t>(count));
}

// A number of components rounded up to whole calls of the random number generator, and so to whole vectors.
EMU_INLINE int64_t padded(int64_t dim) { return (dim + 15) / 16 * 16; }

template <class F, class T>
EMU_INLINE void gather_row(typename F::Real* to, const T* from, int64_t dim) {
  int64_t j = 0;
  for (; j + F::kLanes <= dim; j += F::kLanes) store(to + j, load_wide(from + j));
  if (j == dim) return;
  if (dim >= F::kLanes) {  // the last vector overlaps the one before
    store(to + dim - F::kLanes, load_wide(from + dim - F::kLanes));
  } else {
    for (; j < dim; ++j) to[j] = widen(from[j]);
  }
}

// Calls body(pointer to the table's first element) with the pointer's true type.
template <class F, class Body>
EMU_INLINE void with_table(const Problem& p, Body&& body) {
  if constexpr (sizeof(typename F::Real) == 8) {
    body(static_cast<const double*>(p.table));
  } else {
    switch (p.dtype) {
      case DType::kBFloat16: return body(static_cast<const BFloat16*>(p.table));
      case DType::kHalf: return body(static_cast<const Half*>(p.table));
      default: return body(static_cast<const float*>(p.table));
    }
  }
}

EMU_INLINE int64_t element_size(DType dtype) { return dtype == DType::kDouble ? 8 : dtype == DType::kFloat ? 4 : 2; }

EMU_INLINE void prefetch_row(const void* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(row) + i);
}

template <class Real>
static void write_row(DType dtype, void* out, int64_t at, const Real* from, int64_t dim) {
  if constexpr (sizeof(Real) == 8) {
    __builtin_memcpy(static_cast<double*>(out) + at, from, static_cast<size_t>(dim) * 8);
  } else {
    switch (dtype) {
      case DType::kBFloat16:
        for (int64_t j = 0; j < dim; ++j) narrow(from[j], static_cast<BFloat16*>(out) + at + j);
        return;
      case DType::kHalf:
        for (int64_t j = 0; j < dim; ++j) narrow(from[j], static_cast<Half*>(out) + at + j);
        return;
      default: __builtin_memcpy(static_cast<float*>(out) + at, from, static_cast<size_t>(dim) * 4);
    }
  }
}
