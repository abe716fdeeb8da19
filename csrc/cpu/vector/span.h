// Moves runs of elements between a tensor of any type and stride and a buffer of float or double.
//
// The kernels compute on the accumulation type A alone; everything about storage types is here, so
// a kernel is compiled for two types instead of for every pair of tensor types. A run that is
// already A with stride 1 is used where it lies.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../../problem.h"
#include "half_instructions.h"
#include "half_types.h"
#include "runs.h"
#include "simd.h"

namespace fused_ce::cpu {

template <class A, class T>
inline void load_as(const T* from, int64_t stride, int64_t n, A* to) {
  if (stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) to[i] = static_cast<A>(to_float(from[i]));
  } else if (stride == 2) {  // two vectors and a shuffle instead of a gather
#pragma omp simd
    for (int64_t i = 0; i < n; i++) to[i] = static_cast<A>(to_float(from[2 * i]));
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) to[i] = static_cast<A>(to_float(from[i * stride]));
  }
}

template <class A, class T>
inline void store_as(const A* from, int64_t n, T* to, int64_t stride) {
  if (stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) to[i] = from_float<T>(from[i]);
  } else {
    for (int64_t i = 0; i < n; i++) to[i * stride] = from_float<T>(from[i]);
  }
}

// Calls f with a pointer of the floating type of an Operand or of Values, at an offset in elements.
template <class Storage, class F>
inline void with_floating_pointer(const Storage& storage, int64_t offset, const F& f) {
  const auto at = [&](auto element) {
    using T = decltype(element);
    using Pointer =
        std::conditional_t<std::is_same_v<decltype(Storage::data), const void*>, const T*, T*>;
    f(static_cast<Pointer>(storage.data) + offset);
  };
  switch (storage.dtype) {
    case DType::kFloat32:
      return at(float{});
    case DType::kFloat64:
      return at(double{});
    case DType::kBFloat16:
      return at(BFloat16{});
    case DType::kFloat16:
      return at(Float16{});
    default:
      return;
  }
}

// These two are out of line, with a dispatch of their own, so that the many places that move a run
// do not each carry a copy of all conversions.
template <class A>
__attribute__((noinline)) void load_runs(const Operand& from, const Runs& runs, A* to) {
  if constexpr (sizeof(A) == sizeof(float))
    if (half::has_instructions(from.dtype))
      return half::with_pointer(from, 0, [&](const auto* p) {
        runs.for_each([&](int64_t i, int64_t offset) {
          half::load(p + offset, runs.stride, runs.length, to + i);
        });
      });
  simd::run([&] {
    with_floating_pointer(from, 0, [&](auto* p) {
      runs.for_each([&](int64_t i, int64_t offset) {
        load_as(p + offset, runs.stride, runs.length, to + i);
      });
    });
  });
}

template <class A>
__attribute__((noinline)) void store_runs(const A* from, const Operand& to, const Runs& runs) {
  if constexpr (sizeof(A) == sizeof(float))
    if (half::has_instructions(to.dtype))
      return half::with_pointer(to, 0, [&](auto* p) {
        runs.for_each([&](int64_t i, int64_t offset) {
          half::store(from + i, runs.length, p + offset, runs.stride);
        });
      });
  simd::run([&] {
    with_floating_pointer(to, 0, [&](auto* p) {
      runs.for_each([&](int64_t i, int64_t offset) {
        store_as(from + i, runs.length, p + offset, runs.stride);
      });
    });
  });
}

template <class A>
inline void load_span(const Operand& from, int64_t offset, int64_t stride, int64_t n, A* to) {
  load_runs(from, Runs::one(offset, stride, n), to);
}

template <class A>
inline void store_span(const A* from, int64_t n, const Operand& to, int64_t offset,
                       int64_t stride) {
  store_runs(from, to, Runs::one(offset, stride, n));
}

template <class A, class Storage>
inline A load_value(const Storage& from, int64_t offset) {
  A value{};
  with_floating_pointer(from, offset, [&](auto* p) { value = static_cast<A>(to_float(*p)); });
  return value;
}

template <class A>
inline void store_value(A value, const Operand& to, int64_t offset) {
  with_floating_pointer(to, offset, [&](auto* p) {
    using T = std::remove_reference_t<decltype(*p)>;
    *p = from_float<T>(value);
  });
}

template <class A>
inline bool is_direct(const Operand& operand, int64_t stride) {
  constexpr DType kAccumulation = sizeof(A) == 8 ? DType::kFloat64 : DType::kFloat32;
  return operand.data && operand.dtype == kAccumulation && stride == 1;
}

// Asks for the cache lines of n elements from an offset on. They may lie past the operand's end.
// Inlined at once: GCC drops a call of a function that only prefetches, as one without effect.
[[gnu::always_inline]] inline void prefetch(const Operand& from, int64_t offset, int64_t n) {
  constexpr uintptr_t kStep = 64;
  const int64_t size = size_of(from.dtype);
  const uintptr_t first = reinterpret_cast<uintptr_t>(from.data) + offset * size;
  for (uintptr_t line = first; line < first + n * size; line += kStep)
    __builtin_prefetch(reinterpret_cast<const void*>(line));
}

// The run itself where it is direct, else `buffer` filled from it.
template <class A>
inline const A* read_span(const Operand& from, int64_t offset, int64_t stride, int64_t n,
                          A* buffer) {
  if (is_direct<A>(from, stride)) return static_cast<const A*>(from.data) + offset;
  load_span(from, offset, stride, n, buffer);
  return buffer;
}

}  // namespace fused_ce::cpu
