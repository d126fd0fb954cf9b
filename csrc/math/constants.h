// The only copy of every threshold. Values are those of gsplat 1.5.3, so that both draw the same
// pixels; docs/numerics.md says where each comes from.
#pragma once

#include "host_device.h"

namespace rapfast {

constexpr int kTileSize = 16;                          // pixels per tile side
constexpr int kTilePixels = kTileSize * kTileSize;
constexpr int kRegionWidth = 8, kRegionHeight = 4;                // tiles of a region, which the GPU sorts by
constexpr int kMaxShDegree = 4;

template <typename T>
struct Constants {
  // A contribution fainter than one 8-bit step is not drawn.
  static constexpr T kAlphaCut = T(1) / T(255);
  // A pixel is finished before the Gaussian that would leave it this transparent.
  static constexpr T kTransmittanceStop = T(1e-4);
  // sqrt(2 ln 255) rounded up: beyond this many standard deviations an opaque Gaussian is cut.
  static constexpr T kBoxExtent = T(3.33);
  // Share of the field of view by which the point where the Jacobian is taken may lie outside.
  static constexpr T kFovMargin = T(0.3);
  // Keeps the fisheye angle and its derivatives finite on the optical axis.
  static constexpr T kFisheyeEps = T(1e-7);
  // INRIA's convention: SH coefficients describe colour minus one half.
  static constexpr T kShOffset = T(0.5);
  // Expected depth divides by alpha; this is the smallest divisor.
  static constexpr T kMinAlpha = T(1e-10);
  // Slack of the tile test, in squared standard deviations and in pixels. It covers the rounding of
  // the blend's quadratic form, so that a dropped tile never holds a pixel the blend would draw.
  static constexpr T kTileSlackSigma = T(1e-2);
  static constexpr T kTileSlackPixels = T(1e-2);
  // Below this share of a c, the determinant a c - b^2 of a conic has lost too many digits to bound
  // its ellipse (a needle hundreds of pixels long): its whole box is kept.
  static constexpr T kWellConditioned = sizeof(T) == 4 ? T(1e-4) : T(1e-12);
};

}  // namespace rapfast
