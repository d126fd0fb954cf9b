// Functions marked RAPFAST_HD compile for the host and, under nvcc, for the device: each formula of
// csrc/math exists once for both.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define RAPFAST_HD __host__ __device__ __forceinline__
#else
#define RAPFAST_HD inline __attribute__((always_inline))
#endif

namespace rapfast {

template <typename T>
RAPFAST_HD T min_of(T a, T b) {
  return b < a ? b : a;
}

template <typename T>
RAPFAST_HD T max_of(T a, T b) {
  return a < b ? b : a;
}

template <typename T>
RAPFAST_HD T clamp_to(T x, T lo, T hi) {
  return min_of(max_of(x, lo), hi);
}

// a b + c: one rounding on the device, two on the host. Kernels that must make the same bits of a formula
// are compiled without contraction, which depends on what surrounds an expression, and fuse what this names.
template <typename T>
RAPFAST_HD T multiply_add(T a, T b, T c) {
  return a * b + c;
}

#if defined(__CUDA_ARCH__)
RAPFAST_HD float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
#endif

// x - x is 0 for a finite x and NaN for an infinity or a NaN.
template <typename T>
RAPFAST_HD bool is_finite(T x) {
  return x - x == T(0);
}

}  // namespace rapfast
