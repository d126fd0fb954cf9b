// Which 16x16 tiles a Gaussian reaches.
#pragma once

#include "constants.h"
#include "gaussian.h"

namespace rapfast {

// Half-open ranges of tile columns and rows.
struct TileRect {
  int32_t x0, x1, y0, y1;
};

template <typename T>
RAPFAST_HD int32_t clamp_tile(T t, int32_t n) {
  return t <= T(0) ? 0 : (t >= T(n) ? n : int32_t(t));
}

// The tiles of the bounding box, gsplat's rule: what `meta` shows is made from it too.
template <typename T>
RAPFAST_HD TileRect tile_rect(T x, T y, const int32_t* radii, int32_t tiles_x, int32_t tiles_y) {
  const T inv = T(1) / T(kTileSize);
  const T tx = x * inv, ty = y * inv;
  const T rx = T(radii[0]) * inv, ry = T(radii[1]) * inv;
  return {clamp_tile(T(floor(tx - rx)), tiles_x), clamp_tile(T(ceil(tx + rx)), tiles_x),
          clamp_tile(T(floor(ty - ry)), tiles_y), clamp_tile(T(ceil(ty + ry)), tiles_y)};
}

// The ellipse on which alpha equals the cut, a dx^2 + 2 b dx dy + c dy^2 = level, with the slack
// that makes the test safe against rounding.
template <typename T>
struct CutEllipse {
  T x, y, a, b, c;
  T level;
  T half_height;    // largest dy on the ellipse
  T dy_of_right;    // dy at its rightmost point; minus that at its leftmost
};

// a c - b^2, or NaN where cancellation leaves it unfit to bound the ellipse.
template <typename T>
RAPFAST_HD T well_conditioned_det(T a, T b, T c) {
  const T det = a * c - b * b;
  return det > Constants<T>::kWellConditioned * (a * c) ? det : T(NAN);
}

template <typename T>
RAPFAST_HD CutEllipse<T> cut_ellipse(const Record<T>& r) {
  CutEllipse<T> e;
  e.x = r.x;
  e.y = r.y;
  e.a = r.conic_a;
  e.b = r.conic_b;
  e.c = r.conic_c;
  const T ratio = r.opacity / Constants<T>::kAlphaCut;
  // An opacity of 0 (a record the colour stage removed) has no ellipse; its level is negative.
  e.level = ratio > T(0) ? T(2) * T(log(ratio)) + Constants<T>::kTileSlackSigma : T(-1);
  const T det = well_conditioned_det(e.a, e.b, e.c);
  const T level = max_of(e.level, T(0));
  // NaN where the conic gives no bound: every comparison below then keeps the tile.
  e.half_height = sqrt(level * e.a / det);
  e.dy_of_right = -e.b / e.c * sqrt(level * e.c / det);
  return e;
}

// Columns of tile row `ty`, inside `rect`, that hold a pixel centre within the ellipse. The right
// edge of an ellipse cut to a band is concave in dy, so its maximum is at the rightmost point of the
// ellipse or, if that is outside the band, at the band's nearer end; the left edge likewise.
template <typename T>
RAPFAST_HD void tile_row_range(const CutEllipse<T>& e, const TileRect& rect, int32_t ty, int32_t& x0,
                               int32_t& x1) {
  x0 = x1 = rect.x0;
  if (e.level < T(0)) return;
  const T slack = Constants<T>::kTileSlackPixels;
  const T band_lo = T(ty * kTileSize) + T(0.5) - e.y - slack;
  const T band_hi = T(ty * kTileSize + kTileSize) - T(0.5) - e.y + slack;
  if (band_lo > e.half_height || band_hi < -e.half_height) return;
  x1 = rect.x1;

  const T lo = max_of(band_lo, -e.half_height);
  const T hi = min_of(band_hi, e.half_height);
  const T dy_right = clamp_to(e.dy_of_right, lo, hi);
  const T dy_left = clamp_to(-e.dy_of_right, lo, hi);
  const T det = e.a * e.c - e.b * e.b;
  const T inv_a = T(1) / e.a;
  const T right =
      e.x + (-e.b * dy_right + sqrt(max_of(T(0), e.a * e.level - det * dy_right * dy_right))) * inv_a;
  const T left =
      e.x + (-e.b * dy_left - sqrt(max_of(T(0), e.a * e.level - det * dy_left * dy_left))) * inv_a;
  if (!(right >= left)) return;  // NaN: keep the box

  // Column tx holds the centres 16 tx + 0.5 ... 16 tx + 15.5.
  const T inv = T(1) / T(kTileSize);
  const T first = ceil((left - slack - (T(kTileSize) - T(0.5))) * inv);
  const T last = floor((right + slack - T(0.5)) * inv);
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
