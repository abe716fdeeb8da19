// The logits' types as the kernels compute with them: single elements, and 16 bytes of them.
//
// float, bfloat16 and half are computed in float, double in double. A tensor whose type is not the
// logits' own (targets, losses, incoming gradients) has it looked up at run time.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../../problem.h"
#include "instructions.cuh"

namespace fused_ce::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
using Accumulation = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class A>
constexpr A kNan = static_cast<A>(__builtin_nan(""));

__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(BFloat16 x) {
  return float_of(static_cast<uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ float widen(Float16 x) { return half_to_float(x.bits); }

template <class T, class A>
__device__ __forceinline__ T narrow(A x) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return {static_cast<uint16_t>(pack_bfloat16(static_cast<float>(x), 0.0f))};
  else if constexpr (std::is_same_v<T, Float16>)
    return {static_cast<uint16_t>(pack_half(static_cast<float>(x), 0.0f))};
  else
    return static_cast<T>(x);
}

template <class A>
__device__ __forceinline__ A load_value(const Operand& from, int64_t offset) {
  switch (from.dtype) {
    case DType::kFloat64:
      return static_cast<A>(static_cast<const double*>(from.data)[offset]);
    case DType::kFloat32:
      return static_cast<A>(static_cast<const float*>(from.data)[offset]);
    case DType::kBFloat16:
      return static_cast<A>(widen(static_cast<const BFloat16*>(from.data)[offset]));
    default:
      return static_cast<A>(widen(static_cast<const Float16*>(from.data)[offset]));
  }
}

template <class A>
__device__ __forceinline__ void store_value(A x, const Operand& to, int64_t offset) {
  switch (to.dtype) {
    case DType::kFloat64:
      static_cast<double*>(to.data)[offset] = x;
      break;
    case DType::kFloat32:
      static_cast<float*>(to.data)[offset] = static_cast<float>(x);
      break;
    case DType::kBFloat16:
      static_cast<BFloat16*>(to.data)[offset] = narrow<BFloat16>(x);
      break;
    default:
      static_cast<Float16*>(to.data)[offset] = narrow<Float16>(x);
  }
}

__device__ __forceinline__ int64_t load_index(const Operand& from, int64_t offset) {
  switch (from.dtype) {
    case DType::kInt64:
      return static_cast<const int64_t*>(from.data)[offset];
    case DType::kInt32:
      return static_cast<const int32_t*>(from.data)[offset];
    case DType::kInt16:
      return static_cast<const int16_t*>(from.data)[offset];
    default:
      return static_cast<const uint8_t*>(from.data)[offset];
  }
}

// How a second walk over elements held in registers takes them apart. The values are constants, but
// they come from a kernel argument: knowing that, ptxas would keep the widened elements of the
// first walk in registers instead of the packed ones, and run out of them.
struct Unpacking {
  uint32_t high_mask = 0xffff0000, shift = 16, zero = 0;
};

// As many elements as 16 bytes hold.
template <class T>
struct Pack {
  static constexpr int kSize = 16 / sizeof(T);

  Bits128 bits;

  __device__ __forceinline__ static Pack load(const T* from) { return {load_once(from)}; }
  __device__ __forceinline__ void store(T* to) const { store_once(to, bits); }

  __device__ __forceinline__ static Pack filled(float value) {
    Pack pack;
#pragma unroll
    for (int i = 0; i < 4; i++) pack.bits.words[i] = word_of(value, value);
    return pack;
  }

  __device__ __forceinline__ float operator[](int i) const { return get(i, 0xffff0000, 16, 0); }
  __device__ __forceinline__ float get(int i, const Unpacking& u) const {
    return get(i, u.high_mask, u.shift, u.zero);
  }

  __device__ __forceinline__ void set(const float (&values)[kSize]) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < 4; i++) bits.words[i] = bits_of(values[i]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++) bits.words[i] = word_of(values[2 * i], values[2 * i + 1]);
    }
  }

  // Nan where all elements are.
  __device__ __forceinline__ float max() const {
    if constexpr (sizeof(T) == 4)
      return fmaxf(fmaxf((*this)[0], (*this)[1]), fmaxf((*this)[2], (*this)[3]));
    Pack larger;
    larger.bits.words[0] =
        max_words(max_words(bits.words[0], bits.words[1]), max_words(bits.words[2], bits.words[3]));
    return fmaxf(larger[0], larger[1]);
  }

 private:
  __device__ __forceinline__ static uint32_t word_of(float low, float high) {
    if constexpr (std::is_same_v<T, BFloat16>) return pack_bfloat16(low, high);
    if constexpr (std::is_same_v<T, Float16>) return pack_half(low, high);
    return bits_of(low);
  }

  __device__ __forceinline__ static uint32_t max_words(uint32_t a, uint32_t b) {
    return std::is_same_v<T, BFloat16> ? max_bfloat16(a, b) : max_half(a, b);
  }

  __device__ __forceinline__ float get(int i, uint32_t high_mask, uint32_t shift,
                                       uint32_t zero) const {
    if constexpr (std::is_same_v<T, float>) return float_of(bits.words[i]);
    const uint32_t word = bits.words[i / 2];
    if constexpr (std::is_same_v<T, BFloat16>)
      return float_of(i % 2 ? word & high_mask : word << shift);
    return half_to_float(static_cast<uint16_t>((word ^ zero) >> (i % 2 ? 16 : 0)));
  }
};

}  // namespace fused_ce::cuda
