// Stage 5, composite: from blended colours to the image that was asked for, in one pass over its
// pixels: background, expected depth, clamp, bilinear resize, normalisation, dtype, layout.
#pragma once

#include "cuda/scratch_types.h"
#include "math/constants.h"

namespace rapfast {

enum class PixelType : int32_t { kSame = 0, kFloat32 = 1, kFloat16 = 2, kUint8 = 3 };
enum class BackgroundKind : int32_t { kNone = 0, kColor = 1, kImage = 2 };

template <typename T>
struct CompositeParams {
  int64_t n_images;            // I
  int32_t width, height;       // of the blended images
  int32_t out_width, out_height;
  int64_t n_channels;          // D, depth included
  int64_t n_color_channels;    // the first ones: what background, clamp and normalisation touch
  bool expected_depth;         // divide the last channel by alpha
  bool clamp;
  bool channels_first;         // [I, D, H, W] instead of [I, H, W, D]
  T clamp_min, clamp_max;
  BackgroundKind background_kind;
  PixelType pixel_type;        // of out; kSame is T

  const T* colors;       // [I, H, W, D]
  const T* alphas;       // [I, H, W]
  const T* backgrounds;  // [I, Dc] or [I, H, W, Dc]
  const T* mean;         // [Dc] or null: out = (colour - mean) / std
  const T* std;          // [Dc] or null

  void* out;      // [I, h, w, D] or [I, D, h, w]
  T* out_alphas;  // [I, h, w], or null
};

template <typename T>
void composite_cpu(const CompositeParams<T>& params, int threads);

#if RAPFAST_WITH_CUDA
void composite_cuda(const CompositeParams<float>& params, cudaStream_t stream);
#endif

}  // namespace rapfast
