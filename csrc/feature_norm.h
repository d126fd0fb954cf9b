// What RAP's feature-map network does between its convolutions, in half precision and channels last:
// [n_images, n_pixels, channels], a pixel's channels side by side. The convolutions are torch's.
// An image's bits do not depend on the images beside it.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace rapfast {

// The norm of each image's channel over its pixels: y = (x - mean) * scale + bias.
// channels is 64, 128, 256 or 512 wherever a norm is involved.
struct MapStatsParams {
  int64_t n_images;
  int64_t n_pixels;
  int32_t channels;
  float eps;
  const void* x;        // half [n_images, n_pixels, channels]
  const float* weight;  // [channels]
  const float* bias;    // [channels]
  void* copy;           // null, or half [n_images, n_pixels, copy_pitch]: receives x as it is
  int64_t copy_pitch;   // in numbers
  void* scratch;        // [n_images] of kMapStatsScratch bytes; the first 4 are 0 before and after each call
  // out [n_images, 3, channels]: mean, scale = weight / sqrt(biased variance + eps), bias
  float* norm;
};

constexpr size_t kMapStatsScratch = 16 + 128 * 64 * 2 * sizeof(float);

// y = max(norm(x) + residual, 0), the residual normed by its own statistics where they are given.
struct MapNormParams {
  int64_t n_images;
  int64_t n_pixels;
  int32_t channels;
  const void* x;               // half [n_images, n_pixels, channels]
  const float* norm;           // [n_images, 3, channels]
  const void* residual;        // null or as x
  const float* residual_norm;  // null or as norm
  void* y;                     // as x
  void* copy;                  // null, or half [n_images, n_pixels, copy_pitch]: receives y too
  int64_t copy_pitch;
};

// y = 3x3 maximum, stride 2, padding 1, of max(norm(x), 0): [h, w] to [ceil(h/2), ceil(w/2)].
struct MapPoolParams {
  int64_t n_images;
  int32_t height, width;  // of x
  int32_t channels;
  const void* x;          // half [n_images, height, width, channels]
  const float* norm;      // [n_images, 3, channels]
  void* y;                // half [n_images, ceil(height/2), ceil(width/2), channels]
};

// y(i, j) = x(i / factor, j / factor, (i % factor) * factor + j % factor) + bias: the second half of
// a transposed convolution whose stride is its size, cropped. Factor 1 adds a bias and copies.
struct MapUnfoldParams {
  int64_t n_images;
  int32_t factor;
  int32_t in_height, in_width;  // of x
  int32_t height, width;        // of y
  int32_t channels;             // a multiple of 8
  const void* x;                // half [n_images, in_height, in_width, factor^2, channels]
  const float* bias;            // [channels]
  void* y;                      // half [n_images, height, width, pitch]; the first `channels` are written
  int64_t pitch;
};

void map_stats_cuda(const MapStatsParams& params, cudaStream_t stream);
void map_norm_cuda(const MapNormParams& params, cudaStream_t stream);
void map_pool_cuda(const MapPoolParams& params, cudaStream_t stream);
void map_unfold_cuda(const MapUnfoldParams& params, cudaStream_t stream);

}  // namespace rapfast
