// What both ways to colour do with a record.
#pragma once

#include "../color.h"
#include "check.cuh"

namespace rapfast {

// A pair that passed the cheap frustum test and is not visible has no colour and counts nowhere.
__device__ __forceinline__ bool is_dead(const Record<float>& record) { return record.opacity == 0.f; }

// Takes the record out: nothing of it may be drawn, and 0 x NaN would still be NaN in the sums.
__device__ __forceinline__ void remove_record(const ColorParams<float>& p, int64_t m, int32_t image,
                                              float* out) {
  p.records[m].opacity = 0.f;
  for (int64_t d = 0; d < p.n_channels; ++d) out[d] = 0.f;
  add_to(p.n_invalid + image, 1);
}

// Writes the colour of record m and what stands beside it: its depth or padding.
__device__ __forceinline__ void write_rgb(const ColorParams<float>& p, int64_t m, int32_t image,
                                          const float* rgb) {
  float* out = p.record_colors + m * p.color_stride;
  for (int c = 0; c < 3; ++c) out[c] = rgb[c];
  if (!(is_finite(rgb[0]) && is_finite(rgb[1]) && is_finite(rgb[2]))) remove_record(p, m, image, out);
  out[3] = p.depth_channel == DepthChannel::kAppended ? p.records[m].depth : 0.f;
}

// Of a sum of spherical harmonics. What is not finite passes the clamp, to be seen.
__device__ __forceinline__ float sh_to_color(float sum) {
  const float v = sum + Constants<float>::kShOffset;
  return v < 0.f && is_finite(v) ? 0.f : v;
}

}  // namespace rapfast
