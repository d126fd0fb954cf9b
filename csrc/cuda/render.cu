#include "../render.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <optional>
#include <vector>

#include "check.cuh"
#include "scratch.h"

namespace rapfast {
namespace {

static_assert(sizeof(RenderStatus) == 3 * sizeof(int64_t), "rapfast/ops/render.py reads three numbers");

constexpr int64_t kOrderedCapacity = 4 << 20;  // intersections from which tiles with long lists are drawn first

struct Scratch {
  ProjectScratch project;
  BinScratch bin;
  NetView* net_views;  // [I]
  uint32_t* tile_order;
  // Where the state does not keep them.
  int64_t* tile_offsets;
  int32_t* tile_records;
  float* record_colors;
  int64_t size;
};

int64_t tile_columns(const RenderSizes& s) { return (s.width + kTileSize - 1) / kTileSize; }

int64_t all_tiles(const RenderSizes& s) {
  return s.n_scenes * s.n_cameras * tile_columns(s) * s.n_tile_rows;
}

Scratch lay_out(const RenderSizes& s, void* base) {
  Arena arena(base);
  Scratch scratch{};
  scratch.net_views = arena.take<NetView>(s.n_scenes * s.n_cameras);
  scratch.project =
      project_scratch(arena, s.n_scenes * s.n_cameras, s.n_gaussians, s.record_capacity);
  scratch.bin = bin_scratch(arena, s.record_capacity, s.capacity);
  scratch.tile_order = arena.take<uint32_t>(all_tiles(s) + 2);
  if (!s.keep_state) {
    scratch.tile_offsets = arena.take<int64_t>(all_tiles(s) + 1);
    scratch.tile_records = arena.take<int32_t>(s.capacity);
    scratch.record_colors = arena.take<float>(color_stride(s.n_channels) * s.record_capacity);
  }
  scratch.size = arena.size();
  return scratch;
}

// A kernel writes them to the host: a copy is another engine's work, whose turn kept the next kernel waiting
// for 8 us.
__global__ void publish_kernel(const Counts* counts, Counts* to) { *to = *counts; }

// Where the counts of a call arrive: page-locked memory and an event. Making them costs more than all
// else here, so calls that have ended leave theirs to later ones of any thread.
struct Mailbox {
  cudaEvent_t arrived;
  Counts* counts;
};

class MailboxLoan {
 public:
  explicit MailboxLoan(int device) : device_(device) {
    {
      std::lock_guard<std::mutex> lock(mutex());
      std::vector<Mailbox>& free = free_of(device);
      if (!free.empty()) {
        box_ = free.back();
        free.pop_back();
        return;
      }
    }
    check(cudaEventCreateWithFlags(&box_.arrived, cudaEventDisableTiming), "cudaEventCreate");
    check(cudaMallocHost(&box_.counts, sizeof(Counts)), "cudaMallocHost");
  }
  ~MailboxLoan() {
    // After an error counts may still be on their way into it: it serves no other call.
    if (under_way_) return;
    std::lock_guard<std::mutex> lock(mutex());
    free_of(device_).push_back(box_);
  }

  // Queues the counts on their way to the host.
  void post(const Counts* counts, cudaStream_t stream) {
    under_way_ = true;
    publish_kernel<<<1, 1, 0, stream>>>(counts, box_.counts);
    check_launch("publish_kernel");
    check(cudaEventRecord(box_.arrived, stream), "cudaEventRecord");
  }

  // Waits for what was posted.
  Counts read() {
    check(cudaEventSynchronize(box_.arrived), "rendering");
    under_way_ = false;
    return *box_.counts;
  }

  MailboxLoan(const MailboxLoan&) = delete;
  MailboxLoan& operator=(const MailboxLoan&) = delete;

 private:
  // Never destroyed: a call may be under way while the process exits.
  static std::mutex& mutex() {
    static std::mutex* const m = new std::mutex;
    return *m;
  }
  static std::vector<Mailbox>& free_of(int device) {
    static auto* const free = new std::map<int, std::vector<Mailbox>>;
    return (*free)[device];
  }

  int device_;
  bool under_way_ = false;
  Mailbox box_{};
};

// Views of a colour network travel as kernel arguments: no host memory that must outlive the call, and a
// graph that captures the launch keeps them.
constexpr int kViewsPerLaunch = 128;

struct ViewChunk {
  NetView views[kViewsPerLaunch];
};

__global__ void store_views_kernel(const __grid_constant__ ViewChunk chunk, int count, NetView* to) {
  if (int(threadIdx.x) < count) to[threadIdx.x] = chunk.views[threadIdx.x];
}

void store_views(const NetView* views, int64_t count, NetView* to, cudaStream_t stream) {
  static_assert(sizeof(ViewChunk) < 4000, "kernel arguments hold 4 KB");
  for (int64_t first = 0; first < count; first += kViewsPerLaunch) {
    ViewChunk chunk;
    const int n = int(std::min<int64_t>(kViewsPerLaunch, count - first));
    std::copy(views + first, views + first + n, chunk.views);
    store_views_kernel<<<1, kViewsPerLaunch, 0, stream>>>(chunk, n, to + first);
    check_launch("store_views_kernel");
  }
}

uint32_t nan_of(PixelType type) {
  switch (type) {
    case PixelType::kFloat16: return 0x7e007e00u;
    case PixelType::kUint8: return 0;
    default: return 0x7fc00000u;
  }
}

int64_t bytes_of(PixelType type) {
  switch (type) {
    case PixelType::kFloat16: return 2;
    case PixelType::kUint8: return 1;
    default: return 4;
  }
}

// All that a caller may read of a call without knowing its counts.
OverflowParams poison_of(const RenderParams& params, const StateLayout& layout) {
  const RenderSizes& s = params.sizes;
  const CompositeParams<float>& c = params.composite;
  const int64_t n_images = s.n_scenes * s.n_cameras;
  const uint32_t nan = nan_of(PixelType::kFloat32);
  OverflowParams p{};
  p.status = reinterpret_cast<RenderStatus*>(params.state + layout.status);
  p.worst = params.worst;
  p.record_capacity = s.record_capacity;
  p.capacity = s.capacity;
  const auto add = [&](void* begin, int64_t bytes, uint32_t pattern) {
    if (begin != nullptr && bytes > 0) p.spans[p.n_spans++] = {begin, bytes, pattern};
  };
  if (params.with_composite) {
    const int64_t pixels = n_images * c.out_height * c.out_width;
    add(c.out, pixels * s.n_channels * bytes_of(c.pixel_type), nan_of(c.pixel_type));
    add(c.out_alphas, 4 * pixels, nan);
  } else {
    const int64_t pixels = n_images * s.rows() * s.width;
    add(params.colors, 4 * pixels * s.n_channels, nan);
    add(params.alphas, 4 * pixels, nan);
  }
  // The lists are empty.
  add(params.state + layout.n_invalid, layout.records - layout.n_invalid, 0);
  add(params.state + layout.tile_offsets, layout.tile_records - layout.tile_offsets, 0);
  add(params.state + layout.transmittances, layout.last_ids - layout.transmittances, nan);
  add(params.state + layout.last_ids, layout.size - layout.last_ids, 0);
  return p;
}

}  // namespace

int64_t color_stride(int64_t n_channels) {
  return n_channels < 3 ? n_channels : (n_channels + 3) / 4 * 4;
}

StateLayout state_layout(const RenderSizes& s) {
  const int64_t n_images = s.n_scenes * s.n_cameras;
  int64_t at = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t begin = at;
    at += (bytes + 255) / 256 * 256;
    return begin;
  };
  StateLayout l;
  l.status = take(int64_t(sizeof(RenderStatus)));
  l.n_invalid = take(8 * n_images);
  l.image_offsets = take(8 * (n_images + 1));
  l.records = take(int64_t(sizeof(Record<float>)) * s.record_capacity);
  l.radii = take(8 * s.record_capacity);
  l.gaussian_ids = take(4 * s.record_capacity);
  const int64_t kept = s.keep_state ? 1 : 0, pixels = n_images * s.rows() * s.width;
  l.tile_offsets = take(kept * 8 * (all_tiles(s) + 1));
  l.tile_records = take(kept * 4 * s.capacity);
  l.record_colors = take(kept * 4 * color_stride(s.n_channels) * s.record_capacity);
  l.transmittances = take(kept * 4 * pixels);
  l.last_ids = take(kept * 4 * pixels);
  l.size = at;
  return l;
}

int64_t scratch_size(const RenderSizes& sizes) { return lay_out(sizes, nullptr).size; }

Counts render_cuda(const RenderParams& params, int device, cudaStream_t stream) {
  const DeviceGuard guard(device);
  const RenderSizes& sizes = params.sizes;
  const int64_t n_images = sizes.n_scenes * sizes.n_cameras;
  const int32_t tiles_x = int32_t(tile_columns(sizes));
  const StateLayout layout = state_layout(sizes);
  const Scratch scratch = lay_out(sizes, params.scratch);
  const auto part = [&](int64_t offset) { return static_cast<void*>(params.state + offset); };
  Counts* const counts = &static_cast<RenderStatus*>(part(layout.status))->counts;

  int next_event = 0;
  const auto mark = [&] {
    if (params.stage_events == nullptr) return;
    check(cudaEventRecord(params.stage_events[next_event++], stream), "cudaEventRecord");
  };
  mark();

  ProjectParams<float> project = params.project;
  project.capacity = sizes.record_capacity;
  project.records = static_cast<Record<float>*>(part(layout.records));
  project.radii = static_cast<int32_t*>(part(layout.radii));
  project.gaussian_ids = static_cast<int32_t*>(part(layout.gaussian_ids));
  project.image_offsets = static_cast<int64_t*>(part(layout.image_offsets));
  project.n_invalid = static_cast<int64_t*>(part(layout.n_invalid));
  project_cuda(project, scratch.project, counts, stream);
  mark();

  ColorParams<float> color = params.color;
  color.capacity = sizes.record_capacity;
  color.gaussian_ids = project.gaussian_ids;
  color.image_offsets = project.image_offsets;
  color.records = project.records;
  color.record_colors =
      sizes.keep_state ? static_cast<float*>(part(layout.record_colors)) : scratch.record_colors;
  color.color_stride = color_stride(sizes.n_channels);
  color.n_invalid = project.n_invalid;
  if (params.with_net && color.depth_channel != DepthChannel::kOnly) {
    ColorNetParams<float> net = params.net;
    net.color = color;
    store_views(params.net.views, n_images, scratch.net_views, stream);
    net.views = scratch.net_views;
    color_net_cuda(net, scratch.project.views, scratch.project.image_ids, stream);
  } else {
    color_cuda(color, scratch.project.views, scratch.project.image_ids, stream);
  }
  mark();

  BinParams<float> bin;
  bin.n_images = n_images;
  bin.tiles_x = tiles_x;
  bin.tiles_y = sizes.n_tile_rows;
  bin.first_tile_row = sizes.first_tile_row;
  bin.record_capacity = sizes.record_capacity;
  bin.capacity = sizes.capacity;
  bin.records = project.records;
  bin.radii = project.radii;
  bin.image_offsets = project.image_offsets;
  bin.tile_offsets =
      sizes.keep_state ? static_cast<int64_t*>(part(layout.tile_offsets)) : scratch.tile_offsets;
  bin.tile_records =
      sizes.keep_state ? static_cast<int32_t*>(part(layout.tile_records)) : scratch.tile_records;
  bin_cuda(bin, scratch.bin, scratch.project.image_ids, counts, stream);
  mark();

  std::optional<MailboxLoan> mailbox;
  if (!params.fixed_room) mailbox.emplace(device).post(counts, stream);

  BlendParams<float> blend;
  blend.n_images = n_images;
  blend.width = sizes.width;
  blend.height = sizes.height;
  blend.tiles_x = tiles_x;
  blend.tiles_y = sizes.n_tile_rows;
  blend.first_tile_row = sizes.first_tile_row;
  blend.n_channels = sizes.n_channels;
  blend.alpha_cap = params.alpha_cap;
  blend.records = project.records;
  blend.record_colors = color.record_colors;
  blend.color_stride = color.color_stride;
  blend.image_offsets = project.image_offsets;
  blend.tile_offsets = bin.tile_offsets;
  blend.tile_records = bin.tile_records;
  // In small calls the kernels that find the order cost more than it saves.
  if (sizes.capacity >= kOrderedCapacity) blend.order = scratch.tile_order;
  blend.colors = params.colors;
  blend.alphas = params.alphas;
  blend_cuda(blend, static_cast<float*>(part(layout.transmittances)),
             sizes.keep_state ? static_cast<int32_t*>(part(layout.last_ids)) : nullptr, stream);
  mark();
  if (params.with_composite) composite_cuda(params.composite, stream);
  mark();

  if (params.fixed_room) {
    overflow_cuda(poison_of(params, layout), stream);
    return {-1, -1};
  }
  return mailbox->read();
}

}  // namespace rapfast
