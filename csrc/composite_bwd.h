// Backward of stage 5, composite: from gradients of finished images to those of blended ones.
#pragma once

#include "composite.h"

namespace rapfast {

template <typename T>
struct CompositeBwdParams {
  int64_t n_images;            // I
  int32_t width, height;       // of the blended images
  int32_t out_width, out_height;
  int64_t n_channels;          // D, depth included
  int64_t n_color_channels;    // Dc, the first ones
  bool expected_depth;
  bool clamp;
  bool channels_first;         // v_out is [I, D, h, w]
  T clamp_min, clamp_max;
  BackgroundKind background_kind;

  const T* colors;       // [I, H, W, D] as blended
  const T* alphas;       // [I, H, W]
  const T* backgrounds;  // [I, Dc] or [I, H, W, Dc]
  const T* std;          // [Dc] or null
  const T* v_out;        // [I, h, w, D] or [I, D, h, w]
  const T* v_out_alphas; // [I, h, w]

  // Outputs, every number of them written.
  T* v_colors;       // [I, H, W, D]
  T* v_alphas;       // [I, H, W]
  T* v_backgrounds;  // as backgrounds, or null
};

template <typename T>
void composite_bwd_cpu(const CompositeBwdParams<T>& params, int threads);

}  // namespace rapfast
