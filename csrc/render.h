// All stages of one call on the GPU, queued by one native call.
#pragma once

#include "bin.h"
#include "blend.h"
#include "color.h"
#include "color_net.h"
#include "composite.h"
#include "project.h"

#if RAPFAST_WITH_CUDA

namespace rapfast {

struct RenderSizes {
  int64_t n_scenes, n_cameras, n_gaussians;
  int32_t width, height;
  int64_t n_channels;         // blended channels, depth included
  int64_t record_capacity;    // below 2^31
  int64_t capacity;           // intersections, below 2^31
  bool keep_state;            // for a backward pass: per-pixel state too
};

// Offsets in bytes of the parts of a call's state: what meta shows and what a backward pass needs.
struct StateLayout {
  int64_t image_offsets, tile_offsets, records, radii, gaussian_ids, record_colors,
      tile_records, transmittances, last_ids, size;
};

int64_t color_stride(int64_t n_channels);
StateLayout state_layout(const RenderSizes& sizes);
int64_t scratch_size(const RenderSizes& sizes);  // bytes; needs a device only for CUB's queries

struct RenderParams {
  RenderSizes sizes;
  ProjectParams<float> project;   // inputs, options and n_invalid
  ColorParams<float> color;       // likewise
  bool with_net;                  // colours come from `net`, whose part `color` is the one above
  ColorNetParams<float> net;      // its `views` are on the host
  float alpha_cap;
  CompositeParams<float> composite;
  bool with_composite;
  float* colors;   // [I, H, W, D] blended
  float* alphas;   // [I, H, W]
  char* state;     // [state_layout(sizes).size]
  char* scratch;   // [scratch_size(sizes)]
  int64_t* counts; // [2] on the host: records and intersections wanted
  // [6] events on the host, or null: recorded before the first stage and after each, for benchmarks.
  const cudaEvent_t* stage_events;
};

// Queues everything on `stream` of `device` and returns as soon as the counts are on the host, which
// is while the blend still runs. Where a count exceeds its capacity the images are incomplete and
// the caller comes again with more room.
void render_cuda(const RenderParams& params, int device, cudaStream_t stream);

}  // namespace rapfast

#endif
