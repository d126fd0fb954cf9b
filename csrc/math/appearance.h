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
template <typename A, typename T>
RAPFAST_HD void map_place(A at, int32_t size, int32_t* first, T* share) {
  A place = ((at + A(1)) * A(size) - A(1)) / A(2);
  place = place > A(0) ? place : A(0);
  place = min_of(place, A(size - 1));
  // At the far border the last pixel is the second one with share 1, so that there is always a second.
  const int32_t whole = int32_t(place);
  const int32_t last = size < 2 ? 0 : size - 2;
  *first = whole < last ? whole : last;
  *share = T(place - A(*first));
}

// A is the type to compute in. A place in pixels of a map has lost the last bits of float by then, and
// what it reads changes from pixel to pixel.
template <typename T, typename A>
RAPFAST_HD MapTap<T> map_tap(A x, A y, int32_t width, int32_t height) {
  MapTap<T> tap;
  map_place(x, width, &tap.x, &tap.fx);
  map_place(y, height, &tap.y, &tap.fy);
  return tap;
}

// Where a Gaussian falls on the projected map, -1 .. 1 both ways, and whether it does. With
// (u, v, z) = K (R X + t) it falls at u / (z + 0.01), v / (z + 0.01) of its own window.
template <typename A, typename T>
RAPFAST_HD bool projected_place(const T* viewmat,  // [4, 4] world to camera
                                const T* K,        // [3, 3] pixels, used whole
                                const T* mean,     // [3]
                                const T* window,   // [2] height, width
                                A* x, A* y) {
  A c[3], p[3];
  for (int i = 0; i < 3; ++i) {
    const T* row = viewmat + 4 * i;
    c[i] = A(row[0]) * A(mean[0]) + A(row[1]) * A(mean[1]) + A(row[2]) * A(mean[2]) + A(row[3]);
  }
  for (int i = 0; i < 3; ++i) {
    p[i] = A(K[3 * i]) * c[0] + A(K[3 * i + 1]) * c[1] + A(K[3 * i + 2]) * c[2];
  }
  const A u = p[0] / (p[2] + A(1e-2)), v = p[1] / (p[2] + A(1e-2));
  const A width = A(window[1]), height = A(window[0]);
  // NaN fails every comparison.
  const bool valid = u > A(0) && u < width && v > A(0) && v < height && p[2] > A(0);
  *x = valid ? u / (width / A(2)) - A(1) : A(0);
  *y = valid ? v / (height / A(2)) - A(1) : A(0);
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
