// Backward of stage 4 on the GPU. A warp owns an 8x8 quarter of a tile, eight lanes a 4x4 cell of it, a lane two
// pixels, as in the blend. Warps of a block share nothing and never wait for each other.
//
// A warp goes back to front through the tile's list, from the last record that any of its pixels drew, in windows of
// 32 records, one per lane; the next window is on its way from memory meanwhile. Each lane tests its record against
// the four cells, so a window of a cell is one word of bits, which the cell's lanes walk from the highest down: four
// cells, four records at a time. Each pixel divides its way back from its final transmittance. The eight lanes of a
// cell add up what its pixels give the record. Up to four channels, a cell leaves these sums in shared memory, and
// behind the window each lane adds those of its record over the cells, makes gradients of the moments and adds them
// to the record's row: atomics per (quarter, record). With more channels a cell adds to the row itself.
#include "../render_bwd.h"

#include "blend_cells.cuh"
#include "check.cuh"
#include "tile_order.cuh"
#include "warp_sums.cuh"

namespace rapfast {
namespace {

constexpr int kWarps = 4;     // of a block: the quarters of a tile
constexpr int kWindow = 32;   // records that a warp takes at a time
constexpr int kPixels = 2;    // of a lane
constexpr int kMoments = 6;   // of g = alpha d(loss)/d(alpha): sums of g, g dx, g dy, g dx^2, g dx dy, g dy^2
constexpr int kFixedBits = 40;  // of the largest term of a deterministic sum, so that 2^22 of them fit

__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ------------------------------------------------------------------------------------------- sums

__device__ __forceinline__ void add_atomic(float* to, float x) { atomicAdd(to, x); }

__device__ __forceinline__ void add_atomic2(float* to, float x, float y) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "f"(x), "f"(y) : "memory");
#else
  atomicAdd(to, x);
  atomicAdd(to + 1, y);
#endif
}

__device__ __forceinline__ void add_atomic4(float* to, float4 v) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "f"(v.x),
               "f"(v.y), "f"(v.z), "f"(v.w)
               : "memory");
#else
  atomicAdd(to, v.x);
  atomicAdd(to + 1, v.y);
  atomicAdd(to + 2, v.z);
  atomicAdd(to + 3, v.w);
#endif
}

__device__ __forceinline__ int32_t exponent_of(float x) { return int32_t(__float_as_uint(x) >> 23 & 0xffu); }

// One term of a deterministic sum.
__device__ __forceinline__ void add_fixed(int32_t* exponents, int64_t* fixed, int64_t at, SumKind kind, float x) {
  if (kind == SumKind::kMeasure) {
    if (x != 0.f) atomicMax(exponents + at, max(1, exponent_of(x)));
    return;
  }
  const int32_t exponent = exponents[at];
  if (x == 0.f || exponent == 255) return;  // 255: a term is not finite, nor is the sum
  add_to(fixed + at, __double2ll_rn(ldexp(double(x), kFixedBits - (exponent - 127))));
}

// Row of a record in means2d; -1: it has none.
__device__ __forceinline__ int64_t means2d_row(const Means2dLayout& l, int64_t image, int64_t m) {
  return l.places != nullptr ? int64_t(l.places[m]) : image * l.n_gaussians + l.gaussian_ids[m];
}

// ------------------------------------------------------------------------------------------- tiles

// What a window keeps of a record.
template <int kColors>
struct alignas(16) Staged {
  float x, y, a, b;       // mean, conic a and b scaled
  float c, log2_opacity;  // conic c scaled
  float color[kColors];
};

// One warp's shared memory. kChannels 0: any number, read where they are used.
template <int kChannels, bool kAbs>
struct WarpShared {
  static constexpr bool kInSlots = kChannels >= 1 && kChannels <= 4;
  static constexpr int kInRecord = kInSlots ? kChannels : 2;  // else the opacity's reciprocal and the record
  static constexpr int kQuads = kInSlots ? 0 : kChannels / 4;
  static constexpr int kValues = kMoments + kInRecord + (kAbs ? 2 : 0);
  __device__ static constexpr int more() { return kValues > 8 ? kValues - 8 : 0; }
  static constexpr int kPitch = kValues < 8 ? 9 : kValues % 2 == 1 ? kValues : kValues + 1;

  Staged<kInRecord> records[kWindow + 1];  // the last draws nothing: cells that have no more take it
  float4 colors[kQuads == 0 ? 1 : kWindow + 1][kQuads == 0 ? 1 : kQuads];
  // Of each cell and record the sums over the cell's pixels: moments, colour, |gradient of the mean|.
  float slots[kInSlots ? kCells * kWindow * kPitch : 1];
};

struct Pixel {
  float transmittance;  // behind the record at hand
  float behind;         // gradient that flows through the transmittance behind it
  int32_t last;         // place of its last record
};

// The gradient of a row from the moments of a record: sigma = (a dx^2 + c dy^2) / 2 + b dx dy, alpha = opacity
// exp(-sigma), so d(loss)/d(sigma) = -g and d(loss)/d(opacity) = g / opacity.
struct RowGradient {
  float x, y, a, b, c, opacity;

  // Of scaled conic and moments.
  __device__ RowGradient(float a2, float b2, float c2, float inv_opacity, const float* m)
      : x(kLn2 * fmaf(2.f * a2, m[1], b2 * m[2])),
        y(kLn2 * fmaf(2.f * c2, m[2], b2 * m[1])),
        a(-0.5f * m[3]),
        b(-m[4]),
        c(-0.5f * m[5]),
        opacity(m[0] * inv_opacity) {}
};

template <int kChannels, bool kAbs>
struct Quarter {
  using Shared = WarpShared<kChannels, kAbs>;
  static constexpr bool kInSlots = Shared::kInSlots;
  static constexpr int kQuads = Shared::kQuads;
  __device__ static constexpr int swizzle() { return kQuads == 0 ? 0 : kQuads - 1; }
  static constexpr int kHeld = kChannels == 0 ? 1 : kChannels;  // channels of v_colors in registers

  const BlendBwdCudaParams& p;
  Shared& s;
  const SumKind kind;
  const int lane, cell;
  int64_t image, first_record, first_channel;
  int n_channels;
  float px, py[kPixels];
  int64_t pixel[kPixels];
  Pixel state[kPixels];
  float v_out[kPixels][kHeld];

  // ----------------------------------------------------------------------------------------- walk

  // One record in the lane's pixels: moments and |gradient of the mean| of both, and weights. Returns whether it is
  // drawn in one of them. `v_weight` gives the gradient of the weight in pixel q.
  template <typename VWeight>
  __device__ __forceinline__ bool step(const Staged<Shared::kInRecord>& r, int place, float* moments, float* abs,
                                       float* weights, const VWeight& v_weight) {
    const float dx = r.x - px;
    const Along along(r.a, r.b, r.log2_opacity, dx);
    float g[kPixels], dy[kPixels];
    bool any = false;
#pragma unroll
    for (int q = 0; q < kPixels; ++q) {
      dy[q] = r.y - py[q];
      const float exponent = exponent_at(along, r.c, dy[q]);
      const bool draws = reaches_cut(exponent, r.log2_opacity) && place <= state[q].last;
      const float uncapped = exp2_approx(exponent);
      const float alpha = draws ? fminf(p.alpha_cap, uncapped) : 0.f;
      const float inv = reciprocal_approx(1.f - alpha);
      const float v_w = v_weight(q);
      const float v_alpha = inv * fmaf(state[q].transmittance, v_w, -state[q].behind);
      state[q].transmittance *= inv;
      weights[q] = alpha * state[q].transmittance;
      state[q].behind = fmaf(weights[q], v_w, state[q].behind);
      g[q] = draws && uncapped <= p.alpha_cap ? alpha * v_alpha : 0.f;
      any = any || draws;
    }
    const float gy0 = g[0] * dy[0], gy1 = g[1] * dy[1];
    moments[0] = g[0] + g[1];
    moments[1] = moments[0] * dx;
    moments[2] = gy0 + gy1;
    moments[3] = moments[1] * dx;
    moments[4] = moments[2] * dx;
    moments[5] = fmaf(gy0, dy[0], gy1 * dy[1]);
    if (kAbs) {
      abs[0] = abs[1] = 0.f;
#pragma unroll
      for (int q = 0; q < kPixels; ++q) {
        // Far from the mean the offset may overflow; nothing is drawn there.
        const float x = kLn2 * g[q] * fmaf(2.f * r.a, dx, r.b * dy[q]);
        const float y = kLn2 * g[q] * fmaf(r.b, dx, 2.f * r.c * dy[q]);
        abs[0] += g[q] != 0.f ? fabsf(x) : 0.f;
        abs[1] += g[q] != 0.f ? fabsf(y) : 0.f;
      }
    }
    return any;
  }

  // Up to four channels: the cell's sums go into its slot. `at` is kWindow where the cell has no more records.
  __device__ __forceinline__ bool step_into_slot(int at, int place) {
    const auto& r = s.records[at];
    float values[Shared::kValues < 8 ? 8 : Shared::kValues + 4], abs[2], weights[kPixels];
    const bool draws = step(r, place, values, abs, weights, [&](int q) {
      float v = 0.f;
#pragma unroll
      for (int d = 0; d < kHeld; ++d) v = fmaf(r.color[d < Shared::kInRecord ? d : 0], v_out[q][d], v);
      return v;
    });
    const uint32_t hits = __ballot_sync(kFullWarp, draws);
    if (hits == 0) return false;
#pragma unroll
    for (int d = 0; d < kHeld; ++d) {
      values[kMoments + d] = fmaf(weights[0], v_out[0][d], weights[1] * v_out[1][d]);
    }
    if (kAbs) {
      values[kMoments + kHeld] = abs[0];
      values[kMoments + kHeld + 1] = abs[1];
    }
#pragma unroll
    for (int i = Shared::kValues; i < 8; ++i) values[i] = 0.f;
    float more = 0.f;
    if constexpr (Shared::more() > 0) more = sum8_of<Shared::more()>(values + 8, lane);
    const float sum = sum8_of8(values, lane);
    const bool mine = (hits >> 8 * cell & 0xffu) != 0;
    if (mine) {
      float* const slot = s.slots + (cell * kWindow + at) * Shared::kPitch;
      slot[lane % 8] = sum;
      if constexpr (Shared::more() > 0) {
        constexpr int kEach = Shared::more() >= 3 ? 2 : Shared::more() == 2 ? 4 : 8;  // lanes with the same value
        const int value = value_of8<Shared::more()>(lane % 8);
        if (lane % kEach == 0 && value < Shared::more()) slot[8 + value] = more;
      }
    }
    return mine;
  }

  // Adds a window's slots, a lane those of its record, and adds the gradients to its row. Bit `lane` of drawn[k]: cell
  // k has a slot of it.
  __device__ __forceinline__ void flush(const uint32_t* drawn, int32_t id, float opacity) {
    if ((drawn[0] | drawn[1] | drawn[2] | drawn[3]) == 0) return;
    float sums[Shared::kValues] = {};
    bool any = false;
#pragma unroll
    for (int k = 0; k < kCells; ++k) {
      if ((drawn[k] >> lane & 1u) == 0) continue;
      any = true;
      const float* slot = s.slots + (k * kWindow + lane) * Shared::kPitch;
#pragma unroll
      for (int i = 0; i < Shared::kValues; ++i) sums[i] += slot[i];
    }
    const auto& r = s.records[lane];
    const RowGradient v(r.a, r.b, r.c, any ? 1.f / opacity : 0.f, sums);
    const int64_t m = first_record + id;
    float color[4] = {};
#pragma unroll
    for (int d = 0; d < kHeld; ++d) color[d] = sums[kMoments + d];
    const float abs_x = kAbs ? sums[Shared::kValues - 2] : 0.f, abs_y = kAbs ? sums[Shared::kValues - 1] : 0.f;
    if (kind != SumKind::kAtomic) {
      if (!any) return;
      const int64_t row = m * fixed_stride(p.n_channels);
      const float values[12] = {v.a, v.b, v.c, v.opacity, color[0], color[1], color[2], color[3], v.x, v.y, abs_x, abs_y};
#pragma unroll
      for (int i = 0; i < 12; ++i) add_fixed(p.exponents, p.fixed, row + i, kind, values[i]);
      return;
    }
    // Two lanes take a row together, one record after the other: its 32 bytes are one request.
    const bool is_odd = lane % 2 == 1;
    const float conic[4] = {v.a, v.b, v.c, v.opacity};
    float other[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) other[i] = __shfl_xor_sync(kFullWarp, is_odd ? conic[i] : color[i], 1);
    const int32_t other_id = __shfl_xor_sync(kFullWarp, any ? id : -1, 1);
    const float4 own4 = is_odd ? make_float4(color[0], color[1], color[2], color[3])
                               : make_float4(conic[0], conic[1], conic[2], conic[3]);
    const float4 other4 = make_float4(other[0], other[1], other[2], other[3]);
    const int32_t first_id = is_odd ? other_id : any ? id : -1, second_id = is_odd ? any ? id : -1 : other_id;
    const int half = is_odd ? kRowColor : 0;
    float* const rows = p.rows + first_record * (2 * kRowColor) + half;
    if (first_id >= 0) add_atomic4(rows + int64_t(first_id) * (2 * kRowColor), is_odd ? other4 : own4);
    if (second_id >= 0) add_atomic4(rows + int64_t(second_id) * (2 * kRowColor), is_odd ? own4 : other4);
    if (!any) return;
    const int64_t at = means2d_row(p.layout, image, m);
    if (at < 0) return;
    add_atomic2(p.v_means2d + 2 * at, v.x, v.y);
    if (kAbs) add_atomic2(p.absgrad + 2 * at, abs_x, abs_y);
  }

  // More channels: the cell's sums go to the row at once, a lane each of eight numbers.
  __device__ __forceinline__ void step_into_row(int at, int place) {
    if (at == kWindow) place = INT32_MAX;  // no record: the colours where it points need not have been written
    const auto& r = s.records[at];
    const int32_t id = __float_as_int(r.color[1]);
    const float* given = p.record_colors + (first_record + id) * p.color_stride;
    float moments[kMoments], abs[2] = {0.f, 0.f}, weights[kPixels];
    const bool draws = step(r, place, moments, abs, weights, [&](int q) {
      float v = 0.f;
      if constexpr (kChannels == 0) {
        if (p.v_colors == nullptr || place > state[q].last) return 0.f;
        for (int64_t d = 0; d < p.n_channels; ++d) v = fmaf(given[d], p.v_colors[pixel[q] * p.n_channels + d], v);
      } else {
#pragma unroll
        for (int quad = 0; quad < kQuads; ++quad) {
          const float4 c = s.colors[at][quad ^ (at & swizzle())];
          v = fmaf(c.x, v_out[q][4 * quad], v);
          v = fmaf(c.y, v_out[q][4 * quad + 1], v);
          v = fmaf(c.z, v_out[q][4 * quad + 2], v);
          v = fmaf(c.w, v_out[q][4 * quad + 3], v);
        }
      }
      return v;
    });
    const uint32_t hits = __ballot_sync(kFullWarp, draws);
    if (hits == 0) return;
    const bool mine = (hits >> 8 * cell & 0xffu) != 0;
    const int part = lane % 8;
    const int64_t m = first_record + id;
    const int64_t stride = row_stride(p.n_channels);
    const RowGradient v(r.a, r.b, r.c, r.color[0], moments);
    float values[8] = {v.a, v.b, v.c, v.opacity, v.x, v.y, abs[0], abs[1]};
    const float sum = sum8_of8(values, lane);
    if (mine) {
      if (kind != SumKind::kAtomic) {
        const int64_t row = m * fixed_stride(p.n_channels);
        add_fixed(p.exponents, p.fixed, row + (part < kRowColor ? part : stride + part - kRowColor), kind, sum);
      } else if (part < kRowColor) {
        add_atomic(p.rows + m * stride + part, sum);
      } else {
        const int64_t place2d = means2d_row(p.layout, image, m);
        float* const to = part < 6 ? p.v_means2d : kAbs ? p.absgrad : nullptr;
        if (to != nullptr && place2d >= 0) add_atomic(to + 2 * place2d + part % 2, sum);
      }
    }
    const auto add_channels = [&](int first, const float* v0, const float* v1) {
      float of[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) of[i] = fmaf(weights[0], v0[i], weights[1] * v1[i]);
      const float total = sum8_of8(of, lane);
      if (!mine || first + part >= n_channels) return;
      const int64_t column = kRowColor + first_channel + first + part;
      if (kind == SumKind::kAtomic) {
        add_atomic(p.rows + m * stride + column, total);
      } else {
        add_fixed(p.exponents, p.fixed, m * fixed_stride(p.n_channels) + column, kind, total);
      }
    };
    if constexpr (kChannels == 0) {
      for (int first = 0; first < n_channels; first += 8) {
        float both[kPixels][8];
#pragma unroll
        for (int q = 0; q < kPixels; ++q) {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const bool exists = p.v_colors != nullptr && first + i < n_channels && place <= state[q].last;
            both[q][i] = exists ? p.v_colors[pixel[q] * p.n_channels + first + i] : 0.f;
          }
        }
        add_channels(first, both[0], both[1]);
      }
    } else {
#pragma unroll
      for (int first = 0; first < kHeld; first += 8) {
        if (first < n_channels) add_channels(first, v_out[0] + first, v_out[1] + first);
      }
    }
  }

  // ---------------------------------------------------------------------------------------- window

  float4 a, b, color;  // of the record on its way to this lane
  int32_t id;

  __device__ __forceinline__ void fetch(const Record<float>* records, int32_t of) {
    id = of;
    const float4* at = reinterpret_cast<const float4*>(records + of);
    a = at[0];
    b = at[1];
    if constexpr (kInSlots) {
      const float* from = p.record_colors + (first_record + of) * p.color_stride;
      if (p.color_stride % 4 == 0) {
        color = *reinterpret_cast<const float4*>(from);
      } else {
        color = make_float4(from[0], p.color_stride > 1 ? from[1] : 0.f, 0.f, 0.f);
      }
    }
  }

  // Leaves the fetched record in shared memory.
  __device__ __forceinline__ void stage(const ScaledConic& scaled) {
    Staged<Shared::kInRecord> r;
    r.x = a.x;
    r.y = a.y;
    r.a = scaled.a;
    r.b = scaled.b;
    r.c = scaled.c;
    r.log2_opacity = scaled.log2_opacity;
    if constexpr (kInSlots) {
      const float part[4] = {color.x, color.y, color.z, color.w};
#pragma unroll
      for (int d = 0; d < kHeld; ++d) r.color[d] = part[d];
    } else {
      r.color[0] = b.y > 0.f ? 1.f / b.y : 0.f;
      r.color[1] = __int_as_float(id);
      const float* from = p.record_colors + (first_record + id) * p.color_stride + first_channel;
#pragma unroll
      for (int quad = 0; quad < kQuads; ++quad) {  // rows are padded to four channels
        s.colors[lane][quad ^ (lane & swizzle())] =
            4 * quad < n_channels ? *reinterpret_cast<const float4*>(from + 4 * quad) : float4{};
      }
    }
    s.records[lane] = r;
  }

  __device__ __forceinline__ void run(uint32_t tile_of_all, int warp) {
    const uint32_t tiles = uint32_t(p.tiles_x) * uint32_t(p.tiles_y);
    image = tile_of_all / tiles;
    const uint32_t tile = tile_of_all - uint32_t(image) * tiles;
    const int tile_row = int(tile / uint32_t(p.tiles_x)), tile_column = int(tile) - tile_row * p.tiles_x;
    // Of the quarter.
    const int left = tile_column * kTileSize + warp % 2 * 2 * kCellWidth;
    const int top = tile_row * kTileSize + warp / 2 * 2 * kCellWidth;
    const int column = left + cell % 2 * kCellWidth + lane % kCellWidth;
    const int row = top + cell / 2 * kCellWidth + lane % 8 / kCellWidth;  // and row + kRowStep
    px = float(column) + 0.5f;
    first_channel = int64_t(blockIdx.y) * kChannels;
    n_channels = int(kChannels == 0 ? p.n_channels : min(int64_t(kChannels), p.n_channels - first_channel));

    int last = -1;
#pragma unroll
    for (int q = 0; q < kPixels; ++q) {
      const int y = row + q * kRowStep;
      py[q] = float(y) + 0.5f;
      state[q] = Pixel{1.f, 0.f, -1};
#pragma unroll
      for (int d = 0; d < kHeld; ++d) v_out[q][d] = 0.f;
      if (column >= p.width || y >= p.height) continue;
      pixel[q] = (image * p.height + y) * p.width + column;
      state[q].last = p.last_ids[pixel[q]];
      if (state[q].last < 0) continue;
      state[q].transmittance = p.transmittances[pixel[q]];
      // alphas is 1 - transmittance. Channels are taken in groups, and one of them takes alphas too.
      if (p.v_alphas != nullptr && blockIdx.y == 0) state[q].behind = -p.v_alphas[pixel[q]] * state[q].transmittance;
      if (kChannels > 0 && p.v_colors != nullptr) {
        const float* v = p.v_colors + pixel[q] * p.n_channels + first_channel;
#pragma unroll
        for (int d = 0; d < kHeld; ++d) {
          if (d < n_channels) v_out[q][d] = v[d];
        }
      }
      last = max(last, state[q].last);
    }
    // Of the cell, then of the warp.
    int cell_last = last;
#pragma unroll
    for (int distance = 1; distance < 8; distance *= 2) {
      cell_last = max(cell_last, __shfl_xor_sync(kFullWarp, cell_last, distance));
    }
    const int n = __reduce_max_sync(kFullWarp, cell_last) + 1;
    if (n == 0) return;

    const int32_t* ids = p.tile_records + p.tile_offsets[tile_of_all];
    first_record = p.image_offsets[image];
    const Record<float>* records = p.records + first_record;
    if (lane == 0) {
      Staged<Shared::kInRecord> none{};
      none.log2_opacity = -INFINITY;
      s.records[kWindow] = none;
      if constexpr (kQuads > 0) {
        for (int quad = 0; quad < kQuads; ++quad) s.colors[kWindow][quad] = float4{};
      }
    }
    int base = (n - 1) / kWindow * kWindow;
    fetch(records, ids[min(base + lane, n - 1)]);
    int32_t next_id = base > 0 ? ids[base - kWindow + lane] : 0;
    for (; base >= 0; base -= kWindow) {
      const ScaledConic scaled = scaled_conic(a.z, a.w, b.x, b.y);
      uint32_t reached = 0;
      if (base + lane < n) {
        reached = cells_reached<kCellWidth, 2, 2>(a.z, a.w, b.x, scaled.log2_opacity, float(left) + 0.5f - a.x,
                                                  float(top) + 0.5f - a.y);
      }
      stage(scaled);
      const int32_t own_id = id;
      const float own_opacity = b.y;
      __syncwarp();
      if (base > 0) {
        fetch(records, next_id);
        if (base > kWindow) next_id = ids[base - 2 * kWindow + lane];
      }
      // Bit i: record i of the window reaches the cell, and a pixel there has not ended before it.
      uint32_t rest = 0;
      int n_steps = 0;
#pragma unroll
      for (int k = 0; k < kCells; ++k) {
        const int last_of_k = __shfl_sync(kFullWarp, cell_last, 8 * k);
        const bool in = (reached >> (k / 2 * kCellsPerSide + k % 2) & 1u) != 0 && base + lane <= last_of_k;
        const uint32_t all = __ballot_sync(kFullWarp, in);
        n_steps = max(n_steps, __popc(all));
        if (cell == k) rest = all;
      }
      uint32_t drawn_here = 0;
      for (int step = 0; step < n_steps; ++step) {
        const int at = rest == 0 ? kWindow : 31 - __clz(rest);
        rest &= (1u << (at & 31)) - 1u;
        if constexpr (kInSlots) {
          if (step_into_slot(at, base + at)) drawn_here |= 1u << (at & 31);
        } else {
          step_into_row(at, base + at);
        }
      }
      __syncwarp();
      if constexpr (kInSlots) {
        uint32_t drawn[kCells];
#pragma unroll
        for (int k = 0; k < kCells; ++k) drawn[k] = __shfl_sync(kFullWarp, drawn_here, 8 * k);
        flush(drawn, own_id, own_opacity);
        __syncwarp();
      }
    }
  }
};

// Blocks that are to fit a multiprocessor.
constexpr int min_blocks(int channels) { return channels >= 1 && channels <= 4 ? 5 : channels == 32 ? 3 : 4; }

template <int kChannels, bool kAbs>
__global__ void __launch_bounds__(kWarps * 32, min_blocks(kChannels))
    blend_bwd_kernel(const __grid_constant__ BlendBwdCudaParams p, SumKind kind) {
  __shared__ WarpShared<kChannels, kAbs> shared[kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Quarter<kChannels, kAbs> quarter{p, shared[warp], kind, lane, lane / 8};
  quarter.run(p.order == nullptr ? blockIdx.x : ordered_tile(p.order, gridDim.x, blockIdx.x), warp);
}

// Deterministic sums to floats, in the places that atomic ones go to.
__global__ void __launch_bounds__(kThreads) finish_fixed_kernel(const __grid_constant__ BlendBwdCudaParams p) {
  const int64_t stride = row_stride(p.n_channels), pitch = fixed_stride(p.n_channels);
  RAPFAST_GRID_STRIDE(i, p.n_records * pitch) {
    const int64_t m = i / pitch, column = i - m * pitch;
    const int32_t exponent = p.exponents[i];
    const float sum = exponent == 255 ? NAN
                                      : float(ldexp(double(p.fixed[i]), exponent - 127 - kFixedBits));
    if (exponent == 0) continue;  // no term
    if (column < stride) {
      p.rows[m * stride + column] += sum;
      continue;
    }
    int64_t image = 0;
    if (p.layout.places == nullptr) {
      int64_t end = p.n_images;  // the last image whose first record is not behind m
      while (end - image > 1) {
        const int64_t middle = (image + end) / 2;
        (p.image_offsets[middle] <= m ? image : end) = middle;
      }
    }
    const int64_t at = means2d_row(p.layout, image, m);
    float* const to = column - stride < 2 ? p.v_means2d : p.absgrad;
    if (at >= 0 && to != nullptr) to[2 * at + (column - stride) % 2] += sum;
  }
}

template <int kChannels>
void launch(const BlendBwdCudaParams& p, SumKind kind, cudaStream_t stream) {
  const int64_t groups = kChannels == 0 ? 1 : (p.n_channels + kChannels - 1) / kChannels;
  const dim3 grid(unsigned(p.n_images * p.tiles_x * p.tiles_y), unsigned(groups));
  const auto kernel = p.absgrad != nullptr ? blend_bwd_kernel<kChannels, true> : blend_bwd_kernel<kChannels, false>;
  kernel<<<grid, kWarps * 32, 0, stream>>>(p, kind);
  check_launch("blend_bwd_kernel");
}

void launch(const BlendBwdCudaParams& p, SumKind kind, cudaStream_t stream) {
  const int64_t d = p.n_channels;
  if (d == 1) return launch<1>(p, kind, stream);
  if (d == 3) return launch<3>(p, kind, stream);
  if (d <= 4) return launch<4>(p, kind, stream);
  if (d <= 8) return launch<8>(p, kind, stream);
  if (d <= 32) return launch<32>(p, kind, stream);
  // Absolute values do not add up over groups of channels.
  if (p.absgrad != nullptr) return launch<0>(p, kind, stream);
  launch<32>(p, kind, stream);
}

}  // namespace

void blend_bwd_cuda(const BlendBwdCudaParams& p, cudaStream_t stream) {
  const int64_t n_tiles = p.n_images * p.tiles_x * p.tiles_y;
  if (n_tiles == 0 || p.n_records == 0 || p.n_intersections == 0) return;
  if (p.fixed == nullptr) return launch(p, SumKind::kAtomic, stream);
  launch(p, SumKind::kMeasure, stream);
  launch(p, SumKind::kFixed, stream);
  finish_fixed_kernel<<<grid_for(p.n_records * fixed_stride(p.n_channels)), kThreads, 0, stream>>>(p);
  check_launch("finish_fixed_kernel");
}

}  // namespace rapfast
