// Backward of stage 2, color: from gradients of the records' colours to those of colours or
// coefficients, and through the direction of the harmonics to means and cameras.
#pragma once

#include "color.h"

namespace rapfast {

template <typename T>
struct ColorBwdParams {
  int64_t n_scenes;      // B
  int64_t n_cameras;     // C, of each scene
  int64_t n_gaussians;   // N, of each scene
  int32_t sh_degree;     // -1: colours are given
  int64_t n_bases;       // K, stored SH bases per Gaussian
  int64_t n_channels;    // D, colour channels (3 with SH)
  bool per_camera;       // colours have a camera dimension
  DepthChannel depth_channel;

  const T* means;         // [B, N, 3]
  const T* viewmats;      // [B, C, 4, 4]
  const T* colors;        // [B, (C,) N, D] or [B, (C,) N, K, 3]
  const int32_t* gaussian_ids;   // [M]
  const int64_t* image_offsets;  // [I + 1]
  const Record<T>* records;      // [M] opacity 0: the forward pass took the record out
  const T* v_record_colors;      // [M, color_stride] the first D' = D, D + 1 or 1 by depth_channel
  int64_t color_stride;

  // Outputs, every number of them written; null where not wanted.
  T* v_means;     // [B, N, 3], with SH
  T* v_viewmats;  // [B, C, 4, 4], with SH
  T* v_colors;    // as colors; 0 for what no view sees
  T* v_depths;    // [M], with a depth channel
};

template <typename T>
void color_bwd_cpu(const ColorBwdParams<T>& params, int threads);

}  // namespace rapfast
