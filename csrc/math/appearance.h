// What a colour network is fed: places on feature maps and the view direction. docs/appearance.md has
// the formulas.
#pragma once

#include "vec.h"

namespace rapfast {

constexpr int kMaps = 3;          // of one reference image: two at learned places, one projected
constexpr int kMapFeatures = 16;  // of each map
constexpr int kMapChannels = kMaps * kMapFeatures;

// Bilinear: the four pixels from (x, y) on with shares (1 - fx, fx) and (1 - fy, fy). A map of one
// pixel in a direction has fx (fy) 0 there and no second pixel.
template <typename T>
struct MapTap {
  int32_t x, y;
  T fx, fy;
};

// The first pixel and its neighbour's share, of `size` pixels, at `at` in -1 .. 1 from outer edge to
// outer edge. Border padding: beyond the outer pixels' centres their values go on. NaN is taken as 0.
template <typename T>
RAPFAST_HD void map_place(T at, int32_t size, int32_t* first, T* share) {
  T place = ((at + T(1)) * T(size) - T(1)) / T(2);
  place = place > T(0) ? place : T(0);
  place = min_of(place, T(size - 1));
  // At the far border the last pixel is the second one with share 1, so that there is always a second.
  const int32_t whole = int32_t(place);
  const int32_t last = size < 2 ? 0 : size - 2;
  *first = whole < last ? whole : last;
  *share = place - T(*first);
}

template <typename T>
RAPFAST_HD MapTap<T> map_tap(T x, T y, int32_t width, int32_t height) {
  MapTap<T> tap;
  map_place(x, width, &tap.x, &tap.fx);
  map_place(y, height, &tap.y, &tap.fy);
  return tap;
}

// Where a Gaussian falls on the projected map, -1 .. 1 both ways, and whether it does. With
// (u, v, z) = K (R X + t) it falls at u / (z + 0.01), v / (z + 0.01) of its own window.
template <typename T>
RAPFAST_HD bool projected_place(const T* viewmat,  // [4, 4] world to camera
                                const T* K,        // [3, 3] pixels, used whole
                                const T* mean,     // [3]
                                const T* window,   // [2] height, width
                                T* x, T* y) {
  T c[3], p[3];
  for (int i = 0; i < 3; ++i) {
    const T* row = viewmat + 4 * i;
    c[i] = row[0] * mean[0] + row[1] * mean[1] + row[2] * mean[2] + row[3];
  }
  for (int i = 0; i < 3; ++i) p[i] = K[3 * i] * c[0] + K[3 * i + 1] * c[1] + K[3 * i + 2] * c[2];
  const T u = p[0] / (p[2] + T(1e-2)), v = p[1] / (p[2] + T(1e-2));
  // NaN fails every comparison.
  const bool valid = u > T(0) && u < window[1] && v > T(0) && v < window[0] && p[2] > T(0);
  *x = valid ? u / (window[1] / T(2)) - T(1) : T(0);
  *y = valid ? v / (window[0] / T(2)) - T(1) : T(0);
  return valid;
}

// (X - c) / (|X - c| + 1e-5)
template <typename T>
RAPFAST_HD Vec3<T> view_direction(const T* mean, const Vec3<T>& center) {
  const Vec3<T> d = {mean[0] - center.x, mean[1] - center.y, mean[2] - center.z};
  const T length = sqrt(dot(d, d)) + T(1e-5);
  return {d.x / length, d.y / length, d.z / length};
}

}  // namespace rapfast
