// A batch's ids sorted, so that the backward pass finds all contributions to a row of the table in one segment.
#pragma once

#include "common/problem.h"

namespace emu::cuda {

// Entries e: the G·K negatives (e = g·K + k), then the B positives (e = G·K + b), sorted by id and then by e. Padding,
// and ids out of range, have the key N and come last.
struct SortedIds {
  const uint32_t *key, *entry;  // (entries,) each
  int64_t entries;
};

int64_t count_entries(const Problem& p);
int64_t sort_workspace(const Problem& p);
// Throws std::invalid_argument for more ids or table rows than 32 bits count.
void sort_ids(const Problem& p, void* workspace);
// Lists the entries unsorted, in the order of e, instead.
void list_ids(const Problem& p, void* workspace);
SortedIds sorted_ids(const Problem& p, const void* workspace);

}  // namespace emu::cuda
