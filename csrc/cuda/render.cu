#include "../render.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <vector>

#include "check.cuh"
#include "scratch.h"

namespace rapfast {
namespace {

struct Scratch {
  ProjectScratch project;
  BinScratch bin;
  NetView* net_views;  // [I]
  Counts* counts;
  int64_t size;
};

Scratch lay_out(const RenderSizes& s, void* base) {
  Arena arena(base);
  Scratch scratch;
  scratch.counts = arena.take<Counts>(1);
  scratch.net_views = arena.take<NetView>(s.n_scenes * s.n_cameras);
  scratch.project =
      project_scratch(arena, s.n_scenes * s.n_cameras, s.n_gaussians, s.record_capacity);
  scratch.bin = bin_scratch(arena, s.record_capacity, s.capacity);
  scratch.size = arena.size();
  return scratch;
}

// Where the counts of a call arrive, and where what it sends to the device waits: page-locked memory and
// an event. Making them costs more than all else here, so calls that have ended leave theirs to later
// ones of any thread.
struct Mailbox {
  cudaEvent_t arrived;
  Counts* counts;
  NetView* net_views;
  int64_t net_views_room;
};

class MailboxLoan {
 public:
  explicit MailboxLoan(int device) : device_(device) {
    {
      std::lock_guard<std::mutex> lock(mutex());
      std::vector<Mailbox>& free = free_of(device);
      if (!free.empty()) {
        box = free.back();
        free.pop_back();
        return;
      }
    }
    check(cudaEventCreateWithFlags(&box.arrived, cudaEventDisableTiming), "cudaEventCreate");
    check(cudaMallocHost(&box.counts, sizeof(Counts)), "cudaMallocHost");
  }
  ~MailboxLoan() {
    // After an error views may still be on their way out of it: it serves no other call.
    if (under_way_) return;
    std::lock_guard<std::mutex> lock(mutex());
    free_of(device_).push_back(box);
  }
  // Copies the views of a colour network to the device without a stop. They are on their way until the
  // counts have arrived.
  void send(const NetView* views, int64_t count, NetView* to, cudaStream_t stream) {
    if (count > box.net_views_room) {
      check(cudaFreeHost(box.net_views), "cudaFreeHost");
      box.net_views = nullptr;
      box.net_views_room = 0;
      check(cudaMallocHost(&box.net_views, size_t(count) * sizeof(NetView)), "cudaMallocHost");
      box.net_views_room = count;
    }
    std::copy(views, views + count, box.net_views);
    under_way_ = true;
    check(cudaMemcpyAsync(to, box.net_views, size_t(count) * sizeof(NetView), cudaMemcpyHostToDevice, stream),
          "copy of the views");
  }

  // Everything sent before the counts is where it was sent.
  void arrived() { under_way_ = false; }

  MailboxLoan(const MailboxLoan&) = delete;
  MailboxLoan& operator=(const MailboxLoan&) = delete;

  Mailbox box{};

 private:
  bool under_way_ = false;

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
};

}  // namespace

int64_t color_stride(int64_t n_channels) {
  return n_channels < 3 ? n_channels : (n_channels + 3) / 4 * 4;
}

StateLayout state_layout(const RenderSizes& s) {
  const int64_t n_images = s.n_scenes * s.n_cameras;
  const int64_t tiles_x = (s.width + kTileSize - 1) / kTileSize;
  const int64_t tiles_y = (s.height + kTileSize - 1) / kTileSize;
  const int64_t pixels = s.keep_state ? n_images * s.width * s.height : 0;
  int64_t at = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t begin = at;
    at += (bytes + 255) / 256 * 256;
    return begin;
  };
  StateLayout l;
  l.image_offsets = take(8 * (n_images + 1));
  l.tile_offsets = take(8 * (n_images * tiles_x * tiles_y + 1));
  l.records = take(int64_t(sizeof(Record<float>)) * s.record_capacity);
  l.radii = take(8 * s.record_capacity);
  l.gaussian_ids = take(4 * s.record_capacity);
  l.record_colors = take(4 * color_stride(s.n_channels) * s.record_capacity);
  l.tile_records = take(4 * s.capacity);
  l.transmittances = take(4 * pixels);
  l.last_ids = take(4 * pixels);
  l.size = at;
  return l;
}

int64_t scratch_size(const RenderSizes& sizes) { return lay_out(sizes, nullptr).size; }

void render_cuda(const RenderParams& params, int device, cudaStream_t stream) {
  const DeviceGuard guard(device);
  const RenderSizes& sizes = params.sizes;
  const int64_t n_images = sizes.n_scenes * sizes.n_cameras;
  const int32_t tiles_x = (sizes.width + kTileSize - 1) / kTileSize;
  const int32_t tiles_y = (sizes.height + kTileSize - 1) / kTileSize;
  const StateLayout layout = state_layout(sizes);
  const Scratch scratch = lay_out(sizes, params.scratch);
  const auto part = [&](int64_t offset) { return static_cast<void*>(params.state + offset); };

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
  project_cuda(project, scratch.project, scratch.counts, stream);
  mark();

  ColorParams<float> color = params.color;
  color.capacity = sizes.record_capacity;
  color.gaussian_ids = project.gaussian_ids;
  color.image_offsets = project.image_offsets;
  color.records = project.records;
  color.record_colors = static_cast<float*>(part(layout.record_colors));
  color.color_stride = color_stride(sizes.n_channels);
  color.n_invalid = project.n_invalid;
  MailboxLoan loan(device);
  if (params.with_net && color.depth_channel != DepthChannel::kOnly) {
    ColorNetParams<float> net = params.net;
    net.color = color;
    loan.send(params.net.views, n_images, scratch.net_views, stream);
    net.views = scratch.net_views;
    color_net_cuda(net, scratch.project.views, scratch.project.image_ids, stream);
  } else {
    color_cuda(color, scratch.project.views, scratch.project.image_ids, stream);
  }
  mark();

  BinParams<float> bin;
  bin.n_images = n_images;
  bin.tiles_x = tiles_x;
  bin.tiles_y = tiles_y;
  bin.record_capacity = sizes.record_capacity;
  bin.capacity = sizes.capacity;
  bin.records = project.records;
  bin.radii = project.radii;
  bin.image_offsets = project.image_offsets;
  bin.tile_offsets = static_cast<int64_t*>(part(layout.tile_offsets));
  bin.tile_records = static_cast<int32_t*>(part(layout.tile_records));
  bin_cuda(bin, scratch.bin, scratch.project.image_ids, scratch.counts, stream);
  mark();

  const Mailbox& box = loan.box;
  check(cudaMemcpyAsync(box.counts, scratch.counts, sizeof(Counts), cudaMemcpyDeviceToHost, stream),
        "copy of the counts");
  check(cudaEventRecord(box.arrived, stream), "cudaEventRecord");

  BlendParams<float> blend;
  blend.n_images = n_images;
  blend.width = sizes.width;
  blend.height = sizes.height;
  blend.tiles_x = tiles_x;
  blend.tiles_y = tiles_y;
  blend.n_channels = sizes.n_channels;
  blend.alpha_cap = params.alpha_cap;
  blend.records = project.records;
  blend.record_colors = color.record_colors;
  blend.color_stride = color.color_stride;
  blend.image_offsets = project.image_offsets;
  blend.tile_offsets = bin.tile_offsets;
  blend.tile_records = bin.tile_records;
  blend.colors = params.colors;
  blend.alphas = params.alphas;
  blend_cuda(blend, static_cast<float*>(part(layout.transmittances)),
             sizes.keep_state ? static_cast<int32_t*>(part(layout.last_ids)) : nullptr, stream);
  mark();
  if (params.with_composite) composite_cuda(params.composite, stream);
  mark();

  check(cudaEventSynchronize(box.arrived), "rendering");
  loan.arrived();
  params.counts[0] = box.counts->n_records;
  params.counts[1] = box.counts->n_intersections;
}

}  // namespace rapfast
