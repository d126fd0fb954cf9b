// Stage 3 on the GPU. Two stable radix sorts do it: records of all images by depth, then their
// (tile, record) pairs by tile. The tile's number includes its image, so the first sort need not
// tell images apart, and its keys are 32 bits. Ties keep the records' order, which is Gaussian order.
#include "../bin.h"

#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>
#include <thrust/iterator/permutation_iterator.h>

#include "check.cuh"
#include "cub_bytes.h"
#include "scratch.h"

namespace rapfast {
namespace {

constexpr uint32_t kNoKey = 0xffffffffu;  // sorts behind every key in use
constexpr int kSharedTiles = 32;          // Gaussians on more tiles are emitted by their whole warp

// A dead or removed record has no ellipse and covers no tile.
__device__ bool drawn(const Record<float>& r) { return r.opacity > 0.f; }

__device__ Record<float> load_record(const Record<float>* records, int64_t m) {
  const float4* at = reinterpret_cast<const float4*>(records + m);
  const float4 a = at[0], b = at[1];
  return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
}

__device__ TileRect load_rect(const BinParams<float>& p, const Record<float>& r, int64_t m) {
  const int2 radii = reinterpret_cast<const int2*>(p.radii)[m];
  const int32_t both[2] = {radii.x, radii.y};
  return tile_rect(r.x, r.y, both, p.tiles_x, p.tiles_y, p.first_tile_row);
}

__global__ void __launch_bounds__(kThreads)
    count_kernel(BinParams<float> p, uint32_t* __restrict__ depth_keys, int32_t* __restrict__ order,
                 uint32_t* __restrict__ n_tiles, Counts* counts) {
  const int64_t n = min(p.image_offsets[p.n_images], p.record_capacity);
  int64_t sum = 0;
  RAPFAST_GRID_STRIDE(m, p.record_capacity) {
    uint32_t key = kNoKey, tiles = 0;
    if (m < n) {
      const Record<float> r = load_record(p.records, m);
      if (drawn(r)) {
        const TileRect rect = load_rect(p, r, m);
        const CutEllipse<float> ellipse = cut_ellipse(r);
        for (int32_t ty = rect.y0; ty < rect.y1; ++ty) {
          int32_t x0, x1;
          tile_row_range(ellipse, rect, ty, x0, x1);
          tiles += uint32_t(x1 - x0);
        }
        key = depth_key(r.depth);
      }
    }
    depth_keys[m] = key;
    order[m] = int32_t(m);
    n_tiles[m] = tiles;
    sum += tiles;
  }
  for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(kFullWarp, sum, step);
  if (threadIdx.x % 32 == 0 && sum != 0) add_to(&counts->n_intersections, sum);
}

__global__ void __launch_bounds__(kThreads)
    emit_kernel(BinParams<float> p, const int32_t* __restrict__ order,
                const uint32_t* __restrict__ n_tiles, const uint32_t* __restrict__ starts,
                const int32_t* __restrict__ image_ids, uint32_t* __restrict__ tile_keys,
                int32_t* __restrict__ values, const Counts* counts) {
  // Without room for all of them no pair is emitted: a later run will have it.
  const bool room = counts->n_intersections <= p.capacity;
  const int64_t n = room ? min(p.image_offsets[p.n_images], p.record_capacity) : 0;
  const int lane = threadIdx.x % 32;
  // Whole warps enter the loop body together: its collectives need every lane.
  for (int64_t first = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32 * 32; first < n;
       first += int64_t(gridDim.x) * blockDim.x) {
    const int64_t i = first + lane;
    int32_t m = 0;
    uint32_t count = 0;
    if (i < n) {
      m = order[i];
      count = n_tiles[m];
    }
    Record<float> r{};
    TileRect rect{};
    CutEllipse<float> ellipse{};
    int64_t at = 0;
    uint32_t base = 0;
    int32_t value = 0;
    if (count > 0) {
      const int32_t image = image_ids[m];
      r = load_record(p.records, m);
      rect = load_rect(p, r, m);
      ellipse = cut_ellipse(r);
      at = starts[i];
      base = uint32_t(int64_t(image) * p.tiles_x * p.tiles_y);
      value = int32_t(m - p.image_offsets[image]);
    }
    if (count > 0 && count <= kSharedTiles) {
      for (int32_t ty = rect.y0; ty < rect.y1; ++ty) {
        int32_t x0, x1;
        tile_row_range(ellipse, rect, ty, x0, x1);
        for (int32_t tx = x0; tx < x1; ++tx, ++at) {
          tile_keys[at] = base + uint32_t((ty - p.first_tile_row) * p.tiles_x + tx);
          values[at] = value;
        }
      }
    }
    // The large ones, each by all lanes, a row of tiles per lane.
    for (uint32_t large = __ballot_sync(kFullWarp, count > kSharedTiles); large != 0;
         large &= large - 1) {
      const int owner = __ffs(large) - 1;
      const int64_t owner_i = first + owner;
      const int32_t owner_m = order[owner_i];
      const int32_t image = image_ids[owner_m];
      const Record<float> owner_r = load_record(p.records, owner_m);
      const TileRect owner_rect = load_rect(p, owner_r, owner_m);
      const CutEllipse<float> owner_ellipse = cut_ellipse(owner_r);
      const uint32_t owner_base = uint32_t(int64_t(image) * p.tiles_x * p.tiles_y);
      const int32_t owner_value = int32_t(owner_m - p.image_offsets[image]);
      int64_t next = starts[owner_i];
      for (int32_t row = owner_rect.y0; row < owner_rect.y1; row += 32) {
        const int32_t ty = row + lane;
        int32_t x0 = 0, x1 = 0;
        if (ty < owner_rect.y1) tile_row_range(owner_ellipse, owner_rect, ty, x0, x1);
        int32_t before = x1 - x0;  // inclusive sum over the lanes
        for (int step = 1; step < 32; step *= 2) {
          const int32_t other = __shfl_up_sync(kFullWarp, before, step);
          if (lane >= step) before += other;
        }
        int64_t to = next + before - (x1 - x0);
        next += __shfl_sync(kFullWarp, before, 31);
        for (int32_t tx = x0; tx < x1; ++tx, ++to) {
          tile_keys[to] = owner_base + uint32_t((ty - p.first_tile_row) * p.tiles_x + tx);
          values[to] = owner_value;
        }
      }
    }
  }
  // The sort runs over the whole capacity: what no pair fills sorts to the end.
  const int64_t used = room ? counts->n_intersections : 0;
  RAPFAST_GRID_STRIDE(i, p.capacity - used) {
    tile_keys[used + i] = kNoKey;
    values[used + i] = 0;
  }
}

// tile_offsets[t]: the first pair whose tile is at least t.
__global__ void offsets_kernel(BinParams<float> p, const uint32_t* __restrict__ tile_keys,
                               const Counts* counts) {
  const int64_t n_tiles = p.n_images * p.tiles_x * p.tiles_y;
  const int64_t n = counts->n_intersections <= p.capacity ? counts->n_intersections : 0;
  RAPFAST_GRID_STRIDE(t, n_tiles + 1) {
    int64_t low = 0, high = n;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (int64_t(tile_keys[middle]) < t) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    p.tile_offsets[t] = low;
  }
}

cudaError_t sort_depths(void* temp, size_t& bytes, const BinScratch& s, int64_t n, cudaStream_t stream) {
  return cub::DeviceRadixSort::SortPairs(temp, bytes, s.depth_keys[0], s.depth_keys[1], s.order[0],
                                         s.order[1], int(n), 0, 32, stream);
}

cudaError_t scan_starts(void* temp, size_t& bytes, const BinScratch& s, int64_t n, cudaStream_t stream) {
  return cub::DeviceScan::ExclusiveSum(
      temp, bytes, thrust::make_permutation_iterator(s.n_tiles, s.order[1]), s.starts, int(n), stream);
}

cudaError_t sort_tiles(void* temp, size_t& bytes, const BinScratch& s, int32_t* sorted, int64_t n,
                       int bits, cudaStream_t stream) {
  return cub::DeviceRadixSort::SortPairs(temp, bytes, s.tile_keys[0], s.tile_keys[1], s.values,
                                         sorted, int(n), 0, bits, stream);
}

}  // namespace

BinScratch bin_scratch(Arena& arena, int64_t record_capacity, int64_t capacity) {
  BinScratch s{};
  for (auto& keys : s.depth_keys) keys = arena.take<uint32_t>(record_capacity);
  for (auto& order : s.order) order = arena.take<int32_t>(record_capacity);
  s.n_tiles = arena.take<uint32_t>(record_capacity);
  s.starts = arena.take<uint32_t>(record_capacity);
  for (auto& keys : s.tile_keys) keys = arena.take<uint32_t>(capacity);
  s.values = arena.take<int32_t>(capacity);
  struct DepthSort;
  struct Scan;
  struct TileSort;
  s.cub_bytes = cub_bytes<DepthSort>(record_capacity, "sort by depth", [&](size_t& bytes) {
    return sort_depths(nullptr, bytes, s, record_capacity, nullptr);
  });
  const size_t scan = cub_bytes<Scan>(record_capacity, "scan of tile counts", [&](size_t& bytes) {
    return scan_starts(nullptr, bytes, s, record_capacity, nullptr);
  });
  const size_t tiles = cub_bytes<TileSort>(capacity, "sort by tile", [&](size_t& bytes) {
    return sort_tiles(nullptr, bytes, s, nullptr, capacity, 32, nullptr);
  });
  s.cub_bytes = max_of(s.cub_bytes, max_of(scan, tiles));
  s.cub = arena.take<char>(int64_t(s.cub_bytes));
  return s;
}

void bin_cuda(const BinParams<float>& p, const BinScratch& s, const int32_t* image_ids,
              Counts* counts, cudaStream_t stream) {
  const int64_t n_tiles = p.n_images * p.tiles_x * p.tiles_y;
  size_t bytes = s.cub_bytes;
  if (p.record_capacity > 0) {
    count_kernel<<<grid_for(p.record_capacity), kThreads, 0, stream>>>(
        p, s.depth_keys[0], s.order[0], s.n_tiles, counts);
    check_launch("count_kernel");
    check(sort_depths(s.cub, bytes, s, p.record_capacity, stream), "sort by depth");
    bytes = s.cub_bytes;
    check(scan_starts(s.cub, bytes, s, p.record_capacity, stream), "scan of tile counts");
  }
  if (p.capacity > 0) {
    emit_kernel<<<grid_for(max_of(p.record_capacity, p.capacity)), kThreads, 0, stream>>>(
        p, s.order[1], s.n_tiles, s.starts, image_ids, s.tile_keys[0], s.values, counts);
    check_launch("emit_kernel");
    int bits = 1;  // so that kNoKey's low bits exceed every tile
    while ((int64_t(1) << bits) <= n_tiles) ++bits;
    bytes = s.cub_bytes;
    check(sort_tiles(s.cub, bytes, s, p.tile_records, p.capacity, bits, stream), "sort by tile");
  }
  offsets_kernel<<<grid_for(n_tiles + 1), kThreads, 0, stream>>>(p, s.tile_keys[1], counts);
  check_launch("offsets_kernel");
}

}  // namespace rapfast
