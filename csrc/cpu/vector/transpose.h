// Turns rows of a few classes into a class-major tile and back.
//
// In blocks of 4 x 4 floats, whose 16 byte vectors every 64-bit processor has: a larger block would
// take more shuffles per element, and a gather takes several times as long. The last block overlaps
// the one before it instead of ending in single elements.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace fused_ce::cpu {

// to[c * to_stride + r] = from[r * from_stride + c] for r < rows, c < columns, without overlap.
template <class A>
inline void transpose_each(const A* from, int64_t from_stride, int64_t rows, int64_t columns, A* to,
                           int64_t to_stride) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < columns; c++) to[c * to_stride + r] = from[r * from_stride + c];
}

#if defined(__GNUC__)

using Vector4 = float __attribute__((vector_size(16)));
using Shuffle4 = int32_t __attribute__((vector_size(16)));

inline Vector4 load4(const float* from) {
  Vector4 vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

inline void transpose_4x4(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  const Vector4 a = load4(from), b = load4(from + from_stride);
  const Vector4 c = load4(from + 2 * from_stride), d = load4(from + 3 * from_stride);
  constexpr Shuffle4 kLow{0, 4, 1, 5}, kHigh{2, 6, 3, 7};
  constexpr Shuffle4 kFirst{0, 1, 4, 5}, kSecond{2, 3, 6, 7};
  const Vector4 ab_low = __builtin_shuffle(a, b, kLow), ab_high = __builtin_shuffle(a, b, kHigh);
  const Vector4 cd_low = __builtin_shuffle(c, d, kLow), cd_high = __builtin_shuffle(c, d, kHigh);
  const Vector4 columns[4] = {
      __builtin_shuffle(ab_low, cd_low, kFirst), __builtin_shuffle(ab_low, cd_low, kSecond),
      __builtin_shuffle(ab_high, cd_high, kFirst), __builtin_shuffle(ab_high, cd_high, kSecond)};
  for (int i = 0; i < 4; i++) std::memcpy(to + i * to_stride, &columns[i], sizeof columns[i]);
}

inline void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns,
                      float* to, int64_t to_stride) {
  if (rows < 4 || columns < 4)
    return transpose_each(from, from_stride, rows, columns, to, to_stride);
  const auto block = [=](int64_t r, int64_t c) {
    r = std::min(r, rows - 4), c = std::min(c, columns - 4);
    transpose_4x4(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
  };
  // Along the short side first: what it touches stays in the cache until the next turn.
  if (columns <= rows) {
    for (int64_t r = 0; r < rows; r += 4)
      for (int64_t c = 0; c < columns; c += 4) block(r, c);
  } else {
    for (int64_t c = 0; c < columns; c += 4)
      for (int64_t r = 0; r < rows; r += 4) block(r, c);
  }
}

#endif

template <class A>
inline void transpose(const A* from, int64_t from_stride, int64_t rows, int64_t columns, A* to,
                      int64_t to_stride) {
  transpose_each(from, from_stride, rows, columns, to, to_stride);
}

}  // namespace fused_ce::cpu
