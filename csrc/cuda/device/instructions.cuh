// The instructions that C++ has no words for, as PTX, each beside the same thing in portable C++.
//
// nvcc takes the first half. A host compiler takes the second: that is how tests/cuda/simulator
// compiles the kernels, with a cuda_runtime.h of its own for all that CUDA C++ does have words for.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#if !defined(__CUDACC__)
#include <bit>
#include <cmath>
#include <limits>
#endif

namespace fused_ce::cuda {

struct alignas(16) Bits128 {
  uint32_t words[4];
};

#if defined(__CUDACC__)

// 2^x, within 2 ulp; results below the normal range are zero.
__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x, within 2 ulp, for normal results.
__device__ __forceinline__ float reciprocal_approximate(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float float_of(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }

__device__ __forceinline__ float half_to_float(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

// Two roundings to nearest even; `low` goes into the low half of the word.
__device__ __forceinline__ uint32_t pack_half(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

__device__ __forceinline__ uint32_t pack_bfloat16(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// The larger of each pair of halves, and beside a nan the other.
__device__ __forceinline__ uint32_t max_half(uint32_t a, uint32_t b) {
  uint32_t word;
  asm("max.f16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
  return word;
}

__device__ __forceinline__ uint32_t max_bfloat16(uint32_t a, uint32_t b) {
  uint32_t word;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
  return word;
}

// 16 aligned bytes that this kernel reads once.
__device__ __forceinline__ Bits128 load_once(const void* from) {
  Bits128 v;
  asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
               : "l"(from));
  return v;
}

__device__ __forceinline__ void store_once(void* to, const Bits128& v) {
  asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to),
               "r"(v.words[0]), "r"(v.words[1]), "r"(v.words[2]), "r"(v.words[3])
               : "memory");
}

// The block's dynamic shared memory.
__device__ __forceinline__ void* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

#else

inline float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }

// `exact` with an error of up to 2 ulp, which only `x` decides: what an approximation of the
// hardware may leave.
inline float approximate(double exact, float x) {
  const float nearest = static_cast<float>(exact);
  if (nearest == exact || !std::isfinite(nearest)) return nearest;
  if (nearest < std::numeric_limits<float>::min()) return 0.0f;
  const double ulp = std::ldexp(1.0, std::ilogb(exact) - 23);
  const double error = bits_of(x) * 0x9e3779b1u / 4294967296.0 * 3.0 - 1.5;  // and a rounding
  return static_cast<float>(exact + error * ulp);
}

inline float exp2_approximate(float x) { return approximate(std::exp2(static_cast<double>(x)), x); }
inline float reciprocal_approximate(float x) {
  return approximate(1.0 / static_cast<double>(x), x);
}

inline float half_to_float(uint16_t bits) {
  return static_cast<float>(std::bit_cast<_Float16>(bits));
}

inline uint32_t pack_half(float low, float high) {
  const uint32_t upper = std::bit_cast<uint16_t>(static_cast<_Float16>(high));
  return upper << 16 | std::bit_cast<uint16_t>(static_cast<_Float16>(low));
}

inline uint32_t pack_bfloat16(float low, float high) {
  const auto rounded = [](float x) -> uint32_t {
    const uint32_t bits = bits_of(x);
    if (std::isnan(x)) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  };
  return rounded(high) << 16 | rounded(low);
}

inline uint32_t max_half(uint32_t a, uint32_t b) {
  const auto half = [](uint32_t word, int i) {
    return half_to_float(static_cast<uint16_t>(word >> 16 * i));
  };
  return pack_half(std::fmax(half(a, 0), half(b, 0)), std::fmax(half(a, 1), half(b, 1)));
}

inline uint32_t max_bfloat16(uint32_t a, uint32_t b) {
  constexpr uint32_t kHigh = 0xffff0000;
  return pack_bfloat16(std::fmax(float_of(a << 16), float_of(b << 16)),
                       std::fmax(float_of(a & kHigh), float_of(b & kHigh)));
}

inline Bits128 load_once(const void* from) { return *simulator::aligned<const Bits128>(from); }
inline void store_once(void* to, const Bits128& v) { *simulator::aligned<Bits128>(to) = v; }
inline void* shared_memory() { return simulator::shared_memory(); }

#endif

}  // namespace fused_ce::cuda
