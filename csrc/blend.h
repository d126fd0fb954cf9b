// Stage 4, blend: front-to-back compositing of each tile's records into its pixels.
#pragma once

#include "cuda/scratch_types.h"
#include "math/gaussian.h"

namespace rapfast {

template <typename T>
struct BlendParams {
  int64_t n_images;          // I
  int32_t width, height;     // pixels
  int32_t tiles_x, tiles_y;  // of what is drawn
  // Where the GPU draws an image in bands: the row of tiles that the band begins with. Lists and outputs are
  // those of the band, tiles_y rows of tiles, alone. The CPU draws whole images.
  int32_t first_tile_row = 0;
  int64_t n_channels;        // D, depth included
  T alpha_cap;               // keeps 1 / (1 - alpha) finite in the backward pass

  const Record<T>* records;      // [M]
  const T* record_colors;        // [M, color_stride]
  int64_t color_stride;          // at least D; on the GPU a multiple of 4 from D = 3 on
  const int64_t* image_offsets;  // [I + 1]
  const int64_t* tile_offsets;   // [I * tiles_y * tiles_x + 1]
  const int32_t* tile_records;   // [n] relative to the image's first record

  // The order in which the GPU takes the tiles, as BinParams has it; or, where nothing is kept of pixels, null.
  const uint32_t* order = nullptr;
  bool in_halves = false;  // with an order: long lists are drawn by two blocks

  T* colors;  // [I, H, W, D] output: sum of weight x colour, no background
  T* alphas;  // [I, H, W] output: 1 - final transmittance
};

template <typename T>
void blend_cpu(const BlendParams<T>& params, int threads);

#if RAPFAST_WITH_CUDA
// Halves pay where long lists are very long, of this many pairs in a call, and other tiles too few to fill the GPU.
constexpr int64_t kHalvedCapacity = 2 << 20, kHalvedTiles = 12 << 10;

// With last_ids, also the final transmittance [I, H, W] of each pixel and the place of its last
// record in the tile's list (-1: none): where a backward pass starts.
void blend_cuda(const BlendParams<float>& params, float* transmittances, int32_t* last_ids,
                cudaStream_t stream);

#endif

}  // namespace rapfast
