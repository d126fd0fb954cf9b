// Stage 3 on the GPU: each image's records by depth, then their (tile, record) pairs by tile, both by
// stable radix sorts of one launch a pass (radix_sort.cuh). Ties keep the records' order, which is
// Gaussian order.
//
// The kernel that makes a record also says which tiles it has (tile_count.cuh); one kernel makes all
// the histograms of it (bin_depth.cuh). The number of a record's tiles rides in the bits of its key that
// the sort has done with, and the sort's last pass sums it, so that each record knows where its pairs
// begin. Pairs are first made in the kernel that sorts them by the low digit of their tile (bin_tile.cuh);
// where an image has few tiles that is the only pass. The number of records and of pairs is known on the
// device alone, and only what exists is worked on.
#include "../bin.h"

#include <atomic>

#include "bin_depth.cuh"
#include "bin_kernels.cuh"
#include "bin_tile.cuh"
#include "check.cuh"
#include "radix_sort.cuh"
#include "scratch.h"
#include "tile_count.cuh"

namespace rapfast {
namespace {

// ---------------------------------------------------------------------------------------- counting

// For records that were made without count_tiles().
__global__ void __launch_bounds__(kThreads)
    count_kernel(BinParams<float> p, TileCounting counting) {
  const int64_t n = first_record(p, p.n_images);
  RAPFAST_GRID_STRIDE(m, n) {
    const int2 both = reinterpret_cast<const int2*>(p.radii)[m];
    const int32_t radii[2] = {both.x, both.y};
    count_tiles(counting, m, load_record(p.records, m), radii);
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

// Launches as many blocks as run at once, or one for each chunk; they take tickets. What a kernel needs to have so
// much shared memory is set once a device.
template <auto kernel, int kThreads_ = kBlock>
void launch(BinKernelParams b, size_t shared_bytes, int64_t most_chunks, const char* name, cudaStream_t stream) {
  constexpr int kMaxDevices = 64;
  static std::atomic<int> known[kMaxDevices];  // blocks at once; negative: without programmatic launches
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  int at_once = device < kMaxDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (at_once == 0) {
    int processors = 0, each = 0, major = 0;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)),
          "cudaFuncSetAttribute");
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads_, shared_bytes), "occupancy");
    at_once = max_of(1, processors * each) * (major >= 9 ? 1 : -1);
    if (device < kMaxDevices) known[device].store(at_once, std::memory_order_relaxed);
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  const int64_t blocks = max_of<int64_t>(1, min_of<int64_t>(at_once < 0 ? -at_once : at_once, most_chunks));
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(kThreads_);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = at_once > 0 ? 1 : 0;
  b.chunk_each = blocks >= most_chunks;
  check(cudaLaunchKernelEx(&config, kernel, b), name);
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

template <typename R, typename Item, bool kOnly>
void launch_tiles(const BinKernelParams& b, int64_t chunks, cudaStream_t stream) {
  launch<emit_kernel<R, Item, kOnly>, R::kThreads>(b, sizeof(EmitShared<R, Item, kOnly>), chunks, "emit_kernel", stream);
  if constexpr (!kOnly) {
    launch<tile_kernel<R, Item>, R::kThreads>(b, sizeof(TileShared<R, Item>), chunks, "tile_kernel", stream);
  }
}

}  // namespace

TilePlan tile_plan(int64_t n_tiles, int64_t record_capacity) {
  constexpr int kOnePassBits = 11, kMostBits = 22;
  int bits = 1;
  while ((int64_t(1) << bits) < n_tiles) ++bits;
  if (bits > kMostBits) {
    throw std::runtime_error("rapfast: an image must have at most " + std::to_string(int64_t(1) << kMostBits) +
                             " tiles of 16 x 16 pixels, got " + std::to_string(n_tiles));
  }
  if (bits <= kOnePassBits) return {bits, 0, bits <= 8 ? 256 : 2048, 32, 4};
  TilePlan plan{(bits + 1) / 2, bits / 2, 128, 0, 4};
  plan.record_bits = 32 - plan.high_bits;
  if (plan.low_bits > 7) plan.bins = 256;
  if (plan.low_bits > 8 || record_capacity > int64_t(1) << plan.record_bits) {
    plan.bins = 2048;
    plan.record_bits = 32;
    plan.item_bytes = 8;
  }
  return plan;
}

BinScratch bin_scratch(Arena& arena, int64_t n_images, int64_t n_tiles, int64_t record_capacity, int64_t capacity) {
  const TilePlan plan = tile_plan(n_tiles, record_capacity);
  const int64_t record_chunks = most_chunks(record_capacity, kBlock * depth_items(record_capacity), n_images);
  const int64_t pair_chunks = most_chunks(capacity, kChunk, n_images);
  const int64_t histograms = histogram_rows(n_images);
  BinScratch s{};
  s.depth_keys = arena.take<uint32_t>(record_capacity);
  s.tile_sets = arena.take<uint64_t>(record_capacity);
  s.more_tiles = arena.take<uint64_t>(record_capacity);
  s.tile_counts = arena.take<uint8_t>(record_capacity);
  for (auto& items : s.items) items = arena.take<uint64_t>(record_capacity);
  s.chunk_records = arena.take<uint32_t>(pair_chunks);
  s.pairs = plan.high_bits == 0 ? nullptr : arena.take<char>(capacity * plan.item_bytes);

  const int64_t begin = arena.size();
  s.tickets = arena.take<uint32_t>(8);
  s.zero = s.tickets;
  s.depth_histograms = arena.take<uint32_t>(histograms * kDepthRow);
  s.image_records = arena.take<uint32_t>(n_images);
  s.image_pairs = arena.take<uint64_t>(n_images);
  s.low_differences = arena.take<uint32_t>(histograms * plan.bins);
  s.high_histogram = arena.take<uint32_t>(histograms * plan.bins);
  for (int pass = 0; pass < kDepthPasses; ++pass) {
    s.depth_states[pass] = arena.take<uint32_t>(record_chunks * kDepthBins * (pass == kDepthPasses - 1 ? 2 : 1));
  }
  for (int pass = 0; pass < (plan.high_bits == 0 ? 1 : 2); ++pass) {
    s.tile_states[pass] = arena.take<uint32_t>(pair_chunks * plan.bins);
  }
  s.zero_bytes = size_t(arena.size() - begin);
  return s;
}

TileCounting tile_counting(const BinParams<float>& p, const BinScratch& s) {
  return {p.tiles_x, p.tiles_y, p.first_tile_row, s.depth_keys, s.tile_sets, s.more_tiles, s.tile_counts};
}

void count_cuda(const BinParams<float>& p, const BinScratch& s, cudaStream_t stream) {
  check(cudaMemsetAsync(s.zero, 0, s.zero_bytes, stream), "cudaMemsetAsync");
  if (p.record_capacity == 0) return;
  count_kernel<<<grid_for(p.record_capacity), kThreads, 0, stream>>>(p, tile_counting(p, s));
  check_launch("count_kernel");
}

void bin_cuda(const BinParams<float>& p, const BinScratch& s, Counts* counts, cudaStream_t stream) {
  const TilePlan plan = tile_plan(int64_t(p.tiles_x) * p.tiles_y, p.record_capacity);
  const BinKernelParams b = {p, s, plan, counts, histogram_copies(p.n_images), false};
  if (p.record_capacity > 0) {
    if (depth_items(p.record_capacity) == kFewItems) {
      sort_by_depth<kFewItems>(b, stream);
    } else {
      sort_by_depth<kManyItems>(b, stream);
    }
  }
  const int64_t chunks = most_chunks(p.capacity, kChunk, p.n_images);
  if (plan.high_bits == 0) {
    if (plan.bins == 256) {
      launch_tiles<Ranking<256, kBlock, kChunk / kBlock>, uint32_t, true>(b, chunks, stream);
    } else {
      launch_tiles<Ranking<2048, kBlock, kChunk / kBlock>, uint32_t, true>(b, chunks, stream);
    }
  } else if (plan.bins == 128) {
    launch_tiles<Ranking<128, kBlock, kChunk / kBlock>, uint32_t, false>(b, chunks, stream);
  } else if (plan.bins == 256) {
    launch_tiles<Ranking<256, kBlock, kChunk / kBlock>, uint32_t, false>(b, chunks, stream);
  } else {
    // Half the threads: a warp's counts take much of the shared memory that the smaller GPUs have.
    launch_tiles<Ranking<2048, kBlock / 2, 2 * kChunk / kBlock>, uint64_t, false>(b, chunks, stream);
  }
}

}  // namespace rapfast
