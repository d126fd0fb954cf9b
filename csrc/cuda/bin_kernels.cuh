// What the kernels of stage 3 share: their parameters, and the records and histograms that they read.
#pragma once

#include "../bin.h"
#include "check.cuh"
#include "launch.cuh"
#include "radix_sort.cuh"
#include "scratch.h"
#include "tile_boxes.cuh"

namespace rapfast {
namespace {

using radix::Chunk;
using radix::Ranking;

constexpr int kDepthPasses = 4;
constexpr int kDepthBits = 8, kDepthBins = 1 << kDepthBits;  // of a pass
constexpr int kDepthRow = (kDepthPasses + 1) * kDepthBins;   // of an image's histograms

constexpr int kMostSlices = 32;

constexpr int kBlock = 512;  // threads
enum Tickets { kDepthTickets = 0, kEmitTickets = kDepthPasses };  // one for each pass

struct BinKernelParams {
  BinParams<float> p;
  BinScratch s;
  RegionGrid grid;
  Counts* counts;
  HostMail mail;
  int copies;           // of each histogram: blocks add to them in turn
  int pair_chunk_bits;  // of the number of pairs that a block makes at a time
  int group_chunk_bits;  // of the number of records whose pairs a block groups
  int slices;           // of depth, a power of two: a list for each of a region
  bool chunk_each;      // there are blocks for every chunk: a block takes one
};

__device__ Record<float> load_record(const Record<float>* records, int64_t m) {
  const float4* at = reinterpret_cast<const float4*>(records + m);
  const float4 a = at[0], b = at[1];
  return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
}

__device__ __forceinline__ int64_t first_record(const BinParams<float>& p, int64_t image) {
  return min(p.image_offsets[image], p.record_capacity);
}

// For the pairs by region; asked once all are counted.
__device__ bool has_room(const BinKernelParams& b) { return int64_t(*b.s.n_pairs) <= b.p.capacity; }

// Adding to a few counters from many blocks takes long: the more images, the more counters there are.
int histogram_copies(int64_t n_images) { return n_images <= 2 ? 8 : n_images <= 16 ? 4 : 1; }

// Room for the copies of n images, and for those of fewer: memory made for a batch serves smaller ones.
int64_t histogram_rows(int64_t n_images) {
  if (n_images <= 2) return 8 * n_images;
  return n_images <= 16 ? max_of<int64_t>(16, 4 * n_images) : max_of<int64_t>(64, n_images);
}

// One number of an image's histogram: `row` words an image.
__device__ __forceinline__ uint32_t histogram_at(const BinKernelParams& b, const uint32_t* histograms, int row,
                                                 int64_t image, int i) {
  uint32_t sum = 0;
  for (int copy = 0; copy < b.copies; ++copy) sum += histograms[(copy * b.p.n_images + image) * row + i];
  return sum;
}

}  // namespace
}  // namespace rapfast
