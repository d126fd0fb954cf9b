// The order in which blocks take tiles: those with long lists first, since a long list that is begun last is what the
// whole call waits for. Tiles lie in classes by the length of their list, and in a class in any order.
#pragma once

#include "../bin.h"
#include "check.cuh"

namespace rapfast {

static_assert(kLengthClasses == 8, "counts are read as two quads");

// The counts of the classes, behind the classes.
__device__ __forceinline__ uint32_t* class_counts(uint32_t* order, int64_t n_tiles) {
  return order + kLengthClasses * n_tiles;
}

// Class 0 has kLongList times the mean length or more, the next ones each 1.4 times less than the one before.
__device__ __forceinline__ int length_class(uint32_t length, float per_mean) {
  const float times = float(length) * per_mean;
  if (times >= float(kLongList)) return 0;
  return 1 + int(max_of(0.f, min_of(float(kLengthClasses - 2), 2.f * __log2f(float(kLongList) / times))));
}

__device__ __forceinline__ uint32_t n_long_tiles(const uint32_t* order, int64_t n_tiles) {
  return order[kLengthClasses * n_tiles];
}

// Tile number t in this order.
__device__ __forceinline__ uint32_t ordered_tile(const uint32_t* order, int64_t n_tiles, uint32_t t) {
  const uint4* const counts = reinterpret_cast<const uint4*>(order + kLengthClasses * n_tiles);
  const uint4 a = counts[0], b = counts[1];
  const uint32_t of_class[kLengthClasses - 1] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z};
  int k = 0;
#pragma unroll
  for (int i = 0; i < kLengthClasses - 1; ++i) {
    const bool is_behind = k == i && t >= of_class[i];
    t -= is_behind ? of_class[i] : 0;
    k += is_behind;
  }
  return order[k * n_tiles + t];
}

}  // namespace rapfast
