// What ThreadSanitizer is told, in a program built with it: who does something before whom.
//
// A CUDA thread is a fiber to it, and sees all that a kernel touches, shared memory and global.
// Only barriers order accesses, and fences around an atomic operation; shuffles do not, nor does
// the order in which the simulator runs things. In other programs its functions are absent and none
// is called.
#pragma once

#include <cstddef>
#include <vector>

extern "C" {
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void* __tsan_create_fiber(unsigned flags);
__attribute__((weak)) void __tsan_destroy_fiber(void* fiber);
__attribute__((weak)) void __tsan_switch_to_fiber(void* fiber, unsigned flags);
__attribute__((weak)) void __tsan_acquire(void* address);
__attribute__((weak)) void __tsan_release(void* address);
}

namespace simulator {

inline bool is_watched() { return __tsan_create_fiber; }

// What this thread has done so far comes before what others do that know of the address.
inline void publish(void* address) {
  if (__tsan_release) __tsan_release(address);
}
inline void learn(void* address) {
  if (__tsan_acquire) __tsan_acquire(address);
}

// The order that a barrier makes. Two phases of it may be under way at a time.
struct BarrierOrder {
  char phases[2];

  void arrive(unsigned phase) { publish(&phases[phase % 2]); }
  void leave(unsigned phase) { learn(&phases[phase % 2]); }
};

// How many clusters of a launch have threads of their own. Each thread takes a megabyte, so a
// cluster may have to do with those of an earlier one, which it is then thought to come after.
inline size_t watched_clusters(size_t threads, size_t clusters) {
  constexpr size_t kMostThreads = 2048;
  const size_t most = threads < kMostThreads ? kMostThreads / threads : 1;
  return is_watched() && clusters > 1 ? (clusters < most ? clusters : most) : 1;
}

// The threads of a launch. What the host did before comes before all that they do.
class WatchedThreads {
 public:
  explicit WatchedThreads(size_t count) {
    if (!is_watched()) return;
    host_ = __tsan_get_current_fiber();
    for (size_t i = 0; i < count; i++) threads_.push_back(__tsan_create_fiber(0));
  }
  ~WatchedThreads() {
    for (void* thread : threads_) __tsan_destroy_fiber(thread);
  }
  WatchedThreads(const WatchedThreads&) = delete;

  void switch_to(size_t index) const {
    if (!threads_.empty()) __tsan_switch_to_fiber(threads_[index], kWithoutOrder);
  }
  void switch_to_host() const {
    if (host_) __tsan_switch_to_fiber(host_, kWithoutOrder);
  }

 private:
  static constexpr unsigned kWithoutOrder = 1;

  void* host_ = nullptr;
  std::vector<void*> threads_;
};

}  // namespace simulator
