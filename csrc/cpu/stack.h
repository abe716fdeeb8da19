// Runs work that keeps more on the stack than a thread may have there.
//
// A kernel's arrays lie on the stack, where they cost nothing: taken from the heap they made 65536
// rows of 10 up to 5 % slower, and 8 rows up to 20. A thread whose stack is small, which a program
// may ask for, has its work done by another one meanwhile.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <thread>

#if defined(__GLIBC__)
#include <pthread.h>
#endif

namespace fused_ce::cpu {

// Twice what the largest kernel takes with all that it calls.
constexpr uintptr_t kStackRoom = 256 * 1024;

// The lowest address of this thread's stack, or 0 where it is not known.
inline uintptr_t stack_end() {
  uintptr_t end = 0;
#if defined(__GLIBC__)
  pthread_attr_t attributes;
  if (pthread_getattr_np(pthread_self(), &attributes)) return 0;
  void* lowest = nullptr;
  size_t size = 0;
  if (!pthread_attr_getstack(&attributes, &lowest, &size))
    end = reinterpret_cast<uintptr_t>(lowest);
  pthread_attr_destroy(&attributes);
#endif
  return end;
}

inline bool has_stack_room() {
  thread_local const uintptr_t end = stack_end();
  const char here = 0;
  return reinterpret_cast<uintptr_t>(&here) - end >= kStackRoom;
}

template <class Work>
void with_stack_room(const Work& work) {
  if (has_stack_room()) return work();
  std::exception_ptr failure;
  std::thread other([&] {
    try {
      work();
    } catch (...) {
      failure = std::current_exception();
    }
  });
  other.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace fused_ce::cpu
