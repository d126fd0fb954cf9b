// Stage 3: the (region, record) pairs of records in order of depth, by region.
#pragma once

#include "bin_kernels.cuh"

namespace rapfast {
namespace {

// The tiles of a region that a record reaches, a bit each, row by row. kAtOnce: rows whose instructions are side by side.
template <int kAtOnce>
__device__ __forceinline__ uint32_t tiles_reached(const BinParams<float>& p, const Record<float>& r, TileBox box,
                                                  uint32_t region_x, uint32_t region_y) {
  const int32_t left = int32_t(region_x * kRegionWidth), top = int32_t(region_y * kRegionHeight) + p.first_tile_row;
  const TileRect rect = {int32_t(box.x0()), int32_t(box.x1()), int32_t(box.y0()) + p.first_tile_row,
                         int32_t(box.y1()) + p.first_tile_row};
  const CutEllipse<float> ellipse = cut_ellipse(r);
  const int32_t begin = max(top, rect.y0), end = min(top + kRegionHeight, rect.y1);
  uint32_t mask = 0;
#pragma unroll kAtOnce
  for (int row = 0; row < kRegionHeight; ++row) {  // from the first that both have, so that many lanes are done early
    const int32_t ty = begin + row;
    if (ty >= end) break;
    int32_t x0, x1;
    tile_row_range(ellipse, rect, ty, x0, x1);
    const int from = clamp_to(x0 - left, 0, kRegionWidth), to = clamp_to(x1 - left, 0, kRegionWidth);
    mask |= ((1u << to) - (1u << from)) << (kRegionWidth * (ty - top));
  }
  return mask;
}

// Where an image has few regions, a chunk holds several pairs of each: they are sorted in shared memory, so that
// neighbours are written together. Where it has many, that would be in vain.
template <typename R>
constexpr bool kFewRegions = R::kBins == kFewBins;

// The records of a chunk of pairs; used up before the ranking begins.
template <int kChunk>
struct ChunkRecords {
  uint64_t boxes[kChunk];
  uint32_t ms[kChunk];
  int16_t firsts[kChunk];              // slot of the first pair; negative where that lies in an earlier chunk
  uint32_t heads[kChunk / 32];         // bit s % 32 of word s / 32: a record's pairs begin at slot s
  uint32_t heads_before[kChunk / 32];  // set bits before the word
  static_assert(kMostRegions < 1 << 15, "a record's pairs begin that many slots before at most");
};

template <typename R>
struct ChunkPairs {
  typename R::Shared ranking;
  uint32_t base[R::kBins];  // where a region's pairs go; of few regions, less their place in `sorted`
  uint32_t chunk_first[kFewRegions<R> ? R::kBins : 1];  // place of a region's first pair there
  uint2 sorted[kFewRegions<R> ? R::kChunk : 1];         // the chunk's pairs by region
  uint16_t regions[kFewRegions<R> ? R::kChunk : 1];     // of these
};

template <typename R>
struct EmitShared {
  union {
    ChunkRecords<R::kChunk> records;
    ChunkPairs<R> pairs;
  };
  uint2 made[kFewRegions<R> ? R::kChunk : 1];  // the chunk's pairs, where registers are short
  uint32_t warp_sums[R::kWarps];
  uint32_t ticket;
};

// Makes the pairs of a chunk, a slot each, and sorts them by region: (record, tiles of the region).
template <typename R>
__global__ void __launch_bounds__(R::kThreads, kFewRegions<R> ? 2 : 1) emit_kernel(BinKernelParams b) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& all = *reinterpret_cast<EmitShared<R>*>(shared_bytes);
  ChunkRecords<R::kChunk>& chunk_records = all.records;
  ChunkPairs<R>& shared = all.pairs;
  const int thread = threadIdx.x;
  const int n_regions = b.grid.regions();
  wait_for_kernel_before();
  let_next_kernel_come();
  if (!has_room(b)) return;

  auto finder =
      radix::chunk_finder<1>(b.p.n_images, radix::FixedChunk<R::kChunk>{}, [&](int64_t i) { return uint32_t(b.s.image_pairs[i]); });
  do {
    const uint32_t ticket = radix::take_ticket(b.s.tickets + kEmitTickets, &all.ticket);
    Chunk chunk;
    if (!finder.find(ticket, chunk)) return;
    const int64_t image_first = first_record(b.p, chunk.segment);
    const uint32_t place = uint32_t(chunk.place) * R::kChunk;
    const uint32_t count = min(uint32_t(R::kChunk), chunk.size - place);

    if (thread < R::kChunk / 32) chunk_records.heads[thread] = 0;
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
      chunk_records.firsts[r - first] = int16_t(slot);
      chunk_records.boxes[r - first] = b.s.boxes[record.x];
    }
    __syncthreads();
    uint32_t heads_before[1] = {thread < R::kChunk / 32 ? uint32_t(__popc(chunk_records.heads[thread])) : 0};
    radix::block_sums_before<R::kThreads>(heads_before, all.warp_sums);
    if (thread < R::kChunk / 32) chunk_records.heads_before[thread] = heads_before[0];
    __syncthreads();

    uint32_t tags[R::kItems] = {}, own[R::kOwn], valid = 0;
    uint2 pairs[kFewRegions<R> ? 1 : R::kItems];
    // A few at a time, whose records are on their way together. Behind the last pair it is made again, for nobody.
    constexpr int kAtOnce = 2;
#pragma unroll
    for (int part = 0; part < R::kItems && count != 0; part += kAtOnce) {
      uint32_t ms[kAtOnce], xs[kAtOnce], ys[kAtOnce];
      uint64_t boxes[kAtOnce];
      Record<float> of[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const uint32_t slot = min(uint32_t(R::slot(part + i)), count - 1);
        const uint32_t heads_up_to = chunk_records.heads[slot / 32] & 0xffffffffu >> (31 - slot % 32);
        const uint32_t r = chunk_records.heads_before[slot / 32] + uint32_t(__popc(heads_up_to)) - 1;
        ms[i] = chunk_records.ms[r];
        of[i] = load_record(b.p.records, ms[i]);
        boxes[i] = chunk_records.boxes[r];
        const uint32_t k = uint32_t(int32_t(slot) - int32_t(chunk_records.firsts[r]));
        const TileBox regions = TileBox(boxes[i]).regions();
        // Exact: both are small.
        const uint32_t row = uint32_t(__fdividef(float(k) + 0.5f, float(regions.width())));
        xs[i] = regions.x0() + k - row * regions.width();
        ys[i] = regions.y0() + row;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int j = part + i;
        tags[j] = ys[i] * uint32_t(b.grid.regions_x) + xs[i];
        const uint32_t mask = tiles_reached<kRegionHeight>(b.p, of[i], TileBox(boxes[i]), xs[i], ys[i]);
        const uint2 pair = make_uint2(ms[i] - uint32_t(image_first), mask);
        if (R::slot(j) < int(count)) valid |= 1u << j;
        if constexpr (kFewRegions<R>) {
          all.made[R::slot(j)] = pair;
        } else {
          pairs[j] = pair;
        }
      }
    }
    __syncthreads();  // the records' memory is the ranking's

    R::run(shared.ranking, tags, valid, own);
    if (R::owns()) radix::publish(b.s.emit_states, R::kBins, R::first_own(), chunk, own);
    // Of the regions before: the image's pairs, whose histogram is a running sum of differences, and the chunk's.
    uint32_t differences[1][R::kOwn], before_region[2][R::kOwn], before[R::kOwn];
#pragma unroll
    for (int k = 0; k < R::kOwn; ++k) {
      differences[0][k] =
          R::owns() ? histogram_at(b, b.s.region_differences, R::kBins, chunk.segment, R::first_own() + k) : 0;
      before_region[0][k] = differences[0][k];
    }
    R::sums_before(shared.ranking, differences);
#pragma unroll
    for (int k = 0; k < R::kOwn; ++k) {
      before_region[0][k] = R::owns() ? before_region[0][k] + differences[0][k] : 0;
      before_region[1][k] = own[k];
    }
    R::sums_before(shared.ranking, before_region);
    const uint32_t(&in_image_first)[R::kOwn] = before_region[0];
    const uint32_t(&chunk_first)[R::kOwn] = before_region[1];
    if (R::owns()) {
#pragma unroll
      for (int k = 0; k < R::kOwn; ++k) {
        const int region = R::first_own() + k;
        if constexpr (kFewRegions<R>) shared.chunk_first[region] = chunk_first[k];
        if (chunk.place == 0 && region < n_regions) {
          b.s.region_offsets[chunk.segment * int64_t(n_regions) + region] = chunk.before + in_image_first[k];
        }
      }
    }
    if (chunk.place == 0 && thread == 0 && chunk.segment == b.p.n_images - 1) {
      b.s.region_offsets[b.p.n_images * n_regions] = chunk.before + chunk.size;
    }
    const auto look_back = [&] {
      if (!R::owns()) return;
      radix::look_back(b.s.emit_states, R::kBins, R::first_own(), chunk, own, before);
#pragma unroll
      for (int k = 0; k < R::kOwn; ++k) {
        shared.base[R::first_own() + k] =
            chunk.before + in_image_first[k] + before[k] - (kFewRegions<R> ? chunk_first[k] : 0);
      }
    };
    if constexpr (kFewRegions<R>) {
      __syncthreads();
#pragma unroll
      for (int j = 0; j < R::kItems; ++j) {
        if ((valid >> j & 1u) == 0) continue;
        const uint32_t region = R::digit_of(tags[j]);
        const uint32_t at = shared.chunk_first[region] + R::place_of(shared.ranking, tags[j]);
        shared.sorted[at] = all.made[R::slot(j)];
        shared.regions[at] = uint16_t(region);
      }
      look_back();
      __syncthreads();
      for (uint32_t i = thread; i < count; i += R::kThreads) {
        b.s.pairs[shared.base[shared.regions[i]] + i] = shared.sorted[i];
      }
    } else {
      look_back();
      __syncthreads();
#pragma unroll
      for (int j = 0; j < R::kItems; ++j) {
        if ((valid >> j & 1u) == 0) continue;
        b.s.pairs[shared.base[R::digit_of(tags[j])] + R::place_of(shared.ranking, tags[j])] = pairs[j];
      }
    }
  } while (!b.chunk_each);
}

}  // namespace
}  // namespace rapfast
