// Stage 4 on the GPU. A warp owns an 8x8 quarter of a tile and walks the tile's list alone: no
// block-wide barrier, and a quarter that is opaque stops at once. How many quarters share a block is
// a matter of balance alone.
//
// A warp takes 32 records at a time, one per lane. Each lane tests its record's ellipse against the
// quarter; the survivors are packed into the warp's shared memory in list order, and then every lane
// adds each of them to its two pixels, (x, y) and (x, y + 4), which share the terms in dx.
#include "../blend.h"

#include "../math/tile.h"
#include "check.cuh"
#include "scratch.h"

namespace rapfast {
namespace {

constexpr int kQuarter = kTileSize / 2;  // pixels per side of a warp's share
constexpr int kQuarters = 4;             // of a tile
constexpr int kWarps = 4;                // of a block; divides kQuarters
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Whether alpha reaches the cut somewhere in [x0, x0 + 7] x [y0, y0 + 7], relative to the mean. The
// quadratic form's minimum over the box is 0 inside, else on an edge that faces the mean.
__device__ __forceinline__ bool reaches(float a, float b, float c, float opacity, float x0, float y0) {
  if (!(well_conditioned_det(a, b, c) > 0.f)) return true;
  const float x1 = x0 + float(kQuarter - 1), y1 = y0 + float(kQuarter - 1);
  const float level =
      2.f * kLn2 * log2_approx(opacity * 255.f) + Constants<float>::kTileSlackSigma;
  const float x = clamp_to(0.f, x0, x1), y = clamp_to(0.f, y0, y1);
  float least = 3.4e38f;
  if (x != 0.f) {
    const float best = clamp_to(__fdividef(-b * x, c), y0, y1);
    least = a * x * x + best * (2.f * b * x + c * best);
  }
  if (y != 0.f) {
    const float best = clamp_to(__fdividef(-b * y, a), x0, x1);
    least = fminf(least, c * y * y + best * (2.f * b * y + a * best));
  }
  if (x == 0.f && y == 0.f) least = 0.f;
  // Written so that NaN counts as reached: the pixels decide.
  return !(least > level * (1.f + 1e-4f));
}

struct Pixel {
  float transmittance = 1.f;
  int32_t last = -1;
  bool done = false;
};

// The weight of one record in one pixel; 0 where it is cut or the pixel has stopped.
template <bool kKeepState>
__device__ __forceinline__ float weigh(float exponent, float opacity, float alpha_cap, int32_t place,
                                       Pixel& pixel) {
  const float raw = opacity * exp2_approx(exponent);
  // Written so that NaN does not draw.
  if (pixel.done || !(exponent <= 0.f) || !(raw >= Constants<float>::kAlphaCut)) return 0.f;
  const float alpha = fminf(alpha_cap, raw);
  const float next = pixel.transmittance * (1.f - alpha);
  if (next <= Constants<float>::kTransmittanceStop) {
    pixel.done = true;
    return 0.f;
  }
  const float weight = alpha * pixel.transmittance;
  pixel.transmittance = next;
  if (kKeepState) pixel.last = place;
  return weight;
}

// Up to kChannels channels from blockIdx.y * kChannels on. Channels never mix, so how many a pass
// takes changes no bit.
template <int kChannels, bool kKeepState>
__global__ void __launch_bounds__(kWarps * 32)
    blend_kernel(BlendParams<float> p, float* __restrict__ transmittances,
                 int32_t* __restrict__ last_ids) {
  constexpr bool kSharedColors = kChannels <= 4;
  __shared__ float4 shared_a[kWarps][32];  // x, y, scaled conic a and b
  __shared__ float4 shared_b[kWarps][32];  // scaled conic c, opacity, record, place in the list
  __shared__ float4 shared_color[kSharedColors ? kWarps : 1][32];

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t tiles = int64_t(p.tiles_x) * p.tiles_y;
  const int64_t quarter_of_all = int64_t(blockIdx.x) * kWarps + warp;
  const int64_t tile_of_all = quarter_of_all / kQuarters;
  const int quarter = int(quarter_of_all % kQuarters);
  const int64_t image = tile_of_all / tiles;
  const int tile = int(tile_of_all - image * tiles);
  const int left = tile % p.tiles_x * kTileSize + quarter % 2 * kQuarter;
  const int top = tile / p.tiles_x * kTileSize + quarter / 2 * kQuarter;
  if (left >= p.width || top >= p.height) return;
  const int column = left + lane % kQuarter;
  const int row = top + lane / kQuarter;  // and row + 4
  const float px = float(column) + 0.5f, py = float(row) + 0.5f;
  const int64_t first_channel = int64_t(blockIdx.y) * kChannels;
  const int n_channels = int(min(int64_t(kChannels), p.n_channels - first_channel));

  Pixel pixels[2];
  pixels[0].done = column >= p.width || row >= p.height;
  pixels[1].done = column >= p.width || row + 4 >= p.height;
  float sums[2][kChannels] = {};

  const int64_t begin = p.tile_offsets[tile_of_all], end = p.tile_offsets[tile_of_all + 1];
  const int64_t first_record = p.image_offsets[image];
  for (int64_t base = begin; base < end; base += 32) {
    if (__all_sync(kFullWarp, pixels[0].done && pixels[1].done)) break;
    const int64_t i = base + lane;
    bool keep = false;
    int64_t m = 0;
    float4 a{}, b{};
    if (i < end) {
      m = first_record + p.tile_records[i];
      const float4* at = reinterpret_cast<const float4*>(p.records + m);
      a = at[0];
      b = at[1];
      keep = reaches(a.z, a.w, b.x, b.y, float(left) + 0.5f - a.x, float(top) + 0.5f - a.y);
    }
    const uint32_t kept = __ballot_sync(kFullWarp, keep);
    if (kept == 0) continue;
    __syncwarp();  // the last round's reads are over
    if (keep) {
      const int slot = __popc(kept & ((1u << lane) - 1));
      // exp(-sigma) = 2^(...): the factors move into the conic once for the whole quarter.
      shared_a[warp][slot] = make_float4(a.x, a.y, -0.5f * kLog2e * a.z, -kLog2e * a.w);
      shared_b[warp][slot] = make_float4(-0.5f * kLog2e * b.x, b.y, __int_as_float(int32_t(m)),
                                         __int_as_float(int32_t(i - begin)));
      if (kSharedColors) {
        const float* color = p.record_colors + m * p.color_stride + first_channel;
        if (kChannels >= 3) {
          shared_color[warp][slot] = *reinterpret_cast<const float4*>(color);
        } else {
          shared_color[warp][slot] =
              make_float4(color[0], kChannels > 1 ? color[1] : 0.f, 0.f, 0.f);
        }
      }
    }
    __syncwarp();

    const int n = __popc(kept);
    for (int j = 0; j < n; ++j) {
      const float4 ja = shared_a[warp][j], jb = shared_b[warp][j];
      const float dx = ja.x - px;
      const float dy0 = ja.y - py, dy1 = dy0 - 4.f;
      const float xx = ja.z * dx * dx, xy = ja.w * dx;
      const float exponent0 = fmaf(dy0, fmaf(jb.x, dy0, xy), xx);
      const float exponent1 = fmaf(dy1, fmaf(jb.x, dy1, xy), xx);
      const int32_t place = __float_as_int(jb.w);
      const float w0 = weigh<kKeepState>(exponent0, jb.y, p.alpha_cap, place, pixels[0]);
      const float w1 = weigh<kKeepState>(exponent1, jb.y, p.alpha_cap, place, pixels[1]);
      if (kSharedColors) {
        const float4 color = shared_color[warp][j];
        const float part[4] = {color.x, color.y, color.z, color.w};
#pragma unroll
        for (int d = 0; d < kChannels; ++d) {
          sums[0][d] = fmaf(part[d], w0, sums[0][d]);
          sums[1][d] = fmaf(part[d], w1, sums[1][d]);
        }
      } else if (__any_sync(kFullWarp, w0 != 0.f || w1 != 0.f)) {
        const float* color =
            p.record_colors + int64_t(__float_as_int(jb.z)) * p.color_stride + first_channel;
#pragma unroll
        for (int d = 0; d < kChannels; d += 4) {
          if (d < n_channels) {  // rows are padded to four channels
            const float4 quad = *reinterpret_cast<const float4*>(color + d);
            const float part[4] = {quad.x, quad.y, quad.z, quad.w};
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              sums[0][d + e] = fmaf(part[e], w0, sums[0][d + e]);
              sums[1][d + e] = fmaf(part[e], w1, sums[1][d + e]);
            }
          }
        }
      }
    }
  }

#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int y = row + 4 * k;
    if (column >= p.width || y >= p.height) continue;
    const int64_t pixel = (image * p.height + y) * p.width + column;
    float* out = p.colors + pixel * p.n_channels + first_channel;
#pragma unroll
    for (int d = 0; d < kChannels; ++d) {
      if (d < n_channels) out[d] = sums[k][d];
    }
    if (blockIdx.y == 0) {
      p.alphas[pixel] = 1.f - pixels[k].transmittance;
      if (kKeepState) {
        transmittances[pixel] = pixels[k].transmittance;
        last_ids[pixel] = pixels[k].last;
      }
    }
  }
}

template <int kChannels>
void launch(const BlendParams<float>& p, float* transmittances, int32_t* last_ids,
            cudaStream_t stream) {
  const int64_t blocks = p.n_images * p.tiles_x * p.tiles_y * kQuarters / kWarps;
  const dim3 grid(unsigned(blocks), unsigned((p.n_channels + kChannels - 1) / kChannels));
  if (last_ids != nullptr) {
    blend_kernel<kChannels, true><<<grid, kWarps * 32, 0, stream>>>(p, transmittances, last_ids);
  } else {
    blend_kernel<kChannels, false><<<grid, kWarps * 32, 0, stream>>>(p, nullptr, nullptr);
  }
  check_launch("blend_kernel");
}

}  // namespace

void blend_cuda(const BlendParams<float>& p, float* transmittances, int32_t* last_ids,
                cudaStream_t stream) {
  if (p.n_images == 0) return;
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
