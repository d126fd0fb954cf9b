// Backward of a call on the GPU, from the state that render_cuda() kept: from gradients of blended images to those of
// records (blend_bwd), and from these to those of Gaussians, colours and cameras (color_bwd, project_bwd).
#pragma once

#include "color_bwd.h"
#include "composite_bwd.h"
#include "project_bwd.h"
#include "render.h"

#if RAPFAST_WITH_CUDA

namespace rapfast {

// A record's gradient on the GPU is a row of numbers: conic (3), opacity, then its colour's, padded to four. That of
// its mean lies in the layout of means2d, since it is a tensor of its own that others may look at or change.
constexpr int kRowColor = 4;
RAPFAST_HD int64_t row_stride(int64_t n_channels) { return kRowColor + (n_channels + 3) / 4 * 4; }

// Where the records of a call are in means2d: at image * N + Gaussian, or (packed) at `places`.
struct Means2dLayout {
  int64_t n_gaussians;
  const int32_t* gaussian_ids;  // [M]
  const int32_t* places;        // [M] -1 for the dead ones; null: dense
  const int32_t* radii;         // [M, 2] 0 for the dead ones
};

// The means of visible records as a tensor: dense [I, N, 2], zero at first, or packed [n_visible, 2] with the
// places [M] that blend and backward will want.
struct Means2dParams {
  int64_t n_images, n_gaussians, n_records;
  const Record<float>* records;  // [M]
  const int32_t* radii;          // [M, 2]
  const int32_t* gaussian_ids;   // [M]
  const int64_t* image_offsets;  // [I + 1]
  float* means2d;
  int32_t* places;               // [M] output, or null: dense
  uint32_t* scratch;             // [means2d_chunks(M)] where packed
};

int64_t means2d_chunks(int64_t n_records);
void means2d_cuda(const Means2dParams& params, cudaStream_t stream);

// How sums over (tile, record) pairs are made. kAtomic: floats are added in any order. Deterministic sums take two
// runs: kMeasure finds the largest exponent of each sum's terms, kFixed adds integers scaled by it.
enum class SumKind : int32_t { kAtomic = 0, kMeasure = 1, kFixed = 2 };

struct BlendBwdCudaParams {
  int64_t n_images;
  int32_t width, height, tiles_x, tiles_y;
  int64_t n_channels, n_intersections, n_records;
  float alpha_cap;
  const Record<float>* records;    // [M]
  const float* record_colors;      // [M, color_stride]
  int64_t color_stride;
  const int64_t* image_offsets;    // [I + 1]
  const int64_t* tile_offsets;     // [I * tiles + 1]
  const int32_t* tile_records;     // [n]
  const float* transmittances;     // [I, H, W]
  const int32_t* last_ids;         // [I, H, W]
  const float* v_colors;           // [I, H, W, D] or null: 0
  const float* v_alphas;           // [I, H, W] or null: 0
  Means2dLayout layout;
  const uint32_t* order;           // of the tiles, as BinParams has it, or null

  // All are added to.
  float* rows;         // [M, row_stride(D)]
  float* v_means2d;    // in the layout of means2d
  float* absgrad;      // likewise: sum over pixels of |gradient of the mean|; or null

  // Deterministic sums, or null: zero at first, [M, fixed_stride(D)] each.
  int32_t* exponents;
  int64_t* fixed;
};

// Of rows with the mean's gradient and its absolute values behind.
RAPFAST_HD int64_t fixed_stride(int64_t n_channels) { return row_stride(n_channels) + 4; }

void blend_bwd_cuda(const BlendBwdCudaParams& params, cudaStream_t stream);

// What project_bwd and color_bwd read of a call: which views saw a Gaussian, and where its records are.
struct SeenBy {
  int64_t n_scenes, n_cameras, n_gaussians;
  const DeviceView* views;      // [I]
  const uint32_t* ballots;      // [I, n_words]
  const uint32_t* word_bases;   // [I, n_words]
};

// Gradients of records: `rows` (null: 0), the mean's in the layout of means2d (null: 0), and those that reached the
// records by another way than the blend, whose x and y are not read (null: 0).
struct RecordGradients {
  const float* rows;
  int64_t stride;
  int64_t depth_column;    // of rows; -1: none
  const float* v_means2d;
  Means2dLayout layout;
  const Record<float>* v_records;  // [M]
};

// Sums per image, of 16 numbers (project) or 3 (color), one row for each chunk of Gaussians.
struct ViewSums {
  float* project;  // [I, chunks, 16]: R, t, fx, fy, cx, cy; null: not wanted
  float* center;   // [I, chunks, 3]; null: no harmonics, or not wanted
};

int64_t seen_chunks(int64_t n_gaussians);

// `p` has no v_records, v_means2d, gaussian_ids and image_offsets here. Adds to v_means where `add_means`.
void project_bwd_cuda(const ProjectBwdParams<float>& p, const SeenBy& seen, const RecordGradients& gradients,
                      const ViewSums& sums, bool add_means, cudaStream_t stream);

// `p` has no records, v_record_colors, v_depths, gaussian_ids and image_offsets here.
void color_bwd_cuda(const ColorBwdParams<float>& p, const SeenBy& seen, const float* rows, int64_t stride,
                    const ViewSums& sums, cudaStream_t stream);

// Adds the chunks up in their order and makes the gradients of viewmats and Ks of them; either may be null.
void view_gradients_cuda(const SeenBy& seen, const ViewSums& sums, float* v_viewmats, float* v_Ks,
                         cudaStream_t stream);

// Partial sums of the gradients of background colours.
int64_t background_blocks(int64_t n_pixels);
void composite_bwd_cuda(const CompositeBwdParams<float>& params, float* scratch, cudaStream_t stream);

}  // namespace rapfast

#endif
