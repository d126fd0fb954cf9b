// What all ways to colour do with a record.
#pragma once

#include "../color.h"
#include "../math/sh.h"
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

RAPFAST_HD constexpr int sh_floats(int degree) { return 3 * sh_bases(degree); }
RAPFAST_HD constexpr int sh_quads(int degree) { return (sh_floats(degree) + 3) / 4; }

// Whether rows of SH coefficients begin at 16 bytes. Then sh_quads of one may be read as float4.
__device__ __forceinline__ bool sh_rows_are_aligned(const ColorParams<float>& p) {
  return p.n_bases * 3 % 4 == 0;
}

// The colour in direction d; quad(i) gives coefficients 4 i to 4 i + 3 of the row.
template <int kDegree, typename Quad>
__device__ __forceinline__ void sh_color(const Vec3<float>& d, float* rgb, const Quad& quad) {
  float basis[sh_bases(kDegree)];
  sh_basis(kDegree, d, basis);
  float sum[3] = {0.f, 0.f, 0.f};
#pragma unroll
  for (int i = 0; i < sh_quads(kDegree); ++i) {
    const float4 four = quad(i);
    const float part[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int at = 4 * i + j;
      if (at < sh_floats(kDegree)) sum[at % 3] = __fmaf_rn(basis[at / 3], part[j], sum[at % 3]);
    }
  }
#pragma unroll
  for (int c = 0; c < 3; ++c) rgb[c] = sh_to_color(sum[c]);
}

// The same with the row in global memory.
template <int kDegree>
__device__ __forceinline__ void sh_color(const Vec3<float>& d, const float* row, bool aligned, float* rgb) {
  sh_color<kDegree>(d, rgb, [&](int i) {
    if (aligned) return __ldg(reinterpret_cast<const float4*>(row) + i);
    float part[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) part[j] = 4 * i + j < sh_floats(kDegree) ? __ldg(row + 4 * i + j) : 0.f;
    return make_float4(part[0], part[1], part[2], part[3]);
  });
}

}  // namespace rapfast
