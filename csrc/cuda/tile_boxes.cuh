// What the kernel that makes a record tells stage 3 of it: its depth key and its box of tiles.
//
// Tiles are grouped in regions, and a record is listed by region first: one word then has a bit for each tile of a
// region that it reaches. Which those are is found where the pairs of region and record are made, four rows of
// tiles a thread; asked here, records of few rows would wait for those of many.
#pragma once

#include "../math/tile.h"
#include "check.cuh"

namespace rapfast {

constexpr int kRegionTiles = kRegionWidth * kRegionHeight;
static_assert(kRegionTiles == 32, "a bit of a word for each");

// Half-open ranges of the columns and rows of what is listed, of tiles or of regions, in one word. Zero: none.
class TileBox {
 public:
  static constexpr int kBits = 16;

  __device__ TileBox(uint32_t x0, uint32_t x1, uint32_t y0, uint32_t y1)
      : bits_(uint64_t(x0 | x1 << kBits) | uint64_t(y0 | y1 << kBits) << 32) {}
  __device__ explicit TileBox(uint64_t bits) : bits_(bits) {}

  __device__ uint64_t bits() const { return bits_; }
  __device__ uint32_t x0() const { return uint32_t(bits_) & 0xffffu; }
  __device__ uint32_t x1() const { return uint32_t(bits_) >> 16; }
  __device__ uint32_t y0() const { return uint32_t(bits_ >> 32) & 0xffffu; }
  __device__ uint32_t y1() const { return uint32_t(bits_ >> 48); }
  __device__ uint32_t width() const { return x1() - x0(); }
  __device__ uint32_t size() const { return width() * (y1() - y0()); }

  // The regions that a box of tiles touches.
  __device__ TileBox regions() const {
    return {x0() / kRegionWidth, (x1() + kRegionWidth - 1) / kRegionWidth, y0() / kRegionHeight,
            (y1() + kRegionHeight - 1) / kRegionHeight};
  }

 private:
  uint64_t bits_;
};

// Where tell_bin() leaves what it finds.
struct TileBoxes {
  int32_t tiles_x, tiles_y, first_tile_row;  // as BinParams has them
  uint32_t* depth_keys;                      // [record_capacity]
  uint64_t* boxes;                           // [record_capacity] TileBox of tiles
  uint8_t* region_counts;                    // [record_capacity] kManyRegions for that many or more
};

constexpr uint32_t kManyRegions = 255;
constexpr uint32_t kMostKey = 0xfffffffdu;  // NaN's: a key that sorts may count up by one, and one behind all

// Tells stage 3 of record m. Every record must be told, the dead ones (opacity 0) too, which have no box.
__device__ __forceinline__ void tell_bin(const TileBoxes& b, int64_t m, const Record<float>& r, const int32_t* radii) {
  const TileRect rect = tile_rect(r.x, r.y, radii, b.tiles_x, b.tiles_y, b.first_tile_row);
  TileBox box(0);
  uint32_t n_regions = 0;
  if (r.opacity > 0.f && rect.x0 < rect.x1 && rect.y0 < rect.y1) {
    box = TileBox(uint32_t(rect.x0), uint32_t(rect.x1), uint32_t(rect.y0 - b.first_tile_row),
                  uint32_t(rect.y1 - b.first_tile_row));
    n_regions = box.regions().size();
  }
  b.depth_keys[m] = min(depth_key(r.depth), kMostKey);
  b.boxes[m] = box.bits();
  b.region_counts[m] = uint8_t(min(n_regions, kManyRegions));
}

}  // namespace rapfast
