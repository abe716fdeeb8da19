#include "engine.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

namespace simulator {

Index thread_index, block_index, block_dim, grid_dim;

namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kMaxSharedBytes = 227 << 10;  // of a block, on compute capability 9.0
constexpr int kUnwritten = 0xcd;               // what shared memory holds before it is written

struct Block;

struct Fiber {
  ucontext_t context;
  Block* block = nullptr;
  Index thread;
  unsigned cluster_phase = 0;  // when it arrived
  bool has_arrived = false;
  bool has_ended = false;
};

struct Warp {
  std::vector<Fiber*> waiting;
  uint64_t values[2][kWarp];  // of this exchange and the one before
  unsigned phase = 0;
  const char* what = nullptr;
};

struct Block {
  Index index;
  unsigned rank;
  std::unique_ptr<unsigned char[]> shared;
  std::vector<Fiber*> at_barrier;
  std::vector<Warp> warps;
  unsigned ended = 0;
};

struct Cluster {
  Launch launch;
  const std::function<void()>* kernel;
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  std::vector<Fiber*> ready;
  std::vector<Fiber*> at_cluster_barrier;
  unsigned arrived = 0, phase = 0;
  size_t ended = 0;
  ucontext_t done;
};

uint64_t seed = 0, state = 0;
int launch_count = 0;
Cluster* cluster = nullptr;
Fiber* current = nullptr;

uint64_t draw(uint64_t below) {
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return state % below;
}

void report_deadlock() {
  size_t at_barrier = 0, in_warp = 0;
  for (const Block& block : cluster->blocks) {
    at_barrier += block.at_barrier.size();
    for (const Warp& warp : block.warps) in_warp += warp.waiting.size();
  }
  fail(
      "deadlock: %zu threads at a block's barrier, %zu in a shuffle, %zu at the cluster's barrier, "
      "%zu ended",
      at_barrier, in_warp, cluster->at_cluster_barrier.size(), cluster->ended);
}

// Gives way to a fiber that can run.
void switch_from(ucontext_t& from) {
  std::vector<Fiber*>& ready = cluster->ready;
  if (ready.empty()) {
    if (cluster->ended == cluster->fibers.size()) setcontext(&cluster->done);
    report_deadlock();
  }
  if (seed != 0) std::swap(ready[draw(ready.size())], ready.back());
  current = ready.back();
  ready.pop_back();
  thread_index = current->thread;
  block_index = current->block->index;
  if (&from != &current->context) swapcontext(&from, &current->context);
}

// The current fiber goes on once someone has released it.
void wait_in(std::vector<Fiber*>& waiting) {
  Fiber* self = current;
  waiting.push_back(self);
  switch_from(self->context);
}

void release(std::vector<Fiber*>& waiting) {
  // The last to be pushed is the first to run.
  cluster->ready.insert(cluster->ready.end(), waiting.rbegin(), waiting.rend());
  waiting.clear();
}

void fiber_main() {
  (*cluster->kernel)();
  current->has_ended = true;
  current->block->ended++;
  cluster->ended++;
  switch_from(current->context);
}

void run_cluster(unsigned first_block, unsigned char* stacks) {
  const Launch& launch = cluster->launch;
  const unsigned threads = launch.threads;
  cluster->blocks = std::vector<Block>(launch.cluster);
  cluster->fibers = std::vector<Fiber>(size_t{threads} * launch.cluster);
  cluster->arrived = cluster->phase = 0;
  cluster->ended = 0;
  for (unsigned b = 0; b < launch.cluster; b++) {
    Block& block = cluster->blocks[b];
    block.index = {first_block + b, 0, 0};
    block.rank = b;
    block.shared.reset(new unsigned char[launch.shared_bytes]);
    std::memset(block.shared.get(), kUnwritten, launch.shared_bytes);
    block.warps = std::vector<Warp>(threads / kWarp);
  }
  for (size_t i = cluster->fibers.size(); i-- > 0;) {
    Fiber& fiber = cluster->fibers[i];
    fiber.block = &cluster->blocks[i / threads];
    fiber.thread = {static_cast<unsigned>(i % threads), 0, 0};
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks + kStackBytes * i;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
    cluster->ready.push_back(&fiber);
  }
  volatile bool is_back = false;
  getcontext(&cluster->done);
  if (is_back) return;
  is_back = true;
  ucontext_t unused;
  switch_from(unused);
}

}  // namespace

void set_seed(uint64_t value) { seed = state = value; }

int launches() { return launch_count; }
void count_launch() { launch_count++; }

void run(const Launch& launch, const std::function<void()>& kernel) {
  count_launch();
  if (launch.blocks == 0 || launch.threads == 0 || launch.threads > 1024 ||
      launch.threads % kWarp != 0 || launch.blocks % launch.cluster != 0 || launch.cluster > 8 ||
      launch.shared_bytes > kMaxSharedBytes)
    fail("invalid launch of %u blocks of %u threads, clusters of %u, %zu bytes of shared memory",
         launch.blocks, launch.threads, launch.cluster, launch.shared_bytes);
  const size_t stack_bytes = kStackBytes * launch.threads * launch.cluster;
  void* stacks = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) fail("no memory for the stacks of %u threads", launch.threads);
  std::vector<unsigned> order(launch.blocks / launch.cluster);
  std::iota(order.begin(), order.end(), 0);
  for (size_t i = order.size(); seed != 0 && i > 1; i--) std::swap(order[i - 1], order[draw(i)]);
  Cluster running{launch, &kernel, {}, {}, {}, {}, 0, 0, 0, {}};
  block_dim = {launch.threads, 1, 1};
  grid_dim = {launch.blocks, 1, 1};
  cluster = &running;
  for (const unsigned index : order)
    run_cluster(index * launch.cluster, static_cast<unsigned char*>(stacks));
  cluster = nullptr;
  munmap(stacks, stack_bytes);
}

unsigned cluster_rank() { return current->block->rank; }

void* shared_memory() { return current->block->shared.get(); }

void* peer_memory(const void* own, unsigned rank) {
  const auto offset = static_cast<const unsigned char*>(own) - current->block->shared.get();
  if (rank >= cluster->blocks.size()) fail("no block %u in the cluster", rank);
  if (offset < 0 || static_cast<size_t>(offset) >= cluster->launch.shared_bytes)
    fail("%p is not in the block's shared memory", own);
  if (cluster->blocks[rank].ended == cluster->launch.threads)
    fail("block %u of the cluster has ended, and its shared memory is gone", rank);
  return cluster->blocks[rank].shared.get() + offset;
}

void block_barrier() {
  Block& block = *current->block;
  if (block.at_barrier.size() + 1 < cluster->launch.threads) return wait_in(block.at_barrier);
  release(block.at_barrier);
}

void cluster_arrive() {
  if (current->has_arrived) fail("a thread arrived twice at the cluster's barrier");
  current->has_arrived = true;
  current->cluster_phase = cluster->phase;
  if (++cluster->arrived < cluster->fibers.size()) return;
  cluster->arrived = 0;
  cluster->phase++;
  release(cluster->at_cluster_barrier);
}

void cluster_wait() {
  if (!current->has_arrived) fail("a thread waits at the cluster's barrier without having arrived");
  current->has_arrived = false;
  if (cluster->phase == current->cluster_phase) wait_in(cluster->at_cluster_barrier);
}

uint64_t exchange(uint64_t value, unsigned source, unsigned mask, const char* what) {
  if (mask != 0xffffffff) fail("%s with the mask %08x: only whole warps are simulated", what, mask);
  Warp& warp = current->block->warps[current->thread.x / kWarp];
  if (warp.waiting.empty()) warp.what = what;
  if (std::strcmp(warp.what, what) != 0)
    fail("lanes of one warp are in a %s and in a %s", warp.what, what);
  const unsigned phase = warp.phase;
  warp.values[phase % 2][current->thread.x % kWarp] = value;
  if (warp.waiting.size() + 1 < kWarp) {
    wait_in(warp.waiting);
  } else {
    warp.phase++;
    release(warp.waiting);
  }
  return warp.values[phase % 2][source % kWarp];
}

void fail(const char* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  std::fputs("simulator: ", stderr);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  if (current)
    std::fprintf(stderr, " (block %u, thread %u)", current->block->index.x, current->thread.x);
  std::fputc('\n', stderr);
  std::_Exit(3);
}

}  // namespace simulator
