// Device memory of a call, carved out of buffers that the caller allocates.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../math/constants.h"
#include "../math/frustum.h"
#include "scratch_types.h"

namespace rapfast {

// Hands out aligned pieces of a buffer. With a null buffer it only counts, so that the same code
// says how much is needed and lays it out.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <typename T>
  T* take(int64_t count) {
    const int64_t begin = size_;
    size_ += (count * int64_t(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + begin);
  }

  int64_t size() const { return size_; }

 private:
  static constexpr int64_t kAlignment = 256;
  char* base_;
  int64_t size_ = 0;
};

// A view as the kernels want it, in pieces of 16 bytes. An unusable one has a test that nothing passes.
struct alignas(16) DeviceView {
  View<float> view;
  Vec3<float> center;
  int32_t padding[3];
  alignas(16) FrustumTest<float> test;
};

// How much a call wants.
struct Counts {
  int64_t n_records;        // wanted, also where there was no room
  int64_t n_intersections;  // room for pairs, likewise: see bin_cuda(); of the records there was room for
};

// What the host reads back of a call.
struct HostCounts {
  Counts counts;
  int64_t n_visible;  // records that are not dead; 0 without keep_state
};

// Where bin's last kernel writes them, in page-locked memory: a copy is another engine's work, whose turn keeps the next
// kernel waiting for 8 us.
struct HostMail {
  HostCounts* to;              // or null
  HostCounts* const* to_slot;  // where the device finds it, which a graph cannot know; or null
  const int64_t* n_visible;    // or null
};

struct ProjectScratch {
  DeviceView* views;       // [I] output, used by later stages
  int32_t* image_ids;      // [capacity] output: image of each record
  uint32_t* ballots;       // [I, n_words] bit g % 32 of word g / 32: the view may see Gaussian g
  // Set bits, of ever longer runs of words: the places of records are sums of few of them.
  uint32_t* chunk_counts;  // [I, n_chunks] kChunkWords words each
  uint32_t* span_counts;   // [I, n_spans] kSpanChunks chunks each
  uint32_t* image_counts;  // [I]
  uint32_t* next_item;     // [1] of the work that blocks take up as they get free
  ClearedMemory cleared;   // the last three
  // What a backward pass wants to know besides, or null.
  uint32_t* word_bases;    // [I, n_words] the first record of each word of ballots
  int64_t* n_visible;      // [1] records that are not dead
};

struct BinScratch {
  // What the kernel that makes the records leaves: csrc/cuda/tile_boxes.cuh.
  uint32_t* depth_keys;    // [record_capacity]
  uint64_t* boxes;         // [record_capacity]
  uint8_t* region_counts;  // [record_capacity]

  // Of records by depth, then pairs by region.
  uint64_t* items[2];        // [record_capacity] records on their way to order by image, then depth
  uint32_t* chunk_records;   // [pair chunks] the record that a chunk of pairs begins with
  uint32_t* region_offsets;  // [I * regions + 1]
  // Of pairs by region, then by depth.
  uint2* grouped;            // [capacity] as `pairs`, but a chunk of records at a time, by region
  uint32_t* grouped_keys;    // [capacity] their depths
  uint2* runs;               // [record chunks, groups] where a chunk's pairs of a group begin, and how many they are

  uint2* pairs;              // [capacity] by region, then depth: record relative to the image's first, and its tiles
  uint4* units;              // [units] parts of such lists: image, region and slice, first pair, number of pairs
  uint32_t* unit_counts;     // [units, 32] (tile, record) pairs of each tile in the list's units before
  uint32_t* tile_totals;     // [I, regions, slices, 32] such pairs of each tile

  // All of these are zero at first. Histograms are in several copies, to be added.
  uint32_t* depth_histograms;    // [copies, I, 5, 256] records by each digit of their key; pairs by the highest
  uint32_t* region_differences;  // [copies, I, bins] differences of the histogram of pairs by region
  uint32_t* image_records;       // [I] with a box
  uint64_t* image_pairs;         // [I] (region, record) pairs
  uint32_t* strips;              // [I, rows, regions_x] such pairs of a region's part of each row of tiles
  uint32_t* rows;                // [I, rows] of each row of tiles of the regions
  int64_t* image_tiles;          // [I] of each image
  uint64_t* n_pairs;             // [1] (region, record) pairs of all images
  uint32_t* n_units;             // [1] that have their place
  uint32_t* n_sorted;            // [1] pairs whose region has its place
  uint32_t* depth_states[4];     // [record chunks, 256] what chunks tell each other; the last [, 512]
  uint32_t* emit_states;         // [pair chunks, bins]
  uint32_t* tickets;             // [8] of the passes
  void* zero;                    // where they begin
  size_t zero_bytes;
};

constexpr int kFewBins = 256, kManyBins = 2048, kMostRegions = 4096;

// The regions of what is listed of an image.
struct RegionGrid {
  int32_t regions_x, regions_y;

  RAPFAST_HD int regions() const { return regions_x * regions_y; }
  // Of a sort by region.
  RAPFAST_HD int bins() const {
    return regions() <= kFewBins ? kFewBins : regions() <= kManyBins ? kManyBins : kMostRegions;
  }
  RAPFAST_HD int rows() const { return kRegionHeight * regions_y; }  // of tiles
};

// Throws where there are more than kMostRegions.
RegionGrid region_grid(int64_t tiles_x, int64_t tiles_y);

constexpr int kChunkWords = 16;
constexpr int kSpanChunks = 64;

RAPFAST_HD int64_t ballot_words(int64_t n_gaussians) { return (n_gaussians + 31) / 32; }
RAPFAST_HD int64_t ballot_chunks(int64_t n_gaussians) {
  return (ballot_words(n_gaussians) + kChunkWords - 1) / kChunkWords;
}
RAPFAST_HD int64_t ballot_spans(int64_t n_gaussians) {
  return (ballot_chunks(n_gaussians) + kSpanChunks - 1) / kSpanChunks;
}

ProjectScratch project_scratch(Arena& arena, int64_t n_images, int64_t n_gaussians,
                               int64_t record_capacity);
BinScratch bin_scratch(Arena& arena, int64_t n_images, RegionGrid grid, int64_t record_capacity, int64_t capacity);

}  // namespace rapfast
