// Stage 3 on the GPU: each image's records by depth, then their (tile, record) pairs by tile, both by
// stable radix sorts of one launch a pass (radix_sort.cuh). Ties keep the records' order, which is
// Gaussian order.
//
// The kernel that makes a record also says which tiles it has (tile_count.cuh); one kernel makes all
// the histograms of it. The number of a record's tiles rides in the bits of its key that the sort has
// done with, and the sort's last pass sums it, so that each record knows where its pairs begin. Pairs are first made in the kernel that sorts them by the low
// digit of their tile; where an image has few tiles that is the only pass. The number of records and
// of pairs is known on the device alone, and only what exists is worked on.
#include "../bin.h"

#include <atomic>

#include "check.cuh"
#include "radix_sort.cuh"
#include "scratch.h"
#include "tile_count.cuh"

namespace rapfast {
namespace {

using radix::Chunk;
using radix::Ranking;

constexpr int kDepthPasses = 4;
constexpr int kDepthBits = 8, kDepthBins = 1 << kDepthBits;  // of a pass
constexpr int kDepthRow = (kDepthPasses + 1) * kDepthBins;   // of an image's histograms

constexpr int kBlock = 512;   // threads
constexpr int kChunk = 4096;  // pairs that a block handles at a time
constexpr int kMostTileBins = 2048;

enum Tickets { kDepthTickets = 0, kEmitTickets = kDepthPasses, kTileTickets };  // one for each pass

struct BinKernelParams {
  BinParams<float> p;
  BinScratch s;
  TilePlan plan;
  Counts* counts;
  int copies;       // of each histogram: blocks add to them in turn
  bool chunk_each;  // there are blocks for every chunk: a block takes one
};

__device__ Record<float> load_record(const Record<float>* records, int64_t m) {
  const float4* at = reinterpret_cast<const float4*>(records + m);
  const float4 a = at[0], b = at[1];
  return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
}

__device__ __forceinline__ int64_t first_record(const BinParams<float>& p, int64_t image) {
  return min(p.image_offsets[image], p.record_capacity);
}

__device__ bool has_room(const BinKernelParams& b) { return b.counts->n_intersections <= b.p.capacity; }

// ---------------------------------------------------------------------------------------- counting

// For records that were made without count_tiles().
__global__ void __launch_bounds__(kThreads)
    count_kernel(BinParams<float> p, TileCounting counting) {
  const int64_t n = first_record(p, p.n_images);
  RAPFAST_GRID_STRIDE(m, n) {
    const int2 both = reinterpret_cast<const int2*>(p.radii)[m];
    const int32_t radii[2] = {both.x, both.y};
    count_tiles(counting, m, load_record(p.records, m), radii);
  }
}

// --------------------------------------------------------------------------------------- histograms

// Tiles of record m, however large, a row at a time: visit(first tile, end).
template <typename Visit>
__device__ __forceinline__ void for_rows_of(const BinKernelParams& b, int64_t m, const TileSet& set, Visit&& visit) {
  if (!set.is_large()) {
    const int width = set.width();
    uint64_t mask = set.mask();
    uint64_t more = set.has_more() ? b.s.more_tiles[m] : 0;
    const uint32_t row_bits = (1u << width) - 1;
    for (uint32_t tile = uint32_t(set.first()); (mask | more) != 0; tile += uint32_t(b.p.tiles_x)) {
      // A row is narrower than a word, and the second word follows the first.
      const uint32_t bits = uint32_t(mask) & row_bits;
      mask = (mask >> width | more << (TileSet::kMaskBits - width)) & ((uint64_t(1) << TileSet::kMaskBits) - 1);
      more >>= width;
      if (bits == 0) continue;
      const uint32_t begin = tile + uint32_t(__ffs(int(bits))) - 1;
      visit(begin, begin + uint32_t(__popc(bits)));
    }
    return;
  }
  const Record<float> r = load_record(b.p.records, m);
  const int2 both = reinterpret_cast<const int2*>(b.p.radii)[m];
  const int32_t radii[2] = {both.x, both.y};
  const TileRect rect = tile_rect(r.x, r.y, radii, b.p.tiles_x, b.p.tiles_y, b.p.first_tile_row);
  const CutEllipse<float> ellipse = cut_ellipse(r);
  for (int32_t ty = rect.y0; ty < rect.y1; ++ty) {
    int32_t x0, x1;
    tile_row_range(ellipse, rect, ty, x0, x1);
    const uint32_t row = uint32_t(ty - b.p.first_tile_row) * uint32_t(b.p.tiles_x);
    if (x0 < x1) visit(row + uint32_t(x0), row + uint32_t(x1));
  }
}

// Counts a run of tiles by the two digits of their numbers. The low digits' histogram takes the run's ends
// alone: its running sum is the histogram.
__device__ __forceinline__ void count_run(const TilePlan& plan, uint32_t begin, uint32_t end, uint32_t* low,
                                          uint32_t* high) {
  const uint32_t mask = (1u << plan.low_bits) - 1;
  const uint32_t first = begin >> plan.low_bits;
  const uint32_t rounds = (end >> plan.low_bits) - first;
  if (rounds != 0) atomicAdd(low, rounds);
  atomicAdd(low + (begin & mask), 1u);
  atomicSub(low + (end & mask), 1u);
  if (plan.high_bits == 0) return;
  for (uint32_t digit = first; digit <= (end - 1) >> plan.low_bits; ++digit) {
    const uint32_t from = max(begin, digit << plan.low_bits);
    const uint32_t to = min(end, (digit + 1) << plan.low_bits);
    atomicAdd(high + digit, to - from);
  }
}

// Adds x to bins[digit]. Most lanes of a warp have the same few digits: the lanes of each are summed first.
__device__ __forceinline__ void add_grouped(uint32_t* bins, uint32_t digit, uint32_t x) {
  uint32_t left = __ballot_sync(kFullWarp, x != 0);
  for (int round = 0; round < 3 && left != 0; ++round) {
    const uint32_t group_digit = __shfl_sync(kFullWarp, digit, __ffs(int(left)) - 1);
    const bool mine = digit == group_digit;
    const uint32_t sum = __reduce_add_sync(kFullWarp, mine ? x : 0);
    if (threadIdx.x % 32 == 0) atomicAdd(bins + group_digit, sum);
    if (mine) x = 0;
    left &= ~__ballot_sync(kFullWarp, mine);
  }
  if (x != 0) atomicAdd(bins + digit, x);
}

struct TallyShared {
  uint32_t depth[kDepthRow];
  uint32_t low[kMostTileBins], high[kMostTileBins];
};

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

// All histograms, of kItems records a thread at a time.
template <int kItems>
__global__ void __launch_bounds__(kBlock, 2) tally_kernel(BinKernelParams b) {
  __shared__ TallyShared shared;
  radix::wait_for_kernel_before();
  constexpr int kRecords = kBlock * kItems;
  const int thread = threadIdx.x;
  auto finder = radix::chunk_finder<kRecords, 0>(b.p.n_images, [&](int64_t i) {
    return uint32_t(first_record(b.p, i + 1) - first_record(b.p, i));
  });
  Chunk chunk;
  for (int64_t row = blockIdx.x; finder.find(row, chunk); row += gridDim.x) {
    const int64_t first = first_record(b.p, chunk.segment) + int64_t(chunk.place) * kRecords;
    const uint32_t count = min(uint32_t(kRecords), chunk.size - uint32_t(chunk.place) * kRecords);
    uint32_t keys[kItems];
    uint64_t sets[kItems];
    uint8_t counts[kItems];
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const uint32_t i = j * kBlock + thread;
      keys[j] = i < count ? b.s.depth_keys[first + i] : 0;
      sets[j] = i < count ? b.s.tile_sets[first + i] : 0;
      counts[j] = i < count ? b.s.tile_counts[first + i] : 0;
    }
    for (int i = thread; i < kDepthRow; i += kBlock) shared.depth[i] = 0;
    for (int i = thread; i < b.plan.bins; i += kBlock) shared.low[i] = shared.high[i] = 0;
    __syncthreads();

    uint32_t n_records = 0;
    uint64_t n_pairs = 0;
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const TileSet set(sets[j]);
      const uint32_t n_tiles = counts[j] < kManyTiles || !set.is_large() ? counts[j] : set.large_count();
      n_pairs += n_tiles;
      add_grouped(shared.depth + kDepthPasses * kDepthBins, keys[j] >> (kDepthPasses - 1) * kDepthBits, n_tiles);
      add_grouped(shared.depth + (kDepthPasses - 1) * kDepthBins, keys[j] >> (kDepthPasses - 1) * kDepthBits,
                  n_tiles != 0);
      if (n_tiles == 0) continue;
      ++n_records;
#pragma unroll
      for (int pass = 0; pass < kDepthPasses - 1; ++pass) {
        atomicAdd(&shared.depth[pass * kDepthBins + (keys[j] >> pass * kDepthBits) % kDepthBins], 1u);
      }
      for_rows_of(b, first + j * kBlock + thread, set, [&](uint32_t begin, uint32_t end) {
        count_run(b.plan, begin, end, shared.low, shared.high);
      });
    }
    n_records = __reduce_add_sync(kFullWarp, n_records);
    for (int step = 16; step > 0; step /= 2) n_pairs += __shfl_down_sync(kFullWarp, n_pairs, step);
    if (thread % 32 == 0 && n_records != 0) {
      atomicAdd(b.s.image_records + chunk.segment, n_records);
      add_to(reinterpret_cast<int64_t*>(b.s.image_pairs + chunk.segment), int64_t(n_pairs));
    }
    __syncthreads();
    const int64_t copy = chunk.place % b.copies * b.p.n_images + chunk.segment;
    uint32_t* const depth = b.s.depth_histograms + copy * kDepthRow;
    for (int i = thread; i < kDepthRow; i += kBlock) {
      if (shared.depth[i] != 0) atomicAdd(depth + i, shared.depth[i]);
    }
    for (int i = thread; i < b.plan.bins; i += kBlock) {
      if (shared.low[i] != 0) atomicAdd(b.s.low_differences + copy * b.plan.bins + i, shared.low[i]);
      if (b.plan.high_bits == 0 || shared.high[i] == 0) continue;
      atomicAdd(b.s.high_histogram + copy * b.plan.bins + i, shared.high[i]);
    }
    __syncthreads();
  }
}

// ------------------------------------------------------------------------------------ sort by depth

// Items a thread: few records are spread over more blocks.
template <int kItems>
using DepthRanking = Ranking<kDepthBins, kBlock, kItems>;

template <int kItems>
struct DepthShared {
  typename DepthRanking<kItems>::Shared ranking;
  uint2 sorted[kBlock * kItems];     // the chunk's items by digit
  uint8_t digits[kBlock * kItems];   // of these
  uint32_t chunk_first[kDepthBins];  // place in the chunk of a digit's first item
  uint32_t base[kDepthBins];         // where the chunk's items go, less their place in it
  uint32_t tile_base[kDepthBins];    // likewise their first pairs, less the chunk's pairs before them
  uint32_t warp_sums[kBlock / 32];
  uint32_t n_items;
  uint32_t ticket;
};

// Chunks of pairs of the images before this one.
__device__ __forceinline__ uint32_t pair_rows_before(const BinKernelParams& b, int32_t image) {
  uint32_t rows = 0;
  for (int32_t i = int32_t(threadIdx.x % 32); i < image; i += 32) {
    rows += max(1u, uint32_t(radix::chunks_of(int64_t(b.s.image_pairs[i]), kChunk)));
  }
  return __reduce_add_sync(kFullWarp, rows);
}

// The number of a record's tiles, of what an item has of it.
__device__ __forceinline__ uint32_t whole_count(const BinKernelParams& b, uint32_t count, uint32_t m) {
  if (count != kManyTiles) return count;
  const TileSet set(b.s.tile_sets[m]);
  return set.is_large() ? set.large_count() : count;  // a mask has fewer bits than kManyTiles
}

// Pass kPass of the sort by depth. Items are (key, record). The first pass takes keys as the records left
// them, drops records without tiles, and puts the number of tiles where the digit was. The last one leaves
// (record, first pair) instead.
template <int kPass, int kItems>
__global__ void __launch_bounds__(kBlock, 2) depth_kernel(BinKernelParams b) {
  using R = DepthRanking<kItems>;
  constexpr bool kFirst = kPass == 0, kLast = kPass == kDepthPasses - 1;
  constexpr int kWidth = kLast ? 2 * kDepthBins : kDepthBins;  // words of a state
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<DepthShared<kItems>*>(shared_bytes);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  uint32_t* const state = b.s.depth_states[kPass];
  radix::wait_for_kernel_before();
  if (kLast && !has_room(b)) return;
  if (kFirst && blockIdx.x == 0 && warp == 0) {
    int64_t n_pairs = 0;
#pragma unroll 1
    for (int64_t i = lane; i < b.p.n_images; i += 32) n_pairs += int64_t(b.s.image_pairs[i]);
    for (int step = 16; step > 0; step /= 2) n_pairs += __shfl_down_sync(kFullWarp, n_pairs, step);
    if (lane == 0) b.counts->n_intersections = n_pairs;
  }

  auto finder = radix::chunk_finder<R::kChunk, 0>(b.p.n_images, [&](int64_t i) {
    return kFirst ? uint32_t(first_record(b.p, i + 1) - first_record(b.p, i)) : b.s.image_records[i];
  });
  do {
    const uint32_t ticket = radix::take_ticket(b.s.tickets + kDepthTickets + kPass, &shared.ticket);
    Chunk chunk;
    if (!finder.find(ticket, chunk)) return;
    const int64_t image_first = first_record(b.p, chunk.segment);
    const uint32_t place = uint32_t(chunk.place) * R::kChunk;
    const uint32_t count = min(uint32_t(R::kChunk), chunk.size - place);

    uint2 items[R::kItems];
    uint32_t counts[kFirst ? (kItems + 3) / 4 : 1] = {};  // tiles, a byte an item
    uint32_t tags[R::kItems], own[1], valid = 0;
    const uint2* const in = reinterpret_cast<const uint2*>(b.s.items[(kPass + 1) % 2]) + image_first + place;
#pragma unroll
    for (int j = 0; j < R::kItems; ++j) {
      const uint32_t slot = R::slot(j);
      items[j] = make_uint2(0, 0);
      if (slot >= count) continue;
      if constexpr (kFirst) {
        const int64_t m = image_first + place + slot;
        items[j] = make_uint2(b.s.depth_keys[m], uint32_t(m));
        counts[j / 4] |= uint32_t(b.s.tile_counts[m]) << (j % 4 * 8);
      } else {
        items[j] = in[slot];
        valid |= 1u << j;
      }
    }
    const auto histogram = [&](int which) {
      const int i = which * kDepthBins + thread;
      return R::owns() ? histogram_at(b, b.s.depth_histograms, kDepthRow, chunk.segment, i) : 0;
    };
    const uint32_t in_image = histogram(kPass), tiles_in_image = kLast ? histogram(kDepthPasses) : 0;
#pragma unroll
    for (int j = 0; j < R::kItems; ++j) {
      if (kFirst && (counts[kFirst ? j / 4 : 0] >> (j % 4 * 8) & 255) != 0) valid |= 1u << j;
      tags[j] = items[j].x >> (kPass * kDepthBits) & (kDepthBins - 1);
    }
    R::run(shared.ranking, tags, valid, own);
    if (R::owns()) radix::publish(state, kWidth, thread, chunk, own);

    // Of the digits before: the chunk's items, the image's, and its tiles.
    uint32_t before_digit[kLast ? 3 : 2][1] = {{own[0]}, {in_image}};
    if (kLast) before_digit[kLast ? 2 : 0][0] = tiles_in_image;
    R::sums_before(shared.ranking, before_digit);
    const uint32_t chunk_first = before_digit[0][0];
    if (R::owns()) shared.chunk_first[thread] = chunk_first;
    if (thread == kDepthBins - 1) shared.n_items = chunk_first + own[0];
    __syncthreads();

#pragma unroll
    for (int j = 0; j < R::kItems; ++j) {
      if ((valid >> j & 1u) == 0) continue;
      const uint32_t digit = R::digit_of(tags[j]);
      const uint32_t at = shared.chunk_first[digit] + R::place_of(shared.ranking, tags[j]);
      if constexpr (kFirst) {
        items[j].x = (items[j].x & ~uint32_t(kDepthBins - 1)) | (counts[j / 4] >> (j % 4 * 8) & 255);
      }
      if constexpr (kLast) items[j].x = whole_count(b, items[j].x % kDepthBins, items[j].y);
      shared.sorted[at] = items[j];
      shared.digits[at] = uint8_t(digit);
    }
    uint2* const out = reinterpret_cast<uint2*>(b.s.items[kPass % 2]) + image_first;
    const uint32_t n_items = shared.n_items;
    uint32_t before[1];
    if constexpr (!kLast) {
      if (R::owns()) {
        radix::look_back(state, kWidth, thread, chunk, own, before);
        shared.base[thread] = before_digit[1][0] + before[0] - chunk_first;
      }
      __syncthreads();
      for (uint32_t i = thread; i < n_items; i += kBlock) out[shared.base[shared.digits[i]] + i] = shared.sorted[i];
    } else {
      // Tiles are summed over the chunk in its new order, a warp a stretch; items keep the sum before them.
      __syncthreads();
      uint32_t counts_of[R::kItems], tiles_before[R::kItems], sum = 0;
#pragma unroll
      for (int j = 0; j < R::kItems; ++j) {
        const uint32_t i = R::slot(j);
        counts_of[j] = i < n_items ? shared.sorted[i].x : 0;
        const uint32_t up_to = radix::warp_sum_up_to(counts_of[j]);
        tiles_before[j] = sum + up_to - counts_of[j];
        sum += __shfl_sync(kFullWarp, up_to, 31);
      }
      if (lane == 0) shared.warp_sums[warp] = sum;
      __syncthreads();
      const uint32_t sum_of_warp = lane < R::kWarps ? shared.warp_sums[lane] : 0;
      const uint32_t warps_before = __reduce_add_sync(kFullWarp, lane < warp ? sum_of_warp : 0);
      const uint32_t sum_of_all = __reduce_add_sync(kFullWarp, sum_of_warp);
#pragma unroll
      for (int j = 0; j < R::kItems; ++j) {
        tiles_before[j] += warps_before;
        if (R::slot(j) < int(n_items)) shared.sorted[R::slot(j)].x = tiles_before[j];
      }
      __syncthreads();
      if (R::owns()) {
        const uint32_t end = chunk_first + own[0];
        const uint32_t first_tile = chunk_first < n_items ? shared.sorted[chunk_first].x : sum_of_all;
        const uint32_t own_tiles[1] = {(end < n_items ? shared.sorted[end].x : sum_of_all) - first_tile};
        radix::publish(state, kWidth, kDepthBins + thread, chunk, own_tiles);
        radix::look_back(state, kWidth, thread, chunk, own, before);
        shared.base[thread] = before_digit[1][0] + before[0] - chunk_first;
        radix::look_back(state, kWidth, kDepthBins + thread, chunk, own_tiles, before);
        shared.tile_base[thread] = before_digit[kLast ? 2 : 0][0] + before[0] - first_tile;
      }
      const uint32_t first_row = pair_rows_before(b, chunk.segment);
      __syncthreads();
#pragma unroll
      for (int j = 0; j < R::kItems; ++j) {
        const uint32_t i = R::slot(j);
        if (i >= n_items) continue;
        const uint32_t digit = shared.digits[i];
        const uint32_t at = shared.base[digit] + i;
        const uint32_t first_pair = shared.tile_base[digit] + tiles_before[j];
        out[at] = make_uint2(shared.sorted[i].y, first_pair);
        // Chunks of pairs that begin with one of this record's.
        const uint64_t end_pair = uint64_t(first_pair) + counts_of[j];
        for (uint64_t c = radix::chunks_of(first_pair, kChunk); c * kChunk < end_pair; ++c) {
          b.s.chunk_records[first_row + c] = at;
        }
      }
    }
  } while (!b.chunk_each);
}

// ------------------------------------------------------------------------------------- sort by tile

// Place of the k-th set bit.
__device__ __forceinline__ int nth_bit(uint64_t mask, uint32_t k) {
  uint32_t word = uint32_t(mask);
  int at = 0;
  const uint32_t in_low = uint32_t(__popc(word));
  if (k >= in_low) {
    k -= in_low;
    word = uint32_t(mask >> 32);
    at = 32;
  }
#pragma unroll
  for (int width = 16; width > 0; width /= 2) {
    const uint32_t below = uint32_t(__popc(word & ((1u << width) - 1)));
    if (k >= below) {
      k -= below;
      word >>= width;
      at += width;
    }
  }
  return at;
}

// The k-th tile of a set with a mask.
__device__ __forceinline__ uint32_t nth_tile(const BinKernelParams& b, uint32_t m, const TileSet& set, uint32_t k) {
  uint64_t mask = set.mask();
  int bit = 0;
  if (set.has_more()) {
    const uint32_t in_first = uint32_t(__popcll(mask));
    if (k >= in_first) {
      k -= in_first;
      mask = b.s.more_tiles[m];
      bit = TileSet::kMaskBits;
    }
  }
  bit += nth_bit(mask, k);
  const int width = set.width();
  // Exact: both are small.
  const int row = int(__fdividef(float(bit) + 0.5f, float(width)));
  return uint32_t(set.first() + row * b.p.tiles_x + (bit - row * width));
}

// By a whole warp, a row of tiles a lane: for the lanes in `wanted`, the tile of pair k of record m, whose set is
// large.
__device__ __forceinline__ void large_tiles(const BinKernelParams& b, uint32_t wanted, uint32_t m, uint32_t k,
                                            uint32_t& tile) {
  const int lane = threadIdx.x % 32;
  while (wanted != 0) {
    const uint32_t owner_m = __shfl_sync(kFullWarp, m, __ffs(int(wanted)) - 1);
    const bool mine = m == owner_m && (wanted >> lane & 1u) != 0;
    wanted &= ~__ballot_sync(kFullWarp, mine);
    const Record<float> r = load_record(b.p.records, owner_m);
    const int2 both = reinterpret_cast<const int2*>(b.p.radii)[owner_m];
    const int32_t radii[2] = {both.x, both.y};
    const TileRect rect = tile_rect(r.x, r.y, radii, b.p.tiles_x, b.p.tiles_y, b.p.first_tile_row);
    const CutEllipse<float> ellipse = cut_ellipse(r);
    uint32_t passed = 0;  // tiles of the rows before
    for (int32_t ty = rect.y0 + lane; __any_sync(kFullWarp, mine && k >= passed); ty += 32) {
      int32_t x0 = 0, x1 = 0;
      if (ty < rect.y1) tile_row_range(ellipse, rect, ty, x0, x1);
      const uint32_t first = uint32_t(ty - b.p.first_tile_row) * uint32_t(b.p.tiles_x) + uint32_t(x0);
      const uint32_t n = uint32_t(x1 - x0), up_to = radix::warp_sum_up_to(n), local = k - passed;
      int row = 0;  // rows whose tiles all come before the k-th
#pragma unroll
      for (int step = 16; step > 0; step /= 2) {
        if (__shfl_sync(kFullWarp, up_to, row + step - 1) <= local) row += step;
      }
      const uint32_t row_first = __shfl_sync(kFullWarp, first, row);
      const uint32_t row_begin = __shfl_sync(kFullWarp, up_to - n, row);
      const uint32_t total = __shfl_sync(kFullWarp, up_to, 31);
      if (mine && k >= passed && local < total) tile = row_first + (local - row_begin);
      passed += total;
    }
  }
}

// Items of the second pass: the tile's high digit above the record, in as few bytes as they fit.
template <typename Item>
__device__ __forceinline__ Item tile_item(const TilePlan& plan, uint32_t tile, uint32_t record) {
  return Item(tile >> plan.low_bits) << plan.record_bits | record;
}

// The differences that a running sum makes the histogram of an image's low digits, of those that this thread
// looks after.
template <typename R>
__device__ __forceinline__ void load_differences(const BinKernelParams& b, int64_t image, uint32_t (&low)[R::kOwn]) {
#pragma unroll
  for (int k = 0; k < R::kOwn; ++k) {
    low[k] = R::owns() ? histogram_at(b, b.s.low_differences, b.plan.bins, image, R::first_own() + k) : 0;
  }
}

// Where there is no room for the pairs, every tile's list is empty.
__device__ __forceinline__ void write_empty_lists(const BinParams<float>& p) {
  const int64_t n_tiles = p.n_images * p.tiles_x * p.tiles_y;
  RAPFAST_GRID_STRIDE(t, n_tiles + 1) p.tile_offsets[t] = 0;
}

// The records of a chunk; used up before the ranking begins.
struct ChunkRecords {
  uint64_t sets[kChunk];
  uint32_t ms[kChunk];
  int32_t firsts[kChunk];              // slot of the first pair; negative where that lies in an earlier chunk
  uint32_t heads[kChunk / 32];         // bit s % 32 of word s / 32: a record's pairs begin at slot s
  uint32_t heads_before[kChunk / 32];  // set bits before the word
};

template <typename R, typename Item, bool kOnly>
struct ChunkPairs {
  typename R::Shared ranking;
  uint32_t base[R::kBins];  // where a digit's items go
  uint32_t chunk_first[kOnly ? 1 : R::kBins];
  Item sorted[kOnly ? 1 : R::kChunk];
  uint16_t digits[kOnly ? 1 : R::kChunk];
};

template <typename R, typename Item, bool kOnly>
struct EmitShared {
  union {
    ChunkRecords records;
    ChunkPairs<R, Item, kOnly> pairs;
  };
  uint32_t warp_sums[R::kWarps];
  uint32_t ticket;
};

// Makes the pairs of a chunk, a slot each, and sorts them by the low digit of their tile; kOnly: which is the
// whole of it.
template <typename R, typename Item, bool kOnly>
__global__ void __launch_bounds__(R::kThreads, 2) emit_kernel(BinKernelParams b) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& all = *reinterpret_cast<EmitShared<R, Item, kOnly>*>(shared_bytes);
  ChunkRecords& chunk_records = all.records;
  ChunkPairs<R, Item, kOnly>& shared = all.pairs;
  const int thread = threadIdx.x, lane = thread % 32;
  const int64_t n_tiles = int64_t(b.p.tiles_x) * b.p.tiles_y;
  radix::wait_for_kernel_before();
  if (!has_room(b)) {
    if (kOnly) write_empty_lists(b.p);
    return;
  }
  if (b.p.n_images == 0 && kOnly && blockIdx.x == 0 && thread == 0) b.p.tile_offsets[0] = 0;

  auto finder =
      radix::chunk_finder<kChunk, 1>(b.p.n_images, [&](int64_t i) { return uint32_t(b.s.image_pairs[i]); });
  do {
    const uint32_t ticket = radix::take_ticket(b.s.tickets + kEmitTickets, &all.ticket);
    Chunk chunk;
    if (!finder.find(ticket, chunk)) return;
    const int64_t image_first = first_record(b.p, chunk.segment);
    const uint32_t place = uint32_t(chunk.place) * kChunk;
    const uint32_t count = min(uint32_t(kChunk), chunk.size - place);

    if (thread < kChunk / 32) chunk_records.heads[thread] = 0;
    uint32_t first = 0, end = 0;
    if (count != 0) {
      first = b.s.chunk_records[ticket];
      end = place + count < chunk.size ? b.s.chunk_records[ticket + 1] + 1 : b.s.image_records[chunk.segment];
    }
    __syncthreads();
    const uint2* const records = reinterpret_cast<const uint2*>(b.s.items[(kDepthPasses - 1) % 2]) + image_first;
    for (uint32_t r = first + thread; r < end; r += R::kThreads) {
      const uint2 record = records[r];
      const int32_t slot = int32_t(record.y - place);
      if (slot >= int32_t(count)) continue;  // the next chunk's first
      const uint32_t head = uint32_t(max(slot, 0));
      atomicOr(&chunk_records.heads[head / 32], 1u << (head % 32));
      chunk_records.ms[r - first] = record.x;
      chunk_records.firsts[r - first] = slot;
      chunk_records.sets[r - first] = b.s.tile_sets[record.x];
    }
    __syncthreads();
    uint32_t heads_before[1] = {thread < kChunk / 32 ? uint32_t(__popc(chunk_records.heads[thread])) : 0};
    radix::block_sums_before<R::kThreads>(heads_before, all.warp_sums);
    if (thread < kChunk / 32) chunk_records.heads_before[thread] = heads_before[0];
    __syncthreads();

    uint32_t tags[R::kItems], own[R::kOwn], valid = 0;
    Item items[R::kItems];
#pragma unroll
    for (int j = 0; j < R::kItems; ++j) {
      const uint32_t slot = R::slot(j);
      const bool exists = slot < count;
      uint32_t m = 0, k = 0, tile = 0;
      bool is_large = false;
      if (exists) {
        valid |= 1u << j;
        const uint32_t heads_up_to = chunk_records.heads[slot / 32] & 0xffffffffu >> (31 - lane);
        const uint32_t r = chunk_records.heads_before[slot / 32] + uint32_t(__popc(heads_up_to)) - 1;
        m = chunk_records.ms[r];
        k = uint32_t(int32_t(slot) - chunk_records.firsts[r]);
        const TileSet set(chunk_records.sets[r]);
        is_large = set.is_large();
        if (!is_large) tile = nth_tile(b, m, set, k);
      }
      const uint32_t large = __ballot_sync(kFullWarp, is_large);
      if (large != 0) large_tiles(b, large, m, k, tile);
      tags[j] = tile & ((1u << b.plan.low_bits) - 1);
      const uint32_t record = m - uint32_t(image_first);
      items[j] = kOnly ? Item(record) : tile_item<Item>(b.plan, tile, record);
    }
    __syncthreads();  // the records' memory is the ranking's

    R::run(shared.ranking, tags, valid, own);
    if (R::owns()) radix::publish(b.s.tile_states[0], R::kBins, R::first_own(), chunk, own);
    // Of the digits before: differences, then the image's pairs and the chunk's.
    uint32_t differences[1][R::kOwn], before_digit[kOnly ? 1 : 2][R::kOwn], before[R::kOwn];
    load_differences<R>(b, chunk.segment, differences[0]);
#pragma unroll
    for (int k = 0; k < R::kOwn; ++k) before_digit[0][k] = differences[0][k];
    R::sums_before(shared.ranking, differences);
#pragma unroll
    for (int k = 0; k < R::kOwn; ++k) {
      before_digit[0][k] = R::owns() ? before_digit[0][k] + differences[0][k] : 0;
      if (!kOnly) before_digit[kOnly ? 0 : 1][k] = own[k];
    }
    R::sums_before(shared.ranking, before_digit);
    const uint32_t(&in_image_first)[R::kOwn] = before_digit[0];
    if constexpr (kOnly) {
      if (R::owns()) {
        if (chunk.place == 0) {
          int64_t* const offsets = b.p.tile_offsets + chunk.segment * n_tiles;
#pragma unroll
          for (int k = 0; k < R::kOwn; ++k) {
            const int64_t t = R::first_own() + k;
            if (t < n_tiles) offsets[t] = int64_t(chunk.before) + in_image_first[k];
          }
          if (thread == 0 && chunk.segment == b.p.n_images - 1) offsets[n_tiles] = int64_t(chunk.before) + chunk.size;
        }
#pragma unroll
        for (int k = 0; k < R::kOwn; ++k) shared.base[R::first_own() + k] = chunk.before + in_image_first[k];
        radix::look_back(b.s.tile_states[0], R::kBins, R::first_own(), chunk, own, before);
#pragma unroll
        for (int k = 0; k < R::kOwn; ++k) shared.base[R::first_own() + k] += before[k];
      }
      __syncthreads();
#pragma unroll
      for (int j = 0; j < R::kItems; ++j) {
        if ((valid >> j & 1u) == 0) continue;
        const uint32_t at = shared.base[R::digit_of(tags[j])] + R::place_of(shared.ranking, tags[j]);
        b.p.tile_records[at] = int32_t(items[j]);
      }
    } else {
      const uint32_t(&chunk_first)[R::kOwn] = before_digit[kOnly ? 0 : 1];
      if (R::owns()) {
#pragma unroll
        for (int k = 0; k < R::kOwn; ++k) shared.chunk_first[R::first_own() + k] = chunk_first[k];
      }
      __syncthreads();
#pragma unroll
      for (int j = 0; j < R::kItems; ++j) {
        if ((valid >> j & 1u) == 0) continue;
        const uint32_t digit = R::digit_of(tags[j]);
        const uint32_t at = shared.chunk_first[digit] + R::place_of(shared.ranking, tags[j]);
        shared.sorted[at] = items[j];
        shared.digits[at] = uint16_t(digit);
      }
      if (R::owns()) {
        radix::look_back(b.s.tile_states[0], R::kBins, R::first_own(), chunk, own, before);
#pragma unroll
        for (int k = 0; k < R::kOwn; ++k) {
          shared.base[R::first_own() + k] = chunk.before + in_image_first[k] + before[k] - chunk_first[k];
        }
      }
      __syncthreads();
      Item* const out = static_cast<Item*>(b.s.pairs);
      for (uint32_t i = thread; i < count; i += R::kThreads) out[shared.base[shared.digits[i]] + i] = shared.sorted[i];
    }
  } while (!b.chunk_each);
}

template <typename R, typename Item>
struct TileShared {
  typename R::Shared ranking;
  uint32_t base[R::kBins];
  uint32_t chunk_first[R::kBins + 1];
  uint32_t low_first[R::kBins + 1];  // where the image's pairs of a low digit begin
  Item sorted[R::kChunk];
  uint16_t slots[R::kChunk];         // where these were
  uint32_t ticket;
};

// The first of the ascending values[0 ... n) that is at least x.
template <typename T>
__device__ __forceinline__ uint32_t lower_bound(const T* values, uint32_t low, uint32_t high, uint32_t x) {
  while (low < high) {
    const uint32_t middle = (low + high) / 2;
    if (values[middle] < x) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Sorts pairs by the high digit of their tile, keeps the records alone, and writes the tiles' offsets: tile
// (high, low) begins where the first pair of low digit `low` or more and high digit `high` goes.
template <typename R, typename Item>
__global__ void __launch_bounds__(R::kThreads, 2) tile_kernel(BinKernelParams b) {
  using Shared = TileShared<R, Item>;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  const int thread = threadIdx.x;
  const int64_t n_tiles = int64_t(b.p.tiles_x) * b.p.tiles_y;
  const uint32_t low_bins = 1u << b.plan.low_bits, high_bins = 1u << b.plan.high_bits;
  radix::wait_for_kernel_before();
  if (!has_room(b)) {
    write_empty_lists(b.p);
    return;
  }
  if (b.p.n_images == 0 && blockIdx.x == 0 && thread == 0) b.p.tile_offsets[0] = 0;

  auto finder =
      radix::chunk_finder<kChunk, 1>(b.p.n_images, [&](int64_t i) { return uint32_t(b.s.image_pairs[i]); });
  do {
    const uint32_t ticket = radix::take_ticket(b.s.tickets + kTileTickets, &shared.ticket);
    Chunk chunk;
    if (!finder.find(ticket, chunk)) return;
    const uint32_t place = uint32_t(chunk.place) * kChunk;
    const uint32_t count = min(uint32_t(kChunk), chunk.size - place);
    const bool is_last = place + count == chunk.size;
    const Item* const in = static_cast<const Item*>(b.s.pairs) + chunk.before + place;

    uint32_t tags[R::kItems], own[R::kOwn], valid = 0;
    Item items[R::kItems];
#pragma unroll
    for (int j = 0; j < R::kItems; ++j) {
      const uint32_t slot = R::slot(j);
      items[j] = slot < count ? in[slot] : Item(0);
      valid |= slot < count ? 1u << j : 0;
    }
#pragma unroll
    for (int j = 0; j < R::kItems; ++j) tags[j] = uint32_t(items[j] >> b.plan.record_bits);
    R::run(shared.ranking, tags, valid, own);
    if (R::owns()) radix::publish(b.s.tile_states[1], R::kBins, R::first_own(), chunk, own);

    // Of the digits before: differences, the image's pairs by high digit and the chunk's; then those by low digit.
    uint32_t first_sums[3][R::kOwn], low_first[1][R::kOwn], before[R::kOwn];
    load_differences<R>(b, chunk.segment, first_sums[0]);
#pragma unroll
    for (int k = 0; k < R::kOwn; ++k) {
      low_first[0][k] = first_sums[0][k];
      first_sums[1][k] =
          R::owns() ? histogram_at(b, b.s.high_histogram, b.plan.bins, chunk.segment, R::first_own() + k) : 0;
      first_sums[2][k] = own[k];
    }
    R::sums_before(shared.ranking, first_sums);
#pragma unroll
    for (int k = 0; k < R::kOwn; ++k) low_first[0][k] = R::owns() ? low_first[0][k] + first_sums[0][k] : 0;
    R::sums_before(shared.ranking, low_first);
    const uint32_t(&in_image_first)[R::kOwn] = first_sums[1];
    const uint32_t(&chunk_first)[R::kOwn] = first_sums[2];
    if (R::owns()) {
#pragma unroll
      for (int k = 0; k < R::kOwn; ++k) {
        shared.chunk_first[R::first_own() + k] = chunk_first[k];
        shared.low_first[R::first_own() + k] = low_first[0][k];
      }
      if (R::first_own() + R::kOwn == R::kBins) shared.chunk_first[R::kBins] = count;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < R::kItems; ++j) {
      if ((valid >> j & 1u) == 0) continue;
      const uint32_t digit = R::digit_of(tags[j]);
      const uint32_t at = shared.chunk_first[digit] + R::place_of(shared.ranking, tags[j]);
      shared.sorted[at] = items[j];
      shared.slots[at] = uint16_t(R::slot(j));
    }
    if (R::owns()) {
      radix::look_back(b.s.tile_states[1], R::kBins, R::first_own(), chunk, own, before);
#pragma unroll
      for (int k = 0; k < R::kOwn; ++k) {
        shared.base[R::first_own() + k] = chunk.before + in_image_first[k] + before[k] - chunk_first[k];
      }
    }
    __syncthreads();

    const Item record_mask = (Item(1) << b.plan.record_bits) - 1;
    for (uint32_t i = thread; i < count; i += R::kThreads) {
      const Item item = shared.sorted[i];
      b.p.tile_records[shared.base[uint32_t(item >> b.plan.record_bits)] + i] = int32_t(item & record_mask);
    }
    // Low digits whose pairs begin in this chunk; behind the last pair begin those that have none.
    const uint32_t first_low = lower_bound(shared.low_first, 0, low_bins, place);
    const uint32_t end_low = is_last ? low_bins : lower_bound(shared.low_first, 0, low_bins, place + count);
    const uint32_t n_low = end_low - first_low;
    for (uint32_t i = thread; i < n_low * high_bins; i += R::kThreads) {
      const uint32_t low = first_low + i % n_low, high = i / n_low;
      const int64_t tile = int64_t(high) << b.plan.low_bits | low;
      if (tile >= n_tiles) continue;
      const uint32_t at = lower_bound(shared.slots, shared.chunk_first[high], shared.chunk_first[high + 1],
                                      shared.low_first[low] - place);
      b.p.tile_offsets[chunk.segment * n_tiles + tile] = int64_t(shared.base[high]) + at;
    }
    if (is_last && thread == 0 && chunk.segment == b.p.n_images - 1) {
      b.p.tile_offsets[b.p.n_images * n_tiles] = int64_t(chunk.before) + chunk.size;
    }
  } while (!b.chunk_each);
}

// ----------------------------------------------------------------------------------------- launches

// As many segments may each have a chunk that is not full.
int64_t most_chunks(int64_t capacity, int chunk, int64_t n_images) {
  return radix::chunks_of(capacity, chunk) + n_images;
}

// Records a thread of the sort by depth.
constexpr int kFewItems = 2, kManyItems = 8;
int depth_items(int64_t record_capacity) { return record_capacity < 1 << 19 ? kFewItems : kManyItems; }

// Launches as many blocks as run at once, or one for each chunk; they take tickets. What a kernel needs to have so
// much shared memory is set once a device.
template <auto kernel, int kThreads_ = kBlock>
void launch(BinKernelParams b, size_t shared_bytes, int64_t most_chunks, const char* name, cudaStream_t stream) {
  constexpr int kMaxDevices = 64;
  static std::atomic<int> known[kMaxDevices];  // blocks at once; negative: without programmatic launches
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  int at_once = device < kMaxDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (at_once == 0) {
    int processors = 0, each = 0, major = 0;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)),
          "cudaFuncSetAttribute");
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads_, shared_bytes), "occupancy");
    at_once = max_of(1, processors * each) * (major >= 9 ? 1 : -1);
    if (device < kMaxDevices) known[device].store(at_once, std::memory_order_relaxed);
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  const int64_t blocks = max_of<int64_t>(1, min_of<int64_t>(at_once < 0 ? -at_once : at_once, most_chunks));
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(kThreads_);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = at_once > 0 ? 1 : 0;
  b.chunk_each = blocks >= most_chunks;
  check(cudaLaunchKernelEx(&config, kernel, b), name);
}

template <int kPass, int kItems>
void launch_depth(const BinKernelParams& b, cudaStream_t stream) {
  const int64_t chunks = most_chunks(b.p.record_capacity, kBlock * kItems, b.p.n_images);
  launch<depth_kernel<kPass, kItems>>(b, sizeof(DepthShared<kItems>), chunks, "depth_kernel", stream);
}

// kItems: records a thread in a chunk. Results do not depend on it.
template <int kItems>
void sort_by_depth(const BinKernelParams& b, cudaStream_t stream) {
  const int64_t chunks = most_chunks(b.p.record_capacity, kBlock * kItems, b.p.n_images);
  launch<tally_kernel<kItems>>(b, 0, chunks, "tally_kernel", stream);
  launch_depth<0, kItems>(b, stream);
  launch_depth<1, kItems>(b, stream);
  launch_depth<2, kItems>(b, stream);
  launch_depth<3, kItems>(b, stream);
}

template <typename R, typename Item, bool kOnly>
void launch_tiles(const BinKernelParams& b, int64_t chunks, cudaStream_t stream) {
  launch<emit_kernel<R, Item, kOnly>, R::kThreads>(b, sizeof(EmitShared<R, Item, kOnly>), chunks, "emit_kernel", stream);
  if constexpr (!kOnly) {
    launch<tile_kernel<R, Item>, R::kThreads>(b, sizeof(TileShared<R, Item>), chunks, "tile_kernel", stream);
  }
}

}  // namespace

TilePlan tile_plan(int64_t n_tiles, int64_t record_capacity) {
  constexpr int kOnePassBits = 11, kMostBits = 22;
  int bits = 1;
  while ((int64_t(1) << bits) < n_tiles) ++bits;
  if (bits > kMostBits) {
    throw std::runtime_error("rapfast: an image must have at most " + std::to_string(int64_t(1) << kMostBits) +
                             " tiles of 16 x 16 pixels, got " + std::to_string(n_tiles));
  }
  if (bits <= kOnePassBits) return {bits, 0, bits <= 8 ? 256 : 2048, 32, 4};
  TilePlan plan{(bits + 1) / 2, bits / 2, 128, 0, 4};
  plan.record_bits = 32 - plan.high_bits;
  if (plan.low_bits > 7) plan.bins = 256;
  if (plan.low_bits > 8 || record_capacity > int64_t(1) << plan.record_bits) {
    plan.bins = 2048;
    plan.record_bits = 32;
    plan.item_bytes = 8;
  }
  return plan;
}

BinScratch bin_scratch(Arena& arena, int64_t n_images, int64_t n_tiles, int64_t record_capacity, int64_t capacity) {
  const TilePlan plan = tile_plan(n_tiles, record_capacity);
  const int64_t record_chunks = most_chunks(record_capacity, kBlock * depth_items(record_capacity), n_images);
  const int64_t pair_chunks = most_chunks(capacity, kChunk, n_images);
  const int64_t histograms = histogram_rows(n_images);
  BinScratch s{};
  s.depth_keys = arena.take<uint32_t>(record_capacity);
  s.tile_sets = arena.take<uint64_t>(record_capacity);
  s.more_tiles = arena.take<uint64_t>(record_capacity);
  s.tile_counts = arena.take<uint8_t>(record_capacity);
  for (auto& items : s.items) items = arena.take<uint64_t>(record_capacity);
  s.chunk_records = arena.take<uint32_t>(pair_chunks);
  s.pairs = plan.high_bits == 0 ? nullptr : arena.take<char>(capacity * plan.item_bytes);

  const int64_t begin = arena.size();
  s.tickets = arena.take<uint32_t>(8);
  s.zero = s.tickets;
  s.depth_histograms = arena.take<uint32_t>(histograms * kDepthRow);
  s.image_records = arena.take<uint32_t>(n_images);
  s.image_pairs = arena.take<uint64_t>(n_images);
  s.low_differences = arena.take<uint32_t>(histograms * plan.bins);
  s.high_histogram = arena.take<uint32_t>(histograms * plan.bins);
  for (int pass = 0; pass < kDepthPasses; ++pass) {
    s.depth_states[pass] = arena.take<uint32_t>(record_chunks * kDepthBins * (pass == kDepthPasses - 1 ? 2 : 1));
  }
  for (int pass = 0; pass < (plan.high_bits == 0 ? 1 : 2); ++pass) {
    s.tile_states[pass] = arena.take<uint32_t>(pair_chunks * plan.bins);
  }
  s.zero_bytes = size_t(arena.size() - begin);
  return s;
}

TileCounting tile_counting(const BinParams<float>& p, const BinScratch& s) {
  return {p.tiles_x, p.tiles_y, p.first_tile_row, s.depth_keys, s.tile_sets, s.more_tiles, s.tile_counts};
}

void count_cuda(const BinParams<float>& p, const BinScratch& s, cudaStream_t stream) {
  check(cudaMemsetAsync(s.zero, 0, s.zero_bytes, stream), "cudaMemsetAsync");
  if (p.record_capacity == 0) return;
  count_kernel<<<grid_for(p.record_capacity), kThreads, 0, stream>>>(p, tile_counting(p, s));
  check_launch("count_kernel");
}

void bin_cuda(const BinParams<float>& p, const BinScratch& s, Counts* counts, cudaStream_t stream) {
  const TilePlan plan = tile_plan(int64_t(p.tiles_x) * p.tiles_y, p.record_capacity);
  const BinKernelParams b = {p, s, plan, counts, histogram_copies(p.n_images), false};
  if (p.record_capacity > 0) {
    if (depth_items(p.record_capacity) == kFewItems) {
      sort_by_depth<kFewItems>(b, stream);
    } else {
      sort_by_depth<kManyItems>(b, stream);
    }
  }
  const int64_t chunks = most_chunks(p.capacity, kChunk, p.n_images);
  if (plan.high_bits == 0) {
    if (plan.bins == 256) {
      launch_tiles<Ranking<256, kBlock, kChunk / kBlock>, uint32_t, true>(b, chunks, stream);
    } else {
      launch_tiles<Ranking<2048, kBlock, kChunk / kBlock>, uint32_t, true>(b, chunks, stream);
    }
  } else if (plan.bins == 128) {
    launch_tiles<Ranking<128, kBlock, kChunk / kBlock>, uint32_t, false>(b, chunks, stream);
  } else if (plan.bins == 256) {
    launch_tiles<Ranking<256, kBlock, kChunk / kBlock>, uint32_t, false>(b, chunks, stream);
  } else {
    // Half the threads: a warp's counts take much of the shared memory that the smaller GPUs have.
    launch_tiles<Ranking<2048, kBlock / 2, 2 * kChunk / kBlock>, uint64_t, false>(b, chunks, stream);
  }
}

}  // namespace rapfast
