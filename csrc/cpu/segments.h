// A batch's ids sorted, so that the backward pass finds all contributions to a row of the table in one segment.
#pragma once

#include <cstdint>
#include <memory>

#include "common/problem.h"

namespace emu {

// Entries e: the G·K negatives (e = g·K + k), then the B positives (e = G·K + b). Padding is left out.
class Segments {
 public:
  explicit Segments(const Problem& problem);

  // id << 32 | e, ascending: the same for any number of threads.
  const uint64_t* sorted() const { return sorted_; }
  int64_t size() const { return size_; }
  int64_t touched() const;  // distinct ids

 private:
  std::unique_ptr<uint64_t[]> storage_;
  const uint64_t* sorted_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace emu
