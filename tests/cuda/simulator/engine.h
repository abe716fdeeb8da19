// Runs CUDA kernels on the CPU, to test what they compute; there is nothing here about speed.
//
// Every CUDA thread is a fiber. The blocks of a cluster run together, cluster after cluster, and a
// fiber runs until it waits for others: at a barrier, in a shuffle. Which fiber is next, and which
// cluster, is drawn from a seed, so that what relies on an order that CUDA does not promise fails
// for some seed. Waiting for what can never come, lanes of a warp that disagree about what they
// wait for, and misaligned wide accesses end the program with a message; under ThreadSanitizer so
// do accesses that nothing orders (races.h), whether or not their order matters to the result.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace simulator {

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

struct Launch {
  unsigned blocks, threads, cluster;
  size_t shared_bytes;
};

// 0 for the order of their numbers.
void set_seed(uint64_t seed);

// How many kernels and memsets have been launched.
int launches();
void count_launch();

void run(const Launch& launch, const std::function<void()>& kernel);

// Of the running fiber.
extern Index thread_index, block_index, block_dim, grid_dim;
unsigned cluster_rank();

void* shared_memory();
void* peer_memory(const void* own, unsigned rank);

void block_barrier();
void cluster_arrive(bool publishes);  // what was written before
void cluster_wait();

void warp_barrier(unsigned mask);
void fence();
void observe(void* address);  // by an atomic operation

// All lanes of a warp bring a value and take the one that lane `source` brought.
uint64_t exchange(uint64_t value, unsigned source, unsigned mask, const char* what);

[[noreturn]] void fail(const char* format, ...);

template <class T>
T* aligned(T* pointer) {
  if (reinterpret_cast<uintptr_t>(pointer) % alignof(T) != 0)
    fail("%p is not aligned to %zu bytes", static_cast<const void*>(pointer), alignof(T));
  return pointer;
}
template <class T>
T* aligned(const void* pointer) {
  return aligned(static_cast<T*>(const_cast<void*>(pointer)));
}

}  // namespace simulator
