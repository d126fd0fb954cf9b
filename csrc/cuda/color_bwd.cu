// Backward of stage 2 on the GPU. Harmonics: a lane per Gaussian that some view saw, its coefficients in shared
// memory and their gradients in registers while it meets the views in their order; rows go back through the same
// memory, so that they are written whole. Given colours: a lane per four channels.
#include "../render_bwd.h"

#include "records.cuh"
#include "seen_rows.cuh"

namespace rapfast {
namespace {

struct ColorBwdArguments {
  ColorBwdParams<float> p;
  SeenBy seen;
  ViewGroup group;
  const float* rows;   // [M, stride]
  int64_t stride;
  float* center_sums;  // [I, chunks, 3] or null
  bool add;
};

// Where quad i of a row lies: an even number of quads is shuffled, so that the same quad of neighbouring rows lies in
// different banks.
template <int kPitch>
__device__ __forceinline__ int quad_place(int row, int i) {
  static_assert(kPitch % 2 == 1 || kPitch % 4 == 0, "quads are shuffled in fours");
  return kPitch % 2 == 1 ? i : i ^ (row / 2 % 4);
}

template <int kPitch>
__device__ __forceinline__ float& number_of(float4* rows, int row, int i) {
  return reinterpret_cast<float*>(rows + row * kPitch + quad_place<kPitch>(row, i / 4))[i % 4];
}

// A warp's rows of coefficients, `ids` of the chunk, into shared memory.
template <int kDegree>
__device__ __forceinline__ void load_rows(const float* colors, int64_t n_bases, const uint16_t* ids, int n_rows,
                                          float4* rows) {
  constexpr int kPitch = sh_quads(kDegree), kFloats = sh_floats(kDegree);
  const int lane = threadIdx.x % 32;
  if (n_bases * 3 % 4 == 0) {
    for (int i = lane; i < 32 * kPitch; i += 32) {
      const int row = i / kPitch, quad = i % kPitch;
      if (row >= n_rows) break;
      rows[row * kPitch + quad_place<kPitch>(row, quad)] =
          __ldg(reinterpret_cast<const float4*>(colors + 3 * n_bases * ids[row]) + quad);
    }
  } else {
    for (int i = lane; i < 32 * kFloats; i += 32) {
      const int row = i / kFloats, at = i % kFloats;
      if (row >= n_rows) break;
      number_of<kPitch>(rows, row, at) = __ldg(colors + 3 * n_bases * ids[row] + at);
    }
  }
}

// Gradients in their place; those of bases above the degree are 0.
template <int kDegree>
__device__ __forceinline__ void store_rows(float4* rows, int64_t n_bases, const uint16_t* ids, int n_rows, bool add,
                                           float* v_colors) {
  constexpr int kPitch = sh_quads(kDegree), kFloats = sh_floats(kDegree);
  const int lane = threadIdx.x % 32;
  const int width = int(3 * n_bases);
  if (width % 4 == 0) {
    const int quads = width / 4;
    for (int i = lane; i < n_rows * quads; i += 32) {
      const int row = i / quads, quad = i - row * quads;
      float4 v = quad < kPitch ? rows[row * kPitch + quad_place<kPitch>(row, quad)] : float4{};
      float4* const to = reinterpret_cast<float4*>(v_colors + int64_t(width) * ids[row]) + quad;
      if (add) {
        const float4 before = *to;
        v = make_float4(before.x + v.x, before.y + v.y, before.z + v.z, before.w + v.w);
      }
      *to = v;
    }
  } else {
    for (int i = lane; i < n_rows * width; i += 32) {
      const int row = i / width, at = i - row * width;
      const float v = at < kFloats ? number_of<kPitch>(rows, row, at) : 0.f;
      float* const to = v_colors + int64_t(width) * ids[row] + at;
      *to = add ? *to + v : v;
    }
  }
}

// kOwnRows: each camera has coefficients of its own. kCenters: gradients of cameras are wanted.
template <int kDegree, bool kOwnRows, bool kCenters>
__global__ void __launch_bounds__(kSeenThreads, kDegree >= 4 ? 2 : kDegree == 3 ? 3 : 5)
    sh_bwd_kernel(const __grid_constant__ ColorBwdArguments a) {
  constexpr int kPitch = sh_quads(kDegree), kFloats = sh_floats(kDegree), kBases = sh_bases(kDegree);
  __shared__ SeenShared s;
  __shared__ Vec3<float> centers[kViewGroup];
  __shared__ float center_sums[kCenters ? kSeenWarps : 1][kCenters ? kViewGroup : 1][3];
  __shared__ float4 staged[kSeenWarps][kOwnRows ? 1 : 32 * kPitch];
  const ColorBwdParams<float>& p = a.p;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const SeenChunk chunk(a.seen, a.group);
  const int n_cameras = a.group.n_cameras;
  for (int k = threadIdx.x; k < n_cameras; k += kSeenThreads) centers[k] = a.seen.views[chunk.first_image + k].center;
  if (kCenters) {
    for (int i = threadIdx.x; i < kSeenWarps * kViewGroup * 3; i += kSeenThreads) {
      center_sums[i / 3 / kViewGroup][i / 3 % kViewGroup][i % 3] = 0.f;
    }
  }
  const int n_rows = find_rows(a.seen, a.group, chunk, s);
  if (!a.add) {
    zero_unseen(p.v_means, 3, chunk, s);
    if (!kOwnRows) zero_unseen(p.v_colors, int(3 * p.n_bases), chunk, s);
  }

  for (int first = warp * 32; first < n_rows; first += kSeenThreads) {
    const bool exists = first + lane < n_rows;
    const int row = exists ? s.rows[first + lane] : 0;
    const int64_t g = chunk.first_gaussian + row;
    if (!kOwnRows) {
      load_rows<kDegree>(p.colors + 3 * p.n_bases * chunk.first_gaussian, p.n_bases, s.rows + first,
                         min(32, n_rows - first), staged[warp]);
      __syncwarp();
    }
    const Vec3<float> mean = {p.means[3 * g], p.means[3 * g + 1], p.means[3 * g + 2]};
    Vec3<float> v_mean = {0.f, 0.f, 0.f};
    float v_coeffs[kOwnRows ? 1 : 4 * kPitch] = {};

    // The next view's gradient is on its way while this one's is used.
    const auto fetch = [&](int k) {
      const int64_t m = exists && k < n_cameras ? record_of(s, k, row) : -1;
      return m >= 0 ? __ldg(reinterpret_cast<const float4*>(a.rows + m * a.stride + kRowColor)) : float4{};
    };
    float4 next = fetch(0);
    for (int k = 0; k < n_cameras; ++k) {
      float v_color[3] = {next.x, next.y, next.z};
      next = fetch(k + 1);
      const bool has = v_color[0] != 0.f || v_color[1] != 0.f || v_color[2] != 0.f;
      if (!__any_sync(kFullWarp, has)) continue;
      Vec3<float> v_direction = {0.f, 0.f, 0.f};
      if (has) {
        const Vec3<float> d = {mean.x - centers[k].x, mean.y - centers[k].y, mean.z - centers[k].z};
        const int64_t own = (chunk.first_image + k) * p.n_gaussians + chunk.first_word * 32 + row;
        // Calls body(i, coefficient i) for all of them.
        const auto for_coefficients = [&](const auto& body) {
#pragma unroll
          for (int quad = 0; quad < kPitch; ++quad) {
            float part[4];
            if constexpr (kOwnRows) {
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                if (4 * quad + j < kFloats) part[j] = __ldg(p.colors + 3 * p.n_bases * own + 4 * quad + j);
              }
            } else {
              const float4 four = staged[warp][lane * kPitch + quad_place<kPitch>(lane, quad)];
              part[0] = four.x, part[1] = four.y, part[2] = four.z, part[3] = four.w;
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              if (4 * quad + j < kFloats) body(4 * quad + j, part[j]);
            }
          }
        };
        float basis[kBases], v_basis[sh_bases(kMaxShDegree)] = {}, sum[3] = {0.f, 0.f, 0.f};
        sh_basis(kDegree, d, basis);
        for_coefficients([&](int i, float x) { sum[i % 3] = __fmaf_rn(basis[i / 3], x, sum[i % 3]); });
#pragma unroll
        for (int c = 0; c < 3; ++c) {
          if (!(sum[c] + Constants<float>::kShOffset >= 0.f)) v_color[c] = 0.f;  // the clamp at 0 holds it
        }
        for_coefficients([&](int i, float x) {
          v_basis[i / 3] = fmaf(v_color[i % 3], x, v_basis[i / 3]);
          if constexpr (kOwnRows) {
            if (p.v_colors != nullptr) p.v_colors[3 * p.n_bases * own + i] = v_color[i % 3] * basis[i / 3];
          } else {
            v_coeffs[i] = fmaf(v_color[i % 3], basis[i / 3], v_coeffs[i]);
          }
        });
        v_direction = sh_basis_vjp(kDegree, d, v_basis);
        v_mean.x += v_direction.x;
        v_mean.y += v_direction.y;
        v_mean.z += v_direction.z;
      }
      if (kCenters) {
        const float x = sum32(v_direction.x), y = sum32(v_direction.y), z = sum32(v_direction.z);
        if (lane < 3) center_sums[warp][k][lane] -= lane == 0 ? x : lane == 1 ? y : z;
      }
    }

    if (exists && p.v_means != nullptr) {
      float* const out = p.v_means + 3 * g;
      out[0] = v_mean.x + (a.add ? out[0] : 0.f);
      out[1] = v_mean.y + (a.add ? out[1] : 0.f);
      out[2] = v_mean.z + (a.add ? out[2] : 0.f);
    }
    if constexpr (!kOwnRows) {
      __syncwarp();
      if (p.v_colors != nullptr) {
#pragma unroll
        for (int quad = 0; quad < kPitch; ++quad) {
          staged[warp][lane * kPitch + quad_place<kPitch>(lane, quad)] =
              make_float4(v_coeffs[4 * quad], v_coeffs[4 * quad + 1], v_coeffs[4 * quad + 2], v_coeffs[4 * quad + 3]);
        }
        __syncwarp();
        store_rows<kDegree>(staged[warp], p.n_bases, s.rows + first, min(32, n_rows - first), a.add,
                            p.v_colors + 3 * p.n_bases * chunk.first_gaussian);
      }
      __syncwarp();  // before the next rows
    }
  }
  if (!kCenters) return;
  __syncthreads();
  const int64_t n_chunks = ballot_chunks(a.seen.n_gaussians);
  for (int i = threadIdx.x; i < n_cameras * 3; i += kSeenThreads) {
    float sum = 0.f;
    for (int w = 0; w < kSeenWarps; ++w) sum += center_sums[w][i / 3][i % 3];
    a.center_sums[((chunk.first_image + i / 3) * n_chunks + chunk.chunk) * 3 + i % 3] = sum;
  }
}

// Colours as given: [lead, N, D], lead being scenes or images. Four channels a thread.
__global__ void __launch_bounds__(kThreads)
    given_bwd_kernel(const __grid_constant__ ColorBwdParams<float> p, const __grid_constant__ SeenBy seen,
                     const float* __restrict__ rows, int64_t stride) {
  const int64_t quads = (p.n_channels + 3) / 4, n_leads = seen.n_scenes * (p.per_camera ? seen.n_cameras : 1);
  const int64_t n_words = ballot_words(seen.n_gaussians);
  RAPFAST_GRID_STRIDE(i, n_leads * seen.n_gaussians * quads) {
    const int64_t at = i / quads, quad = i - at * quads;
    const int64_t lead = at / seen.n_gaussians, g = at - lead * seen.n_gaussians;
    const int64_t first_image = p.per_camera ? lead : lead * seen.n_cameras;
    float sum[4] = {0.f, 0.f, 0.f, 0.f};
    for (int64_t k = 0; k < (p.per_camera ? 1 : seen.n_cameras); ++k) {
      const int64_t word = (first_image + k) * n_words + g / 32;
      const uint32_t bits = __ldg(seen.ballots + word);
      if ((bits >> g % 32 & 1u) == 0) continue;
      const int64_t m = int64_t(__ldg(seen.word_bases + word)) + __popc(bits & ((1u << g % 32) - 1));
      const float4 v = __ldg(reinterpret_cast<const float4*>(rows + m * stride + kRowColor) + quad);
      sum[0] += v.x;
      sum[1] += v.y;
      sum[2] += v.z;
      sum[3] += v.w;
    }
    float* const out = p.v_colors + at * p.n_channels + 4 * quad;
#pragma unroll
    for (int d = 0; d < 4; ++d) {
      if (4 * quad + d < p.n_channels) out[d] = sum[d];
    }
  }
}

template <int kDegree>
void launch_sh(const ColorBwdArguments& a, int64_t blocks, cudaStream_t stream) {
  const bool centers = a.center_sums != nullptr;
  const auto kernel =
      a.p.per_camera ? (centers ? sh_bwd_kernel<kDegree, true, true> : sh_bwd_kernel<kDegree, true, false>)
                     : (centers ? sh_bwd_kernel<kDegree, false, true> : sh_bwd_kernel<kDegree, false, false>);
  kernel<<<unsigned(blocks), kSeenThreads, 0, stream>>>(a);
  check_launch("sh_bwd_kernel");
}

}  // namespace

void color_bwd_cuda(const ColorBwdParams<float>& p, const SeenBy& seen, const float* rows, int64_t stride,
                    const ViewSums& sums, cudaStream_t stream) {
  if (p.depth_channel == DepthChannel::kOnly || seen.n_gaussians == 0) return;
  if (p.sh_degree < 0) {
    const int64_t n = seen.n_scenes * (p.per_camera ? seen.n_cameras : 1) * seen.n_gaussians * ((p.n_channels + 3) / 4);
    if (p.v_colors == nullptr || n == 0) return;
    given_bwd_kernel<<<grid_for(n), kThreads, 0, stream>>>(p, seen, rows, stride);
    check_launch("given_bwd_kernel");
    return;
  }
  if (p.per_camera && p.v_colors != nullptr) {
    const int64_t n = seen.n_scenes * seen.n_cameras * seen.n_gaussians * 3 * p.n_bases;
    check(cudaMemsetAsync(p.v_colors, 0, size_t(4 * n), stream), "cudaMemsetAsync");
  }
  const int64_t blocks = seen.n_scenes * ballot_chunks(seen.n_gaussians);
  for_view_groups(seen.n_cameras, [&](const ViewGroup& group) {
    const ColorBwdArguments a = {p, seen, group, rows, stride, sums.center, group.first_camera > 0};
    switch (p.sh_degree) {
      case 0: return launch_sh<0>(a, blocks, stream);
      case 1: return launch_sh<1>(a, blocks, stream);
      case 2: return launch_sh<2>(a, blocks, stream);
      case 3: return launch_sh<3>(a, blocks, stream);
      default: return launch_sh<4>(a, blocks, stream);
    }
  });
}

}  // namespace rapfast
