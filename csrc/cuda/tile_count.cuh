// What the kernel that makes a record tells stage 3 of it: its depth key, its tiles, and a count of
// its key's lowest digit, which the sort by depth begins with.
//
// Any kernel of any file may call this and gets the same bits: csrc/math/tile.h says how.
#pragma once

#include "../math/tile.h"
#include "check.cuh"

namespace rapfast {

// The tiles of a record in 64 bits. Of a box of few tiles, one bit for each of them, row by row from
// the box's first: most records are such, and whoever lists their tiles computes nothing again. Of a
// larger one the number of tiles alone. Zero: no tile, the record is not drawn.
class TileSet {
 public:
  static constexpr int kMaskBits = 39, kWidthBits = 5, kFirstBits = 20;

  __device__ explicit TileSet(uint64_t bits) : bits_(bits) {}

  // Whether boxes of this shape are kept as a mask.
  __device__ static bool fits(int32_t width, int32_t height, int64_t first) {
    return width < (1 << kWidthBits) && int64_t(width) * height <= kMaskBits &&
           first < (int64_t(1) << kFirstBits);
  }
  __device__ static uint64_t small(uint64_t mask, int32_t width, int64_t first) {
    return mask == 0 ? 0 : mask | uint64_t(width) << kMaskBits | uint64_t(first) << (kMaskBits + kWidthBits);
  }
  __device__ static uint64_t large(uint32_t count) { return count; }

  __device__ bool is_large() const { return width() == 0; }
  __device__ uint32_t count() const { return is_large() ? uint32_t(bits_) : uint32_t(__popcll(mask())); }

  // Of a small set: its box's columns and first tile, and the mask.
  __device__ int32_t width() const { return int32_t(bits_ >> kMaskBits) & ((1 << kWidthBits) - 1); }
  __device__ int32_t first() const { return int32_t(bits_ >> (kMaskBits + kWidthBits)); }
  __device__ uint64_t mask() const { return bits_ & ((uint64_t(1) << kMaskBits) - 1); }

 private:
  uint64_t bits_;
};

constexpr int kDepthBits = 8, kDepthBins = 1 << kDepthBits;  // of a pass of the sort by depth

// Where count_tiles() leaves what it finds. The histogram must be zero before the first record.
struct TileCounting {
  int32_t tiles_x, tiles_y, first_tile_row;  // as BinParams has them
  uint32_t* depth_keys;                      // [record_capacity]
  uint64_t* tile_sets;                       // [record_capacity] a TileSet each
  uint32_t* depth_histogram;                 // [I, kDepthBins] records with tiles, by their key's low bits
};

// The tiles of a record. One of opacity 0 has none.
__device__ __forceinline__ uint64_t tile_set(const TileCounting& c, const Record<float>& r, const int32_t* radii) {
  if (!(r.opacity > 0.f)) return 0;
  const TileRect rect = tile_rect(r.x, r.y, radii, c.tiles_x, c.tiles_y, c.first_tile_row);
  const CutEllipse<float> ellipse = cut_ellipse(r);
  const int32_t width = rect.x1 - rect.x0;
  const int64_t first = int64_t(rect.y0 - c.first_tile_row) * c.tiles_x + rect.x0;
  if (TileSet::fits(width, rect.y1 - rect.y0, first)) {
    uint64_t mask = 0;
    int shift = 0;
    for (int32_t ty = rect.y0; ty < rect.y1; ++ty, shift += width) {
      int32_t x0, x1;
      tile_row_range(ellipse, rect, ty, x0, x1);
      mask |= ((uint64_t(1) << (x1 - x0)) - 1) << (shift + (x0 - rect.x0));
    }
    return TileSet::small(mask, width, first);
  }
  uint32_t count = 0;
  for (int32_t ty = rect.y0; ty < rect.y1; ++ty) {
    int32_t x0, x1;
    tile_row_range(ellipse, rect, ty, x0, x1);
    count += uint32_t(x1 - x0);
  }
  return TileSet::large(count);
}

// Tells stage 3 of record m. Every record must be told, the dead ones (opacity 0) too; any threads of
// a warp may call it together.
__device__ __forceinline__ void count_tiles(const TileCounting& c, int64_t m, int32_t image,
                                            const Record<float>& r, const int32_t* radii) {
  const uint64_t set = tile_set(c, r, radii);
  const uint32_t key = depth_key(r.depth);
  c.depth_keys[m] = key;
  c.tile_sets[m] = set;
  if (set == 0) return;
  // Equal depths may be many: those of a warp are added as one.
  uint32_t* bin = c.depth_histogram + int64_t(image) * kDepthBins + key % kDepthBins;
  const uint32_t same = __match_any_sync(__activemask(), reinterpret_cast<uint64_t>(bin));
  if (int(threadIdx.x % 32) == __ffs(int(same)) - 1) atomicAdd(bin, uint32_t(__popc(same)));
}

}  // namespace rapfast
