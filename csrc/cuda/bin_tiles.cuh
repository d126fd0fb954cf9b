// Stage 3: a region's pairs, dealt out to the lists of its tiles. A region has a list of pairs in order, or one for each
// slice of depth; where in memory they lie is up to those that made them.
#pragma once

#include "bin_kernels.cuh"
#include "tile_order.cuh"

namespace rapfast {
namespace {

constexpr int kUnitBits = 9, kUnit = 1 << kUnitBits;  // pairs of a region that a block deals out at a time
// Of a unit's second word: the slice of depth lies above the region, and a bit marks the region's first unit.
constexpr int kSliceShift = 16;
constexpr uint32_t kRegionMask = (1u << kSliceShift) - 1, kSliceMask = 0xffu, kFirstUnit = 0x80000000u;
static_assert(kMostRegions <= 1 << kSliceShift && kMostSlices <= kSliceMask, "they fit");

// Bit i of lane t: bit t of lane i's x.
__device__ __forceinline__ uint32_t transposed(uint32_t x) {
  const int lane = threadIdx.x % 32;
  uint32_t low = 0x0000ffffu;  // bits whose number lacks that of the step
#pragma unroll
  for (int step = 16; step > 0; step /= 2, low ^= low << step) {
    const uint32_t other = __shfl_xor_sync(kFullWarp, x, step);
    x = (lane & step) == 0 ? (x & low) | (other & low) << step : (x & ~low) | (other & ~low) >> step;
  }
  return x;
}

// ------------------------------------------------------------------------------------------- counts

constexpr int kCountThreads = 512;

struct CountShared {
  uint32_t totals[kCountThreads / 32][kRegionTiles];
  uint32_t first_unit;
};

// Units of a list of n pairs. One that is empty has one too, for the offsets of the region's tiles: the first slice's.
__device__ __forceinline__ uint32_t units_of(uint32_t n, uint32_t slice) {
  return max(uint32_t(slice == 0), (n + kUnit - 1) / kUnit);
}

// The units, from `first` on, of n pairs that lie from `begin` on. By the whole block.
template <int kThreads_>
__device__ __forceinline__ void write_units(const BinKernelParams& b, int32_t image, int32_t region, uint32_t slice,
                                            uint32_t begin, uint32_t n, uint32_t first) {
  for (uint32_t k = threadIdx.x; k < units_of(n, slice); k += kThreads_) {
    const uint32_t which = uint32_t(region) | slice << kSliceShift | (slice == 0 && k == 0 ? kFirstUnit : 0);
    b.s.units[first + k] = make_uint4(uint32_t(image), which, begin + k * kUnit, min(n - k * kUnit, uint32_t(kUnit)));
  }
}

// Leaves how many pairs come before each unit of n pairs from `begin` on, a tile a lane. Returns how many there are in
// all, in every warp.
template <int kThreads_>
__device__ __forceinline__ uint32_t count_units(const uint2* pairs, uint32_t begin, uint32_t n, uint32_t* of_units,
                                                CountShared& shared) {
  constexpr int kWarps = kThreads_ / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int n_units = int(radix::chunks_of(n, kUnit));
  if (n_units == 0 && warp == 0) of_units[lane] = 0;
  // A warp has a stretch of units. First the pairs of the stretch before each unit, then those before the stretch too.
  const int each = (n_units + kWarps - 1) / kWarps, stretch = min(warp * each, n_units);
  const int stretch_end = min(stretch + each, n_units);
  const uint32_t end = begin + n;
  uint32_t sum = 0;  // of this lane's tile
  for (int k = stretch; k < stretch_end; ++k) {
    of_units[k * kRegionTiles + lane] = sum;
    const uint32_t at = begin + k * kUnit + lane;
#pragma unroll 8
    for (uint32_t i = 0; i < kUnit; i += 32) {
      sum += uint32_t(__popc(transposed(at + i < end ? pairs[at + i].y : 0)));
    }
  }
  shared.totals[warp][lane] = sum;
  __syncthreads();
  uint32_t total = 0, before = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) before = total;
    total += shared.totals[w][lane];
  }
#pragma unroll 4
  for (int k = stretch; k < stretch_end; ++k) of_units[k * kRegionTiles + lane] += before;
  return total;
}

// Of a row of a region's tiles, a lane each: the sum up to this one.
__device__ __forceinline__ uint32_t sum_of_row(uint32_t of_tile) {
  uint32_t row = of_tile;
  for (int step = 1; step < kRegionWidth; step *= 2) {
    const uint32_t other = __shfl_up_sync(kFullWarp, row, step, kRegionWidth);
    if (threadIdx.x % kRegionWidth >= step) row += other;
  }
  return row;
}

// A slice of a region's tiles has `total` pairs each, a lane a tile. By one warp of the block; the first block's also
// makes put_in_order() begin with nothing.
__device__ __forceinline__ void tell_tiles(const BinKernelParams& b, int32_t image, int32_t region, uint32_t slice,
                                           uint32_t total) {
  const int lane = threadIdx.x % 32;
  b.s.tile_totals[((int64_t(image) * b.grid.regions() + region) * b.slices + slice) * kRegionTiles + lane] = total;
  const int32_t region_y = region / b.grid.regions_x, region_x = region - region_y * b.grid.regions_x;
  const uint32_t row = sum_of_row(total);
  if (lane % kRegionWidth == kRegionWidth - 1 && row != 0) {
    const int64_t y = int64_t(image) * b.grid.rows() + region_y * kRegionHeight + lane / kRegionWidth;
    atomicAdd(b.s.strips + y * b.grid.regions_x + region_x, row);
    atomicAdd(b.s.rows + y, row);
  }
  // A tile's pairs are below 2^31, those of 32 tiles may not be.
  const int64_t high = __reduce_add_sync(kFullWarp, total >> 16), low = __reduce_add_sync(kFullWarp, total & 0xffffu);
  if (lane == 0 && (high | low) != 0) add_to(b.s.image_tiles + image, (high << 16) + low);
  if (lane < kLengthClasses && blockIdx.x == 0 && b.p.order != nullptr) {
    class_counts(b.p.order, b.p.n_images * b.p.tiles_x * b.p.tiles_y)[lane] = 0;
  }
}

// A block a region whose pairs are in order: how many pairs each of its tiles has, before each unit and in all.
__global__ void __launch_bounds__(kCountThreads, 3) count_kernel(BinKernelParams b) {
  __shared__ CountShared shared;
  const int regions = b.grid.regions();
  wait_for_kernel_before();
  let_next_kernel_come();
  if (!has_room(b) || b.p.n_images * regions == 0) return;
  const int32_t image = int32_t(blockIdx.x / unsigned(regions)), region = int32_t(blockIdx.x - unsigned(image * regions));
  const uint32_t begin = b.s.region_offsets[blockIdx.x], n = b.s.region_offsets[blockIdx.x + 1] - begin;
  if (threadIdx.x == 0) shared.first_unit = atomicAdd(b.s.n_units, units_of(n, 0));
  __syncthreads();
  const uint32_t first = shared.first_unit;
  write_units<kCountThreads>(b, image, region, 0, begin, n, first);
  uint32_t* const of_units = b.s.unit_counts + int64_t(first) * kRegionTiles;
  const uint32_t total = count_units<kCountThreads>(b.s.pairs, begin, n, of_units, shared);
  if (threadIdx.x < 32) tell_tiles(b, image, region, 0, total);
}

// --------------------------------------------------------------------------------------------- lists

constexpr int kDealWarps = kUnit / 32;

struct DealShared {
  uint32_t counts[kDealWarps][kRegionTiles];
  uint32_t base[kRegionTiles];  // where a tile's records of the unit go, less their place in `sorted`
  uint32_t records[kUnit];
  uint16_t sorted[kUnit * kRegionTiles];  // by tile: a place in the unit, and above it the tile
};

// Puts each lane's tile, where it exists, in its class of the order.
__device__ __forceinline__ void put_in_order(const BinKernelParams& b, bool exists, uint32_t tile, uint32_t length,
                                             float per_mean) {
  const int64_t n_tiles = b.p.n_images * b.p.tiles_x * b.p.tiles_y;
  const uint32_t below = (1u << threadIdx.x % 32) - 1;
  const int own = exists ? length_class(length, per_mean) : kLengthClasses;
  const uint32_t alike = __match_any_sync(kFullWarp, own);
  uint32_t first = 0;
  if (exists && (alike & below) == 0) first = atomicAdd(class_counts(b.p.order, n_tiles) + own, uint32_t(__popc(alike)));
  first = __shfl_sync(kFullWarp, first, __ffs(int(alike)) - 1);
  if (exists) b.p.order[own * n_tiles + first + __popc(alike & below)] = tile;
}

// Where the pairs of a region's tiles begin, without those of the region itself: a lane each row of 8 tiles. By a warp,
// whose loads are all under way at once.
__device__ __forceinline__ uint32_t begin_of_rows(const BinKernelParams& b, int32_t image, int32_t region_y,
                                                  int32_t region_x) {
  static_assert(kRegionWidth * kRegionHeight == 32, "a lane a tile");
  const int lane = threadIdx.x % 32, row = lane / kRegionWidth;
  const uint32_t* const rows = b.s.rows + int64_t(image) * b.grid.rows();
  const int n_rows = region_y * kRegionHeight;
  const uint32_t* const strips = b.s.strips + (int64_t(image) * b.grid.rows() + n_rows + row) * b.grid.regions_x;
  const uint32_t own_row = lane < kRegionHeight ? rows[n_rows + lane] : 0;
  uint32_t before = 0, in_row = 0;  // in images and rows above; in regions of this lane's row
#pragma unroll 1
  for (int i = 0; i < max_of(max_of(image, n_rows), region_x * (32 / kRegionWidth)); i += 32) {
    if (i + lane < image) before += uint32_t(b.s.image_tiles[i + lane]);
    if (i + lane < n_rows) before += rows[i + lane];
    const int x = i / (32 / kRegionWidth) + lane % kRegionWidth;
    if (x < region_x) in_row += strips[x];
  }
  before = __reduce_add_sync(kFullWarp, before);
  for (int step = 1; step < kRegionWidth; step *= 2) in_row += __shfl_xor_sync(kFullWarp, in_row, step);
#pragma unroll
  for (int r = 0; r + 1 < kRegionHeight; ++r) {
    const uint32_t of_row = __shfl_sync(kFullWarp, own_row, r);
    if (r < row) before += of_row;
  }
  return before + in_row;
}

// Sum of values [0, n), by a warp.
__device__ __forceinline__ int64_t sum_of(const int64_t* values, int64_t n) {
  int64_t sum = 0;
#pragma unroll 1
  for (int64_t i = threadIdx.x % 32; i < n; i += 32) sum += values[i];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
  return sum;
}

// Where there was no room for something, every list is empty.
__device__ __forceinline__ void write_empty_lists(const BinKernelParams& b) {
  const int64_t n_tiles = b.p.n_images * b.p.tiles_x * b.p.tiles_y;
  RAPFAST_GRID_STRIDE(t, n_tiles + 1) {
    b.p.tile_offsets[t] = 0;
    if (b.p.order != nullptr && t < n_tiles) b.p.order[(kLengthClasses - 1) * n_tiles + t] = uint32_t(t);
  }
  if (b.p.order != nullptr && blockIdx.x == 0 && threadIdx.x < kLengthClasses) {
    class_counts(b.p.order, n_tiles)[threadIdx.x] = threadIdx.x == kLengthClasses - 1 ? uint32_t(n_tiles) : 0;
  }
}

// Blocks take units in turn. Offsets of tiles, and their order, come with the first unit of a region.
#if __CUDA_ARCH__ >= 900
constexpr int kDealBlocks = 3;
#else
constexpr int kDealBlocks = 2;  // with more, registers do not suffice
#endif
__global__ void __launch_bounds__(kUnit, kDealBlocks) deal_kernel(BinKernelParams b) {
  __shared__ DealShared shared;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  wait_for_kernel_before();
  let_next_kernel_come();
  const uint32_t n_units = *b.s.n_units;
  const int64_t n_tiles = b.p.n_images * b.p.tiles_x * b.p.tiles_y;
  const int64_t n_pairs = int64_t(*b.s.n_pairs), n_tile_pairs = sum_of(b.s.image_tiles, b.p.n_images);
  if (blockIdx.x == 0 && thread == 0) {
    b.counts->n_intersections = max_of(n_pairs, n_tile_pairs);
    HostCounts* const to = b.mail.to_slot == nullptr ? b.mail.to : *b.mail.to_slot;
    if (to != nullptr) *to = {*b.counts, b.mail.n_visible == nullptr ? 0 : *b.mail.n_visible};
  }
  if (max_of(n_pairs, n_tile_pairs) > b.p.capacity || n_tiles == 0) {
    write_empty_lists(b);
    return;
  }
  if (blockIdx.x == 0 && thread == 0) b.p.tile_offsets[n_tiles] = n_tile_pairs;
  const float per_mean = float(n_tiles) / float(max_of<int64_t>(n_tile_pairs, 1));

  uint4 next_unit = blockIdx.x < n_units ? b.s.units[blockIdx.x] : make_uint4(0, 0, 0, 0);
  for (uint32_t u = blockIdx.x; u < n_units; u += gridDim.x) {
    const uint4 unit = next_unit;
    const int32_t image = int32_t(unit.x), region = int32_t(unit.y & kRegionMask);
    const int slice = int(unit.y >> kSliceShift & kSliceMask);
    const bool is_first = (unit.y & kFirstUnit) != 0;
    if (u + gridDim.x < n_units) next_unit = b.s.units[u + gridDim.x];
    const uint2 pair = uint32_t(thread) < unit.w ? b.s.pairs[unit.z + thread] : make_uint2(0, 0);
    uint32_t cursor = 0;  // of the first warp: where the unit's first record of this lane's tile goes
    if (warp == 0 || (warp == 1 && is_first)) {
      const uint32_t* totals =
          b.s.tile_totals + (int64_t(image) * b.grid.regions() + region) * b.slices * kRegionTiles + lane;
      uint32_t total = 0;
      for (int i = 0; i < b.slices; ++i, totals += kRegionTiles) {
        if (i == slice) cursor = total;
        total += *totals;
      }
      const int32_t region_y = region / b.grid.regions_x, region_x = region - region_y * b.grid.regions_x;
      const int32_t y = region_y * kRegionHeight + lane / kRegionWidth, x = region_x * kRegionWidth + lane % kRegionWidth;
      const bool exists = x < b.p.tiles_x && y < b.p.tiles_y;
      const uint32_t tile = uint32_t((image * b.p.tiles_y + y) * b.p.tiles_x + x);
      if (warp == 1) {
        if (b.p.order != nullptr) put_in_order(b, exists, tile, total, per_mean);
      } else {
        cursor += sum_of_row(total) - total + b.s.unit_counts[int64_t(u) * kRegionTiles + lane] +
                  begin_of_rows(b, image, region_y, region_x);
        if (is_first && exists) b.p.tile_offsets[tile] = cursor;
      }
    }

    uint32_t reached = transposed(pair.y);  // bit i: the warp's pair i is of this lane's tile
    __syncthreads();                        // all have left the last unit
    shared.records[thread] = pair.x;
    shared.counts[warp][lane] = uint32_t(__popc(reached));
    __syncthreads();
    uint32_t in_tile = 0, before = 0;  // of this lane's tile: in the unit, and before this warp
#pragma unroll
    for (int w = 0; w < kDealWarps; ++w) {
      if (w == warp) before = in_tile;
      in_tile += shared.counts[w][lane];
    }
    const uint32_t up_to = radix::warp_sum_up_to(in_tile), tile_first = up_to - in_tile;
    if (warp == 0) shared.base[lane] = cursor - tile_first;
    for (uint32_t at = tile_first + before; reached != 0; reached &= reached - 1, ++at) {
      shared.sorted[at] = uint16_t((warp * 32 + __ffs(int(reached)) - 1) | lane << kUnitBits);
    }
    const uint32_t n = __shfl_sync(kFullWarp, up_to, 31);
    __syncthreads();
    for (uint32_t i = thread; i < n; i += kUnit) {
      const uint32_t both = shared.sorted[i];
      b.p.tile_records[shared.base[both >> kUnitBits] + i] = int32_t(shared.records[both & (kUnit - 1)]);
    }
  }
}

}  // namespace
}  // namespace rapfast
