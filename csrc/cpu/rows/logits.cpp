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

// A loop of its own: what follows a tanh, GCC 12 moves into branches within it, and then vectorises
// neither.
template <class A>
inline void find_tanhs(const LogitMap<A>& map, const A* logits, int64_t n, A* to) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) to[i] = math::tanh(map.part_of_cap(logits[i]));
}

template <class A>
void map_logits(const LogitMap<A>& map, const A* logits, int64_t n, A* mapped) {
  simd::run([=] {
    if (map.bends()) {
      find_tanhs(map, logits, n, mapped);
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
  simd::run([=] {
    find_tanhs(map, logits, n, mapped);
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
