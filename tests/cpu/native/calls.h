// Calls of the CPU kernels for programs without torch: problems of every kind of kernel, in memory
// of their own, and threads to share them.
//
// What is here stands in for checks.cpp and backend.cpp. Random numbers serve as logits; the
// programs compare results with each other, the numbers themselves are for other tests to judge.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <latch>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../../csrc/cpu/kernels.h"
#include "../../../csrc/cpu/vector/span.h"

namespace calls {

using namespace fused_ce;

// How many threads share a call.
inline int64_t threads = 1;

// Whether a kernel is at work, rather than the program around it.
inline std::atomic<bool> in_kernel = false;

class Setting {
 public:
  explicit Setting(bool value) : before_(in_kernel.exchange(value)) {}
  ~Setting() { in_kernel = before_; }

 private:
  const bool before_;
};

// As at::parallel_for: at most as many parts as threads, and the first exception is the caller's.
inline void share(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& work) {
  const Setting outside(false);
  const int64_t parts = std::max<int64_t>(1, std::min(threads, (count + grain - 1) / grain));
  const int64_t size = (count + parts - 1) / parts;
  std::vector<std::exception_ptr> errors(parts);
  std::vector<std::thread> others;
  std::latch started(parts);
  const auto run_part = [&](int64_t part) {
    started.arrive_and_wait();
    try {
      if (part * size < count) work(part * size, std::min(part * size + size, count));
    } catch (...) {
      errors[part] = std::current_exception();
    }
  };
  for (int64_t part = 1; part < parts; part++) others.emplace_back(run_part, part);
  {
    const Setting inside(true);
    run_part(0);
    for (std::thread& other : others) other.join();
  }
  for (const std::exception_ptr& error : errors)
    if (error) std::rethrow_exception(error);
}

constexpr cpu::Threads kThreads{[] { return threads; }, share};

enum class Operation { kLoss, kGradient, kInPlace, kBackward, kBackwardInPlace, kTarget, kScale };

struct Kind {
  std::string name;
  Operation operation;
  int64_t rows, classes;
  DType dtype = DType::kFloat32;
  bool beside = false;  // the rows, and not the classes, lie next to each other
  bool probabilities = false;
  Reduction reduction = Reduction::kMean;
  double smoothing = 0.0;
  bool weight = false;
  double softcap = 0.0;
};

// One call, which can be made again and again.
class Call {
 public:
  explicit Call(const Kind& kind) : kind_(kind) {
    const int64_t elements = kind.rows * kind.classes;
    fill(logits_, elements, kind.dtype, -4.0, 4.0);
    input_ = logits_;
    if (kind.probabilities) {
      fill(target_, elements, kind.dtype, 0.0, 2.0 / kind.classes);
    } else {
      target_.resize(kind.rows * sizeof(int64_t));
      for (int64_t r = 0; r < kind.rows; r++) {
        const int64_t index = r % 7 == 3 ? kIgnored : r * 31 % kind.classes;
        std::memcpy(target_.data() + r * sizeof index, &index, sizeof index);
      }
    }
    if (kind.weight) fill(weight_, kind.classes, accumulation(), 0.5, 1.5);
    if (reads_statistics()) {
      Problem p = problem();
      p.grad = {};
      cpu::forward(p, kThreads);  // for the statistics
    }
    fill(grad_output_, kind.reduction == Reduction::kNone ? kind.rows : 1, kind.dtype, 0.5, 1.5);
  }

  // The results, one after another.
  std::vector<std::byte> run() {
    input_ = logits_;
    Problem p = problem();
    if (reads_statistics()) p.grad_output = rows_of(grad_output_, kind_.dtype);
    call(p);
    std::vector<std::byte> all;
    for (const auto* part : {&loss_, &stats_, &grad_, &target_grad_, &input_})
      all.insert(all.end(), part->begin(), part->end());
    return all;
  }

  // Whether the logits are what they were before the last call.
  bool is_untouched() const { return input_ == logits_; }

 private:
  static constexpr int64_t kIgnored = -100;

  void call(Problem& p) {
    const Setting inside(true);
    switch (kind_.operation) {
      case Operation::kBackward:
      case Operation::kBackwardInPlace:
        return cpu::backward(p, kThreads);
      case Operation::kTarget:
        return cpu::backward_target(p, kThreads);
      case Operation::kScale:
        return cpu::scale(elements(), 0.3, kThreads);
      default:
        return cpu::forward(p, kThreads);
    }
  }

  Elements elements() {
    Elements e;
    e.data = input_.data();
    e.dtype = kind_.dtype;
    e.dims = 1;
    e.sizes[0] = kind_.rows * kind_.classes;
    e.strides[0] = 1;
    return e;
  }

  DType accumulation() const {
    return kind_.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  }

  bool reads_statistics() const {
    return kind_.operation == Operation::kBackward ||
           kind_.operation == Operation::kBackwardInPlace || kind_.operation == Operation::kTarget;
  }

  static void fill(std::vector<std::byte>& to, int64_t n, DType dtype, double low, double high) {
    static std::mt19937 generator(1);
    to.resize(n * size_of(dtype));
    Operand operand;
    operand.data = to.data();
    operand.dtype = dtype;
    for (int64_t i = 0; i < n; i++)
      cpu::store_value(low + (high - low) * static_cast<double>(generator()) / 4294967296.0,
                       operand, i);
  }

  Operand classes_of(std::vector<std::byte>& memory) const {
    Operand operand;
    operand.data = memory.data();
    operand.dtype = kind_.dtype;
    operand.class_stride = kind_.beside ? kind_.rows : 1;
    operand.row_strides[0] = kind_.beside ? 1 : kind_.classes;
    return operand;
  }

  Operand rows_of(std::vector<std::byte>& memory, DType dtype, int64_t first = 0) const {
    Operand operand;
    operand.data = memory.data() + first * size_of(dtype);
    operand.dtype = dtype;
    operand.row_strides[0] = static_cast<int64_t>(memory.size()) == size_of(dtype) ? 0 : 1;
    return operand;
  }

  Problem problem() {
    Problem p;
    p.classes = kind_.classes;
    p.rows = p.row_sizes[0] = kind_.rows;
    p.row_dims = 1;
    p.probabilities = kind_.probabilities;
    p.options.reduction = kind_.reduction;
    p.options.ignore_index = kIgnored;
    p.options.label_smoothing = kind_.smoothing;
    p.options.softcap = kind_.softcap;
    if (kind_.weight) p.options.weight = {weight_.data(), accumulation()};
    p.input = classes_of(input_);
    p.target = kind_.probabilities ? classes_of(target_) : rows_of(target_, DType::kInt64);
    loss_.resize((p.reduces() ? 1 : kind_.rows) * size_of(kind_.dtype));
    p.loss = rows_of(loss_, kind_.dtype);
    stats_.resize(4 * kind_.rows * size_of(accumulation()));
    p.row_max = rows_of(stats_, accumulation());
    p.row_rest = rows_of(stats_, accumulation(), kind_.rows);
    p.row_mass = rows_of(stats_, accumulation(), 2 * kind_.rows);
    p.row_mass_low = rows_of(stats_, accumulation(), 3 * kind_.rows);
    p.totals = &totals_;
    switch (kind_.operation) {
      case Operation::kInPlace:
      case Operation::kBackwardInPlace:
        p.grad = p.input;
        break;
      case Operation::kGradient:
      case Operation::kBackward:
        grad_.resize(input_.size());
        p.grad = classes_of(grad_);
        break;
      case Operation::kTarget:
        target_grad_.resize(target_.size());
        p.target_grad = classes_of(target_grad_);
        break;
      default:
        break;
    }
    return p;
  }

  const Kind kind_;
  std::vector<std::byte> logits_, input_, target_, weight_, grad_output_;
  std::vector<std::byte> loss_, stats_, grad_, target_grad_;
  Totals totals_;
};

// Enough work for more than one thread in every kernel, and in the scan of the targets before it;
// the longest row is one that threads share.
inline std::vector<Kind> kinds() {
  struct Shape {
    const char* name;
    int64_t rows, classes;
    bool beside;
  };
  constexpr Shape kShapes[] = {
      {"rows of a few classes", 9000, 12, false},   {"rows in one block", 150, 700, false},
      {"rows of some blocks", 19, 5000, false},     {"rows side by side", 500, 200, true},
      {"row that threads share", 1, 262150, false},
  };
  constexpr Operation kOperations[] = {
      Operation::kLoss,     Operation::kGradient,        Operation::kInPlace,
      Operation::kBackward, Operation::kBackwardInPlace, Operation::kTarget,
  };
  const char* const kNames[] = {"loss",     "gradient",          "in place",
                                "backward", "backward in place", "target"};
  std::vector<Kind> all;
  for (const Shape& shape : kShapes)
    for (const Operation operation : kOperations) {
      const auto add = [&](const char* variant, const auto& change) {
        const std::string name =
            std::string(shape.name) + ", " + kNames[static_cast<int>(operation)] + variant;
        Kind kind{name, operation, shape.rows, shape.classes};
        kind.beside = shape.beside;
        change(kind);
        if (operation != Operation::kTarget || kind.probabilities) all.push_back(kind);
      };
      add("", [](Kind&) {});
      add(" in bfloat16, with weights and each loss apart", [](Kind& kind) {
        kind.dtype = DType::kBFloat16, kind.weight = true, kind.reduction = Reduction::kNone;
      });
      add(" for probabilities, smoothed",
          [](Kind& kind) { kind.probabilities = true, kind.smoothing = 0.1; });
      add(" in float64, capped",
          [](Kind& kind) { kind.dtype = DType::kFloat64, kind.softcap = 3.0; });
    }
  all.push_back({"scale", Operation::kScale, 300, 1000});
  return all;
}

}  // namespace calls
