// A call's work in parts that threads share out, and the memory that each part needs.
//
// Once one thread has written gradients over its logits, another must not give up because there is
// no memory for a kernel of its own: half of the logits would be gone. So one kernel is made before
// anything is written, and a part that gets none waits for it. Nor is memory asked for on the way
// to the threads.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <tuple>

#include "../stack.h"
#include "../vector/simd.h"
#include "tiles.h"

namespace fused_ce::cpu {

// Whether there is enough work for more than one thread.
inline bool is_shared(const Tiling& tiling) { return tiling.count > tiling.grain; }

template <class Work>
void run_parts(const Threads& threads, int64_t count, int64_t grain, const Work& work) {
  const auto with_room = [&](int64_t begin, int64_t end) {
    with_stack_room([&] { work(begin, end); });
  };
  threads.run(count, grain, std::cref(with_room));  // which std::function holds without memory
}

template <class Work>
void for_tiles(const Tiling& tiling, const Threads& threads, const Work& work) {
  if (is_shared(tiling))
    run_parts(threads, tiling.count, tiling.grain, work);
  else if (tiling.count > 0)
    with_stack_room([&] { work(0, tiling.count); });
}

// The kernels of one call, made from these arguments, which outlive them.
template <class Kernel, class... Arguments>
class Kernels {
 public:
  explicit Kernels(const Arguments&... arguments)
      : arguments_(arguments...), first_(std::make_unique<Kernel>(arguments...)) {}

  // Calls use(kernel) with a kernel that nobody else uses meanwhile.
  template <class Use>
  void lend(const Use& use) {
    std::unique_lock lock(mutex_, std::try_to_lock);
    if (lock.owns_lock()) return use(*first_);
    std::optional<Kernel> own;
    try {
      std::apply([&](const Arguments&... arguments) { own.emplace(arguments...); }, arguments_);
    } catch (const std::bad_alloc&) {
      lock.lock();
    }
    use(own ? *own : *first_);
  }

 private:
  const std::tuple<const Arguments&...> arguments_;
  const std::unique_ptr<Kernel> first_;
  std::mutex mutex_;
};

// Calls use(kernel, begin, end) for all tiles, compiled once for one level of simd.h. A kernel is
// made from what follows `use`.
template <class Kernel, simd::Level kLevel, class Use, class... Arguments>
void run_tiles(const Tiling& tiling, const Threads& threads, const Use& use,
               const Arguments&... arguments) {
  const auto use_at_level = [&](Kernel& kernel, int64_t begin, int64_t end) {
    simd::run_as<kLevel>([&] { use(kernel, begin, end); });
  };
  if (tiling.count == 0) return;
  if (!is_shared(tiling))
    return with_stack_room([&] {
      Kernel kernel(arguments...);
      use_at_level(kernel, 0, tiling.count);
    });
  Kernels<Kernel, Arguments...> kernels(arguments...);
  run_parts(threads, tiling.count, tiling.grain, [&](int64_t begin, int64_t end) {
    kernels.lend([&](Kernel& kernel) { use_at_level(kernel, begin, end); });
  });
}

}  // namespace fused_ce::cpu
