// Sums over the lanes of a warp, or of eight lanes of it. Of many values at once: in each round two lanes exchange
// halves, each sends what the other keeps, so that n values over n lanes take n - 1 shuffles and not n log n.
#pragma once

#include "check.cuh"

namespace rapfast {

// One round between lanes whose numbers differ by `distance`: 2 n values become n, the lower ones in the lower lane.
template <int n>
__device__ __forceinline__ void exchange_halves(float* v /* [2 n] */, int distance, int lane) {
  const bool is_upper = (lane & distance) != 0;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const float given = is_upper ? v[i] : v[i + n], kept = is_upper ? v[i + n] : v[i];
    v[i] = kept + __shfl_xor_sync(kFullWarp, given, distance);
  }
}

// The sum of value lane % 8 over the eight lanes of a group.
__device__ __forceinline__ float sum8_of8(float* v /* [8] */, int lane) {
  exchange_halves<4>(v, 4, lane);
  exchange_halves<2>(v, 2, lane);
  exchange_halves<1>(v, 1, lane);
  return v[0];
}

// The same of n values, 1 to 4. value_of8<n>(lane) says which one a lane gets; several lanes get the same.
template <int n>
__device__ __forceinline__ float sum8_of(float* v /* [4] */, int lane) {
  static_assert(1 <= n && n <= 4, "up to four values");
  if constexpr (n >= 3) {
    if (n == 3) v[3] = 0.f;
    exchange_halves<2>(v, 4, lane);
    exchange_halves<1>(v, 2, lane);
  } else if constexpr (n == 2) {
    exchange_halves<1>(v, 4, lane);
    v[0] += __shfl_xor_sync(kFullWarp, v[0], 2);
  } else {
    v[0] += __shfl_xor_sync(kFullWarp, v[0], 4);
    v[0] += __shfl_xor_sync(kFullWarp, v[0], 2);
  }
  return v[0] + __shfl_xor_sync(kFullWarp, v[0], 1);
}

template <int n>
__device__ __forceinline__ int value_of8(int lane) {
  return n >= 3 ? lane / 2 % 4 : n == 2 ? lane / 4 % 2 : 0;
}

// The sum of value lane / 2 over a warp.
__device__ __forceinline__ float sum32_of16(float* v /* [16] */, int lane) {
  exchange_halves<8>(v, 16, lane);
  exchange_halves<4>(v, 8, lane);
  exchange_halves<2>(v, 4, lane);
  exchange_halves<1>(v, 2, lane);
  return v[0] + __shfl_xor_sync(kFullWarp, v[0], 1);
}

__device__ __forceinline__ float sum32(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(kFullWarp, x, distance);
  return x;
}

__device__ __forceinline__ uint32_t warp_sum(uint32_t x) { return __reduce_add_sync(kFullWarp, x); }

__device__ __forceinline__ uint32_t inclusive_sum(uint32_t x, int lane) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(kFullWarp, x, step);
    if (lane >= step) x += other;
  }
  return x;
}

}  // namespace rapfast
