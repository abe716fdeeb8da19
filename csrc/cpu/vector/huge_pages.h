// Asks for huge pages under a large block of memory that has not been touched yet.
//
// The C library maps every large block anew, and then most of the time of filling it goes to page
// faults of 4 KiB each. This is advice: a system that does not follow it is only slower.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fused_ce::cpu {

inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t kHugePage = size_t{1} << 21;
  constexpr size_t kWorthwhile = size_t{1} << 24;
  if (bytes < kWorthwhile) return;
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace fused_ce::cpu
