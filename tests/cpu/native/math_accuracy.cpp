// Prints the largest error, in ulp, of the functions of cpu/math.h against the C library's in the
// next wider type, over every STEP-th float of their domain (in double over 17 times fewer
// arguments spread the same way), as the instruction set that ATEN_CPU_CAPABILITY names computes
// them.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <type_traits>

#include "../../../csrc/cpu/vector/exp_avx2.h"
#include "../../../csrc/cpu/vector/exp_avx512.h"
#include "../../../csrc/cpu/vector/math.h"
#include "../../../csrc/cpu/vector/simd.h"

namespace {

using fused_ce::cpu::math::bits_as;

// Many times as fast for float as long double, and its error is 2^-29 of what is measured.
template <class T>
using Wider = std::conditional_t<std::is_same_v<T, float>, double, long double>;

// The distance of two neighbours of type T between the powers of two around `value`.
template <class T>
double ulp(double value) {
  const double power = bits_as<double>(bits_as<uint64_t>(value) & 0x7ff0000000000000u);
  using Limits = std::numeric_limits<T>;
  return std::max<double>(power, Limits::min()) * Limits::epsilon();
}

struct Worst {
  double error = 0.0;
  double at = 0.0;

  template <class T>
  void see(T argument, T got, Wider<T> exact) {
    const double error =
        static_cast<double>(std::fabs(got - exact)) / ulp<T>(static_cast<double>(exact));
    if (!(error <= this->error)) *this = {error, argument};
  }
};

void report(const char* name, const Worst& worst) {
  std::printf("%s %.4f at %.17g\n", name, worst.error, worst.at);
}

constexpr int kChunk = 4096;

template <class T, class Span, class Exact, class Next>
Worst sweep_spans(const Span& span, const Exact& exact, Next next) {
  T x[kChunk], y[kChunk];
  Worst worst;
  for (bool more = true; more;) {
    int n = 0;
    while (n < kChunk && (more = next(x[n]))) n++;
    fused_ce::cpu::simd::run([&] { span(x, n, y); });
    for (int i = 0; i < n; i++) worst.see(x[i], y[i], exact(static_cast<Wider<T>>(x[i])));
  }
  return worst;
}

template <class T, class Function, class Exact, class Next>
Worst sweep(const Function& function, const Exact& exact, Next next) {
  return sweep_spans<T>(
      [&](const T* x, int n, T* y) {
#pragma omp simd
        for (int i = 0; i < n; i++) y[i] = function(x[i]);
      },
      exact, next);
}

}  // namespace

int main(int, char** argv) {
  const uint64_t step = std::strtoull(argv[1], nullptr, 10);
  const auto exp = [](auto x) { return std::exp(x); };
  const auto log1p = [](auto y) { return std::log1p(y); };
  const auto tanh = [](auto x) { return std::tanh(x); };

  // From -0 to where exp rounds to zero.
  uint64_t bits = 0x80000000u;
  report("exp_float",
         sweep<float>([](float x) { return fused_ce::cpu::math::exp_nonpositive(x); }, exp,
                      [&](float& x) {
                        x = bits_as<float>(static_cast<uint32_t>(bits));
                        bits += step;
                        return x >= -104.5f;
                      }));

  bits = 0x80000000u;
  report("exp_normal_float",
         sweep<float>([](float x) { return fused_ce::cpu::math::exp_normal(x); }, exp,
                      [&](float& x) {
                        x = bits_as<float>(static_cast<uint32_t>(bits));
                        bits += step;
                        return x > -fused_ce::cpu::math::kNormalExp;
                      }));

  // Those that are loops over vectors of one instruction set.
  const auto of_level = [&](fused_ce::cpu::simd::Level level, const char* name, auto exps) {
    if (fused_ce::cpu::simd::level() != level) return;
    bits = 0x80000000u;
    report(name, sweep_spans<float>(exps, exp, [&](float& x) {
             x = bits_as<float>(static_cast<uint32_t>(bits));
             bits += step;
             return x >= -104.5f;
           }));
  };
  using fused_ce::cpu::Digits;
  using fused_ce::cpu::simd::Level;
  of_level(Level::kAvx512, "exp_avx512", [](const float* x, int64_t n, float* y) {
    fused_ce::cpu::avx512::exp_differences<false>(x, 1.0f, 0.0f, n, y);
  });
  of_level(Level::kAvx2, "exp_avx2", [](const float* x, int64_t n, float* y) {
    fused_ce::cpu::avx2::exp_differences<Digits::kFloat, false>(x, 1.0f, 0.0f, n, y);
  });
  of_level(Level::kAvx2, "exp_avx2_half", [](const float* x, int64_t n, float* y) {
    fused_ce::cpu::avx2::exp_differences<Digits::kHalf, false>(x, 1.0f, 0.0f, n, y);
  });

  // The same floats, spread over the arguments of the other two.
  bits = 0x80000000u;
  report("exp_double",
         sweep<double>([](double x) { return fused_ce::cpu::math::exp_nonpositive(x); }, exp,
                       [&](double& x) {
                         x = bits_as<float>(static_cast<uint32_t>(bits)) * 6.8;
                         bits += 17 * step;
                         return x >= -708.0;
                       }));
  bits = 0;
  report("log1p_double",
         sweep<double>(
             [](double y) { return fused_ce::cpu::math::log1p_nonnegative(y, 1.0 / (1.0 + y)); },
             log1p,
             [&](double& y) {
               y = bits_as<float>(static_cast<uint32_t>(bits)) * 1.0000001;
               bits += 17 * step;
               return y < 1e38;
             }));
  bits = 0;
  report("log1p_float",
         sweep<float>(
             [](float y) { return fused_ce::cpu::math::log1p_nonnegative(y, 1.0f / (1.0f + y)); },
             log1p,
             [&](float& y) {
               y = bits_as<float>(static_cast<uint32_t>(bits));
               bits += step;
               return y < 1e38f;
             }));

  // Less than 2^-15 is its own tanh, 16 and more have 1.
  constexpr uint32_t kFirst = 0x38000000u;
  bits = kFirst;
  report("tanh_float", sweep<float>([](float x) { return fused_ce::cpu::math::tanh(x); }, tanh,
                                    [&](float& x) {
                                      x = bits_as<float>(static_cast<uint32_t>(bits));
                                      bits += step;
                                      return x < 16.0f;
                                    }));
  bits = kFirst;
  report("tanh_double", sweep<double>([](double x) { return fused_ce::cpu::math::tanh(x); }, tanh,
                                      [&](double& x) {
                                        x = bits_as<float>(static_cast<uint32_t>(bits)) *
                                            -1.0000001;
                                        bits += 17 * step;
                                        return x > -16.0;
                                      }));
}
