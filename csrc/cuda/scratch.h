// Device memory of a call, carved out of buffers that the caller allocates.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../math/frustum.h"

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

// A view as the kernels want it.
struct DeviceView {
  FrustumTest<float> test;  // holds the View
  Vec3<float> center;
};

// What the host reads back of a call.
struct Counts {
  int64_t n_records;        // wanted, also where there was no room
  int64_t n_intersections;  // likewise; of the records there was room for
};

struct ProjectScratch {
  DeviceView* views;       // [I] output, used by later stages
  int32_t* image_ids;      // [capacity] output: image of each record
  uint32_t* ballots;       // [I, n_words] bit g % 32 of word g / 32: the view may see Gaussian g
  uint32_t* word_offsets;  // [I, n_words] set bits before the word
  void* cub;
  size_t cub_bytes;
};

struct BinScratch {
  uint32_t* depth_keys[2];  // [record_capacity]
  int32_t* order[2];        // [record_capacity]
  uint32_t* n_tiles;        // [record_capacity]
  uint32_t* starts;         // [record_capacity] in depth order
  uint32_t* tile_keys[2];   // [capacity]
  int32_t* values;          // [capacity] what the tile sort reads
  void* cub;
  size_t cub_bytes;
};

RAPFAST_HD int64_t ballot_words(int64_t n_gaussians) { return (n_gaussians + 31) / 32; }

ProjectScratch project_scratch(Arena& arena, int64_t n_images, int64_t n_gaussians,
                               int64_t record_capacity);
BinScratch bin_scratch(Arena& arena, int64_t record_capacity, int64_t capacity);

}  // namespace rapfast
