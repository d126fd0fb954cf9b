// Backward of stage 4, blend: from gradients of images to those of records and their colours.
#pragma once

#include "blend.h"

namespace rapfast {

template <typename T>
struct BlendBwdParams {
  int64_t n_images;          // I
  int32_t width, height;     // pixels
  int32_t tiles_x, tiles_y;
  int64_t n_channels;        // D, depth included
  T alpha_cap;

  const Record<T>* records;      // [M] as blended
  const T* record_colors;        // [M, color_stride]
  int64_t color_stride;          // also of v_record_colors
  const int64_t* image_offsets;  // [I + 1]
  const int64_t* tile_offsets;   // [I * tiles_y * tiles_x + 1]
  const int32_t* tile_records;   // [n] relative to the image's first record

  const T* v_colors;  // [I, H, W, D]
  const T* v_alphas;  // [I, H, W]

  // Outputs, every number of them written.
  Record<T>* v_records;  // [M] depth and compensation 0: the blend does not read them
  T* v_record_colors;    // [M, color_stride]
  T* v_means2d_abs;      // [M, 2] sum over pixels of |gradient of (x, y)|, or null
};

// Starts from what the forward pass was given and nothing it found: it draws each tile again.
template <typename T>
void blend_bwd_cpu(const BlendBwdParams<T>& params, int threads);

}  // namespace rapfast
