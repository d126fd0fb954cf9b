// How the backward of projection and colours goes over Gaussians: a block takes a chunk of them, finds those that some
// view saw, and gives each a lane, which meets the views in their order. Sums over views need no atomics.
#pragma once

#include "../render_bwd.h"
#include "check.cuh"
#include "scratch.h"
#include "warp_sums.cuh"

namespace rapfast {

constexpr int kSeenThreads = 128, kSeenWarps = kSeenThreads / 32;
constexpr int kSeenGaussians = 32 * kChunkWords;  // of a chunk
constexpr int kViewGroup = 32;                    // views that a launch takes; later ones add to the first one's sums

// The views of a launch, of every scene.
struct ViewGroup {
  int32_t first_camera, n_cameras;
};

struct SeenShared {
  uint32_t any[kChunkWords];        // Gaussians that some view of the group saw
  uint16_t rows[kSeenGaussians];    // their numbers in the chunk
  // The chunk's ballots and word_bases: of each view a warp would wait for two loads, one after the other.
  uint32_t bits[kViewGroup][kChunkWords], bases[kViewGroup][kChunkWords];
};

// A block's chunk.
struct SeenChunk {
  int64_t scene, chunk, n_words;
  int64_t first_word;      // of the scene's
  int64_t first_gaussian;  // of all scenes
  int64_t first_image;     // of the group
  int n_gaussians;         // that exist

  __device__ SeenChunk(const SeenBy& seen, const ViewGroup& group) {
    const int64_t n_chunks = ballot_chunks(seen.n_gaussians);
    n_words = ballot_words(seen.n_gaussians);
    scene = blockIdx.x / n_chunks;
    chunk = blockIdx.x - scene * n_chunks;
    first_word = chunk * kChunkWords;
    first_gaussian = scene * seen.n_gaussians + first_word * 32;
    first_image = scene * seen.n_cameras + group.first_camera;
    n_gaussians = int(min(int64_t(kSeenGaussians), seen.n_gaussians - first_word * 32));
  }
};

// Lists the Gaussians that some view saw; returns how many there are. All threads of the block come here.
__device__ __forceinline__ int find_rows(const SeenBy& seen, const ViewGroup& group, const SeenChunk& c,
                                         SeenShared& s) {
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < kChunkWords) s.any[threadIdx.x] = 0;
  __syncthreads();
  const int word = threadIdx.x % kChunkWords;
  uint32_t any = 0;
  for (int k = threadIdx.x / kChunkWords; k < group.n_cameras; k += kSeenThreads / kChunkWords) {
    const bool exists = c.first_word + word < c.n_words;
    const int64_t at = (c.first_image + k) * c.n_words + c.first_word + word;
    const uint32_t bits = exists ? seen.ballots[at] : 0;
    s.bits[k][word] = bits;
    s.bases[k][word] = exists ? seen.word_bases[at] : 0;
    any |= bits;
  }
  if (any != 0) atomicOr(&s.any[word], any);
  __syncthreads();
  const uint32_t mine = lane < kChunkWords ? s.any[lane] : 0;
  const uint32_t end = inclusive_sum(__popc(mine), lane);
#pragma unroll
  for (int i = 0; i < kChunkWords / kSeenWarps; ++i) {
    const int w = i * kSeenWarps + threadIdx.x / 32;
    const uint32_t bits = __shfl_sync(kFullWarp, mine, w);
    const uint32_t at = __shfl_sync(kFullWarp, end, w) - __popc(bits);
    if (bits >> lane & 1u) s.rows[at + __popc(bits & ((1u << lane) - 1))] = uint16_t(w * 32 + lane);
  }
  const int n_rows = int(__shfl_sync(kFullWarp, end, 31));
  __syncthreads();
  return n_rows;
}

// The record of Gaussian `row` of the chunk in view k of the group, -1 where the view did not see it.
__device__ __forceinline__ int64_t record_of(const SeenShared& s, int k, int row) {
  const uint32_t bits = s.bits[k][row / 32];
  if ((bits >> row % 32 & 1u) == 0) return -1;
  return int64_t(s.bases[k][row / 32]) + __popc(bits & ((1u << row % 32) - 1));
}

// Zeros for the chunk's Gaussians that no view saw: [N, width].
__device__ __forceinline__ void zero_unseen(float* to, int width, const SeenChunk& c, const SeenShared& s) {
  if (to == nullptr) return;
  to += c.first_gaussian * width;
  if (width % 4 == 0) {
    const int quads = width / 4;
    for (int i = threadIdx.x; i < c.n_gaussians * quads; i += kSeenThreads) {
      const int row = i / quads;
      if ((s.any[row / 32] >> row % 32 & 1u) == 0) reinterpret_cast<float4*>(to)[i] = float4{};
    }
    return;
  }
  for (int i = threadIdx.x; i < c.n_gaussians * width; i += kSeenThreads) {
    const int row = i / width;
    if ((s.any[row / 32] >> row % 32 & 1u) == 0) to[i] = 0.f;
  }
}

// Calls launch(group) for all views.
template <typename Launch>
void for_view_groups(int64_t n_cameras, const Launch& launch) {
  for (int64_t first = 0; first < n_cameras; first += kViewGroup) {
    launch(ViewGroup{int32_t(first), int32_t(min_of<int64_t>(kViewGroup, n_cameras - first))});
  }
}

}  // namespace rapfast
