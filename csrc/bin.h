// Stage 3, bin: for every tile of every image, the records that reach it, front to back.
#pragma once

#include "cuda/scratch_types.h"
#include "math/tile.h"

namespace rapfast {

template <typename T>
struct BinParams {
  int64_t n_images;  // I
  int32_t tiles_x, tiles_y;  // listed per image
  // The image's row of tiles that is listed as row 0: an image may be listed in bands, which together
  // are the lists of the whole.
  int32_t first_tile_row = 0;
  int64_t record_capacity;   // rows of records; M may not exceed it
  int64_t capacity;          // pairs there is room for

  const Record<T>* records;      // [M] ordered by image, then Gaussian
  const int32_t* radii;          // [M, 2]
  const int64_t* image_offsets;  // [I + 1]

  // Outputs. Within a tile: depth ascending, ties by Gaussian. Where tile_offsets' last entry
  // (on the GPU counts->n_intersections) exceeds the capacity, tile_records is not written: the caller comes again with
  // room.
  int64_t* tile_offsets;  // [I * tiles_y * tiles_x + 1]
  int32_t* tile_records;  // [capacity] record index relative to its image's first record

  // On the GPU, or null: [order_words()] the tiles in classes by the length of their lists, cuda/tile_order.cuh.
  uint32_t* order = nullptr;
};

template <typename T>
void bin_cpu(const BinParams<T>& params, int threads);

#if RAPFAST_WITH_CUDA
// Times the mean length: lists that are as long are begun first.
constexpr int64_t kLongList = 4;
// Tiles are begun in classes by the length of their lists, each of which has room for all.
constexpr int kLengthClasses = 8;
constexpr int64_t order_words(int64_t n_tiles) { return kLengthClasses * (n_tiles + 1); }

// Tells bin_cuda() of each record what it needs to know and clears scratch.zero. A kernel that makes records may
// do the one itself (cuda/tile_boxes.cuh), one before it the other.
void boxes_cuda(const BinParams<float>& params, const BinScratch& scratch, cudaStream_t stream);
TileBoxes tile_boxes(const BinParams<float>& params, const BinScratch& scratch);

// Writes counts->n_intersections, the room that the call needs: its (tile, record) pairs, or those of regions and
// records (cuda/tile_boxes.cuh) where there are more of them, since boxes touch regions that their ellipses miss. Where
// it exceeds the capacity every list is empty; and where the latter alone do, the former are not counted yet, so that
// the caller may have to come a third time.
// Where there is `mail` the host gets the counts by it.
void bin_cuda(const BinParams<float>& params, const BinScratch& scratch, Counts* counts, const HostMail* mail,
              cudaStream_t stream);
#endif

}  // namespace rapfast
