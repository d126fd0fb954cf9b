// Stage 3 where an image has few records for its regions: pairs are grouped by region and slice of depth, a chunk of
// records at a time, and then each group's are put in order of depth where they lie side by side in shared memory.
//
// Two kernels that depend on nothing but what lies in front of them, instead of six that look back at each other.
// Groups keep the records' order, and so does the sort: ties end in Gaussian order. Where in memory a chunk's or a
// group's pairs come to lie is up to who comes first; what they are, and their order, is not.
#pragma once

#include "bin_kernels.cuh"
#include "bin_regions.cuh"
#include "bin_tiles.cuh"

namespace rapfast {
namespace {

constexpr int kFewGroups = 512, kMostGroups = 1024;  // regions, times slices, of an image
constexpr int kGroupThreads = 256;
constexpr int kPartBits = 8, kPart = 1 << kPartBits;  // records of a chunk that are looked at together
static_assert(kPart == kGroupThreads, "one each");
constexpr int kMostChunks = 768;  // of all records there is room for, so of an image's too

// Records of a chunk, as a power of two: no more chunks than a block of the sort has room to know.
int group_chunk_bits(int64_t record_capacity) {
  int bits = kPartBits;
  while (radix::chunks_of(record_capacity, 1 << bits) > kMostChunks) ++bits;
  return bits;
}

// The first of ends[0 ... n) that is above i, which one of them is.
__device__ __forceinline__ uint32_t first_above(const uint32_t* ends, uint32_t n, uint32_t i) {
  uint32_t low = 0, left = n;
  while (left > 1) {
    const uint32_t half = left / 2;
    if (ends[low + half - 1] <= i) low += half;
    left -= half;
  }
  return low;
}

// ----------------------------------------------------------------------------------------- grouping

constexpr int kSamples = 128;

template <int kBins>
struct GroupShared {
  using R = Ranking<kBins, kGroupThreads, 1>;
  typename R::Shared ranking;
  float4 records[2][kPart];    // the halves of each
  uint64_t boxes[kPart];
  uint32_t keys[kPart];
  uint32_t ends[kPart];        // pairs of the records up to this one
  uint32_t places[kBins];      // the chunk's pairs of a group; then where its next one goes
  uint32_t warp_sums[kGroupThreads / 32];
  uint4 samples[kSamples / 4];
  uint32_t cuts[kMostSlices];  // the key that slice s + 1 begins with
  uint64_t first;              // where the chunk's pairs begin
  uint32_t n_pairs;            // that it has
};

__device__ __forceinline__ int slice_bits(const BinKernelParams& b) { return __ffs(b.slices) - 1; }

struct LoadedRecord {
  float4 halves[2];
  uint64_t box;
  uint32_t key;
};

__device__ __forceinline__ LoadedRecord load_binned(const BinKernelParams& b, int64_t m, bool exists) {
  LoadedRecord r{};
  if (!exists) return r;
  r.box = b.s.boxes[m];
  r.key = b.s.depth_keys[m];
  r.halves[0] = reinterpret_cast<const float4*>(b.p.records + m)[0];
  r.halves[1] = reinterpret_cast<const float4*>(b.p.records + m)[1];
  return r;
}

// Cuts an image's depths in slices of about as many records each, by a sample, in which those without a box are too;
// every block of the image finds the same.
// `sample`: that of the thread, of the first kSamples. Ends with a barrier.
template <typename Shared>
__device__ __forceinline__ void find_cuts(const BinKernelParams& b, Shared& shared, uint32_t sample) {
  static_assert(kGroupThreads == 2 * kSamples, "two threads compare a sample with half of all each");
  const int thread = threadIdx.x;
  if (thread < kSamples) reinterpret_cast<uint32_t*>(shared.samples)[thread] = sample / 2;
  __syncthreads();
  const int which = thread / 2, half = thread % 2 * (kSamples / 2);
  const uint32_t own = reinterpret_cast<const uint32_t*>(shared.samples)[which];
  uint32_t rank = 0;  // by signs of differences, which have 32 bits
#pragma unroll 2
  for (int i = 0; i < kSamples / 8; ++i) {
    const uint4 others = shared.samples[half / 4 + i];
    const int before = which - half - 4 * i;  // equal ones count where they come before
    rank += (others.x - own - uint32_t(before > 0)) >> 31;
    rank += (others.y - own - uint32_t(before > 1)) >> 31;
    rank += (others.z - own - uint32_t(before > 2)) >> 31;
    rank += (others.w - own - uint32_t(before > 3)) >> 31;
  }
  rank += __shfl_xor_sync(kFullWarp, rank, 1);
  const uint32_t each = uint32_t(kSamples >> slice_bits(b));
  if (half == 0 && rank != 0 && rank % each == 0) shared.cuts[rank / each - 1] = 2 * own;
  __syncthreads();
}

__device__ __forceinline__ uint32_t slice_of(const uint32_t* cuts, int slices, uint32_t key) {
  uint32_t slice = 0;
  for (int step = slices / 2; step > 0; step /= 2) slice += key >= cuts[slice + step - 1] ? step : 0;
  return slice;
}

// A block a chunk of an image's records: their pairs (record, tiles of the region), by region and slice.
template <int kBins>
__global__ void __launch_bounds__(kGroupThreads, 4) group_kernel(const __grid_constant__ BinKernelParams b) {
  using R = typename GroupShared<kBins>::R;
  __shared__ GroupShared<kBins> shared;
  const int thread = threadIdx.x, n_groups = b.grid.regions() * b.slices;
  wait_for_kernel_before();
  let_next_kernel_come();
  const uint32_t group_chunk = 1u << b.group_chunk_bits;
  auto finder = radix::chunk_finder<0>(b.p.n_images, radix::ChunkBits{b.group_chunk_bits}, [&](int64_t i) {
    return uint32_t(first_record(b.p, i + 1) - first_record(b.p, i));
  });
  Chunk chunk;
  if (!finder.find(blockIdx.x, chunk)) return;
  const int64_t image_first = first_record(b.p, chunk.segment);
  const uint32_t chunk_first = uint32_t(chunk.place) << b.group_chunk_bits;
  const uint32_t count = min(group_chunk, chunk.size - chunk_first);
  const int64_t first = image_first + chunk_first;

  LoadedRecord loaded = load_binned(b, first + thread, uint32_t(thread) < count);
  for (int i = thread; i < kBins; i += kGroupThreads) shared.places[i] = 0;
  if (b.slices > 1) {
    const int64_t m = image_first + int64_t(uint64_t(chunk.size) * uint32_t(thread) / kSamples);
    find_cuts(b, shared, thread < kSamples ? b.s.depth_keys[m] : 0);
  } else {
    __syncthreads();
  }
  for (uint32_t i = thread; i < count; i += kPart) {
    const bool is_loaded = i < kPart;
    const TileBox regions = TileBox(is_loaded ? loaded.box : b.s.boxes[first + i]).regions();
    const uint32_t slice = slice_of(shared.cuts, b.slices, is_loaded ? loaded.key : b.s.depth_keys[first + i]);
    for (uint32_t y = regions.y0(); y < regions.y1(); ++y) {
      for (uint32_t x = regions.x0(); x < regions.x1(); ++x) {
        atomicAdd(shared.places + (y * uint32_t(b.grid.regions_x) + x) * uint32_t(b.slices) + slice, 1u);
      }
    }
  }
  __syncthreads();
  uint32_t in_chunk[R::kOwn], before[1] = {};
#pragma unroll
  for (int k = 0; k < R::kOwn; ++k) {
    in_chunk[k] = shared.places[R::first_own() + k];
    before[0] += in_chunk[k];
  }
  const uint32_t own_pairs_of_groups = before[0];
  radix::block_sums_before<kGroupThreads>(before, shared.warp_sums);
  if (thread == kGroupThreads - 1) {
    shared.n_pairs = before[0] + own_pairs_of_groups;
    shared.first = atomicAdd(reinterpret_cast<unsigned long long*>(b.s.n_pairs), before[0] + own_pairs_of_groups);
  }
  __syncthreads();
  if (int64_t(shared.first) + shared.n_pairs > b.p.capacity) return;  // the sum of all says so
  uint32_t place = uint32_t(shared.first) + before[0];
#pragma unroll
  for (int k = 0; k < R::kOwn; ++k) {
    const int group = R::first_own() + k;
    shared.places[group] = place;
    if (group < n_groups) b.s.runs[chunk.row * n_groups + group] = make_uint2(place, in_chunk[k]);
    place += in_chunk[k];
  }

  for (uint32_t from = 0; from < count; from += kPart) {
    __syncthreads();
    const uint32_t i = from + thread;
    if (from != 0) loaded = load_binned(b, first + i, i < count);
    shared.records[0][thread] = loaded.halves[0];
    shared.records[1][thread] = loaded.halves[1];
    shared.boxes[thread] = loaded.box;
    shared.keys[thread] = loaded.key;
    const uint32_t own_pairs = TileBox(loaded.box).regions().size();
    uint32_t pairs_before[1] = {own_pairs};
    radix::block_sums_before<kGroupThreads>(pairs_before, shared.warp_sums);
    shared.ends[thread] = pairs_before[0] + own_pairs;
    __syncthreads();
    const uint32_t n_pairs = shared.ends[kPart - 1];
    for (uint32_t done = 0; done < n_pairs; done += R::kChunk) {
      uint32_t tag[1] = {}, own[R::kOwn], key;
      uint2 pair;
      const uint32_t k = done + R::slot(0);
      const bool exists = k < n_pairs;
      if (exists) {
        const uint32_t r = first_above(shared.ends, kPart, k);
        const TileBox box(shared.boxes[r]), regions = box.regions();
        const uint32_t in_box = k - (r == 0 ? 0 : shared.ends[r - 1]);
        // Exact: both are small.
        const uint32_t row = uint32_t(__fdividef(float(in_box) + 0.5f, float(regions.width())));
        const uint32_t x = regions.x0() + in_box - row * regions.width(), y = regions.y0() + row;
        const float4 u = shared.records[0][r], v = shared.records[1][r];
        const Record<float> record = {u.x, u.y, u.z, u.w, v.x, v.y, v.z, v.w};
        key = shared.keys[r];
        tag[0] = (y * uint32_t(b.grid.regions_x) + x) * uint32_t(b.slices) + slice_of(shared.cuts, b.slices, key);
        pair = make_uint2(chunk_first + from + r, tiles_reached<1>(b.p, record, box, x, y));
      }
      R::run(shared.ranking, tag, exists, own);
      __syncthreads();
      if (exists) {
        const uint32_t at = shared.places[R::digit_of(tag[0])] + R::place_of(shared.ranking, tag[0]);
        b.s.grouped[at] = pair;
        b.s.grouped_keys[at] = key;
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < R::kOwn; ++k) shared.places[R::first_own() + k] += own[k];
    }
  }
}

// ------------------------------------------------------------------------------------------ sorting

constexpr int kSortThreads = 256, kSortWarps = kSortThreads / 32;
constexpr int kMostSortedBits = 12, kMostSorted = 1 << kMostSortedBits;  // pairs that lie in shared memory at once
constexpr uint32_t kFullBucket = 24;       // pairs of as good as the same depth that are compared one with another
constexpr uint32_t kNoKey = kMostKey + 1;  // comes behind that of any record

struct SortShared {
  // Of the pairs at hand. The second of each is what buckets and merges work in.
  uint32_t keys[2][kMostSorted];
  uint16_t ids[2][kMostSorted];
  // The group's list: a run of each chunk. Its pair i lies at i + offset, modulo 2^32, of the first run that ends above.
  uint32_t run_ends[kMostChunks];
  uint32_t run_offsets[kMostChunks];
  uint32_t unit_counts[kMostSorted / kUnit][kRegionTiles];
  uint32_t warp_sums[2 * kSortWarps];
  uint32_t lowest, highest;
  uint32_t begin, first_unit;
};

// Where pair i of the group's list lies, of so many runs.
__device__ __forceinline__ uint32_t source_of(const SortShared& shared, uint32_t n_runs, uint32_t i) {
  return i + shared.run_offsets[first_above(shared.run_ends, n_runs, i)];
}

// The same of all of a short list, to shared.keys[1]: a thread a run.
__device__ __forceinline__ void spread_sources(SortShared& shared, uint32_t n_runs) {
#pragma unroll 1
  for (uint32_t c = threadIdx.x; c < n_runs; c += kSortThreads) {
    const uint32_t end = shared.run_ends[c], offset = shared.run_offsets[c];
#pragma unroll 1
    for (uint32_t i = c == 0 ? 0 : shared.run_ends[c - 1]; i < end; ++i) shared.keys[1][i] = i + offset;
  }
}

// Tells all threads the lowest and the highest of what each has seen; nobody has written the two since the last barrier.
__device__ __forceinline__ void find_range(SortShared& shared, uint32_t& lowest, uint32_t& highest) {
  if (threadIdx.x == 0) {
    shared.lowest = 0xffffffffu;
    shared.highest = 0;
  }
  lowest = __reduce_min_sync(kFullWarp, lowest);
  highest = __reduce_max_sync(kFullWarp, highest);
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    atomicMin(&shared.lowest, lowest);
    atomicMax(&shared.highest, highest);
  }
  __syncthreads();
  lowest = shared.lowest;
  highest = shared.highest;
}

// Bits of numbers up to this one.
__device__ __forceinline__ int bits_of(uint32_t most) { return 32 - __clz(int(most)); }

// Leaves in ids[0] the places of keys[0] [0, n) in order, equal ones in theirs. All is there when it ends, and may have
// been written just before. False, and nothing has happened, where many depths are as good as the same.
//
// Buckets of keys, in each of which there are a few that are compared with each other. Everything is rolled up: the
// instructions of a kernel that is over in some microseconds come from far away.
__device__ __forceinline__ bool sort_by_buckets(SortShared& shared, uint32_t n, uint32_t lowest, uint32_t highest) {
  const int thread = threadIdx.x;
  const int bucket_bits = min(kMostSortedBits, max(8, bits_of(n) + 1));
  const int shift = max(0, bits_of(highest - lowest) - bucket_bits);
  const int stretch_bits = bucket_bits - 8, stretch = 1 << stretch_bits;  // of buckets that a thread has
  static_assert(kSortThreads == 1 << 8, "one each");
  uint32_t* const buckets = shared.keys[1];
  const auto bucket_of = [&](uint32_t key) { return (key - lowest) >> shift; };
  // Where neighbouring threads' buckets lie in different banks.
  const auto at_bucket = [&](uint32_t bucket) {
    return buckets + (bucket >> stretch_bits | (bucket & uint32_t(stretch - 1)) << 8);
  };
#pragma unroll 1
  for (int i = thread; i < 1 << bucket_bits; i += kSortThreads) buckets[i] = 0;
  __syncthreads();
#pragma unroll 1
  for (uint32_t i = thread; i < n; i += kSortThreads) atomicAdd(at_bucket(bucket_of(shared.keys[0][i])), 1u);
  __syncthreads();
  uint32_t sum[1] = {}, most = 0;
#pragma unroll 1
  for (int k = 0; k < stretch; ++k) {
    const uint32_t count = buckets[thread + k * kSortThreads];
    sum[0] += count;
    most = max(most, count);
  }
  const bool is_full = __syncthreads_or(most > kFullBucket) != 0;
  if (is_full) return false;
  radix::block_sums_before<kSortThreads>(sum, shared.warp_sums);
#pragma unroll 1
  for (int k = 0; k < stretch; ++k) {  // to where each begins
    const uint32_t count = buckets[thread + k * kSortThreads];
    buckets[thread + k * kSortThreads] = sum[0];
    sum[0] += count;
  }
  __syncthreads();
#pragma unroll 1
  for (uint32_t i = thread; i < n; i += kSortThreads) {
    shared.ids[1][atomicAdd(at_bucket(bucket_of(shared.keys[0][i])), 1u)] = uint16_t(i);
  }
  __syncthreads();
  // A bucket now ends where it has come to, and begins where the one in front ends.
#pragma unroll 1
  for (uint32_t at = thread; at < n; at += kSortThreads) {
    const uint32_t id = shared.ids[1][at], key = shared.keys[0][id], bucket = bucket_of(key);
    uint32_t place = bucket == 0 ? 0 : *at_bucket(bucket - 1);
    const uint32_t end = *at_bucket(bucket);
#pragma unroll 1
    for (uint32_t i = place; i < end; ++i) {
      const uint32_t other = shared.ids[1][i];
      place += shared.keys[0][other] < key + uint32_t(other < id);  // and equal ones in front
    }
    shared.ids[0][place] = uint16_t(id);
  }
  __syncthreads();
  return true;
}

// The same for any keys, by merges: each item's place is its own in its run of `width`, and as many as come before it in
// the run beside.
__device__ __noinline__ void sort_by_merges(SortShared& shared, uint32_t n) {
  const int thread = threadIdx.x, lane = thread % 32;
  // Whole runs of twice any width below n.
  const uint32_t most = n <= 32 ? 32 : 1u << bits_of(n - 1);
  for (uint32_t i = n + thread; i < most; i += kSortThreads) shared.keys[0][i] = kNoKey;
  __syncthreads();
  // Runs of 32: each item counts those of the other lanes that come before it.
#pragma unroll 1
  for (uint32_t i = thread; i < most; i += kSortThreads) {
    const uint32_t key = shared.keys[0][i];
    uint32_t place = i - lane;
#pragma unroll 8
    for (int other = 0; other < 32; ++other) {
      place += __shfl_sync(kFullWarp, key, other) < key + uint32_t(other < lane);
    }
    shared.keys[1][place] = key;
    shared.ids[1][place] = uint16_t(i);
  }
  __syncthreads();
  int at = 1;
#pragma unroll 1
  for (uint32_t width = 32; width < n; width *= 2, at ^= 1) {
    const uint32_t* const keys = shared.keys[at];
#pragma unroll 1
    for (uint32_t i = thread; i < most; i += kSortThreads) {
      // Behind all that are below; an item of the right run behind equal ones too.
      const uint32_t key = keys[i], bound = key + uint32_t((i & width) != 0);
      uint32_t beside = (i & ~(width - 1)) ^ width;
#pragma unroll 1
      for (uint32_t step = width / 2; step > 0; step /= 2) beside += keys[beside + step - 1] < bound ? step : 0;
      beside += keys[beside] < bound;
      const uint32_t place = i + beside - (i & ~(2 * width - 1)) - width;
      shared.keys[at ^ 1][place] = key;
      shared.ids[at ^ 1][place] = shared.ids[at][i];
    }
    __syncthreads();
  }
  if (at == 1) {
    for (uint32_t i = thread; i < n; i += kSortThreads) shared.ids[0][i] = shared.ids[1][i];
    __syncthreads();
  }
}

// A list that is too long for shared memory, by ranges of keys that are not: each is collected from the whole list. It
// takes a time that grows with the square of the length.
__device__ __noinline__ void sort_long(const BinKernelParams& b, SortShared& shared, uint32_t n_runs, uint32_t n,
                                       uint32_t begin) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  uint32_t lowest = 0xffffffffu, highest = 0;
  for (uint32_t i = thread; i < n; i += kSortThreads) {
    const uint32_t key = b.s.grouped_keys[source_of(shared, n_runs, i)];
    lowest = min(lowest, key);
    highest = max(highest, key);
  }
  find_range(shared, lowest, highest);
  uint32_t* const histogram = shared.keys[1];
  uint32_t done = 0;
  uint64_t from = lowest;  // keys below are done
  while (done < n) {
    // The range [from, to) with as many keys as there is room for, or a single key that there is no room for.
    uint64_t to = uint64_t(highest) + 1;
    uint32_t count = 0;
    while (true) {
      const int shift = max(0, bits_of(uint32_t(to - 1 - from)) - 8);
      histogram[thread] = 0;
      __syncthreads();
      for (uint32_t i = thread; i < n; i += kSortThreads) {
        const uint32_t key = b.s.grouped_keys[source_of(shared, n_runs, i)];
        if (key >= from && key < to) atomicAdd(histogram + uint32_t((key - from) >> shift), 1u);
      }
      __syncthreads();
      const uint32_t own = histogram[thread];
      uint32_t up_to[1] = {own};
      radix::block_sums_before<kSortThreads>(up_to, shared.warp_sums);
      up_to[0] += own;
      const uint32_t fit = uint32_t(__syncthreads_count(up_to[0] <= uint32_t(kMostSorted)));
      if (fit != 0) {
        if (uint32_t(thread) == fit - 1) shared.begin = up_to[0];
        __syncthreads();
        count = shared.begin;
        __syncthreads();
        const uint64_t end = min(to, from + (uint64_t(fit) << shift));
        if (count == 0) {  // what there is lies behind
          from = end;
          continue;
        }
        to = end;
        break;
      }
      if (shift == 0) {
        to = from + 1;
        break;
      }
      to = min(to, from + (uint64_t(1) << shift));
    }
    // Collected in their order; those of a single key are in order then.
    uint32_t found = 0;
    for (uint32_t base = 0; base < n; base += kSortThreads) {
      const uint32_t i = base + thread;
      uint32_t source = 0, key = 0;
      bool wanted = false;
      if (i < n) {
        source = source_of(shared, n_runs, i);
        key = b.s.grouped_keys[source];
        wanted = key >= from && key < to;
      }
      const uint32_t lanes = __ballot_sync(kFullWarp, wanted);
      uint32_t* const sums = shared.warp_sums + base / kSortThreads % 2 * kSortWarps;  // so one barrier a step is enough
      if (lane == 0) sums[warp] = uint32_t(__popc(lanes));
      __syncthreads();
      const uint32_t of_warp = lane < kSortWarps ? sums[lane] : 0;
      const uint32_t at = found + __reduce_add_sync(kFullWarp, lane < warp ? of_warp : 0) +
                          uint32_t(__popc(lanes & ((1u << lane) - 1)));
      found += __reduce_add_sync(kFullWarp, of_warp);
      if (!wanted) continue;
      b.s.pairs[begin + done + at] = b.s.grouped[source];
      if (count != 0) shared.keys[0][at] = key;
    }
    __syncthreads();
    if (count != 0) {
      if (!sort_by_buckets(shared, count, uint32_t(from), uint32_t(to - 1))) sort_by_merges(shared, count);
      const uint16_t* const ids = shared.ids[0];
      uint2* const pairs = reinterpret_cast<uint2*>(shared.keys);  // which have done their work
      for (uint32_t i = thread; i < count; i += kSortThreads) pairs[i] = b.s.pairs[begin + done + i];
      __syncthreads();
      for (uint32_t i = thread; i < count; i += kSortThreads) b.s.pairs[begin + done + i] = pairs[ids[i]];
    }
    __syncthreads();
    done += found;
    from = to;
  }
}

// A block a group: its pairs by depth, and how many each tile has, as count_kernel leaves them.
__global__ void __launch_bounds__(kSortThreads, 4) sort_kernel(const __grid_constant__ BinKernelParams b) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<SortShared*>(shared_bytes);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const uint32_t n_groups = uint32_t(b.grid.regions() * b.slices);
  const int32_t image = int32_t(blockIdx.x / max(n_groups, 1u));
  const uint32_t group = blockIdx.x - uint32_t(image) * n_groups;
  wait_for_kernel_before();
  let_next_kernel_come();
  if (b.p.n_images * n_groups == 0) return;

  // The group's runs, of all chunks of the image.
  const auto chunks_of_image = [&](int64_t i) {
    return (uint32_t(first_record(b.p, i + 1) - first_record(b.p, i)) + (1u << b.group_chunk_bits) - 1) >>
           b.group_chunk_bits;
  };
  const bool fits = has_room(b);
  uint32_t rows_before = 0;
  for (int32_t i = lane; i < image; i += 32) rows_before += chunks_of_image(i);
  rows_before = __reduce_add_sync(kFullWarp, rows_before);
  const uint32_t n_runs = chunks_of_image(image);
  if (!fits) return;
  uint32_t n = 0;
  for (uint32_t base = 0; base < n_runs; base += kSortThreads) {
    const uint32_t c = base + thread;
    const uint2 run = c < n_runs ? b.s.runs[(rows_before + c) * uint64_t(n_groups) + group] : make_uint2(0, 0);
    uint32_t before[1] = {run.y};
    radix::block_sums_before<kSortThreads>(before, shared.warp_sums);
    if (c < n_runs) {
      shared.run_ends[c] = n + before[0] + run.y;
      shared.run_offsets[c] = run.x - (n + before[0]);
    }
    __syncthreads();
    n = shared.run_ends[min(base + kSortThreads, n_runs) - 1];
  }
  const uint32_t region = group >> slice_bits(b), slice = group & uint32_t(b.slices - 1);
  uint32_t begin = 0, first_unit = 0;  // of the first thread, for now: they take long
  if (thread == 0) {
    begin = atomicAdd(b.s.n_sorted, n);
    first_unit = atomicAdd(b.s.n_units, units_of(n, slice));
  }
  const bool is_long = n > kMostSorted;
  const int n_units = int(radix::chunks_of(n, kUnit));
  constexpr int kAtOnce = 4;
  if (!is_long && n != 0) {
    for (int i = thread; i < n_units * kRegionTiles; i += kSortThreads) {
      shared.unit_counts[i / kRegionTiles][i % kRegionTiles] = 0;
    }
    spread_sources(shared, n_runs);
    __syncthreads();
    uint32_t lowest = 0xffffffffu, highest = 0;
#pragma unroll 1
    for (uint32_t base = thread; base < n; base += kAtOnce * kSortThreads) {
      uint32_t keys[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        keys[j] = b.s.grouped_keys[shared.keys[1][min(base + j * kSortThreads, n - 1)]];
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        lowest = min(lowest, keys[j]);
        highest = max(highest, keys[j]);
        if (base + j * kSortThreads < n) shared.keys[0][base + j * kSortThreads] = keys[j];
      }
    }
    find_range(shared, lowest, highest);
    if (!sort_by_buckets(shared, n, lowest, highest)) sort_by_merges(shared, n);
    spread_sources(shared, n_runs);
  }
  if (thread == 0) {
    shared.begin = begin;
    shared.first_unit = first_unit;
  }
  __syncthreads();
  begin = shared.begin;
  first_unit = shared.first_unit;
  write_units<kSortThreads>(b, image, region, slice, begin, n, first_unit);
  uint32_t* const of_units = b.s.unit_counts + int64_t(first_unit) * kRegionTiles;
  uint32_t total = 0;
  if (is_long) {
    sort_long(b, shared, n_runs, n, begin);
    total = count_units<kSortThreads>(b.s.pairs, begin, n, of_units, reinterpret_cast<CountShared&>(shared.keys));
  } else {
#pragma unroll 2
    for (uint32_t base = 0; base < n; base += kSortThreads) {
      const uint32_t i = base + thread;
      uint32_t tiles = 0;
      if (i < n) {
        const uint2 pair = b.s.grouped[shared.keys[1][shared.ids[0][i]]];
        b.s.pairs[begin + i] = pair;
        tiles = pair.y;
      }
      const uint32_t in_tile = uint32_t(__popc(transposed(tiles)));
      if (in_tile != 0) atomicAdd(&shared.unit_counts[i / kUnit][lane], in_tile);
    }
    __syncthreads();
    if (warp == 0) {
      for (int k = 0; k < n_units; ++k) {
        of_units[k * kRegionTiles + lane] = total;
        total += shared.unit_counts[k][lane];
      }
      if (slice == 0 && n_units == 0) of_units[lane] = 0;
    }
  }
  if (warp == 0) tell_tiles(b, image, int32_t(region), slice, total);
}

}  // namespace
}  // namespace rapfast
