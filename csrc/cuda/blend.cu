// Stage 4 on the GPU. A block owns a tile, each of its four warps an 8x8 quarter, each eight lanes of a
// warp a 4x4 cell of it; a lane has two pixels, (x, y) and (x, y + 2), which share the terms in dx.
//
// The block takes the tile's list in windows of 128 records, one per thread, and the next window is on its
// way from memory meanwhile. Each thread tests its record's ellipse against the tile's sixteen cells and
// leaves the record and the answer in shared memory. A warp then lists, cell by cell, the records that
// reach it, and its four cells go through their lists side by side: lanes meet few records that draw nothing
// in them, and a step costs no more than the longest of four lists asks for.
//
// A tile whose list is long would keep the call waiting: it is begun first. In large calls of few tiles it is drawn by
// two blocks, each the upper or the lower half, with one pixel per lane and cells of 4x2; where there are many, other
// tiles fill the time, and halves would only cost instructions. Each pixel sees the same operations either way.
#include "../bin.h"
#include "../blend.h"

#include <type_traits>

#include "blend_cells.cuh"
#include "check.cuh"
#include "launch.cuh"
#include "scratch.h"
#include "tile_order.cuh"

namespace rapfast {
namespace {

constexpr int kWarps = 4;                 // of a block: the quarters of a tile
constexpr int kWindow = kWarps * 32;      // records in shared memory at a time
constexpr int kStep = 2;                   // records per step of a cell
constexpr int kLook = 8;                   // steps after which a warp looks whether any of its pixels is open

// What a window keeps of a record.
template <int kColors>
struct alignas(16) Staged {
  float x, y, a, b;         // mean, conic a and b scaled
  float c, log2_opacity;    // conic c scaled
  float color[kColors];
  int32_t place;            // in the tile's list
};

struct Pixel {
  float transmittance = 1.f;  // behind all that was met, what it stopped at included: from there nothing climbs back
  float drawn = 1.f;          // behind what was drawn
  int32_t last = -1;

  __device__ bool open() const { return transmittance > Constants<float>::kTransmittanceStop; }
};

// The weight of one record in one pixel where it draws.
template <bool kKeepState>
__device__ __forceinline__ bool weigh(float exponent, float log2_opacity, float alpha_cap, int32_t place,
                                      Pixel& pixel, float& weight) {
  const float alpha = fminf(alpha_cap, exp2_approx(exponent));
  weight = alpha * pixel.transmittance;
  const float next = fmaf(-alpha, pixel.transmittance, pixel.transmittance);
  const bool hit = reaches_cut(exponent, log2_opacity);
  const bool draws = hit && next > Constants<float>::kTransmittanceStop;
  if (hit) pixel.transmittance = next;
  if (draws) pixel.drawn = next;
  if (kKeepState && draws) pixel.last = place;
  return draws;
}

// One block's shared memory. Windows alternate between two buffers, so that one barrier per window is enough.
// Up to four channels lie in the record, more in rows of their own whose quads are permuted: lanes that read
// different rows find them in different banks.
template <int kChannels>
struct Shared {
  static constexpr int kInRecord = kChannels <= 4 ? kChannels : 0;
  static constexpr int kQuads = kChannels <= 4 ? 0 : kChannels / 4;
  static constexpr int kSwizzle = kQuads == 0 ? 0 : kQuads - 1;
  static constexpr int kRows = kWindow + 1;  // the last draws nothing: it fills the shorter of a warp's lists
  using Record = Staged<kInRecord == 0 ? 1 : kInRecord>;

  Record records[2 * kRows];
  float4 colors[kQuads == 0 ? 1 : 2 * kRows][kQuads == 0 ? 1 : kQuads];
  uint16_t cells[2][kWindow];
  using Entry = std::conditional_t<kQuads == 0, uint32_t, uint16_t>;
  alignas(16) Entry lists[kWarps][kCells][kWindow];  // of records, as offsets in bytes
};

__device__ __forceinline__ void copy_async(float4* to, const float* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(uint32_t(__cvta_generic_to_shared(to))), "l"(from));
}

__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// Draws a tile's rows from part * (rows that a block has) on: up to kChannels channels from
// blockIdx.y * kChannels on. Channels never mix, so how many a pass takes changes no bit.
template <int kChannels, bool kKeepState, int kPixels>
__device__ __forceinline__ void blend_part(const BlendParams<float>& p, Shared<kChannels>& shared, uint32_t tile_of_all,
                                           int part_of_tile, float* __restrict__ transmittances,
                                           int32_t* __restrict__ last_ids) {
  using Memory = Shared<kChannels>;
  constexpr int kQuads = Memory::kQuads, kRows = Memory::kRows;
  constexpr int kCellHeight = kRowStep * kPixels;

  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, cell = lane / 8;
  const uint32_t tiles = uint32_t(p.tiles_x) * uint32_t(p.tiles_y);
  const uint32_t image = tile_of_all / tiles, tile = tile_of_all - image * tiles;
  const int tile_row = int(tile / uint32_t(p.tiles_x)), tile_column = int(tile) - tile_row * p.tiles_x;
  const int left = tile_column * kTileSize;
  const int top = (p.first_tile_row + tile_row) * kTileSize + part_of_tile * kCellsPerSide * kCellHeight;
  const int column = left + (warp % 2 * 2 + cell % 2) * kCellWidth + lane % kCellWidth;
  const int row = top + (warp / 2 * 2 + cell / 2) * kCellHeight + lane % 8 / kCellWidth;  // and row + kRowStep
  const float px = float(column) + 0.5f;
  const int64_t first_channel = int64_t(blockIdx.y) * kChannels;
  const int n_channels = int(min(int64_t(kChannels), p.n_channels - first_channel));

  Pixel pixels[kPixels];
  float py[kPixels];
#pragma unroll
  for (int k = 0; k < kPixels; ++k) {
    py[k] = float(row + k * kRowStep) + 0.5f;
    // Outside the image nothing is drawn.
    if (column >= p.width || row + k * kRowStep >= p.height) pixels[k].transmittance = 0.f;
  }
  float sums[kPixels][kChannels] = {};
  const auto is_open = [&] { return pixels[0].open() || pixels[kPixels - 1].open(); };

  const int64_t begin = p.tile_offsets[tile_of_all];
  const int n = int(p.tile_offsets[tile_of_all + 1] - begin);
  const int32_t* ids = p.tile_records + begin;
  const int64_t first_record = p.image_offsets[image];
  const Record<float>* records = p.records + first_record;
  const float* colors = p.record_colors + first_record * p.color_stride + first_channel;

  float4 a{}, b{}, color{};
  // The record of place `place` in the list, if there is one, on its way to this thread.
  const auto fetch = [&](int place, int32_t id) {
    if (place >= n) return;
    const float4* at = reinterpret_cast<const float4*>(records + id);
    a = at[0];
    b = at[1];
    const float* from = colors + id * p.color_stride;
    if (kChannels >= 3 && kQuads == 0) {
      color = *reinterpret_cast<const float4*>(from);
    } else if (kQuads == 0) {
      color.x = from[0];
      if (kChannels > 1) color.y = from[1];
    }
    const int buffered = place / kWindow % 2 * kRows + thread;
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {  // rows are padded to four channels
      if (4 * quad < n_channels) copy_async(&shared.colors[buffered][quad ^ (buffered & Memory::kSwizzle)], from + 4 * quad);
    }
  };

  if (thread == 0) {
    typename Memory::Record none{};
    none.log2_opacity = -INFINITY;
    shared.records[kWindow] = none;
  }
  using Entry = typename Memory::Entry;
  const auto entry_of = [](uint32_t record) { return Entry(record * sizeof(typename Memory::Record)); };
  int32_t next_id = thread + kWindow < n ? ids[thread + kWindow] : 0;
  fetch(thread, thread < n ? ids[thread] : 0);
  for (int base = 0; base < n; base += kWindow) {
    const int buffer = base / kWindow % 2;
    uint32_t reached = 0;
    if (base + thread < n) {
      const ScaledConic scaled = scaled_conic(a.z, a.w, b.x, b.y);
      reached = cells_reached<kCellHeight, kCellsPerSide, kCellsPerSide>(
          a.z, a.w, b.x, scaled.log2_opacity, float(left) + 0.5f - a.x, float(top) + 0.5f - a.y);
      typename Memory::Record staged;
      staged.x = a.x;
      staged.y = a.y;
      staged.a = scaled.a;
      staged.b = scaled.b;
      staged.c = scaled.c;
      staged.log2_opacity = scaled.log2_opacity;
      const float part[4] = {color.x, color.y, color.z, color.w};
#pragma unroll
      for (int d = 0; d < Memory::kInRecord; ++d) staged.color[d] = part[d];
      staged.place = base + thread;
      shared.records[buffer * kRows + thread] = staged;
    }
    shared.cells[buffer][thread] = uint16_t(reached);
    if (kQuads > 0) wait_for_copies();
    const bool open = is_open();
    // The window is there for all, and all have left the one before it.
    if (__syncthreads_and(!open)) break;
    fetch(base + kWindow + thread, next_id);
    next_id = base + 2 * kWindow + thread < n ? ids[base + 2 * kWindow + thread] : 0;

    // The records of each cell, in the list's order.
    const uint32_t open_lanes = __ballot_sync(kFullWarp, open);
    if (open_lanes == 0) continue;
    int counts[kCells] = {};
#pragma unroll
    for (int first = 0; first < kWindow; first += 32) {
      const uint32_t of_record = shared.cells[buffer][first + lane] >> (warp / 2 * 2 * kCellsPerSide + warp % 2 * 2);
#pragma unroll
      for (int k = 0; k < kCells; ++k) {
        const bool in = (of_record >> (k / 2 * kCellsPerSide + k % 2) & 1u) != 0 && (open_lanes >> 8 * k & 0xffu) != 0;
        const uint32_t all = __ballot_sync(kFullWarp, in);
        if (in) {
          shared.lists[warp][k][counts[k] + __popc(all & ((1u << lane) - 1))] =
              entry_of(buffer * kRows + first + lane);
        }
        counts[k] += __popc(all);
      }
    }
    const int most = max(max(counts[0], counts[1]), max(counts[2], counts[3]));
    const int n_steps = (most + kStep - 1) / kStep;
    Entry* list = shared.lists[warp][cell];
    const int mine = cell < 2 ? (cell == 0 ? counts[0] : counts[1]) : (cell == 2 ? counts[2] : counts[3]);
    for (int k = mine + lane % 8; k < n_steps * kStep; k += 8) list[k] = entry_of(kWindow);
    __syncwarp();

    // Long lists lie behind what closes their pixels.
    for (int step = 0; step < n_steps;) {
      const int until = min(step + kLook, n_steps);
      for (; step < until; ++step) {
        struct alignas(sizeof(Entry) * kStep) Entries {
          Entry of[kStep];
        };
        const Entries entries = reinterpret_cast<const Entries*>(list)[step];
#pragma unroll
        for (int k = 0; k < kStep; ++k) {
          const uint32_t at = entries.of[k];
          const typename Memory::Record& r =
              *reinterpret_cast<const typename Memory::Record*>(reinterpret_cast<const char*>(shared.records) + at);
          const float dx = r.x - px;
          const Along along(r.a, r.b, r.log2_opacity, dx);
          float weights[kPixels];
          bool draws[kPixels], any = false;
#pragma unroll
          for (int q = 0; q < kPixels; ++q) {
            const float dy = r.y - py[q];
            draws[q] = weigh<kKeepState>(exponent_at(along, r.c, dy), r.log2_opacity, p.alpha_cap, r.place,
                                         pixels[q], weights[q]);
            any = any || draws[q];
          }
          if (kQuads == 0) {
#pragma unroll
            for (int d = 0; d < Memory::kInRecord; ++d) {
              const float part = r.color[d];
#pragma unroll
              for (int q = 0; q < kPixels; ++q) {
                if (draws[q]) sums[q][d] = fmaf(part, weights[q], sums[q][d]);
              }
            }
          } else if (any) {
            const uint32_t of = at / uint32_t(sizeof(typename Memory::Record));
#pragma unroll
            for (int q = 0; q < kPixels; ++q) weights[q] = draws[q] ? weights[q] : 0.f;
#pragma unroll
            for (int quad = 0; quad < kQuads; ++quad) {
              const float4 color = shared.colors[of][quad ^ (of & Memory::kSwizzle)];
              const float part[4] = {color.x, color.y, color.z, color.w};
#pragma unroll
              for (int e = 0; e < 4; ++e) {
#pragma unroll
                for (int q = 0; q < kPixels; ++q) {
                  sums[q][4 * quad + e] = fmaf(part[e], weights[q], sums[q][4 * quad + e]);
                }
              }
            }
          }
        }
      }
      if (!__any_sync(kFullWarp, is_open())) break;
    }
  }

  const int first_row = p.first_tile_row * kTileSize, rows = min(p.height - first_row, p.tiles_y * kTileSize);
#pragma unroll
  for (int k = 0; k < kPixels; ++k) {
    const int y = row + kRowStep * k;
    if (column >= p.width || y >= p.height) continue;
    const int64_t pixel = (int64_t(image) * rows + (y - first_row)) * p.width + column;
    float* out = p.colors + pixel * p.n_channels + first_channel;
    if (kQuads > 0 && p.n_channels % 4 == 0) {
#pragma unroll
      for (int quad = 0; quad < kQuads; ++quad) {
        if (4 * quad < n_channels) {
          reinterpret_cast<float4*>(out)[quad] = make_float4(sums[k][4 * quad], sums[k][4 * quad + 1],
                                                             sums[k][4 * quad + 2], sums[k][4 * quad + 3]);
        }
      }
    } else {
#pragma unroll
      for (int d = 0; d < kChannels; ++d) {
        if (d < n_channels) out[d] = sums[k][d];
      }
    }
    if (blockIdx.y == 0) {
      p.alphas[pixel] = 1.f - pixels[k].drawn;
      if (kKeepState) {
        transmittances[pixel] = pixels[k].drawn;
        last_ids[pixel] = pixels[k].last;
      }
    }
  }
}

// How blocks come to tiles: one each in their order; or as p.order has them; or so, with long lists in halves.
enum class Order { kNone, kLongFirst, kHalves };

// Blocks that are to fit a multiprocessor: the most with which nothing is spilled on sm_80, sm_89 and sm_90, as far as
// more of them still pay.
constexpr int min_blocks(int channels, Order order) {
  if (channels > 16) return order == Order::kNone ? 4 : 3;
  if (channels > 4) return 1;
  if (order == Order::kNone) return 8;
  return order == Order::kLongFirst ? 7 : 5;
}

template <int kChannels, bool kKeepState, Order kOrder>
__global__ void __launch_bounds__(kWindow, min_blocks(kChannels, kOrder))
    blend_kernel(BlendParams<float> p, float* __restrict__ transmittances, int32_t* __restrict__ last_ids) {
  __shared__ Shared<kChannels> shared;
  wait_for_kernel_before();
  uint32_t tile = blockIdx.x;
  const uint32_t n_tiles = uint32_t(p.n_images * p.tiles_x * p.tiles_y);
  if (kOrder == Order::kLongFirst) tile = ordered_tile(p.order, n_tiles, tile);
  if (kOrder == Order::kHalves) {
    const uint32_t n_long = n_long_tiles(p.order, n_tiles);
    if (tile < 2 * n_long) {
      blend_part<kChannels, kKeepState, 1>(p, shared, p.order[tile / 2], int(tile % 2), transmittances, last_ids);
      return;
    }
    if (tile - n_long >= n_tiles) return;
    tile = ordered_tile(p.order, n_tiles, tile - n_long);
  }
  blend_part<kChannels, kKeepState, 2>(p, shared, tile, 0, transmittances, last_ids);
}

template <int kChannels, bool kKeepState, Order kOrder>
void launch(const BlendParams<float>& p, float* transmittances, int32_t* last_ids, cudaStream_t stream) {
  const int64_t tiles = p.n_images * p.tiles_x * p.tiles_y;
  // At most one list in kLongList is kLongList times as long as all are on average.
  const int64_t blocks = kOrder == Order::kHalves ? tiles + tiles / kLongList + 1 : tiles;
  const dim3 grid(unsigned(blocks), unsigned((p.n_channels + kChannels - 1) / kChannels));
  launch_behind("blend_kernel", blend_kernel<kChannels, kKeepState, kOrder>, grid, kWindow, 0, stream, p, transmittances,
                last_ids);
}

template <int kChannels, bool kKeepState>
void launch(const BlendParams<float>& p, float* transmittances, int32_t* last_ids, cudaStream_t stream) {
  if constexpr (!kKeepState) {
    if (p.order == nullptr) return launch<kChannels, kKeepState, Order::kNone>(p, transmittances, last_ids, stream);
  }
  if (p.in_halves) {
    launch<kChannels, kKeepState, Order::kHalves>(p, transmittances, last_ids, stream);
  } else {
    launch<kChannels, kKeepState, Order::kLongFirst>(p, transmittances, last_ids, stream);
  }
}

template <int kChannels>
void launch(const BlendParams<float>& p, float* transmittances, int32_t* last_ids, cudaStream_t stream) {
  if (last_ids != nullptr) {
    launch<kChannels, true>(p, transmittances, last_ids, stream);
  } else {
    launch<kChannels, false>(p, nullptr, nullptr, stream);
  }
}

}  // namespace

void blend_cuda(const BlendParams<float>& p, float* transmittances, int32_t* last_ids,
                cudaStream_t stream) {
  const int64_t n_tiles = p.n_images * p.tiles_x * p.tiles_y;
  if (n_tiles == 0) return;
  const int64_t d = p.n_channels;
  if (d == 1) {
    launch<1>(p, transmittances, last_ids, stream);
  } else if (d == 2) {
    launch<2>(p, transmittances, last_ids, stream);
  } else if (d == 3) {
    launch<3>(p, transmittances, last_ids, stream);
  } else if (d == 4) {
    launch<4>(p, transmittances, last_ids, stream);
  } else if (d <= 8) {
    launch<8>(p, transmittances, last_ids, stream);
  } else if (d <= 16) {
    launch<16>(p, transmittances, last_ids, stream);
  } else {
    launch<32>(p, transmittances, last_ids, stream);
  }
}

}  // namespace rapfast
