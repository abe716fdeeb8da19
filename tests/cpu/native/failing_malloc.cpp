// Loaded before all other libraries (LD_PRELOAD): an allocation of the process fails, by number.
//
// Whoever asks is counted, torch and the interpreter too, on every thread.
#include <atomic>
#include <cerrno>
#include <cstddef>

extern "C" {

void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
void* __libc_memalign(std::size_t, std::size_t);

static std::atomic<long> made = 0, failing = 0;

// From now on the allocation of this number fails, counted from 1; none where it is 0. Returns how
// many were made since the last call.
long fail_allocation(long number) {
  failing = number;
  return made.exchange(0);
}

static bool fails() {
  if (++made != failing) return false;
  errno = ENOMEM;
  return true;
}

void* malloc(std::size_t bytes) { return fails() ? nullptr : __libc_malloc(bytes); }
void* calloc(std::size_t count, std::size_t bytes) {
  return fails() ? nullptr : __libc_calloc(count, bytes);
}
void* realloc(void* memory, std::size_t bytes) {
  return fails() ? nullptr : __libc_realloc(memory, bytes);
}
void* memalign(std::size_t alignment, std::size_t bytes) {
  return fails() ? nullptr : __libc_memalign(alignment, bytes);
}
void* aligned_alloc(std::size_t alignment, std::size_t bytes) { return memalign(alignment, bytes); }
int posix_memalign(void** memory, std::size_t alignment, std::size_t bytes) {
  void* const made_here = memalign(alignment, bytes);
  if (!made_here) return ENOMEM;
  *memory = made_here;
  return 0;
}

}  // extern "C"
