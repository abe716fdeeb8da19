#include "engine.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "races.h"

namespace simulator {

Index thread_index, block_index, block_dim, grid_dim;

namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kMaxSharedBytes = 227 << 10;  // of a block, on compute capability 9.0
constexpr int kUnwritten = 0xcd;               // what shared memory holds before it is written
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kBeyond = 0;
#else
constexpr size_t kBeyond = 1024;  // bytes behind it that are watched
#endif
constexpr unsigned char kUntouched = 0xff;  // and are nan to whoever reads them

// To swap contexts is a call to the system each time, to jump is none. The sanitizers know of the
// first alone.
bool jumps() {
#if defined(__SANITIZE_ADDRESS__)
  return false;
#else
  return !is_watched();
#endif
}

// Where what has a stack of its own goes on. It outlives the fiber, whose place is another's then.
struct Jump {
  jmp_buf buffer;
  bool is_set = false;
};

struct Block;

struct Fiber {
  ucontext_t context;
  Jump* jump = nullptr;
  Block* block = nullptr;
  Index thread;
  size_t place = 0;
  unsigned cluster_phase = 0;  // when it arrived
  bool has_arrived = false;
  bool has_fenced = false;
  void* observed = nullptr;  // the last atomic operation's address
  bool has_ended = false;
};

struct Warp {
  std::vector<Fiber*> waiting;
  uint64_t values[2][kWarp];  // of this exchange and the one before
  unsigned phase = 0;
  const char* what = nullptr;
  BarrierOrder order;
};

struct Block {
  Index index;
  unsigned rank;
  unsigned char* shared;
  std::vector<Fiber*> at_barrier;
  std::vector<Warp> warps;
  unsigned phase = 0, ended = 0;
  BarrierOrder order;
};

// The cluster that runs, and what the clusters of a launch have in common.
struct Cluster {
  Launch launch;
  const std::function<void()>* kernel;
  const WatchedThreads* watched;
  Jump* jumps;                                           // of all places
  std::vector<std::unique_ptr<unsigned char[]>> shared;  // of all blocks so far
  char begin, end;                                       // what the host publishes and learns
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  std::vector<Fiber*> ready;
  std::vector<Fiber*> at_cluster_barrier;
  unsigned arrived = 0, phase = 0;
  size_t ended = 0;
  std::unique_ptr<BarrierOrder> order;
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

// Gives way to a fiber that can run; the host (nullptr) does not come back this way.
void switch_from(Fiber* from) {
  if (from && jumps()) {
    from->jump->is_set = true;
    if (_setjmp(from->jump->buffer)) return;
  }
  std::vector<Fiber*>& ready = cluster->ready;
  if (ready.empty()) {
    if (cluster->ended < cluster->fibers.size()) report_deadlock();
    cluster->watched->switch_to_host();
    setcontext(&cluster->done);
  }
  if (seed != 0) std::swap(ready[draw(ready.size())], ready.back());
  current = ready.back();
  ready.pop_back();
  thread_index = current->thread;
  block_index = current->block->index;
  cluster->watched->switch_to(current->place);
  if (current->jump && current->jump->is_set) _longjmp(current->jump->buffer, 1);
  if (!from || jumps())
    setcontext(&current->context);
  else if (from != current)
    swapcontext(&from->context, &current->context);
}

// The current fiber goes on once someone has released it.
void wait_in(std::vector<Fiber*>& waiting) {
  Fiber* self = current;
  waiting.push_back(self);
  switch_from(self);
}

void release(std::vector<Fiber*>& waiting) {
  // The last to be pushed is the first to run.
  cluster->ready.insert(cluster->ready.end(), waiting.rbegin(), waiting.rend());
  waiting.clear();
}

// A thread of the kernel, and after it those of the same place in the clusters that follow.
void fiber_main() {
  for (;;) {
    learn(&cluster->begin);
    (*cluster->kernel)();
    publish(&cluster->end);
    current->has_ended = true;
    current->block->ended++;
    cluster->ended++;
    switch_from(current);
  }
}

// What waits is reserved for: a thread of the kernel must not allocate, or ThreadSanitizer takes
// the memory for its own.
template <class T>
void reset(std::vector<T>& waiting, size_t most) {
  waiting.clear();
  waiting.reserve(most);
}

// Its threads have the places from `first_place` on, each a stack and an identity.
void set_up_cluster(unsigned first_block, size_t first_place, unsigned char* stacks) {
  const Launch& launch = cluster->launch;
  const unsigned threads = launch.threads;
  cluster->blocks = std::vector<Block>(launch.cluster);
  cluster->fibers = std::vector<Fiber>(size_t{threads} * launch.cluster);
  cluster->arrived = cluster->phase = 0;
  cluster->ended = 0;
  cluster->order = std::make_unique<BarrierOrder>();
  reset(cluster->ready, cluster->fibers.size());
  reset(cluster->at_cluster_barrier, cluster->fibers.size());
  for (unsigned b = 0; b < launch.cluster; b++) {
    Block& block = cluster->blocks[b];
    block.index = {first_block + b, 0, 0};
    block.rank = b;
    cluster->shared.emplace_back(new unsigned char[launch.shared_bytes + kBeyond]);
    block.shared = cluster->shared.back().get();
    std::memset(block.shared, kUnwritten, launch.shared_bytes);
    std::memset(block.shared + launch.shared_bytes, kUntouched, kBeyond);
    reset(block.at_barrier, threads);
    block.warps = std::vector<Warp>(threads / kWarp);
    for (Warp& warp : block.warps) reset(warp.waiting, kWarp);
  }
  publish(&cluster->begin);
  for (size_t i = cluster->fibers.size(); i-- > 0;) {
    Fiber& fiber = cluster->fibers[i];
    fiber.place = first_place + i;
    fiber.block = &cluster->blocks[i / threads];
    fiber.thread = {static_cast<unsigned>(i % threads), 0, 0};
    cluster->ready.push_back(&fiber);
    if (jumps()) fiber.jump = cluster->jumps + fiber.place;
    if (fiber.jump && fiber.jump->is_set) continue;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks + kStackBytes * fiber.place;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
}

void check_shared_memory() {
  for (const auto& shared : cluster->shared)
    for (size_t i = 0; i < kBeyond; i++)
      if (shared[cluster->launch.shared_bytes + i] != kUntouched)
        fail("written %zu bytes beyond the shared memory of a block", i);
}

void run_cluster() {
  volatile bool is_back = false;
  getcontext(&cluster->done);
  if (is_back) return;
  is_back = true;
  switch_from(nullptr);
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
  const unsigned clusters = launch.blocks / launch.cluster;
  const size_t threads = size_t{launch.threads} * launch.cluster;
  const size_t places = threads * watched_clusters(threads, clusters);
  const size_t stack_bytes = kStackBytes * places;
  void* stacks = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) fail("no memory for the stacks of %zu threads", places);
  std::vector<unsigned> order(clusters);
  std::iota(order.begin(), order.end(), 0);
  for (size_t i = order.size(); seed != 0 && i > 1; i--) std::swap(order[i - 1], order[draw(i)]);
  const WatchedThreads watched(places);
  Cluster running{};
  running.launch = launch;
  running.kernel = &kernel;
  running.watched = &watched;
  std::vector<Jump> jumps_of_places(places);
  running.jumps = jumps_of_places.data();
  block_dim = {launch.threads, 1, 1};
  grid_dim = {launch.blocks, 1, 1};
  cluster = &running;
  for (size_t i = 0; i < order.size(); i++) {
    set_up_cluster(order[i] * launch.cluster, i * threads % places,
                   static_cast<unsigned char*>(stacks));
    run_cluster();
  }
  learn(&running.end);
  current = nullptr;
  check_shared_memory();
  cluster = nullptr;
  munmap(stacks, stack_bytes);
}

unsigned cluster_rank() { return current->block->rank; }

void* shared_memory() { return current->block->shared; }

void* peer_memory(const void* own, unsigned rank) {
  const auto offset = static_cast<const unsigned char*>(own) - current->block->shared;
  if (rank >= cluster->blocks.size()) fail("no block %u in the cluster", rank);
  if (offset < 0 || static_cast<size_t>(offset) >= cluster->launch.shared_bytes)
    fail("%p is not in the block's shared memory", own);
  if (cluster->blocks[rank].ended == cluster->launch.threads)
    fail("block %u of the cluster has ended, and its shared memory is gone", rank);
  return cluster->blocks[rank].shared + offset;
}

void block_barrier() {
  Block& block = *current->block;
  const unsigned phase = block.phase;
  block.order.arrive(phase);
  if (block.at_barrier.size() + 1 < cluster->launch.threads) {
    wait_in(block.at_barrier);
  } else {
    block.phase++;
    release(block.at_barrier);
  }
  block.order.leave(phase);
}

void cluster_arrive(bool publishes) {
  if (current->has_arrived) fail("a thread arrived twice at the cluster's barrier");
  current->has_arrived = true;
  current->cluster_phase = cluster->phase;
  if (publishes) cluster->order->arrive(cluster->phase);
  if (++cluster->arrived < cluster->fibers.size()) return;
  cluster->arrived = 0;
  cluster->phase++;
  release(cluster->at_cluster_barrier);
}

void cluster_wait() {
  if (!current->has_arrived) fail("a thread waits at the cluster's barrier without having arrived");
  current->has_arrived = false;
  const unsigned phase = current->cluster_phase;
  if (cluster->phase == phase) wait_in(cluster->at_cluster_barrier);
  cluster->order->leave(phase);
}

void warp_barrier(unsigned mask) {
  BarrierOrder& order = current->block->warps[current->thread.x / kWarp].order;
  const unsigned phase = current->block->warps[current->thread.x / kWarp].phase;
  order.arrive(phase);
  exchange(0, 0, mask, "syncwarp");
  order.leave(phase);
}

void fence() {
  current->has_fenced = true;
  if (current->observed) learn(current->observed);
}

// Orders what its threads do besides only between a fence before it in one and after it in another.
void observe(void* address) {
  if (current->has_fenced) publish(address);
  current->observed = address;
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
