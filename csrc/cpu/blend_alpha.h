// How much of a pixel a Gaussian covers, and which pixels are open: what the blend and its backward must agree on to the last bit,
// since the one decides what is drawn and the other must decide the same.
#pragma once

#include <algorithm>
#include <cmath>

#include "../math/tile.h"
#include "simd.h"

namespace rapfast {

// Rows of the tile whose pixel centres the Gaussian's cut ellipse reaches.
template <typename T>
void row_range(const Record<T>& r, T tile_y, int& begin, int& end) {
  const CutEllipse<T> e = cut_ellipse(r);
  begin = 0;
  end = e.level < T(0) ? 0 : kTileSize;
  const T lo = std::ceil(e.y - e.half_height - Constants<T>::kTileSlackPixels - T(0.5) - tile_y);
  const T hi = std::floor(e.y + e.half_height + Constants<T>::kTileSlackPixels - T(0.5) - tile_y);
  if (lo > T(0)) begin = lo >= T(kTileSize) ? kTileSize : int(lo);
  if (hi < T(kTileSize - 1)) end = std::min(end, hi < T(0) ? 0 : int(hi) + 1);
  end = std::max(begin, end);
}

// 0.5, 1.5, ...: the pixel centres of a vector's lanes.
template <typename T>
typename Simd<T>::V lane_centres() {
  typename Simd<T>::V lane;
  for (int k = 0; k < Simd<T>::kLanes; ++k) lane[k] = T(k) + T(0.5);
  return lane;
}

template <typename T>
struct PixelAlphas {
  typename Simd<T>::V uncapped;  // opacity exp(-sigma); of no meaning where alpha is 0
  typename Simd<T>::V alpha;     // capped; 0 where the Gaussian is not drawn
};

// At pixels dx, dy from the Gaussian's mean.
template <typename T>
inline __attribute__((always_inline)) PixelAlphas<T> pixel_alphas(const Record<T>& r, T alpha_cap,
                                                                 typename Simd<T>::V dx, T dy) {
  typedef typename Simd<T>::V V;
  const V zero = V{};
  // Where exp_nonpositive ends, and nothing but an absurd opacity could still be seen.
  constexpr T limit = sizeof(T) == 4 ? T(87) : T(700);
  const V sigma = T(0.5) * (r.conic_a * dx * dx + r.conic_c * dy * dy) + r.conic_b * dx * dy;
  const V exponent = sigma < limit ? -sigma : zero - limit;
  const V uncapped = r.opacity * exp_nonpositive(exponent > zero ? zero : exponent);
  const V capped = uncapped > alpha_cap ? zero + alpha_cap : uncapped;
  const auto drawn = (sigma >= zero) & (sigma < limit) & (capped >= Constants<T>::kAlphaCut);
  return {uncapped, drawn ? capped : zero};
}

// Whether a pixel of a tile is still open: `live` is its transmittance, 0 once it has stopped.
template <typename T>
bool any_live(const T (&live)[kTilePixels]) {
  T sum = T(0);
  for (T t : live) sum += t;
  return sum > T(0);
}

}  // namespace rapfast
