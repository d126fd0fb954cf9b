// Stage 3: the (tile, record) pairs of records in order of depth, by tile.
#pragma once

#include "bin_kernels.cuh"

namespace rapfast {
namespace {

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

}  // namespace
}  // namespace rapfast
