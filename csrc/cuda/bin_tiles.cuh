// Stage 3: a region's pairs, dealt out to the lists of its tiles. The order of the region's pairs is that of each list.
#pragma once

#include "bin_kernels.cuh"

namespace rapfast {
namespace {

constexpr int kUnitBits = 9, kUnit = 1 << kUnitBits;  // pairs of a region that a block deals out at a time

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

constexpr int kCountThreads = 512, kCountWarps = kCountThreads / 32;

struct CountShared {
  uint32_t totals[kCountWarps][kRegionTiles];
  uint32_t warp_sums[kCountWarps];
  bool is_last;
};

// Where the units of a region begin, of all regions the `region`-th, and `begin` its first pair: each of the regions
// before has at most one unit more than their pairs fill. Units behind a region's last pair have none.
__device__ __forceinline__ uint32_t first_unit(uint32_t region, uint32_t begin) { return begin / kUnit + region; }

// Whether this block is the last of n to come here, all of whose earlier writes it then sees.
__device__ __forceinline__ bool is_last_of(uint32_t* arrived, uint32_t n, bool* shared) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *shared = atomicAdd(arrived, 1u) == n - 1;
  __syncthreads();
  if (*shared) __threadfence();
  return *shared;
}

// Values [0, n) to the sums of those before them, by the whole block.
__device__ __forceinline__ void sum_before(uint32_t* values, int n, uint32_t* warp_sums) {
  const int each = (n + kCountThreads - 1) / kCountThreads, first = min(int(threadIdx.x) * each, n);
  const int end = min(first + each, n);
  uint32_t sum[1] = {};
  for (int i = first; i < end; ++i) sum[0] += __ldcg(values + i);
  radix::block_sums_before<kCountThreads>(sum, warp_sums);
  for (int i = first; i < end; ++i) {
    const uint32_t value = __ldcg(values + i);
    values[i] = sum[0];
    sum[0] += value;
  }
}

// Puts each lane's tile, where it exists, among those with long lists or behind them: a long list that is begun last is
// what the whole call waits for. Which comes first among its like changes no pixel.
__device__ __forceinline__ void put_in_order(const BinKernelParams& b, bool exists, int64_t tile, uint32_t length) {
  const int64_t n_tiles = b.p.n_images * b.p.tiles_x * b.p.tiles_y;
  const int lane = threadIdx.x % 32;
  const bool is_long = exists && int64_t(length) * n_tiles >= kLongList * b.p.capacity;
  const uint32_t longs = __ballot_sync(kFullWarp, is_long), others = __ballot_sync(kFullWarp, exists && !is_long);
  uint32_t start = 0;
  if (lane < 2) start = atomicAdd(b.s.in_order + lane, uint32_t(__popc(lane == 0 ? longs : others)));
  const uint32_t below = (1u << lane) - 1;
  const uint32_t front = __shfl_sync(kFullWarp, start, 0) + __popc(longs & below);
  const uint32_t back = uint32_t(n_tiles) - 1 - __shfl_sync(kFullWarp, start, 1) - __popc(others & below);
  if (exists) b.p.order[is_long ? front : back] = uint32_t(tile);
}

// A block a region: how many pairs each of its tiles has, before each unit of the region's pairs and in all. The last
// block of an image sums up the image, the last of all the images.
__global__ void __launch_bounds__(kCountThreads, 3) count_kernel(BinKernelParams b) {
  __shared__ CountShared shared;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int regions = b.grid.regions();
  wait_for_kernel_before();
  let_next_kernel_come();
  if (!has_room(b) || b.p.n_images * regions == 0) return;
  const int32_t image = int32_t(blockIdx.x / unsigned(regions)), region = int32_t(blockIdx.x - unsigned(image * regions));
  const int32_t region_y = region / b.grid.regions_x, region_x = region - region_y * b.grid.regions_x;
  const uint32_t begin = b.s.region_offsets[blockIdx.x], end = b.s.region_offsets[blockIdx.x + 1];
  const uint32_t first = first_unit(blockIdx.x, begin);
  const int n_slots = int(first_unit(blockIdx.x + 1, end) - first), n_units = int(radix::chunks_of(end - begin, kUnit));
  uint32_t* const of_units = b.s.unit_counts + int64_t(first) * kRegionTiles;
  for (int k = thread; k < n_slots; k += kCountThreads) {
    const uint32_t at = begin + k * kUnit;
    b.s.units[first + k] = make_uint4(uint32_t(image), uint32_t(region), at, at < end ? min(end - at, uint32_t(kUnit)) : 0);
  }

  // A warp has a stretch of units. First the pairs of the stretch before each unit, then those before the stretch too.
  const int each = (n_units + kCountWarps - 1) / kCountWarps, stretch = min(warp * each, n_units);
  const int stretch_end = min(stretch + each, n_units);
  uint32_t sum = 0;  // of this lane's tile
  for (int k = stretch; k < stretch_end; ++k) {
    of_units[k * kRegionTiles + lane] = sum;
    const uint32_t at = begin + k * kUnit + lane;
#pragma unroll 8
    for (uint32_t i = 0; i < kUnit; i += 32) {
      sum += uint32_t(__popc(transposed(at + i < end ? b.s.pairs[at + i].y : 0)));
    }
  }
  shared.totals[warp][lane] = sum;
  __syncthreads();
  uint32_t total = 0, before = 0;
#pragma unroll
  for (int w = 0; w < kCountWarps; ++w) {
    if (w == warp) before = total;
    total += shared.totals[w][lane];
  }
  uint32_t row = total;  // of the region's row up to this tile
  for (int step = 1; step < kRegionWidth; step *= 2) {
    const uint32_t other = __shfl_up_sync(kFullWarp, row, step, kRegionWidth);
    if (lane % kRegionWidth >= step) row += other;
  }
  before += row - total;
#pragma unroll 4
  for (int k = stretch; k < stretch_end; ++k) of_units[k * kRegionTiles + lane] += before;
  if (warp == 1 && b.p.order != nullptr) {
    const int32_t x = region_x * kRegionWidth + lane % kRegionWidth, y = region_y * kRegionHeight + lane / kRegionWidth;
    put_in_order(b, x < b.p.tiles_x && y < b.p.tiles_y, (int64_t(image) * b.p.tiles_y + y) * b.p.tiles_x + x, total);
  }
  if (warp == 0) {
    if (n_units == 0) of_units[lane] = 0;
    if (lane % kRegionWidth == kRegionWidth - 1) {
      const int32_t y = region_y * kRegionHeight + lane / kRegionWidth;
      b.s.strips[int64_t(image) * b.grid.strips() + y * b.grid.regions_x + region_x] = row;
    }
    // A tile's pairs are below 2^31, those of 32 tiles may not be.
    const int64_t high = __reduce_add_sync(kFullWarp, total >> 16), low = __reduce_add_sync(kFullWarp, total & 0xffffu);
    if (lane == 0 && (high | low) != 0) {
      add_to(reinterpret_cast<int64_t*>(b.s.image_tiles + image), (high << 16) + low);
    }
  }
  if (!is_last_of(b.s.arrived + image, uint32_t(regions), &shared.is_last)) return;
  sum_before(b.s.strips + int64_t(image) * b.grid.strips(), b.grid.strips(), shared.warp_sums);
  if (!is_last_of(b.s.arrived + b.p.n_images, uint32_t(b.p.n_images), &shared.is_last) || warp != 0) return;
  int64_t images_before = 0;
  for (int64_t from = 0; from < b.p.n_images; from += 32) {
    const int64_t i = from + lane, n = i < b.p.n_images ? int64_t(__ldcg(b.s.image_tiles + i)) : 0;
    int64_t up_to = n;
    for (int step = 1; step < 32; step *= 2) {
      const int64_t other = __shfl_up_sync(kFullWarp, up_to, step);
      if (lane >= step) up_to += other;
    }
    if (i < b.p.n_images) b.s.image_tiles[i] = uint64_t(images_before + up_to - n);
    images_before += __shfl_sync(kFullWarp, up_to, 31);
  }
  if (lane == 0) {
    *b.s.n_tile_pairs = images_before;
    b.counts->n_intersections = max_of(images_before, int64_t(*b.s.n_pairs));
  }
}

// --------------------------------------------------------------------------------------------- lists

constexpr int kDealWarps = kUnit / 32;

struct DealShared {
  uint32_t counts[kDealWarps][kRegionTiles];
  uint32_t base[kRegionTiles];  // where a tile's records of the unit go, less their place in `sorted`
  uint32_t records[kUnit];
  uint16_t sorted[kUnit * kRegionTiles];  // by tile: a place in the unit, and above it the tile
};

// Where there was no room for something, every list is empty.
__device__ __forceinline__ void write_empty_lists(const BinKernelParams& b) {
  const int64_t n_tiles = b.p.n_images * b.p.tiles_x * b.p.tiles_y;
  RAPFAST_GRID_STRIDE(t, n_tiles + 1) {
    b.p.tile_offsets[t] = 0;
    if (b.p.order != nullptr) b.p.order[t] = t < n_tiles ? uint32_t(t) : 0;
  }
  if (blockIdx.x != 0 || threadIdx.x != 0) return;
  // Where the pairs by region had none there is no other count.
  if (!has_room(b)) b.counts->n_intersections = int64_t(*b.s.n_pairs);
  if (n_tiles == 0) b.counts->n_intersections = 0;
}

// Blocks take units in turn. Offsets of tiles come with the first unit of a region.
__global__ void __launch_bounds__(kUnit, 3) deal_kernel(BinKernelParams b) {
  __shared__ DealShared shared;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int64_t n_tiles = int64_t(b.p.tiles_x) * b.p.tiles_y;
  wait_for_kernel_before();
  let_next_kernel_come();
  if (!has_room(b) || b.counts->n_intersections > b.p.capacity || b.p.n_images * n_tiles == 0) {
    write_empty_lists(b);
    return;
  }
  if (blockIdx.x == 0 && thread == 0) {
    b.p.tile_offsets[b.p.n_images * n_tiles] = *b.s.n_tile_pairs;
    if (b.p.order != nullptr) b.p.order[b.p.n_images * n_tiles] = b.s.in_order[0];
  }
  const uint32_t n_regions = uint32_t(b.p.n_images * b.grid.regions());
  const uint32_t n_units = first_unit(n_regions, b.s.region_offsets[n_regions]);

  uint4 next_unit = blockIdx.x < n_units ? b.s.units[blockIdx.x] : make_uint4(0, 0, 0, 0);
  for (uint32_t u = blockIdx.x; u < n_units; u += gridDim.x) {
    const uint4 unit = next_unit;
    const int32_t image = int32_t(unit.x), region = int32_t(unit.y);
    if (u + gridDim.x < n_units) next_unit = b.s.units[u + gridDim.x];
    const bool is_first = unit.z == b.s.region_offsets[image * int64_t(b.grid.regions()) + region];
    if (unit.w == 0 && !is_first) continue;
    const uint2 pair = uint32_t(thread) < unit.w ? b.s.pairs[unit.z + thread] : make_uint2(0, 0);
    const int32_t region_y = region / b.grid.regions_x, region_x = region - region_y * b.grid.regions_x;
    const int32_t y = region_y * kRegionHeight + lane / kRegionWidth, x = region_x * kRegionWidth + lane % kRegionWidth;
    // Where the unit's first record of this lane's tile goes.
    uint32_t cursor = b.s.unit_counts[int64_t(u) * kRegionTiles + lane] + uint32_t(b.s.image_tiles[image]) +
                      b.s.strips[int64_t(image) * b.grid.strips() + y * b.grid.regions_x + region_x];
    if (warp == 0 && is_first && x < b.p.tiles_x && y < b.p.tiles_y) {
      b.p.tile_offsets[image * n_tiles + int64_t(y) * b.p.tiles_x + x] = cursor;
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
