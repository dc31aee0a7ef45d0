// The backward pass goes entity by entity: this sorts the ids of a batch once, so that each touched row of
// the table has its contributions in one segment.
#pragma once

#include <cstdint>
#include <memory>

#include "cpu/problem.h"

namespace emu {

// Entries e: the G·K negatives (e = g·K + k), then the B positives (e = G·K + b). Padding is left out.
class Segments {
 public:
  explicit Segments(const Problem& problem);

  // id << 32 | e, ascending, so the same for any number of threads.
  const uint64_t* sorted() const { return sorted_; }
  int64_t size() const { return size_; }
  int64_t touched() const;  // distinct ids

 private:
  std::unique_ptr<uint64_t[]> storage_;
  const uint64_t* sorted_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace emu
