// Stage 2, color: the colour of every record, from spherical harmonics or as given.
#pragma once

#include "cuda/scratch_types.h"
#include "math/gaussian.h"

namespace rapfast {

enum class DepthChannel : int32_t {
  kNone = 0,
  kAppended = 1,  // after the colour channels
  kOnly = 2,      // no colours at all
};

template <typename T>
struct ColorParams {
  int64_t n_scenes;      // B
  int64_t n_cameras;     // C, of each scene
  int64_t n_gaussians;   // N, of each scene
  int64_t capacity;      // rows of records and record_colors; M may not exceed it
  int32_t width, height; // pixels
  int32_t sh_degree;     // -1: colours are given
  int64_t n_bases;       // K, stored SH bases per Gaussian (at least (sh_degree + 1)^2)
  int64_t n_channels;    // D, colour channels (3 with SH)
  bool per_camera;       // colours have a camera dimension
  bool shared;           // without it: all scenes have the same colours
  DepthChannel depth_channel;

  const T* means;         // [B, N, 3]
  const T* viewmats;      // [B, C, 4, 4]
  const T* Ks;            // [B, C, 3, 3]
  const T* colors;        // [B, (C,) N, D] or [B, (C,) N, K, 3]; B is 1 where they are shared
  const int32_t* gaussian_ids;   // [M]
  const int64_t* image_offsets;  // [I + 1]

  // A record whose colour is not finite gets opacity 0 and is counted: this is the last stage that
  // may take a record out.
  Record<T>* records;   // [M]
  T* record_colors;     // [M, color_stride] output: the first D' = D, D + 1 or 1 by depth_channel
  int64_t color_stride;  // at least D'; on the GPU a multiple of 4 from D' = 3 on
  int64_t* n_invalid;   // [I] added to
};

template <typename T>
RAPFAST_HD int64_t output_channels(const ColorParams<T>& p) {
  if (p.depth_channel == DepthChannel::kOnly) return 1;
  return p.n_channels + (p.depth_channel == DepthChannel::kAppended ? 1 : 0);
}

// Which of the colours' sets of N an image takes.
template <typename T>
RAPFAST_HD int64_t color_set(const ColorParams<T>& p, int64_t image) {
  if (p.per_camera) return image;
  return p.shared ? 0 : image / p.n_cameras;
}

template <typename T>
void color_cpu(const ColorParams<T>& params, int threads);

#if RAPFAST_WITH_CUDA
// The colours of records that are there already.
void color_cuda(const ColorParams<float>& params, const DeviceView* views, const int32_t* image_ids,
                cudaStream_t stream);
#endif

}  // namespace rapfast
