// Bilinear resampling as torch does it with align_corners=False, and the 8-bit rounding.
#pragma once

#include "host_device.h"

namespace rapfast {

template <typename T>
struct Lerp {
  int64_t i0, i1;  // source indices
  T w0, w1;        // their weights
};

// Output index i of n_out samples n_in: pixel centres at +0.5, edges repeated, no antialiasing.
template <typename T>
RAPFAST_HD Lerp<T> resize_lerp(int64_t i, int64_t n_in, int64_t n_out) {
  if (n_in == n_out) return {i, i, T(1), T(0)};
  const T scale = T(n_in) / T(n_out);
  const T source = max_of(T(0), (T(i) + T(0.5)) * scale - T(0.5));
  const int64_t i0 = min_of(int64_t(source), n_in - 1);
  const T w1 = min_of(source - T(i0), T(1));
  return {i0, min_of(i0 + 1, n_in - 1), T(1) - w1, w1};
}

template <typename T>
RAPFAST_HD T bilinear(const Lerp<T>& y, const Lerp<T>& x, T v00, T v01, T v10, T v11) {
  return y.w0 * (x.w0 * v00 + x.w1 * v01) + y.w1 * (x.w0 * v10 + x.w1 * v11);
}

// Nearest of 256 levels, halves up; NaN becomes 0.
template <typename T>
RAPFAST_HD uint8_t to_byte(T x) {
  const T scaled = T(255) * x + T(0.5);
  return scaled > T(0) ? uint8_t(min_of(scaled, T(255))) : uint8_t(0);
}

}  // namespace rapfast
