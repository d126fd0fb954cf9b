#include "../render.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <optional>
#include <vector>

#include "check.cuh"
#include "scratch.h"
#include "tile_boxes.cuh"

namespace rapfast {
namespace {

static_assert(sizeof(RenderStatus) == 3 * sizeof(int64_t), "rapfast/ops/state.py reads three numbers");

struct Scratch {
  ProjectScratch project;
  BinScratch bin;
  NetView* net_views;  // [I]
  float* viewmats;     // [I, 4, 4] where a graph reads them
  float* Ks;           // [I, 3, 3]
  HostCounts** mail;   // [1]
  // Where the state does not keep them.
  uint32_t* order;
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
  scratch.viewmats = arena.take<float>(16 * s.n_scenes * s.n_cameras);
  scratch.Ks = arena.take<float>(9 * s.n_scenes * s.n_cameras);
  scratch.mail = arena.take<HostCounts*>(1);
  scratch.project =
      project_scratch(arena, s.n_scenes * s.n_cameras, s.n_gaussians, s.record_capacity);
  const RegionGrid grid = region_grid(tile_columns(s), s.n_tile_rows);
  scratch.bin = bin_scratch(arena, s.n_scenes * s.n_cameras, grid, s.record_capacity, s.capacity);
  if (!s.keep_state) {
    scratch.order = arena.take<uint32_t>(order_words(all_tiles(s)));
    scratch.tile_offsets = arena.take<int64_t>(all_tiles(s) + 1);
    scratch.tile_records = arena.take<int32_t>(s.capacity);
    scratch.record_colors = arena.take<float>(color_stride(s.n_channels) * s.record_capacity);
  }
  scratch.size = arena.size();
  return scratch;
}

// Where the counts of a call arrive: page-locked memory and an event. Making them costs more than all
// else here, so calls that have ended leave theirs to later ones of any thread.
struct Mailbox {
  cudaEvent_t arrived;
  HostCounts* counts;
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
    check(cudaMallocHost(&box_.counts, sizeof(HostCounts)), "cudaMallocHost");
  }
  ~MailboxLoan() {
    // After an error counts may still be on their way into it: it serves no other call.
    if (under_way_) return;
    std::lock_guard<std::mutex> lock(mutex());
    free_of(device_).push_back(box_);
  }

  // For a kernel that is queued next.
  HostCounts* counts() {
    under_way_ = true;
    return box_.counts;
  }

  // That kernel is queued.
  void posted(cudaStream_t stream) { check(cudaEventRecord(box_.arrived, stream), "cudaEventRecord"); }

  // Waits for it.
  HostCounts read() {
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

__global__ void __launch_bounds__(kThreads)
    copy_cameras_kernel(const float* __restrict__ viewmats, const float* __restrict__ Ks, HostCounts* mail,
                        int64_t n_images, float* __restrict__ to_viewmats, float* __restrict__ to_Ks,
                        HostCounts** to_mail) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *to_mail = mail;
  RAPFAST_GRID_STRIDE(i, 25 * n_images) {
    if (i < 16 * n_images) {
      to_viewmats[i] = viewmats[i];
    } else {
      to_Ks[i - 16 * n_images] = Ks[i - 16 * n_images];
    }
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
OverflowParams poison_of(const RenderParams& params, const RenderOutputs& outputs,
                         const StateLayout& layout) {
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
    add(outputs.images, pixels * s.n_channels * bytes_of(c.pixel_type), nan_of(c.pixel_type));
    add(outputs.out_alphas, 4 * pixels, nan);
  } else {
    const int64_t pixels = n_images * s.rows() * s.width;
    add(outputs.colors, 4 * pixels * s.n_channels, nan);
    add(outputs.alphas, 4 * pixels, nan);
  }
  // The lists are empty.
  add(params.state + layout.n_invalid, layout.records - layout.n_invalid, 0);
  add(params.state + layout.tile_offsets, layout.order - layout.tile_offsets, 0);
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
  l.n_visible = take(8);
  l.n_invalid = take(8 * n_images);
  l.image_offsets = take(8 * (n_images + 1));
  l.records = take(int64_t(sizeof(Record<float>)) * s.record_capacity);
  l.radii = take(8 * s.record_capacity);
  l.gaussian_ids = take(4 * s.record_capacity);
  const int64_t kept = s.keep_state ? 1 : 0, pixels = n_images * s.rows() * s.width;
  l.tile_offsets = take(kept * 8 * (all_tiles(s) + 1));
  l.order = take(kept * 4 * order_words(all_tiles(s)));
  l.tile_records = take(kept * 4 * s.capacity);
  l.record_colors = take(kept * 4 * color_stride(s.n_channels) * s.record_capacity);
  l.views = take(kept * int64_t(sizeof(DeviceView)) * n_images);
  l.ballots = take(kept * 4 * n_images * ballot_words(s.n_gaussians));
  l.word_bases = take(kept * 4 * n_images * ballot_words(s.n_gaussians));
  l.transmittances = take(kept * 4 * pixels);
  l.last_ids = take(kept * 4 * pixels);
  l.size = at;
  return l;
}

int64_t scratch_size(const RenderSizes& sizes) { return lay_out(sizes, nullptr).size; }

// What the second part of a call takes from the first.
struct RenderCall::Parts {
  RenderParams params;
  int device;
  cudaStream_t stream;
  StateLayout layout;
  Scratch scratch;
  std::optional<MailboxLoan> mailbox;
  int next_event = 0;

  template <typename T>
  T* part(int64_t offset) const {
    return reinterpret_cast<T*>(params.state + offset);
  }
  Counts* counts() const { return &part<RenderStatus>(layout.status)->counts; }
  int64_t* n_visible() const { return params.sizes.keep_state ? part<int64_t>(layout.n_visible) : nullptr; }
  // What the state keeps on request.
  int64_t* tile_offsets() const {
    return params.sizes.keep_state ? part<int64_t>(layout.tile_offsets) : scratch.tile_offsets;
  }
  uint32_t* order() const { return params.sizes.keep_state ? part<uint32_t>(layout.order) : scratch.order; }
  int32_t* tile_records() const {
    return params.sizes.keep_state ? part<int32_t>(layout.tile_records) : scratch.tile_records;
  }
  float* record_colors() const {
    return params.sizes.keep_state ? part<float>(layout.record_colors) : scratch.record_colors;
  }

  bool colored_by_net() const { return params.with_net && params.color.depth_channel != DepthChannel::kOnly; }
  bool colored_by_projection() const {
    return !colored_by_net() && colors_with_projection(params.project.options, params.color);
  }

  ColorParams<float> color_params(const float* viewmats, const float* Ks) const;
  void queue_front(const float* viewmats, const float* Ks, const HostMail& mail, cudaStream_t stream);
  void queue_colors();
  bool launch_graph(HostCounts* mail);

  void mark() {
    if (params.stage_events == nullptr) return;
    check(cudaEventRecord(params.stage_events[next_event++], stream), "cudaEventRecord");
  }
};

ColorParams<float> RenderCall::Parts::color_params(const float* viewmats, const float* Ks) const {
  ColorParams<float> color = params.color;
  color.viewmats = viewmats;
  color.Ks = Ks;
  color.capacity = params.sizes.record_capacity;
  color.gaussian_ids = part<int32_t>(layout.gaussian_ids);
  color.image_offsets = part<int64_t>(layout.image_offsets);
  color.records = part<Record<float>>(layout.records);
  color.record_colors = record_colors();
  color.color_stride = color_stride(params.sizes.n_channels);
  color.n_invalid = part<int64_t>(layout.n_invalid);
  return color;
}

// Projection, with colours where it can make them, and bin.
void RenderCall::Parts::queue_front(const float* viewmats, const float* Ks, const HostMail& mail,
                                    cudaStream_t stream) {
  const RenderSizes& sizes = params.sizes;
  mark();

  ProjectParams<float> project = params.project;
  project.viewmats = viewmats;
  project.Ks = Ks;
  project.capacity = sizes.record_capacity;
  project.records = part<Record<float>>(layout.records);
  project.radii = part<int32_t>(layout.radii);
  project.gaussian_ids = part<int32_t>(layout.gaussian_ids);
  project.image_offsets = part<int64_t>(layout.image_offsets);
  project.n_invalid = part<int64_t>(layout.n_invalid);
  BinParams<float> bin;
  bin.n_images = sizes.n_scenes * sizes.n_cameras;
  bin.tiles_x = int32_t(tile_columns(sizes));
  bin.tiles_y = sizes.n_tile_rows;
  bin.first_tile_row = sizes.first_tile_row;
  bin.record_capacity = sizes.record_capacity;
  bin.capacity = sizes.capacity;
  bin.records = project.records;
  bin.radii = project.radii;
  bin.image_offsets = project.image_offsets;
  bin.tile_offsets = tile_offsets();
  bin.tile_records = tile_records();
  bin.order = order();
  const ColorParams<float> color = color_params(viewmats, Ks);
  const TileBoxes boxes = tile_boxes(bin, scratch.bin);
  const ClearedMemory cleared = {scratch.bin.zero, int64_t(scratch.bin.zero_bytes)};
  project_cuda(project, scratch.project, counts(), {colored_by_projection() ? &color : nullptr, &boxes, cleared}, stream);
  mark();
  bin_cuda(bin, scratch.bin, counts(), &mail, stream);
  mark();
}

// The colours that are left. They come last, so that neither the binning nor the counts on their way to the host
// wait for them. What a colour takes out after it was binned has opacity 0 and draws nothing.
void RenderCall::Parts::queue_colors() {
  if (!colored_by_projection()) {
    const int64_t n_images = params.sizes.n_scenes * params.sizes.n_cameras;
    const ColorParams<float> color = color_params(params.project.viewmats, params.project.Ks);
    if (colored_by_net()) {
      ColorNetParams<float> net = params.net;
      net.color = color;
      store_views(params.net.views, n_images, scratch.net_views, stream);
      net.views = scratch.net_views;
      color_net_cuda(net, scratch.project.views, scratch.project.image_ids, stream);
    } else {
      color_cuda(color, scratch.project.views, scratch.project.image_ids, stream);
    }
  }
  mark();
}

// queue_front as a graph, where calls keep coming with these addresses.
bool RenderCall::Parts::launch_graph(HostCounts* mail) {
  if (params.graphs == nullptr || params.fixed_room || params.stage_events != nullptr) {
    return false;
  }
  const ProjectParams<float>& in = params.project;
  const FrontGraphs::Key key = {in.means, in.quats, in.scales, in.covars, in.opacities, params.color.colors,
                                params.state, params.scratch};
  const int64_t n_images = params.sizes.n_scenes * params.sizes.n_cameras;
  const dim3 grid(grid_for(25 * n_images));
  const auto update = [&](cudaGraphExec_t graph, cudaGraphNode_t copy) {
    void* arguments[] = {const_cast<float**>(&in.viewmats), const_cast<float**>(&in.Ks), &mail,
                         const_cast<int64_t*>(&n_images), &scratch.viewmats, &scratch.Ks, &scratch.mail};
    cudaKernelNodeParams node{};
    node.func = reinterpret_cast<void*>(&copy_cameras_kernel);
    node.gridDim = grid;
    node.blockDim = dim3(kThreads);
    node.kernelParams = arguments;
    check(cudaGraphExecKernelNodeSetParams(graph, copy, &node), "cudaGraphExecKernelNodeSetParams");
  };
  return params.graphs->launch(key, {in.viewmats, in.Ks, mail}, stream, update, [&](cudaStream_t to) {
    copy_cameras_kernel<<<grid, kThreads, 0, to>>>(in.viewmats, in.Ks, mail, n_images, scratch.viewmats, scratch.Ks,
                                                   scratch.mail);
    check_launch("copy_cameras_kernel");
    queue_front(scratch.viewmats, scratch.Ks, {nullptr, scratch.mail, n_visible()}, to);
  });
}

RenderCall::RenderCall(const RenderParams& params, int device, cudaStream_t stream) {
  const DeviceGuard guard(device);
  parts_.reset(new Parts{params, device, stream, state_layout(params.sizes),
                         lay_out(params.sizes, params.scratch), {}});
  if (params.sizes.keep_state) {
    const StateLayout& layout = parts_->layout;
    ProjectScratch& project = parts_->scratch.project;
    project.views = parts_->part<DeviceView>(layout.views);
    project.ballots = parts_->part<uint32_t>(layout.ballots);
    project.word_bases = parts_->part<uint32_t>(layout.word_bases);
    project.n_visible = parts_->n_visible();
  }
  HostCounts* const mail = params.fixed_room ? nullptr : parts_->mailbox.emplace(device).counts();
  if (!parts_->launch_graph(mail)) {
    parts_->queue_front(params.project.viewmats, params.project.Ks, {mail, nullptr, parts_->n_visible()}, stream);
  }
  if (!params.fixed_room) parts_->mailbox->posted(stream);
  parts_->queue_colors();
}

HostCounts RenderCall::finish(const RenderOutputs& outputs) {
  const DeviceGuard guard(parts_->device);
  const RenderParams& params = parts_->params;
  const RenderSizes& sizes = params.sizes;
  const StateLayout& layout = parts_->layout;
  const cudaStream_t stream = parts_->stream;

  BlendParams<float> blend;
  blend.n_images = sizes.n_scenes * sizes.n_cameras;
  blend.width = sizes.width;
  blend.height = sizes.height;
  blend.tiles_x = int32_t(tile_columns(sizes));
  blend.tiles_y = sizes.n_tile_rows;
  blend.first_tile_row = sizes.first_tile_row;
  blend.n_channels = sizes.n_channels;
  blend.alpha_cap = params.alpha_cap;
  blend.records = parts_->part<Record<float>>(layout.records);
  blend.record_colors = parts_->record_colors();
  blend.color_stride = color_stride(sizes.n_channels);
  blend.image_offsets = parts_->part<int64_t>(layout.image_offsets);
  blend.tile_offsets = parts_->tile_offsets();
  blend.tile_records = parts_->tile_records();
  blend.order = parts_->order();
  blend.in_halves = sizes.capacity >= kHalvedCapacity && all_tiles(sizes) < kHalvedTiles;
  blend.colors = outputs.colors;
  blend.alphas = outputs.alphas;
  blend_cuda(blend, parts_->part<float>(layout.transmittances),
             sizes.keep_state ? parts_->part<int32_t>(layout.last_ids) : nullptr, stream);
  parts_->mark();
  if (params.with_composite) {
    CompositeParams<float> composite = params.composite;
    composite.colors = outputs.colors;
    composite.alphas = outputs.alphas;
    composite.out = outputs.images;
    composite.out_alphas = outputs.out_alphas;
    composite_cuda(composite, stream);
  }
  parts_->mark();

  if (params.fixed_room) {
    overflow_cuda(poison_of(params, outputs, layout), stream);
    return {{-1, -1}, -1};
  }
  return parts_->mailbox->read();
}

RenderCall::~RenderCall() = default;

}  // namespace rapfast
