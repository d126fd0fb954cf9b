// What the kernel that makes a record tells stage 3 of it: its depth key and its tiles.
//
// Any kernel of any file may call this and gets the same bits: csrc/math/tile.h says how.
#pragma once

#include "../math/tile.h"
#include "check.cuh"

namespace rapfast {

// The tiles of a record in one word or two. Of a box of few tiles, one bit for each of them, row by row from the
// box's first: nearly all records are such, and whoever lists their tiles computes nothing again. The lowest bits
// are in the first word, the rest of a box that has more of them in the second. Of a still larger box the number of
// tiles alone. Zero: no tile, the record is not drawn.
class TileSet {
 public:
  static constexpr int kMaskBits = 39, kWidthBits = 5, kFirstBits = 19;
  static constexpr int kMostTiles = kMaskBits + 64;  // of a box that has a mask

  __device__ explicit TileSet(uint64_t bits) : bits_(bits) {}

  // Whether boxes of this shape have a mask.
  __device__ static bool fits(int32_t width, int32_t height, int64_t first) {
    return width < (1 << kWidthBits) && int64_t(width) * height <= kMostTiles &&
           first < (int64_t(1) << kFirstBits);
  }
  __device__ static uint64_t masked(uint64_t mask, int32_t width, int64_t first, bool has_more) {
    return mask | uint64_t(width) << kMaskBits | uint64_t(has_more) << (kMaskBits + kWidthBits) |
           uint64_t(first) << (kMaskBits + kWidthBits + 1);
  }
  __device__ static uint64_t large(uint32_t count) { return count; }

  __device__ bool is_large() const { return width() == 0; }
  __device__ uint32_t large_count() const { return uint32_t(bits_); }

  // Of a set with a mask: whether there is a second word, the box's columns and first tile, and the first word's
  // part of the mask.
  __device__ bool has_more() const { return (bits_ >> (kMaskBits + kWidthBits) & 1) != 0; }
  __device__ int32_t width() const { return int32_t(bits_ >> kMaskBits) & ((1 << kWidthBits) - 1); }
  __device__ int32_t first() const { return int32_t(bits_ >> (kMaskBits + kWidthBits + 1)); }
  __device__ uint64_t mask() const { return bits_ & ((uint64_t(1) << kMaskBits) - 1); }

 private:
  uint64_t bits_;
};

// Where count_tiles() leaves what it finds.
struct TileCounting {
  int32_t tiles_x, tiles_y, first_tile_row;  // as BinParams has them
  uint32_t* depth_keys;                      // [record_capacity]
  uint64_t* tile_sets;                       // [record_capacity] first words
  uint64_t* more_tiles;                      // [record_capacity] second words, where there are any
  uint8_t* tile_counts;                      // [record_capacity] tiles, kManyTiles for that many or more
};

constexpr uint32_t kManyTiles = 255;

// Tells stage 3 of record m. Every record must be told, the dead ones (opacity 0) too, which have no tiles.
__device__ __forceinline__ void count_tiles(const TileCounting& c, int64_t m, const Record<float>& r,
                                            const int32_t* radii) {
  uint64_t set = 0;
  uint32_t count = 0;
  if (r.opacity > 0.f) {
    const TileRect rect = tile_rect(r.x, r.y, radii, c.tiles_x, c.tiles_y, c.first_tile_row);
    const CutEllipse<float> ellipse = cut_ellipse(r);
    const int32_t width = rect.x1 - rect.x0;
    const int64_t first = int64_t(rect.y0 - c.first_tile_row) * c.tiles_x + rect.x0;
    const bool has_mask = TileSet::fits(width, rect.y1 - rect.y0, first);
    uint64_t mask = 0, more = 0;
    int shift = 0;
    for (int32_t ty = rect.y0; ty < rect.y1; ++ty, shift += width) {
      int32_t x0, x1;
      tile_row_range(ellipse, rect, ty, x0, x1);
      count += uint32_t(x1 - x0);
      if (!has_mask) continue;
      const uint64_t row = (uint64_t(1) << (x1 - x0)) - 1;
      const int at = shift + (x0 - rect.x0);
      if (at < 64) mask |= row << at;
      const int above = at - TileSet::kMaskBits;
      if (above > -32) more |= above < 0 ? row >> -above : row << above;
    }
    if (count != 0) {
      const bool has_more = has_mask && more != 0;
      set = has_mask ? TileSet::masked(mask & ((uint64_t(1) << TileSet::kMaskBits) - 1), width, first, has_more)
                     : TileSet::large(count);
      if (has_more) c.more_tiles[m] = more;
    }
  }
  c.depth_keys[m] = depth_key(r.depth);
  c.tile_sets[m] = set;
  c.tile_counts[m] = uint8_t(count < kManyTiles ? count : kManyTiles);
}

}  // namespace rapfast
