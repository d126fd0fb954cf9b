// Backward of stage 1, project: from gradients of records to those of Gaussians and cameras.
#pragma once

#include "project.h"

namespace rapfast {

// M = image_offsets[I] records, in the order of the forward pass: by image, then by Gaussian.
template <typename T>
struct ProjectBwdParams {
  int64_t n_scenes;     // B
  int64_t n_cameras;    // C, of each scene
  int64_t n_gaussians;  // N, of each scene
  int32_t width, height;
  CameraModel camera_model;
  bool antialiased;
  bool dense_means2d;   // layout of v_means2d
  T eps2d;              // pixels^2

  const T* means;      // [B, N, 3]
  const T* quats;      // [B, N, 4]; null where covars are given
  const T* scales;     // [B, N, 3]; null where covars are given
  const T* covars;     // [B, N, 3, 3]; null where quats and scales are given
  const T* opacities;  // [B, N]
  const T* viewmats;   // [B, C, 4, 4]
  const T* Ks;         // [B, C, 3, 3]
  const int32_t* gaussian_ids;   // [M]
  const int64_t* image_offsets;  // [I + 1]

  // A record whose gradient is all 0 is skipped: dead rows of the GPU's records must have one.
  const Record<T>* v_records;  // [M]; x and y are not read where v_means2d is given
  const T* v_means2d;          // [M, 2], or dense [I, N, 2] read at the records' places; or null

  // Outputs, every number of them written; null where not wanted. Gaussians that no view sees get 0.
  T* v_means;      // [B, N, 3]
  T* v_quats;      // [B, N, 4]
  T* v_scales;     // [B, N, 3]
  T* v_covars;     // [B, N, 3, 3], 0 below the diagonal
  T* v_opacities;  // [B, N]
  T* v_viewmats;   // [B, C, 4, 4]
  T* v_Ks;         // [B, C, 3, 3]
};

template <typename T>
void project_bwd_cpu(const ProjectBwdParams<T>& params, int threads);

}  // namespace rapfast
