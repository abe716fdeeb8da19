// Makes every call with an allocation that fails: the first of it, the second, and so on.
//
// The call has to end in std::bad_alloc with the logits as they were, or in the right result, and
// so has the next one, which gets all memory it asks for. An allocation may fail alone or with all
// that follow. Threads fail as the caller does; starting them is not a kernel's business.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <utility>

#include "calls.h"

namespace {

std::atomic<int> allocations = 0;
int failing = 0;       // the number of the one that fails; none where it is 0
bool all_that_follow;  // fail, too

void* allocate(std::size_t bytes, std::size_t alignment) {
  if (calls::in_kernel) {
    const int number = ++allocations;
    if (failing > 0 && (number == failing || (all_that_follow && number > failing)))
      throw std::bad_alloc();
  }
  bytes = bytes > 0 ? (bytes + alignment - 1) / alignment * alignment : alignment;
  void* const memory = std::aligned_alloc(alignment, bytes);
  if (!memory) throw std::bad_alloc();
  return memory;
}

constexpr std::size_t kAlignment = alignof(std::max_align_t);

}  // namespace

void* operator new(std::size_t bytes) { return allocate(bytes, kAlignment); }
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return allocate(bytes, static_cast<std::size_t>(alignment));
}
void* operator new[](std::size_t bytes) { return allocate(bytes, kAlignment); }
void* operator new[](std::size_t bytes, std::align_val_t alignment) {
  return allocate(bytes, static_cast<std::size_t>(alignment));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }

namespace {

enum class End { kRight, kOutOfMemory, kWrong };

End end_of(calls::Call& call, const std::vector<std::byte>& expected) {
  try {
    return call.run() == expected ? End::kRight : End::kWrong;
  } catch (const std::bad_alloc&) {
    return call.is_untouched() ? End::kOutOfMemory : End::kWrong;
  }
}

// How many allocations the call makes, or -1 where one that fails leaves something wrong.
int check(const calls::Kind& kind) {
  calls::Call call(kind);
  const std::vector<std::byte> expected = call.run();
  for (int number = 1;; number++) {
    allocations = 0;
    failing = number;
    const End end = end_of(call, expected);
    failing = 0;
    const bool failed = allocations >= number;
    if (end == End::kWrong || (!failed && end == End::kOutOfMemory) ||
        end_of(call, expected) != End::kRight) {
      std::fprintf(stderr, "%s, threads: %d: wrong after failure of allocation %d%s\n",
                   kind.name.c_str(), static_cast<int>(calls::threads), number,
                   all_that_follow ? " and all that follow" : "");
      return -1;
    }
    if (!failed) return number - 1;
  }
}

}  // namespace

int main() {
  int points = 0;
  for (const calls::Kind& kind : calls::kinds())
    for (const auto& [threads, rest] : {std::pair{1, false}, {3, false}, {3, true}}) {
      calls::threads = threads;
      all_that_follow = rest;
      const int found = check(kind);
      if (found < 0) return 1;
      points += found;
    }
  std::printf("%d allocations failed\n", points);
}
