// Device memory of a call, carved out of buffers that the caller allocates.
#pragma once

#include <cstddef>
#include <cstdint>

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
  int64_t n_intersections;  // likewise; of the records there was room for
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
  // What the kernel that makes the records leaves: csrc/cuda/tile_count.cuh.
  uint32_t* depth_keys;  // [record_capacity]
  uint64_t* tile_sets;   // [record_capacity]
  uint64_t* more_tiles;  // [record_capacity]
  uint8_t* tile_counts;  // [record_capacity]

  uint64_t* items[2];       // [record_capacity] records on their way to order by image, then depth
  uint32_t* chunk_records;  // [pair chunks] the record that a chunk of pairs begins with
  void* pairs;              // [capacity] by the low digit of their tile; null where one pass suffices

  // All of these are zero at first. Histograms are in several copies, to be added.
  uint32_t* depth_histograms;  // [copies, I, 5, 256] records by each digit of their key; tiles by the highest
  uint32_t* low_differences;   // [copies, I, bins] differences of the histogram of pairs by their tile's low digit
  uint32_t* high_histogram;    // [copies, I, bins] pairs by their tile's high digit
  uint32_t* image_records;     // [I] with tiles
  uint64_t* image_pairs;       // [I] (tile, record) pairs
  uint32_t* depth_states[4];   // [record chunks, 256] what chunks tell each other; the last [, 512]
  uint32_t* tile_states[2];    // [pair chunks, tile_bins]
  uint32_t* tickets;           // [8] of the passes
  void* zero;                  // where they begin
  size_t zero_bytes;
};

// How pairs are sorted by tile.
struct TilePlan {
  int low_bits, high_bits;  // of an image's tile numbers; no high ones: one pass
  int bins;                 // of a pass
  int record_bits;          // low bits of an item that hold the record; the tile's high digit is above
  int item_bytes;
};

TilePlan tile_plan(int64_t n_tiles, int64_t record_capacity);

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
// n_tiles: of an image.
BinScratch bin_scratch(Arena& arena, int64_t n_images, int64_t n_tiles, int64_t record_capacity, int64_t capacity);

}  // namespace rapfast
