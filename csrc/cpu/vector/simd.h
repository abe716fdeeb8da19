// Runs a callable compiled for the widest vectors this machine has.
//
// The callable is plain C++; `flatten` pulls all of it into a wrapper compiled for AVX-512, AVX2 or
// the baseline, so one source file holds all three versions and needs no flags of its own. Off
// x86-64 the baseline (NEON on aarch64) is the only version. ATEN_CPU_CAPABILITY caps the choice as
// it does for PyTorch's own kernels.
#pragma once

#include <cstdlib>
#include <cstring>
#include <type_traits>

namespace fused_ce::cpu::simd {

enum class Level { kBaseline, kAvx2, kAvx512 };

#if defined(__x86_64__) && defined(__GNUC__)

#define FCE_AVX2 "avx2,fma,f16c,bmi,bmi2"
#define FCE_AVX512 FCE_AVX2 ",avx512f,avx512bw,avx512dq,avx512vl,avx512cd,prefer-vector-width=512"

inline Level detect() {
  const char* cap = std::getenv("ATEN_CPU_CAPABILITY");
  if (cap && !std::strcmp(cap, "default")) return Level::kBaseline;
  // Every CPU with AVX2 has F16C too, which not all compilers can ask for.
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512cd");
  if (avx512 && !(cap && !std::strcmp(cap, "avx2"))) return Level::kAvx512;
  return avx2 ? Level::kAvx2 : Level::kBaseline;
}

template <class F>
__attribute__((target(FCE_AVX512), flatten, noinline)) void run_avx512(const F& f) {
  f();
}

template <class F>
__attribute__((target(FCE_AVX2), flatten, noinline)) void run_avx2(const F& f) {
  f();
}

#else

inline Level detect() { return Level::kBaseline; }

#endif

inline Level level() {
  static const Level found = detect();
  return found;
}

inline const char* level_name() {
  constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};
  return kNames[static_cast<int>(level())];
}

template <class F>
__attribute__((flatten, noinline)) void run_baseline(const F& f) {
  f();
}

// As compiled for one level, which must be this machine's or a narrower one.
template <Level kLevel, class F>
void run_as(const F& f) {
#if defined(__x86_64__) && defined(__GNUC__)
  if constexpr (kLevel == Level::kAvx512) return run_avx512(f);
  if constexpr (kLevel == Level::kAvx2) return run_avx2(f);
#endif
  run_baseline(f);
}

// Calls f with this machine's level as an integral_constant, for what is to be compiled for one
// level alone; f itself is not.
template <class F>
void with_level(const F& f) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (level() == Level::kAvx512) return f(std::integral_constant<Level, Level::kAvx512>{});
  if (level() == Level::kAvx2) return f(std::integral_constant<Level, Level::kAvx2>{});
#endif
  f(std::integral_constant<Level, Level::kBaseline>{});
}

template <class F>
void run(const F& f) {
  with_level([&](auto level) { run_as<level>(f); });
}

}  // namespace fused_ce::cpu::simd
