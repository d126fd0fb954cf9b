// Stage 3 on the GPU: each image's records by depth, then by region of 8x4 tiles, both by stable radix sorts of one
// launch a pass (radix_sort.cuh), then dealt out to the lists of the region's tiles. Ties keep the records' order,
// which is Gaussian order.
//
// The kernel that makes a record also says which box of tiles it has (tile_boxes.cuh); one kernel makes all
// the histograms of it (bin_depth.cuh). The number of a record's regions rides in the bits of its key that
// the sort has done with, and the sort's last pass sums it, so that each record knows where its pairs
// begin. Pairs are first made in the kernel that sorts them by region (bin_regions.cuh), which asks which of the
// region's tiles the record reaches; the last kernel (bin_tiles.cuh) need not. The number of records and of pairs is
// known on the device alone, and only what exists is worked on.
#include "../bin.h"

#include <atomic>

#include "bin_depth.cuh"
#include "bin_kernels.cuh"
#include "bin_regions.cuh"
#include "bin_tiles.cuh"
#include "check.cuh"
#include "launch.cuh"
#include "radix_sort.cuh"
#include "scratch.h"
#include "tile_boxes.cuh"

namespace rapfast {
namespace {

// ------------------------------------------------------------------------------------------- boxes

// For records that were made without tell_bin().
__global__ void __launch_bounds__(kThreads) boxes_kernel(BinParams<float> p, TileBoxes boxes) {
  const int64_t n = first_record(p, p.n_images);
  RAPFAST_GRID_STRIDE(m, n) {
    const int2 both = reinterpret_cast<const int2*>(p.radii)[m];
    const int32_t radii[2] = {both.x, both.y};
    tell_bin(boxes, m, load_record(p.records, m), radii);
  }
}

// ----------------------------------------------------------------------------------------- launches

// As many segments may each have a chunk that is not full.
int64_t most_chunks(int64_t capacity, int chunk, int64_t n_images) {
  return radix::chunks_of(capacity, chunk) + n_images;
}

// Records a thread of the sort by depth.
constexpr int kFewItems = 2, kManyItems = 8;
int depth_items(int64_t record_capacity) { return record_capacity < 1 << 19 ? kFewItems : kManyItems; }

// Of the number of pairs that a block makes at a time: few pairs are spread over more blocks. Where there are many
// regions, what a chunk costs whatever its length is much.
constexpr int kSmallChunkBits = 10, kLargeChunkBits = 12;
int pair_chunk_bits(int64_t capacity, RegionGrid grid) {
  return grid.bins() == kFewBins && capacity < 2 << 20 ? kSmallChunkBits : kLargeChunkBits;
}

// Units of a region's pairs, first_unit() of what comes behind the last.
int64_t most_units(int64_t capacity, int64_t n_images, RegionGrid grid) {
  return radix::chunks_of(capacity, kUnit) + n_images * grid.regions();
}

// Launches as many blocks as run at once, or one for each chunk; they take tickets. What a kernel needs to have so
// much shared memory is set once a device.
template <auto kernel, int kThreads_ = kBlock>
void launch(BinKernelParams b, size_t shared_bytes, int64_t most_chunks, const char* name, cudaStream_t stream) {
  constexpr int kMaxDevices = 64;
  static std::atomic<int> known[kMaxDevices];  // blocks at once
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  int at_once = device < kMaxDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (at_once == 0) {
    int each = 0;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)),
          "cudaFuncSetAttribute");
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads_, shared_bytes), "occupancy");
    at_once = max_of(1, device_facts().processors * each);
    if (device < kMaxDevices) known[device].store(at_once, std::memory_order_relaxed);
  }
  const int64_t blocks = max_of<int64_t>(1, min_of<int64_t>(at_once, most_chunks));
  b.chunk_each = blocks >= most_chunks;
  launch_behind(name, kernel, dim3(unsigned(blocks)), kThreads_, shared_bytes, stream, b);
}

template <int kPass, int kItems>
void launch_depth(const BinKernelParams& b, cudaStream_t stream) {
  const int64_t chunks = most_chunks(b.p.record_capacity, kBlock * kItems, b.p.n_images);
  launch<depth_kernel<kPass, kItems>>(b, sizeof(DepthShared<kItems>), chunks, "depth_kernel", stream);
}

// kItems: records a thread in a chunk. Results do not depend on it.
template <int kItems>
void sort_by_depth(const BinKernelParams& b, cudaStream_t stream) {
  const int64_t chunks = most_chunks(b.p.record_capacity, kBlock * kItems, b.p.n_images);
  launch<tally_kernel<kItems>>(b, 0, chunks, "tally_kernel", stream);
  launch_depth<0, kItems>(b, stream);
  launch_depth<1, kItems>(b, stream);
  launch_depth<2, kItems>(b, stream);
  launch_depth<3, kItems>(b, stream);
}

template <typename R>
void launch_emit(const BinKernelParams& b, int64_t chunks, cudaStream_t stream) {
  launch<emit_kernel<R>, R::kThreads>(b, sizeof(EmitShared<R>), chunks, "emit_kernel", stream);
}

void launch_lists(const BinKernelParams& b, cudaStream_t stream) {
  const int64_t regions = max_of<int64_t>(1, b.p.n_images * b.grid.regions());
  launch_behind("count_kernel", count_kernel, dim3(unsigned(regions)), kCountThreads, 0, stream, b);
  launch<deal_kernel, kUnit>(b, 0, most_units(b.p.capacity, b.p.n_images, b.grid), "deal_kernel", stream);
}

}  // namespace

RegionGrid region_grid(int64_t tiles_x, int64_t tiles_y) {
  const int64_t x = (tiles_x + kRegionWidth - 1) / kRegionWidth, y = (tiles_y + kRegionHeight - 1) / kRegionHeight;
  if (x * y > kMostRegions) {
    throw std::runtime_error("rapfast: what is listed of an image must have at most " + std::to_string(kMostRegions) +
                             " regions of 128 x 64 pixels, got " + std::to_string(x) + " x " + std::to_string(y));
  }
  return {int32_t(x), int32_t(y)};
}

BinScratch bin_scratch(Arena& arena, int64_t n_images, RegionGrid grid, int64_t record_capacity, int64_t capacity) {
  const int64_t record_chunks = most_chunks(record_capacity, kBlock * depth_items(record_capacity), n_images);
  const int64_t pair_chunks = most_chunks(capacity, 1 << pair_chunk_bits(capacity, grid), n_images);
  const int64_t histograms = histogram_rows(n_images);
  BinScratch s{};
  s.depth_keys = arena.take<uint32_t>(record_capacity);
  s.boxes = arena.take<uint64_t>(record_capacity);
  s.region_counts = arena.take<uint8_t>(record_capacity);
  for (auto& items : s.items) items = arena.take<uint64_t>(record_capacity);
  s.chunk_records = arena.take<uint32_t>(pair_chunks);
  s.pairs = arena.take<uint2>(capacity);
  s.region_offsets = arena.take<uint32_t>(n_images * grid.regions() + 1);
  s.units = arena.take<uint4>(most_units(capacity, n_images, grid));
  s.unit_counts = arena.take<uint32_t>(most_units(capacity, n_images, grid) * kRegionTiles);
  s.strips = arena.take<uint32_t>(n_images * grid.strips());

  const int64_t begin = arena.size();
  s.tickets = arena.take<uint32_t>(8);
  s.zero = s.tickets;
  s.depth_histograms = arena.take<uint32_t>(histograms * kDepthRow);
  s.image_records = arena.take<uint32_t>(n_images);
  s.image_pairs = arena.take<uint64_t>(n_images);
  s.image_tiles = arena.take<uint64_t>(n_images);
  s.n_pairs = arena.take<uint64_t>(1);
  s.n_tile_pairs = arena.take<int64_t>(1);
  s.region_differences = arena.take<uint32_t>(histograms * grid.bins());
  s.in_order = arena.take<uint32_t>(2);
  s.arrived = arena.take<uint32_t>(n_images + 1);
  for (int pass = 0; pass < kDepthPasses; ++pass) {
    s.depth_states[pass] = arena.take<uint32_t>(record_chunks * kDepthBins * (pass == kDepthPasses - 1 ? 2 : 1));
  }
  s.emit_states = arena.take<uint32_t>(pair_chunks * grid.bins());
  s.zero_bytes = size_t(arena.size() - begin);
  return s;
}

TileBoxes tile_boxes(const BinParams<float>& p, const BinScratch& s) {
  return {p.tiles_x, p.tiles_y, p.first_tile_row, s.depth_keys, s.boxes, s.region_counts};
}

void boxes_cuda(const BinParams<float>& p, const BinScratch& s, cudaStream_t stream) {
  check(cudaMemsetAsync(s.zero, 0, s.zero_bytes, stream), "cudaMemsetAsync");
  if (p.record_capacity == 0) return;
  boxes_kernel<<<grid_for(p.record_capacity), kThreads, 0, stream>>>(p, tile_boxes(p, s));
  check_launch("boxes_kernel");
}

void bin_cuda(const BinParams<float>& p, const BinScratch& s, Counts* counts, cudaStream_t stream) {
  const RegionGrid grid = region_grid(p.tiles_x, p.tiles_y);
  const BinKernelParams b = {p, s, grid, counts, histogram_copies(p.n_images), pair_chunk_bits(p.capacity, grid),
                             false};
  if (p.record_capacity > 0) {
    if (depth_items(p.record_capacity) == kFewItems) {
      sort_by_depth<kFewItems>(b, stream);
    } else {
      sort_by_depth<kManyItems>(b, stream);
    }
  }
  const int64_t chunks = most_chunks(p.capacity, 1 << b.pair_chunk_bits, p.n_images);
  if (b.pair_chunk_bits == kSmallChunkBits) {
    launch_emit<Ranking<kFewBins, kBlock, (1 << kSmallChunkBits) / kBlock>>(b, chunks, stream);
  } else if (grid.bins() == kFewBins) {
    launch_emit<Ranking<kFewBins, kBlock, (1 << kLargeChunkBits) / kBlock>>(b, chunks, stream);
  } else if (grid.bins() == kManyBins) {
    // Half the threads: a warp's counts take much of the shared memory that the smaller GPUs have.
    launch_emit<Ranking<kManyBins, kBlock / 2, 2 * (1 << kLargeChunkBits) / kBlock>>(b, chunks, stream);
  } else {
    launch_emit<Ranking<kMostRegions, kBlock / 2, 2 * (1 << kLargeChunkBits) / kBlock>>(b, chunks, stream);
  }
  launch_lists(b, stream);
}

}  // namespace rapfast
