// Stage 1, project: every Gaussian into every camera; only the visible pairs go on, as records.
#pragma once

#include "color.h"
#include "cuda/scratch_types.h"
#include "math/gaussian.h"

namespace rapfast {

// An image is a (scene, camera) pair: image i = scene * n_cameras + camera; there are
// I = n_scenes * n_cameras of them. M = image_offsets[I] is the number of records.
template <typename T>
struct ProjectParams {
  int64_t n_scenes;     // B
  int64_t n_cameras;    // C, of each scene
  int64_t n_gaussians;  // N, of each scene
  int64_t capacity;     // records there is room for
  ProjectOptions<T> options;

  const T* means;      // [B, N, 3]
  const T* quats;      // [B, N, 4] wxyz of any norm; null where covars are given
  const T* scales;     // [B, N, 3]; null where covars are given
  const T* covars;     // [B, N, 3, 3], upper triangle read; null where quats and scales are given
  const T* opacities;  // [B, N]
  const T* viewmats;   // [B, C, 4, 4] world to camera
  const T* Ks;         // [B, C, 3, 3]

  // Outputs. Records are ordered by image, then by Gaussian. Where M > capacity nothing but the
  // offsets and counts is written: the caller comes again with room for M.
  Record<T>* records;      // [capacity]
  int32_t* radii;          // [capacity, 2]
  int32_t* gaussian_ids;   // [capacity] index within the scene
  int64_t* image_offsets;  // [I + 1] first record of each image
  int64_t* n_invalid;      // [I] Gaussians culled because they are non-finite or degenerate
};

template <typename T>
void project_cpu(const ProjectParams<T>& params, int threads);

#if RAPFAST_WITH_CUDA
constexpr int64_t kMaxProjectedChannels = 4;

// Whether project_cuda can make these colours too: spherical harmonics, few given channels, or depth alone.
inline bool colors_with_projection(const ProjectOptions<float>& options, const ColorParams<float>& color) {
  return options.camera_model != CameraModel::kFisheye &&
         (color.depth_channel == DepthChannel::kOnly || color.sh_degree >= 0 ||
          color.n_channels <= kMaxProjectedChannels);
}

// Cameras [I] as the kernels want them.
void views_cuda(const float* viewmats, const float* Ks, int64_t n_images,
                const ProjectOptions<float>& options, DeviceView* views, cudaStream_t stream);

// Made of each record while it is at hand, or null.
struct ProjectExtras {
  const ColorParams<float>* color;  // its colour; colors_with_projection must take it
  const TileBoxes* boxes;           // what the binning needs to know of it
  ClearedMemory cleared;            // of later stages: the first kernel sets it to 0
};

// Writes views and image ids of the scratch for later stages, and counts->n_records.
void project_cuda(const ProjectParams<float>& params, const ProjectScratch& scratch, Counts* counts,
                  const ProjectExtras& extras, cudaStream_t stream);
#endif

}  // namespace rapfast
