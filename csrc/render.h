// All stages of one call on the GPU, queued by one native call.
#pragma once

#include <algorithm>
#include <array>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "bin.h"
#include "blend.h"
#include "color.h"
#include "color_net.h"
#include "composite.h"
#include "cuda/scratch.h"
#include "project.h"

#if RAPFAST_WITH_CUDA

namespace rapfast {

struct RenderSizes {
  int64_t n_scenes, n_cameras, n_gaussians;
  int32_t width, height;
  int64_t n_channels;         // blended channels, depth included
  int64_t record_capacity;    // below 2^31
  int64_t capacity;           // pairs of tiles, or of regions, and records; below 2^31
  bool keep_state;            // for a backward pass: tile lists, colours and per-pixel state too
  // The rows of tiles that are drawn; all: 0 and ceil(height / 16). Images and what is kept per tile or
  // pixel hold these rows alone, so that a view may be drawn in bands.
  int32_t first_tile_row, n_tile_rows;

  // Rows of pixels in them.
  int32_t rows() const {
    return std::min(kTileSize * n_tile_rows, height - kTileSize * first_tile_row);
  }
};

// Offsets in bytes of the parts of a call's state: what meta shows and, from tile_offsets on and with
// keep_state alone, what a backward pass needs besides. `views` are DeviceViews [I], ballots and word_bases as
// ProjectScratch has them.
struct StateLayout {
  int64_t status, n_visible, n_invalid, image_offsets, records, radii, gaussian_ids, tile_offsets, order,
      tile_records, record_colors, views, ballots, word_bases, transmittances, last_ids, size;
};

// How much a call wanted, and whether there was less room: int64 [3] on the device.
struct RenderStatus {
  Counts counts;
  int64_t overflowed;  // 0 or 1; written by calls with fixed room alone
};

int64_t color_stride(int64_t n_channels);
StateLayout state_layout(const RenderSizes& sizes);
int64_t scratch_size(const RenderSizes& sizes);  // bytes

class FrontGraphs;

struct RenderParams {
  RenderSizes sizes;
  ProjectParams<float> project;   // inputs, options and n_invalid
  ColorParams<float> color;       // likewise
  bool with_net;                  // colours come from `net`, whose part `color` is the one above
  ColorNetParams<float> net;      // its `views` are on the host, and read before render_cuda returns
  float alpha_cap;
  CompositeParams<float> composite;
  bool with_composite;
  char* state;     // [state_layout(sizes).size]
  char* scratch;   // [scratch_size(sizes)]
  // [6] events on the host, or null: recorded before the first stage and after each, for benchmarks. The
  // stages run in the order project (with colours, where colors_with_projection), bin, color, blend, composite.
  const cudaEvent_t* stage_events;
  // The room is what it is: nothing is read back, so that the call may be captured in a CUDA graph, and
  // where a count exceeds its capacity the outputs are NaN (integers 0) instead of incomplete.
  bool fixed_room;
  // With fixed_room, or null: the largest status since the caller cleared it, on the device.
  RenderStatus* worst;
  FrontGraphs* graphs;  // of earlier calls with these sizes and options, or null
};

struct RenderOutputs {
  float* colors;      // [I, sizes.rows(), W, D] blended
  float* alphas;      // [I, sizes.rows(), W]
  void* images;       // [I, h, w, D] or [I, D, h, w] with_composite
  float* out_alphas;  // [I, h, w] with_composite
};

// The stages up to bin as CUDA graphs, one for each set of addresses that calls come with again and again:
// in a loop the scene is the same, and the allocator hands out the same blocks in turn. A graph is launched
// in 6 us where its kernels take 3 each, and leaves shorter gaps between them. The kernels and so the
// bits are the same.
class FrontGraphs {
 public:
  using Key = std::array<const void*, 8>;
  using Arguments = std::array<const void*, 3>;

  FrontGraphs();
  ~FrontGraphs();
  FrontGraphs(const FrontGraphs&) = delete;
  FrontGraphs& operator=(const FrontGraphs&) = delete;

  // Launches the graph of `key` on `stream`, and returns whether there is one. `queue(stream)` queues the
  // kernels; once the key has come often enough they become a graph, of which `update(graph, node)` changes
  // the first kernel's arguments, which are `arguments`, where the last launch had others.
  bool launch(const Key& key, const Arguments& arguments, cudaStream_t stream,
              const std::function<void(cudaGraphExec_t, cudaGraphNode_t)>& update,
              const std::function<void(cudaStream_t)>& queue);

  int64_t count();  // of graphs

 private:
  struct Entry;
  std::mutex mutex_;
  std::vector<Entry> entries_;  // the last used one last
};

// One call on `stream` of `device`. It comes in two parts, so that the GPU has begun while the caller
// allocates what only the second one needs.
class RenderCall {
 public:
  // Queues all stages up to bin.
  RenderCall(const RenderParams& params, int device, cudaStream_t stream);

  // Queues the others.
  //
  // Without fixed_room returns the counts of records and room for pairs wanted, as soon as they are on the
  // host, which is while the blend still runs. Where one exceeds its capacity the images are incomplete and
  // the caller comes again with more room. With fixed_room returns at once, with counts of -1.
  HostCounts finish(const RenderOutputs& outputs);

  ~RenderCall();
  RenderCall(const RenderCall&) = delete;
  RenderCall& operator=(const RenderCall&) = delete;

 private:
  struct Parts;
  std::unique_ptr<Parts> parts_;
};

// Memory to overwrite where a call had too little room.
struct PoisonSpan {
  void* begin;
  int64_t bytes;
  uint32_t pattern;  // repeated from the begin on
};

constexpr int kMaxPoisonSpans = 8;

struct OverflowParams {
  RenderStatus* status;
  RenderStatus* worst;  // or null
  int64_t record_capacity, capacity;
  int32_t n_spans;
  PoisonSpan spans[kMaxPoisonSpans];
};

// Sets status->overflowed by the counts beside it, and where it is 1 writes the spans.
void overflow_cuda(const OverflowParams& params, cudaStream_t stream);

}  // namespace rapfast

#endif
