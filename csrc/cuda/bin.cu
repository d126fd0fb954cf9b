// Stage 3 on the GPU: each image's pairs of records and regions of 8x4 tiles, by region and depth, then dealt out to the
// lists of the region's tiles (bin_tiles.cuh). Ties keep the records' order, which is Gaussian order. There are two ways
// to the former, between which what there is room for decides; the lists are the same.
//
// Few: by region first, and then by depth in shared memory (bin_groups.cuh).
//
// Many: records by depth (bin_depth.cuh), then their pairs by region (bin_regions.cuh), both by stable radix sorts of one
// launch a pass (radix_sort.cuh), one kernel in front making all the histograms. The number of a record's regions rides in
// the bits of its key that the sort has done with, and the sort's last pass sums it, so that each record knows where its
// pairs begin.
//
// The kernel that makes a record also says which box of tiles it has (tile_boxes.cuh). Which tiles of a region it reaches
// is asked where the pair is made. How many records and pairs there are is known on the device alone, and only what
// exists is worked on.
#include "../bin.h"

#include <atomic>

#include "bin_depth.cuh"
#include "bin_groups.cuh"
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

// Lists of pairs, where those of a region are cut in slices by depth so that they have about kAlone pairs and blocks are
// enough. A record is taken for one and a half pairs.
constexpr int64_t kAlone = 256, kEnoughLists = 256, kFewPairs = 512;
// What may all lie in one list, which takes a time that grows with the square of its length.
constexpr int64_t kMostRecords = 1 << 22;
int64_t guessed_pairs(int64_t record_capacity) { return record_capacity * 3 / 2; }

int group_slices(int64_t n_images, RegionGrid grid, int64_t record_capacity) {
  const int64_t regions = n_images * grid.regions(), pairs = guessed_pairs(record_capacity);
  int slices = 1;
  while (2 * slices <= kMostSlices && 2 * slices * grid.regions() <= kMostGroups &&
         (pairs > kAlone * slices * regions || slices * regions < kEnoughLists)) {
    slices *= 2;
  }
  return slices;
}

// Which of two ways to order by region and depth: what a block sorts in shared memory is the faster while there is little
// of it, in a list and in an image, and where lists are not so many that most have next to nothing. It takes 12 bytes a
// pair that there is room for, of which records over many tiles need few: they are pairs of tiles.
constexpr int64_t kFewOfImage = 96 << 10, kMostSliced = 128, kFewTiles = 64, kLittleRoom = 64 << 10;
bool sorts_in_groups(int64_t n_images, RegionGrid grid, int64_t record_capacity, int64_t capacity) {
  if (grid.regions() > kMostSliced || record_capacity > min_of(kMostRecords, kFewOfImage * n_images)) return false;
  if (capacity > kFewTiles * record_capacity + kLittleRoom) return false;
  const int64_t lists = n_images * grid.regions() * group_slices(n_images, grid, record_capacity);
  return guessed_pairs(record_capacity) <= kFewPairs * lists;
}

// Groups of an image and lists of all, of so many images or of fewer, which may be cut in more slices: a number of slices
// is doubled while these lists are fewer.
int64_t before_doubling(int64_t record_capacity) { return max_of(guessed_pairs(record_capacity) / kAlone + 1, kEnoughLists); }

int64_t most_groups(RegionGrid grid, int64_t record_capacity) {
  const int64_t regions = grid.regions(), doubled = max_of(regions, 2 * before_doubling(record_capacity));
  return min_of(min_of<int64_t>(kMostGroups, kMostSlices * regions), doubled);
}

int64_t most_lists(int64_t n_images, RegionGrid grid, int64_t record_capacity, bool in_groups) {
  const int64_t regions = n_images * grid.regions();
  if (!in_groups) return regions;
  return min_of(kMostSlices * regions, max_of(regions, 2 * before_doubling(record_capacity)));
}

// Units of them, each with one that is not full.
int64_t most_units(int64_t capacity, int64_t lists) { return radix::chunks_of(capacity, kUnit) + lists; }

// Lets a kernel have so much shared memory, once a device, and returns how many blocks run at once then.
template <auto kernel>
int allow_shared(size_t shared_bytes, int threads) {
  constexpr int kMaxDevices = 64;
  static std::atomic<int> known[kMaxDevices];
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  int at_once = device < kMaxDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (at_once == 0) {
    int each = 0;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)),
          "cudaFuncSetAttribute");
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared_bytes), "occupancy");
    at_once = max_of(1, device_facts().processors * each);
    if (device < kMaxDevices) known[device].store(at_once, std::memory_order_relaxed);
  }
  return at_once;
}

// Launches as many blocks as run at once, or one for each chunk.
template <auto kernel, int kThreads_ = kBlock>
void launch(BinKernelParams b, size_t shared_bytes, int64_t most_chunks, const char* name, cudaStream_t stream) {
  const int64_t blocks = max_of<int64_t>(1, min_of<int64_t>(allow_shared<kernel>(shared_bytes, kThreads_), most_chunks));
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

// The regions' pairs, in order, from records by depth.
void launch_depth_first(const BinKernelParams& b, cudaStream_t stream) {
  const int64_t record_capacity = b.p.record_capacity, capacity = b.p.capacity;
  if (record_capacity > 0) {
    if (depth_items(record_capacity) == kFewItems) {
      sort_by_depth<kFewItems>(b, stream);
    } else {
      sort_by_depth<kManyItems>(b, stream);
    }
  }
  const int64_t chunks = most_chunks(capacity, 1 << b.pair_chunk_bits, b.p.n_images);
  if (b.pair_chunk_bits == kSmallChunkBits) {
    launch_emit<Ranking<kFewBins, kBlock, (1 << kSmallChunkBits) / kBlock>>(b, chunks, stream);
  } else if (b.grid.bins() == kFewBins) {
    launch_emit<Ranking<kFewBins, kBlock, (1 << kLargeChunkBits) / kBlock>>(b, chunks, stream);
  } else if (b.grid.bins() == kManyBins) {
    // Half the threads: a warp's counts take much of the shared memory that the smaller GPUs have.
    launch_emit<Ranking<kManyBins, kBlock / 2, 2 * (1 << kLargeChunkBits) / kBlock>>(b, chunks, stream);
  } else {
    launch_emit<Ranking<kMostRegions, kBlock / 2, 2 * (1 << kLargeChunkBits) / kBlock>>(b, chunks, stream);
  }
  const int64_t regions = max_of<int64_t>(1, b.p.n_images * b.grid.regions());
  launch_behind("count_kernel", count_kernel, dim3(unsigned(regions)), kCountThreads, 0, stream, b);
}

// The same from pairs by region.
void launch_groups(const BinKernelParams& b, cudaStream_t stream) {
  const int64_t chunks = max_of<int64_t>(1, most_chunks(b.p.record_capacity, 1 << b.group_chunk_bits, b.p.n_images));
  const auto group = b.grid.regions() * b.slices <= kFewGroups ? group_kernel<kFewGroups> : group_kernel<kMostGroups>;
  launch_behind("group_kernel", group, dim3(unsigned(chunks)), kGroupThreads, 0, stream, b);
  const int64_t regions = max_of<int64_t>(1, b.p.n_images * b.grid.regions());
  allow_shared<sort_kernel>(sizeof(SortShared), kSortThreads);
  launch_behind("sort_kernel", sort_kernel, dim3(unsigned(regions * b.slices)), kSortThreads, sizeof(SortShared), stream, b);
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

namespace {

BinScratch lay_out(Arena& arena, int64_t n_images, RegionGrid grid, int64_t record_capacity, int64_t capacity,
                   bool in_groups) {
  const int64_t record_chunks = most_chunks(record_capacity, kBlock * depth_items(record_capacity), n_images);
  const int64_t pair_chunks = most_chunks(capacity, 1 << pair_chunk_bits(capacity, grid), n_images);
  const int64_t lists = most_lists(n_images, grid, record_capacity, in_groups), units = most_units(capacity, lists);
  const int64_t histograms = histogram_rows(n_images);
  BinScratch s{};
  s.depth_keys = arena.take<uint32_t>(record_capacity);
  s.boxes = arena.take<uint64_t>(record_capacity);
  s.region_counts = arena.take<uint8_t>(record_capacity);
  if (in_groups) {
    s.grouped = arena.take<uint2>(capacity);
    s.grouped_keys = arena.take<uint32_t>(capacity);
    const int64_t group_chunks = most_chunks(record_capacity, 1 << group_chunk_bits(record_capacity), n_images);
    s.runs = arena.take<uint2>(group_chunks * most_groups(grid, record_capacity));
  } else {
    for (auto& items : s.items) items = arena.take<uint64_t>(record_capacity);
    s.chunk_records = arena.take<uint32_t>(pair_chunks);
    s.region_offsets = arena.take<uint32_t>(n_images * grid.regions() + 1);
  }
  s.pairs = arena.take<uint2>(capacity);
  s.units = arena.take<uint4>(units);
  s.unit_counts = arena.take<uint32_t>(units * kRegionTiles);
  s.tile_totals = arena.take<uint32_t>(lists * kRegionTiles);

  const int64_t begin = arena.size();
  s.tickets = arena.take<uint32_t>(8);
  s.zero = s.tickets;
  s.strips = arena.take<uint32_t>(n_images * grid.rows() * grid.regions_x);
  s.rows = arena.take<uint32_t>(n_images * grid.rows());
  s.image_tiles = arena.take<int64_t>(n_images);
  s.n_pairs = arena.take<uint64_t>(1);
  s.n_units = arena.take<uint32_t>(1);
  s.n_sorted = arena.take<uint32_t>(1);
  if (!in_groups) {
    s.depth_histograms = arena.take<uint32_t>(histograms * kDepthRow);
    s.image_records = arena.take<uint32_t>(n_images);
    s.image_pairs = arena.take<uint64_t>(n_images);
    s.region_differences = arena.take<uint32_t>(histograms * grid.bins());
    for (int pass = 0; pass < kDepthPasses; ++pass) {
      s.depth_states[pass] = arena.take<uint32_t>(record_chunks * kDepthBins * (pass == kDepthPasses - 1 ? 2 : 1));
    }
    s.emit_states = arena.take<uint32_t>(pair_chunks * grid.bins());
  }
  s.zero_bytes = size_t(arena.size() - begin);
  return s;
}

}  // namespace

BinScratch bin_scratch(Arena& arena, int64_t n_images, RegionGrid grid, int64_t record_capacity, int64_t capacity) {
  const bool in_groups = sorts_in_groups(n_images, grid, record_capacity, capacity);
  const int64_t begin = arena.size();
  const BinScratch scratch = lay_out(arena, n_images, grid, record_capacity, capacity, in_groups);
  if (in_groups) {
    // Memory made for a batch serves smaller ones, which may be sorted the other way.
    Arena other(nullptr);
    lay_out(other, n_images, grid, record_capacity, capacity, false);
    arena.take<char>(max_of<int64_t>(0, begin + other.size() - arena.size()));
  }
  return scratch;
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

void bin_cuda(const BinParams<float>& p, const BinScratch& s, Counts* counts, const HostMail* mail,
              cudaStream_t stream) {
  const RegionGrid grid = region_grid(p.tiles_x, p.tiles_y);
  const bool in_groups = sorts_in_groups(p.n_images, grid, p.record_capacity, p.capacity);
  const BinKernelParams b = {p,
                             s,
                             grid,
                             counts,
                             mail == nullptr ? HostMail{} : *mail,
                             histogram_copies(p.n_images),
                             pair_chunk_bits(p.capacity, grid),
                             group_chunk_bits(p.record_capacity),
                             in_groups ? group_slices(p.n_images, grid, p.record_capacity) : 1,
                             false};
  if (in_groups) {
    launch_groups(b, stream);
  } else {
    launch_depth_first(b, stream);
  }
  const int64_t lists = most_lists(p.n_images, grid, p.record_capacity, in_groups);
  launch<deal_kernel, kUnit>(b, 0, most_units(p.capacity, lists), "deal_kernel", stream);
}

}  // namespace rapfast
