// Stage 3: the histograms of all passes, and each image's records by depth.
#pragma once

#include "bin_kernels.cuh"

namespace rapfast {
namespace {

// --------------------------------------------------------------------------------------- histograms

// Counts the regions of a box. The histogram takes the ends of each row of them alone: its running sum is the
// histogram.
__device__ __forceinline__ void count_regions(uint32_t* differences, int bins, int regions_x, TileBox regions) {
  for (uint32_t y = regions.y0(); y < regions.y1(); ++y) {
    const uint32_t row = y * uint32_t(regions_x), end = row + regions.x1();
    atomicAdd(differences + row + regions.x0(), 1u);
    if (end < uint32_t(bins)) atomicSub(differences + end, 1u);
  }
}

// The regions of record m, of what a byte has of them.
__device__ __forceinline__ uint32_t whole_count(const BinKernelParams& b, uint32_t count, uint32_t m) {
  return count != kManyRegions ? count : TileBox(b.s.boxes[m]).regions().size();
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
  uint32_t regions[kMostRegions];
};

// All histograms, of kItems records a thread at a time.
template <int kItems>
__global__ void __launch_bounds__(kBlock, 2) tally_kernel(BinKernelParams b) {
  __shared__ TallyShared shared;
  wait_for_kernel_before();
  let_next_kernel_come();
  constexpr int kRecords = kBlock * kItems;
  const int thread = threadIdx.x, bins = b.grid.bins();
  auto finder = radix::chunk_finder<0>(b.p.n_images, radix::FixedChunk<kRecords>{}, [&](int64_t i) {
    return uint32_t(first_record(b.p, i + 1) - first_record(b.p, i));
  });
  Chunk chunk;
  for (int64_t row = blockIdx.x; finder.find(row, chunk); row += gridDim.x) {
    const int64_t first = first_record(b.p, chunk.segment) + int64_t(chunk.place) * kRecords;
    const uint32_t count = min(uint32_t(kRecords), chunk.size - uint32_t(chunk.place) * kRecords);
    uint32_t keys[kItems];
    uint64_t boxes[kItems];
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const uint32_t i = j * kBlock + thread;
      keys[j] = i < count ? b.s.depth_keys[first + i] : 0;
      boxes[j] = i < count ? b.s.boxes[first + i] : 0;
    }
    for (int i = thread; i < kDepthRow; i += kBlock) shared.depth[i] = 0;
    for (int i = thread; i < bins; i += kBlock) shared.regions[i] = 0;
    __syncthreads();

    uint32_t n_records = 0;
    uint64_t n_pairs = 0;
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const TileBox regions = TileBox(boxes[j]).regions();
      const uint32_t n_regions = regions.size();
      n_pairs += n_regions;
      add_grouped(shared.depth + kDepthPasses * kDepthBins, keys[j] >> (kDepthPasses - 1) * kDepthBits, n_regions);
      add_grouped(shared.depth + (kDepthPasses - 1) * kDepthBins, keys[j] >> (kDepthPasses - 1) * kDepthBits,
                  n_regions != 0);
      if (n_regions == 0) continue;
      ++n_records;
#pragma unroll
      for (int pass = 0; pass < kDepthPasses - 1; ++pass) {
        atomicAdd(&shared.depth[pass * kDepthBins + (keys[j] >> pass * kDepthBits) % kDepthBins], 1u);
      }
      count_regions(shared.regions, bins, b.grid.regions_x, regions);
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
    for (int i = thread; i < bins; i += kBlock) {
      if (shared.regions[i] != 0) atomicAdd(b.s.region_differences + copy * bins + i, shared.regions[i]);
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
  uint32_t pair_base[kDepthBins];    // likewise their first pairs, less the chunk's pairs before them
  uint32_t warp_sums[kBlock / 32];
  uint32_t n_items;
  uint32_t ticket;
};

// Chunks of pairs of the images before this one.
__device__ __forceinline__ uint32_t pair_rows_before(const BinKernelParams& b, int32_t image) {
  uint32_t rows = 0;
  for (int32_t i = int32_t(threadIdx.x % 32); i < image; i += 32) {
    rows += max(1u, uint32_t(radix::chunks_of(int64_t(b.s.image_pairs[i]), 1 << b.pair_chunk_bits)));
  }
  return __reduce_add_sync(kFullWarp, rows);
}

// Pass kPass of the sort by depth. Items are (key, record). The first pass takes keys as the records left
// them, drops records without a box, and puts the number of regions where the digit was. The last one leaves
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
  wait_for_kernel_before();
  let_next_kernel_come();
  if (kLast && !has_room(b)) return;
  if (kFirst && blockIdx.x == 0 && warp == 0) {
    int64_t n_pairs = 0;
#pragma unroll 1
    for (int64_t i = lane; i < b.p.n_images; i += 32) n_pairs += int64_t(b.s.image_pairs[i]);
    for (int step = 16; step > 0; step /= 2) n_pairs += __shfl_down_sync(kFullWarp, n_pairs, step);
    if (lane == 0) *b.s.n_pairs = uint64_t(n_pairs);
  }

  auto finder = radix::chunk_finder<0>(b.p.n_images, radix::FixedChunk<R::kChunk>{}, [&](int64_t i) {
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
    uint32_t counts[kFirst ? (kItems + 3) / 4 : 1] = {};  // regions, a byte an item
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
        counts[j / 4] |= uint32_t(b.s.region_counts[m]) << (j % 4 * 8);
      } else {
        items[j] = in[slot];
        valid |= 1u << j;
      }
    }
    const auto histogram = [&](int which) {
      const int i = which * kDepthBins + thread;
      return R::owns() ? histogram_at(b, b.s.depth_histograms, kDepthRow, chunk.segment, i) : 0;
    };
    const uint32_t in_image = histogram(kPass), pairs_in_image = kLast ? histogram(kDepthPasses) : 0;
#pragma unroll
    for (int j = 0; j < R::kItems; ++j) {
      if (kFirst && (counts[kFirst ? j / 4 : 0] >> (j % 4 * 8) & 255) != 0) valid |= 1u << j;
      tags[j] = items[j].x >> (kPass * kDepthBits) & (kDepthBins - 1);
    }
    R::run(shared.ranking, tags, valid, own);
    if (R::owns()) radix::publish(state, kWidth, thread, chunk, own);

    // Of the digits before: the chunk's items, the image's, and its pairs.
    uint32_t before_digit[kLast ? 3 : 2][1] = {{own[0]}, {in_image}};
    if (kLast) before_digit[kLast ? 2 : 0][0] = pairs_in_image;
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
      // Pairs are summed over the chunk in its new order, a warp a stretch; items keep the sum before them.
      __syncthreads();
      uint32_t counts_of[R::kItems], pairs_before[R::kItems], sum = 0;
#pragma unroll
      for (int j = 0; j < R::kItems; ++j) {
        const uint32_t i = R::slot(j);
        counts_of[j] = i < n_items ? shared.sorted[i].x : 0;
        const uint32_t up_to = radix::warp_sum_up_to(counts_of[j]);
        pairs_before[j] = sum + up_to - counts_of[j];
        sum += __shfl_sync(kFullWarp, up_to, 31);
      }
      if (lane == 0) shared.warp_sums[warp] = sum;
      __syncthreads();
      const uint32_t sum_of_warp = lane < R::kWarps ? shared.warp_sums[lane] : 0;
      const uint32_t warps_before = __reduce_add_sync(kFullWarp, lane < warp ? sum_of_warp : 0);
      const uint32_t sum_of_all = __reduce_add_sync(kFullWarp, sum_of_warp);
#pragma unroll
      for (int j = 0; j < R::kItems; ++j) {
        pairs_before[j] += warps_before;
        if (R::slot(j) < int(n_items)) shared.sorted[R::slot(j)].x = pairs_before[j];
      }
      __syncthreads();
      if (R::owns()) {
        const uint32_t end = chunk_first + own[0];
        const uint32_t first_pair_of_digit = chunk_first < n_items ? shared.sorted[chunk_first].x : sum_of_all;
        const uint32_t own_pairs[1] = {(end < n_items ? shared.sorted[end].x : sum_of_all) - first_pair_of_digit};
        radix::publish(state, kWidth, kDepthBins + thread, chunk, own_pairs);
        radix::look_back(state, kWidth, thread, chunk, own, before);
        shared.base[thread] = before_digit[1][0] + before[0] - chunk_first;
        radix::look_back(state, kWidth, kDepthBins + thread, chunk, own_pairs, before);
        shared.pair_base[thread] = before_digit[kLast ? 2 : 0][0] + before[0] - first_pair_of_digit;
      }
      const uint32_t first_row = pair_rows_before(b, chunk.segment);
      __syncthreads();
#pragma unroll
      for (int j = 0; j < R::kItems; ++j) {
        const uint32_t i = R::slot(j);
        if (i >= n_items) continue;
        const uint32_t digit = shared.digits[i];
        const uint32_t at = shared.base[digit] + i;
        const uint32_t first_pair = shared.pair_base[digit] + pairs_before[j];
        out[at] = make_uint2(shared.sorted[i].y, first_pair);
        // Chunks of pairs that begin with one of this record's.
        const uint64_t end_pair = uint64_t(first_pair) + counts_of[j];
        const uint64_t chunk_end = (uint64_t(1) << b.pair_chunk_bits) - 1;
        for (uint64_t c = (first_pair + chunk_end) >> b.pair_chunk_bits; c << b.pair_chunk_bits < end_pair; ++c) {
          b.s.chunk_records[first_row + c] = at;
        }
      }
    }
  } while (!b.chunk_each);
}

}  // namespace
}  // namespace rapfast
