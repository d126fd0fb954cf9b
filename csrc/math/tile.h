// Which 16x16 tiles a Gaussian reaches.
#pragma once

#include "constants.h"
#include "gaussian.h"

namespace rapfast {

// Several kernels find the tiles of one Gaussian, of a whole image or of a band, and must
// agree to the last bit. What surrounds an expression decides whether nvcc contracts it, so on the
// device these formulas name every operation. lg2, rcp and sqrt are the hardware's: the slack below
// is thousands of times their error.
namespace tile_math {

template <typename T>
RAPFAST_HD T mul(T a, T b) {
  return a * b;
}
template <typename T>
RAPFAST_HD T add(T a, T b) {
  return a + b;
}
template <typename T>
RAPFAST_HD T mul_add(T a, T b, T c) {
  return a * b + c;
}
template <typename T>
RAPFAST_HD T reciprocal(T x) {
  return T(1) / x;
}
template <typename T>
RAPFAST_HD T root(T x) {
  return T(sqrt(x));
}
template <typename T>
RAPFAST_HD T natural_log(T x) {
  return T(log(x));
}

#if defined(__CUDA_ARCH__)
template <>
RAPFAST_HD float mul(float a, float b) {
  return __fmul_rn(a, b);
}
template <>
RAPFAST_HD float add(float a, float b) {
  return __fadd_rn(a, b);
}
template <>
RAPFAST_HD float mul_add(float a, float b, float c) {
  return __fmaf_rn(a, b, c);
}
template <>
RAPFAST_HD float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
template <>
RAPFAST_HD float root(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
template <>
RAPFAST_HD float natural_log(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return __fmul_rn(y, 0.6931471805599453f);
}
#endif

}  // namespace tile_math

// Half-open ranges of tile columns and rows.
struct TileRect {
  int32_t x0, x1, y0, y1;
};

template <typename T>
RAPFAST_HD int32_t clamp_tile(T t, int32_t n) {
  return t <= T(0) ? 0 : (t >= T(n) ? n : int32_t(t));
}

// The tiles of the bounding box, gsplat's rule, within rows [first_row, first_row + tiles_y) of the
// image. Rows are the image's.
template <typename T>
RAPFAST_HD TileRect tile_rect(T x, T y, const int32_t* radii, int32_t tiles_x, int32_t tiles_y,
                              int32_t first_row = 0) {
  // A power of two: these products are exact, and contraction changes nothing.
  const T inv = T(1) / T(kTileSize);
  const T tx = x * inv, ty = y * inv;
  const T rx = T(radii[0]) * inv, ry = T(radii[1]) * inv;
  const int32_t end_row = first_row + tiles_y;
  return {clamp_tile(T(floor(tx - rx)), tiles_x), clamp_tile(T(ceil(tx + rx)), tiles_x),
          max_of(first_row, clamp_tile(T(floor(ty - ry)), end_row)),
          max_of(first_row, clamp_tile(T(ceil(ty + ry)), end_row))};
}

// The ellipse on which alpha equals the cut, a dx^2 + 2 b dx dy + c dy^2 = level, with the slack
// that makes the test safe against rounding.
template <typename T>
struct CutEllipse {
  T x, y;
  T level;        // negative: no ellipse
  T half_height;  // largest dy on the ellipse; NaN where its conic does not bound it
  T dy_of_right;  // dy at its rightmost point; minus that at its leftmost
  // Its edges at dy are dx = slope dy -+ sqrt(width2 - shrink dy^2).
  T slope, width2, shrink;
};

// a c - b^2, or NaN where cancellation leaves it unfit to bound the ellipse.
template <typename T>
RAPFAST_HD T well_conditioned_det(T a, T b, T c) {
  using namespace tile_math;
  const T ac = mul(a, c);
  const T det = add(ac, -mul(b, b));
  return det > mul(Constants<T>::kWellConditioned, ac) ? det : T(NAN);
}

template <typename T>
RAPFAST_HD CutEllipse<T> cut_ellipse(const Record<T>& r) {
  using namespace tile_math;
  const T a = r.conic_a, b = r.conic_b, c = r.conic_c;
  CutEllipse<T> e;
  e.x = r.x;
  e.y = r.y;
  const T ratio = mul(r.opacity, T(1) / Constants<T>::kAlphaCut);
  // An opacity of 0 (a record the colour stage removed) has no ellipse; its level is negative.
  e.level = ratio > T(0) ? mul_add(T(2), natural_log(ratio), Constants<T>::kTileSlackSigma) : T(-1);
  const T level = max_of(e.level, T(0));
  const T det = well_conditioned_det(a, b, c);
  const T per_det = mul(level, reciprocal(det));
  e.half_height = root(mul(per_det, a));
  e.dy_of_right = mul(-mul(b, reciprocal(c)), root(mul(per_det, c)));
  const T inv_a = reciprocal(a);
  e.slope = -mul(b, inv_a);
  e.width2 = mul(level, inv_a);
  e.shrink = mul(mul(det, inv_a), inv_a);
  return e;
}

// Columns of tile row `ty` of the image, inside `rect`, that hold a pixel centre within the ellipse.
// The right edge of an ellipse cut to a band is concave in dy, so its maximum is at the rightmost
// point of the ellipse or, if that is outside the band, at the band's nearer end; the left edge
// likewise.
template <typename T>
RAPFAST_HD void tile_row_range(const CutEllipse<T>& e, const TileRect& rect, int32_t ty, int32_t& x0,
                               int32_t& x1) {
  using namespace tile_math;
  x0 = x1 = rect.x0;
  if (e.level < T(0)) return;
  const T slack = Constants<T>::kTileSlackPixels;
  const T middle = add(T(ty * kTileSize + kTileSize / 2), -e.y);
  const T reach = T(kTileSize) / T(2) - T(0.5) + slack;
  const T band_lo = add(middle, -reach), band_hi = add(middle, reach);
  if (band_lo > e.half_height || band_hi < -e.half_height) return;
  x1 = rect.x1;

  const T lo = max_of(band_lo, -e.half_height);
  const T hi = min_of(band_hi, e.half_height);
  const T dy_right = clamp_to(e.dy_of_right, lo, hi);
  const T dy_left = clamp_to(-e.dy_of_right, lo, hi);
  const T half_right = root(max_of(T(0), mul_add(-mul(e.shrink, dy_right), dy_right, e.width2)));
  const T half_left = root(max_of(T(0), mul_add(-mul(e.shrink, dy_left), dy_left, e.width2)));
  const T right = add(e.x, mul_add(e.slope, dy_right, half_right));
  const T left = add(e.x, mul_add(e.slope, dy_left, -half_left));
  if (!(e.half_height >= T(0)) || !(right >= left)) return;  // NaN: keep the box

  // Column tx holds the centres 16 tx + 0.5 ... 16 tx + 15.5.
  const T inv = T(1) / T(kTileSize);
  const T first = ceil(mul(add(left, -(slack + (T(kTileSize) - T(0.5)))), inv));
  const T last = floor(mul(add(right, slack - T(0.5)), inv));
  x0 = max_of(rect.x0, clamp_tile(first, rect.x1));
  x1 = max_of(x0, min_of(rect.x1, clamp_tile(T(last + T(1)), rect.x1)));
}

// Monotonic map of a depth to an unsigned key: sorting the keys sorts the depths as real numbers
// (adding zero makes -0 and +0 one key).
RAPFAST_HD uint32_t depth_key(float depth) {
  union {
    float f;
    uint32_t u;
  } bits = {depth + 0.0f};
  return bits.u & 0x80000000u ? ~bits.u : bits.u | 0x80000000u;
}

RAPFAST_HD uint64_t depth_key(double depth) {
  union {
    double f;
    uint64_t u;
  } bits = {depth + 0.0};
  return bits.u & 0x8000000000000000ull ? ~bits.u : bits.u | 0x8000000000000000ull;
}

}  // namespace rapfast
