// What the blend and its backward must agree on to the last bit: a record's exponent in a pixel, and whether it
// draws there; and the cells of a tile that a record may reach.
#pragma once

#include "../math/tile.h"
#include "check.cuh"

namespace rapfast {

constexpr int kCellWidth = 4;  // pixels of what eight lanes own; two rows for each pixel of a lane
constexpr int kRowStep = 2;    // between the pixels of a lane
constexpr int kCells = 4;      // of a warp
constexpr int kCellsPerSide = kTileSize / kCellWidth;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kLog2Cut = -7.994353436858858f;  // of Constants<float>::kAlphaCut = 1 / 255

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float sqrt_approx(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A record as the pixels want it: opacity x exp(-sigma) = 2^exponent(...). Factors and opacity move into it once.
struct ScaledConic {
  float a, b, c, log2_opacity;
};

__device__ __forceinline__ ScaledConic scaled_conic(float a, float b, float c, float opacity) {
  return {-0.5f * kLog2e * a, -kLog2e * b, -0.5f * kLog2e * c, log2_approx(opacity)};
}

// What the pixels of a lane share: they lie in one column.
struct Along {
  float x, xy;

  __device__ Along(float a, float b, float log2_opacity, float dx) : x(fmaf(a * dx, dx, log2_opacity)), xy(b * dx) {}
};

__device__ __forceinline__ float exponent_at(const Along& along, float c, float dy) {
  return fmaf(dy, fmaf(c, dy, along.xy), along.x);
}

// Whether alpha reaches the cut. Written so that NaN does not draw.
__device__ __forceinline__ bool reaches_cut(float exponent, float log2_opacity) {
  return exponent >= kLog2Cut && exponent <= log2_opacity;
}

// Cells of a block of kRows x kColumns whose pixels alpha may reach the cut in: bit kCellsPerSide * row + column of
// cells. (x, y) is the block's first pixel centre relative to the mean. In a row of cells the ellipse's right edge is
// concave in dy, so it is farthest out at the ellipse's rightmost point or at the end of the row nearer to it; likewise
// the left edge (math/tile.h has the same formulas for tiles).
template <int kCellHeight, int kRows, int kColumns>
__device__ __forceinline__ uint32_t cells_reached(float a, float b, float c, float log2_opacity, float x, float y) {
  const float det = well_conditioned_det(a, b, c);
  if (!(det > 0.f)) return 0xffffu;  // no bound: the pixels decide
  const float level = 2.f * kLn2 * (log2_opacity - kLog2Cut) + Constants<float>::kTileSlackSigma;
  if (level < 0.f) return 0u;
  const float slack = Constants<float>::kTileSlackPixels;
  const float inv_a = __fdividef(1.f, a), slope = -b * inv_a;
  const float spread = level * __fdividef(1.f, det);
  const float half_height = sqrt_approx(spread * a);
  const float dy_of_right = -b * sqrt_approx(__fdividef(spread, c));
  const float a_level = a * level;
  uint32_t reached = 0;
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const float top = y + float(row * kCellHeight) - slack, bottom = y + float((row + 1) * kCellHeight - 1) + slack;
    const float low = fmaxf(top, -half_height), high = fminf(bottom, half_height);
    if (low > high) continue;
    const float dy_right = clamp_to(dy_of_right, low, high), dy_left = clamp_to(-dy_of_right, low, high);
    const float right = fmaf(slope, dy_right, inv_a * sqrt_approx(fmaxf(0.f, a_level - det * dy_right * dy_right)));
    const float left = fmaf(slope, dy_left, -inv_a * sqrt_approx(fmaxf(0.f, a_level - det * dy_left * dy_left)));
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      const float from = x + float(column * kCellWidth);
      // Written so that NaN counts as reached.
      if (!(left - slack > from + float(kCellWidth - 1)) && !(right + slack < from)) {
        reached |= 1u << (row * kCellsPerSide + column);
      }
    }
  }
  return reached;
}

}  // namespace rapfast
