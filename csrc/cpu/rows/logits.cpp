#include "logits.h"

#include "../vector/math.h"
#include "../vector/simd.h"
#include "../vector/span.h"

namespace fused_ce::cpu {

template <class A>
LogitMap<A> logit_map(const Problem& p) {
  const Values& scale = p.options.logit_scale;
  return {scale.data ? load_value<A>(scale, 0) : A(1), static_cast<A>(p.options.softcap)};
}

// With a dispatch of its own: in a function with another loop GCC 12 moves what follows a tanh into
// branches within it, and vectorises neither.
template <class A>
void find_tanhs(const LogitMap<A>& map, const A* logits, int64_t n, A* to) {
  const A part = map.part_of_cap(A(1));  // one division, not one for each
  simd::run([=] {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) to[i] = math::tanh(part * logits[i]);
  });
}

template <class A>
void map_logits(const LogitMap<A>& map, const A* logits, int64_t n, A* mapped) {
  if (map.bends()) find_tanhs(map, logits, n, mapped);
  simd::run([=] {
    if (map.bends()) {
#pragma omp simd
      for (int64_t i = 0; i < n; i++) mapped[i] = map.bent(mapped[i]).logit;
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; i++) mapped[i] = map.factor * logits[i];
    }
  });
}

template <class A>
void map_logits(const LogitMap<A>& map, const A* logits, int64_t n, A* mapped, A* slopes) {
  find_tanhs(map, logits, n, mapped);
  simd::run([=] {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      const auto [logit, slope] = map.bent(mapped[i]);
      mapped[i] = logit;
      slopes[i] = slope;
    }
  });
}

template LogitMap<float> logit_map(const Problem&);
template LogitMap<double> logit_map(const Problem&);
template void map_logits(const LogitMap<float>&, const float*, int64_t, float*);
template void map_logits(const LogitMap<double>&, const double*, int64_t, double*);
template void map_logits(const LogitMap<float>&, const float*, int64_t, float*, float*);
template void map_logits(const LogitMap<double>&, const double*, int64_t, double*, double*);

}  // namespace fused_ce::cpu
