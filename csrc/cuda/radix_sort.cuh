// Parts of a stable radix sort in one launch a pass ("one-sweep": Adinets and Merrill 2022, Onesweep).
//
// What is sorted lies in segments, one for each image, cut into chunks of a block each. A block ranks
// its chunk's items by their digit, learns from the chunks before it in its segment how many items of
// each digit those have (decoupled look-back: Merrill and Garland 2016), and writes its items where
// they belong. Blocks take chunks by ticket, in order, so whom a block waits for is already running.
#pragma once

#include "../math/host_device.h"
#include "check.cuh"

namespace rapfast {
namespace radix {

RAPFAST_HD constexpr int64_t chunks_of(int64_t size, int chunk) { return (size + chunk - 1) / chunk; }

// ------------------------------------------------------------------------------------ whole blocks

// Inclusive sum over the lanes of a warp.
__device__ __forceinline__ uint32_t warp_sum_up_to(uint32_t x) {
  const int lane = threadIdx.x % 32;
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(kFullWarp, x, step);
    if (lane >= step) x += other;
  }
  return x;
}

// Of each of x[0 ... kSums): the sum over the threads before this one. `sums` has room for a word a warp and a
// sum; the block may use it again after its next barrier.
template <int kThreads, int kSums>
__device__ __forceinline__ void block_sums_before(uint32_t (&x)[kSums], uint32_t* sums) {
  constexpr int kWarps = kThreads / 32;
  const int warp = threadIdx.x / 32;
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    const uint32_t up_to = warp_sum_up_to(x[k]);
    if (threadIdx.x % 32 == 31) sums[k * kWarps + warp] = up_to;
    x[k] = up_to - x[k];
  }
  __syncthreads();
  // Every warp adds the sums of those before it, a lane each.
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    const int w = int(threadIdx.x) % 32;
    x[k] += __reduce_add_sync(kFullWarp, w < warp ? sums[k * kWarps + w] : 0);
  }
}

// ------------------------------------------------------------------------------------------ chunks

struct Chunk {
  int64_t row;      // among the chunks of all segments
  int32_t segment;
  int32_t place;    // within its segment
  uint32_t size;    // of the segment, in items
  uint32_t before;  // items of the segments before it
};

// Items of a chunk: so many, or a power of two.
template <int kChunk>
struct FixedChunk {
  __device__ uint32_t whole(uint32_t size) const { return uint32_t(chunks_of(size, kChunk)); }
};
struct ChunkBits {
  int bits;
  __device__ uint32_t whole(uint32_t size) const { return (size + (1u << bits) - 1) >> bits; }
};

// Finds the chunks of ascending rows. Every warp of a block asks by itself. A segment of no items has
// `kAtLeast` chunks.
template <int kAtLeast, typename ChunkSize, typename Size>
class ChunkFinder {
 public:
  // Reads the first sizes: begin before the ticket is there.
  __device__ ChunkFinder(int64_t n_segments, ChunkSize chunk, Size size_of)
      : n_segments_(n_segments), chunk_(chunk), size_of_(size_of) {
    read();
  }

  __device__ bool find(int64_t row, Chunk& chunk) {
    while (first_ < n_segments_) {
      const uint32_t owners = __ballot_sync(kFullWarp, row < rows_before_ + rows_);
      if (owners != 0) {
        const int owner = __ffs(int(owners)) - 1;
        chunk.row = row;
        chunk.segment = int32_t(first_) + owner;
        chunk.place = int32_t(row - rows_before_ - __shfl_sync(kFullWarp, rows_ - chunks_, owner));
        chunk.size = __shfl_sync(kFullWarp, size_, owner);
        chunk.before = items_before_ + __shfl_sync(kFullWarp, items_ - size_, owner);
        return true;
      }
      rows_before_ += __shfl_sync(kFullWarp, rows_, 31);
      items_before_ += __shfl_sync(kFullWarp, items_, 31);
      first_ += 32;
      read();
    }
    return false;
  }

 private:
  // Of 32 segments, one a lane: its size and chunks, and both summed up to it.
  __device__ void read() {
    const int64_t i = first_ + threadIdx.x % 32;
    size_ = i < n_segments_ ? size_of_(i) : 0;
    chunks_ = chunk_.whole(size_);
    if (kAtLeast != 0 && i < n_segments_ && chunks_ == 0) chunks_ = kAtLeast;
    rows_ = warp_sum_up_to(chunks_);
    items_ = warp_sum_up_to(size_);
  }

  int64_t n_segments_, first_ = 0, rows_before_ = 0;
  ChunkSize chunk_;
  Size size_of_;
  uint32_t items_before_ = 0;
  uint32_t size_, chunks_, rows_, items_;
};

template <int kAtLeast, typename ChunkSize, typename Size>
__device__ ChunkFinder<kAtLeast, ChunkSize, Size> chunk_finder(int64_t n_segments, ChunkSize chunk, Size size_of) {
  return {n_segments, chunk, size_of};
}

// The next ticket, the same in all threads. Ends with a barrier, and begins with one: what the block
// shared for its last chunk is free.
__device__ __forceinline__ uint32_t take_ticket(uint32_t* tickets, uint32_t* shared) {
  __syncthreads();
  if (threadIdx.x == 0) *shared = atomicAdd(tickets, 1);
  __syncthreads();
  return *shared;
}

// --------------------------------------------------------------------------------------- look-back

// What a chunk tells the later ones of a digit, in one word, so that no fence is needed: nothing yet (0);
// its own sum, plus one; or, with the highest bit, the sum of all chunks up to it, plus one. Sums stay
// below 2^31 - 1.
constexpr uint32_t kUpToHere = 0x80000000u;

template <int kWords>
__device__ __forceinline__ void store_state(uint32_t* at, const uint32_t (&w)[kWords]) {
  if constexpr (kWords % 4 == 0) {
#pragma unroll
    for (int k = 0; k < kWords; k += 4) {
      asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at + k), "r"(w[k]), "r"(w[k + 1]),
                   "r"(w[k + 2]), "r"(w[k + 3])
                   : "memory");
    }
  } else {
#pragma unroll
    for (int k = 0; k < kWords; ++k) {
      asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(at + k), "r"(w[k]) : "memory");
    }
  }
}

template <int kWords>
__device__ __forceinline__ void load_state(const uint32_t* at, uint32_t (&w)[kWords]) {
  if constexpr (kWords % 4 == 0) {
#pragma unroll
    for (int k = 0; k < kWords; k += 4) {
      asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(w[k]), "=r"(w[k + 1]), "=r"(w[k + 2]), "=r"(w[k + 3])
                   : "l"(at + k)
                   : "memory");
    }
  } else {
#pragma unroll
    for (int k = 0; k < kWords; ++k) {
      asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(w[k]) : "l"(at + k) : "memory");
    }
  }
}

// Tells the chunk's own sums, of the kWords columns from `column` on. Rows have `width` words.
template <int kWords>
__device__ __forceinline__ void publish(uint32_t* state, int width, int column, const Chunk& chunk,
                                        const uint32_t (&own)[kWords]) {
  uint32_t words[kWords];
#pragma unroll
  for (int k = 0; k < kWords; ++k) words[k] = (own[k] + 1) | (chunk.place == 0 ? kUpToHere : 0);
  store_state(state + chunk.row * width + column, words);
}

// Sums of the chunks before this one in its segment; tells the later ones. Rows are read a few at a time,
// since a read takes long.
template <int kWords>
__device__ __forceinline__ void look_back(uint32_t* state, int width, int column, const Chunk& chunk,
                                          const uint32_t (&own)[kWords], uint32_t (&before)[kWords]) {
  constexpr int kRows = kWords >= 4 ? 4 : 8;
#pragma unroll
  for (int k = 0; k < kWords; ++k) before[k] = 0;
  if (chunk.place == 0) return;
  const uint32_t* row = state + (chunk.row - 1) * width + column;
  int32_t left = chunk.place;  // rows not yet added
  uint32_t open = (1u << kWords) - 1;
  while (open != 0) {
    uint32_t words[kRows][kWords];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r < left) load_state(row - int64_t(r) * width, words[r]);
    }
    int taken = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r != taken || r >= left) continue;
      bool told = true;
#pragma unroll
      for (int k = 0; k < kWords; ++k) told = told && (words[r][k] != 0 || (open >> k & 1u) == 0);
      if (!told) continue;
      ++taken;
#pragma unroll
      for (int k = 0; k < kWords; ++k) {
        if ((open >> k & 1u) == 0) continue;
        before[k] += (words[r][k] & ~kUpToHere) - 1;
        if ((words[r][k] & kUpToHere) != 0) open &= ~(1u << k);
      }
      if (open == 0) taken = kRows;  // no further row counts
    }
    row -= int64_t(taken) * width;
    left -= taken;
  }
  uint32_t words[kWords];
#pragma unroll
  for (int k = 0; k < kWords; ++k) words[k] = (before[k] + own[k] + 1) | kUpToHere;
  store_state(state + chunk.row * width + column, words);
}

// ------------------------------------------------------------------------------------------ ranks

// Lanes whose digit is this lane's.
template <int kBits>
__device__ __forceinline__ uint32_t same_digit(uint32_t digit) {
  uint32_t same = kFullWarp;
#pragma unroll
  for (int b = 0; b < kBits; ++b) {
    const bool set = (digit >> b & 1u) != 0;
    const uint32_t lanes = __ballot_sync(kFullWarp, set);
    same &= set ? lanes : ~lanes;
  }
  return same;
}

// A block's ranking of kThreads x kItems items by digit. Items are in the order (warp, j, lane): item j of
// a thread lies at slot(j).
template <int kBins_, int kThreads_, int kItems_>
struct Ranking {
  static constexpr int kBins = kBins_, kThreads = kThreads_, kItems = kItems_;
  static constexpr int kWarps = kThreads / 32, kChunk = kThreads * kItems;
  static constexpr int kBits = kBins == 256 ? 8 : kBins == 512 ? 9 : kBins == 1024 ? 10 : kBins == 2048 ? 11 : 12;
  static_assert(kBins == 1 << kBits, "a power of two, 256 to 4096");
  static constexpr int kOwn = kBins > kThreads ? kBins / kThreads : 1;  // digits that a thread looks after

  static constexpr int kMostSums = 4;

  struct Shared {
    uint16_t counts[kWarps][kBins];  // items of a digit in the warps before, once ranked
    uint32_t sums[kMostSums * kWarps];
  };

  __device__ static bool owns() { return kBins >= kThreads || threadIdx.x < kBins; }
  __device__ static int first_own() { return int(threadIdx.x) * kOwn; }
  __device__ static int slot(int j) { return (int(threadIdx.x) / 32 * kItems + j) * 32 + int(threadIdx.x) % 32; }

  // A digit and a rank in one word.
  __device__ static uint32_t digit_of(uint32_t tag) { return tag & 0xffffu; }
  __device__ static uint32_t rank_of(uint32_t tag) { return tag >> 16; }

  // tags[j]: at first the digit of item j; then also its rank, which is how many items of the same digit come
  // before it in its warp. own[k]: the chunk's items of digit first_own() + k. Bit j of `valid` says whether item j
  // exists. Ends without a barrier: counts of other digits are ready after the next one.
  __device__ static void run(Shared& s, uint32_t (&tags)[kItems], uint32_t valid, uint32_t (&own)[kOwn]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t* const pairs = reinterpret_cast<uint32_t*>(s.counts[warp]);  // the counts of two digits each
#pragma unroll
    for (int i = 0; i < kBins / 64; ++i) pairs[i * 32 + lane] = 0;
    __syncwarp();
    // The first lane of each digit adds for all of them. A warp's additions are made in their order, so a few are
    // under way at once.
    constexpr int kAtOnce = kItems < 4 ? kItems : 4;
    static_assert(kItems % kAtOnce == 0, "whole groups");
#pragma unroll
    for (int part = 0; part < kItems; part += kAtOnce) {
      uint32_t same[kAtOnce], sums[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const bool exists = (valid >> (part + i) & 1u) != 0;
        same[i] = same_digit<kBits>(tags[part + i]) & __ballot_sync(kFullWarp, exists);
        same[i] = exists ? same[i] : 0;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const uint32_t tag = tags[part + i];
        const bool adds = same[i] != 0 && (same[i] & ((1u << lane) - 1)) == 0;
        sums[i] = adds ? atomicAdd(pairs + tag / 2, uint32_t(__popc(same[i])) << (tag % 2 * 16)) : 0;
        __syncwarp();
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const uint32_t tag = tags[part + i];
        const uint32_t before_all = __shfl_sync(kFullWarp, sums[i], max(__ffs(int(same[i])) - 1, 0));
        const uint32_t rank = (before_all >> (tag % 2 * 16) & 0xffffu) + uint32_t(__popc(same[i] & ((1u << lane) - 1)));
        tags[part + i] = tag | rank << 16;
      }
    }
    __syncthreads();
    if constexpr (kOwn % 2 == 0) {
      uint32_t sums[kOwn / 2] = {};  // of two digits each
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        uint32_t* at = reinterpret_cast<uint32_t*>(s.counts[w]) + threadIdx.x * (kOwn / 2);
#pragma unroll
        for (int k = 0; k < kOwn / 2; ++k) {
          const uint32_t count = at[k];
          at[k] = sums[k];
          sums[k] += count;
        }
      }
#pragma unroll
      for (int k = 0; k < kOwn; ++k) own[k] = k % 2 == 0 ? sums[k / 2] & 0xffffu : sums[k / 2] >> 16;
    } else {
      static_assert(kOwn == 1, "a power of two");
      own[0] = 0;
      if (owns()) {
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          const uint32_t count = s.counts[w][threadIdx.x];
          s.counts[w][threadIdx.x] = uint16_t(own[0]);
          own[0] += count;
        }
      }
    }
  }

  // How many items of its digit come before an item in the chunk. `counts` must be ready.
  __device__ static uint32_t place_of(const Shared& s, uint32_t tag) {
    return s.counts[threadIdx.x / 32][digit_of(tag)] + rank_of(tag);
  }

  // In place, of each of several values a digit: the sum over the digits before. Begins with a barrier.
  template <int kSums>
  __device__ static void sums_before(Shared& s, uint32_t (&values)[kSums][kOwn]) {
    static_assert(kSums <= kMostSums, "room for the warps' sums");
    uint32_t sums[kSums];
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      sums[i] = 0;
#pragma unroll
      for (int k = 0; k < kOwn; ++k) sums[i] += values[i][k];
    }
    __syncthreads();
    block_sums_before<kThreads>(sums, s.sums);
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
#pragma unroll
      for (int k = 0; k < kOwn; ++k) {
        const uint32_t value = values[i][k];
        values[i][k] = sums[i];
        sums[i] += value;
      }
    }
  }
};

}  // namespace radix
}  // namespace rapfast
