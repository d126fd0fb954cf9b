// Stage 1: a record for each Gaussian that a camera may see.
#pragma once

#include <cuda_pipeline_primitives.h>

#include <cstddef>

#include "project_kernels.cuh"
#include "records.cuh"
#include "tile_boxes.cuh"
#include "warp_sums.cuh"

namespace rapfast {
namespace {

// Where a record's colour comes from.
enum class Source {
  kNone,       // not from here
  kGiven,      // up to kMaxProjectedChannels channels, or depth alone
  kSh,         // spherical harmonics that all cameras share
  kCameraSh,   // of each camera
};

struct RecordParams {
  ProjectParams<float> p;
  ColorParams<float> c;
  ProjectScratch s;
  TileBoxes boxes;             // depth_keys null: nobody wants them
  Counts* counts;
  int32_t n_images, n_groups;  // groups of cameras, of one scene
  int32_t n_words, n_chunks, n_spans;
  int32_t n_items;             // a chunk of words of each camera of a group
};

// Quads of a staged row of coefficients.
__host__ __device__ constexpr int coeff_pitch(Source source, int degree) {
  return source == Source::kSh ? sh_quads(degree) : 0;
}

// Where quad i of a staged row lies: an even number of quads is shuffled, so that the same quad of
// neighbouring rows lies in different banks.
template <int kPitch>
__device__ __forceinline__ int coeff_place(int row, int i) {
  static_assert(kPitch % 2 == 1 || kPitch % 4 == 0, "quads are shuffled in fours");
  return kPitch % 2 == 1 ? i : i ^ (row / 2 % 4);
}

// A camera of the group at hand: the front of a DeviceView, with its number.
struct ItemView {
  View<float> view;
  Vec3<float> center;
  int32_t padding;
  int32_t image;
  int32_t more_padding;
};
static_assert(sizeof(ItemView) == 16 * kViewQuads && offsetof(ItemView, image) == 16 * kViewQuads - 8,
              "views are copied in pieces of 16 bytes, and the last takes the number");

// What a block knows of its item. Behind it lie `views` and `words` of the cameras, their `masks`, and what
// each warp has staged; how many cameras there are is known when the kernel starts.
struct ItemShared {
  uint32_t image_bases[kGroup];  // first record of the image
  uint32_t item_bases[kGroup];   // records of the image before the item's
  uint16_t row_ids[32 * kChunkWords];  // Gaussians that a camera may see, in order
  int64_t first_gaussian;        // of all scenes
  int64_t first_colors;          // the row of colours that belongs to it
  int32_t first_word, n_cameras;
  uint32_t next_item;
};

template <int kPitch>
struct RowsShared {
  float4 coeffs[kPitch == 0 ? 1 : kRows * kPitch];
  float4 rows[kRows][kRowQuads];
  uint32_t first_places[kGroup];  // a camera's first record of these rows, less its place in the list
  // Behind it: list [cameras * kRows], records as row and camera, in (camera, Gaussian) order.
};

template <int kPitch>
struct RecordLayout {
  int views, words, masks, rows, rows_pitch, size;  // bytes, multiples of 16

  __host__ __device__ explicit RecordLayout(int n_cameras) {
    views = round(sizeof(ItemShared));
    words = views + n_cameras * int(sizeof(ItemView));
    masks = words + n_cameras * kChunkWords * 4;
    rows = masks + round(n_cameras * kChunkWords * 4);
    rows_pitch = round(sizeof(RowsShared<kPitch>)) + n_cameras * kRows * 2;
    size = rows + kRecordWarps * rows_pitch;
  }
  __host__ __device__ static int round(size_t bytes) { return int((bytes + 15) / 16 * 16); }
};

// Channels of a record from those given: zeros where one is not finite, and false.
__device__ __forceinline__ bool load_given(const ColorParams<float>& c, int64_t row, float* v) {
  bool finite = true;
#pragma unroll
  for (int d = 0; d < kMaxProjectedChannels; ++d) {
    v[d] = 0.f;
    if (d < c.n_channels && c.depth_channel != DepthChannel::kOnly) {
      v[d] = __ldg(c.colors + c.n_channels * row + d);
      finite = finite && is_finite(v[d]);
    }
  }
#pragma unroll
  for (int d = 0; d < kMaxProjectedChannels; ++d) v[d] = finite ? v[d] : 0.f;
  return finite;
}

__device__ __forceinline__ void write_given(const ColorParams<float>& c, int64_t m, const float* v, float depth) {
  const int n_given = c.depth_channel == DepthChannel::kOnly ? 0 : int(c.n_channels);
  const bool with_depth = c.depth_channel != DepthChannel::kNone;
  float row[kMaxProjectedChannels + 4] = {};
#pragma unroll
  for (int d = 0; d <= kMaxProjectedChannels; ++d) {
    if (d < kMaxProjectedChannels && d < n_given) row[d] = v[d];
    if (d == n_given && with_depth) row[d] = depth;
  }
  float* out = c.record_colors + m * c.color_stride;
  if (c.color_stride % 4 == 0) {
    reinterpret_cast<float4*>(out)[0] = make_float4(row[0], row[1], row[2], row[3]);
    if (c.color_stride > 4) reinterpret_cast<float4*>(out)[1] = make_float4(row[4], 0.f, 0.f, 0.f);
  } else {
    out[0] = row[0];
    if (c.color_stride > 1) out[1] = row[1];
  }
}

// Copies a warp's rows of SH coefficients into shared memory; they are there after a wait. A lane's own row
// is that of Gaussian `id`.
template <int kDegree, int kPitch>
__device__ __forceinline__ void stage_coeffs(const ColorParams<float>& c, int64_t first_row, int id,
                                             int n_rows, float4* coeffs) {
  int lane = threadIdx.x % 32;
  asm volatile("" : "+r"(lane));  // else the addresses of all steps are kept in registers between calls
  const uint32_t pitch = uint32_t(3 * c.n_bases);
  const float* from = c.colors + 3 * c.n_bases * first_row;
  if (sh_rows_are_aligned(c)) {
#pragma unroll
    for (int step = 0; step < kPitch; ++step) {
      const int i = 32 * step + lane, row = i / kPitch, quad = i % kPitch;
      const uint32_t at = uint32_t(__shfl_sync(kFullWarp, id, row)) * pitch + 4 * quad;
      if (row < n_rows) __pipeline_memcpy_async(coeffs + row * kPitch + coeff_place<kPitch>(row, quad), from + at, 16);
    }
  } else {
    constexpr int kFloats = sh_floats(kDegree);
    for (int step = 0; step < kFloats; ++step) {
      const int i = 32 * step + lane, row = i / kFloats, at = i % kFloats;
      const float* source = from + uint32_t(__shfl_sync(kFullWarp, id, row)) * pitch + at;
      float* const to = reinterpret_cast<float*>(coeffs + row * kPitch + coeff_place<kPitch>(row, at / 4)) + at % 4;
      if (row < n_rows) __pipeline_memcpy_async(to, source, 4);
    }
  }
  __pipeline_commit();
}

// `g` is the Gaussian of all scenes, `id` that of its own.
__device__ __forceinline__ void stage_row(const ProjectParams<float>& p, int64_t g, int32_t id, float4* row) {
  // All on their way before one is wanted.
  const float x = __ldg(p.means + 3 * g), y = __ldg(p.means + 3 * g + 1), z = __ldg(p.means + 3 * g + 2);
  const float opacity = __ldg(p.opacities + g);
  Sym3<float> cov;
  if (p.covars != nullptr) {
    cov = upper_triangle(p.covars + 9 * g);
  } else {
    const float4 q = __ldg(reinterpret_cast<const float4*>(p.quats) + g);
    const float quat[4] = {q.x, q.y, q.z, q.w};
    const float scales[3] = {__ldg(p.scales + 3 * g), __ldg(p.scales + 3 * g + 1), __ldg(p.scales + 3 * g + 2)};
    cov = covariance(quat, scales);
  }
  row[0] = make_float4(x, y, z, opacity);
  row[1] = make_float4(cov.xx, cov.xy, cov.xz, cov.yy);
  row[2] = make_float4(cov.yz, cov.zz, __int_as_float(id), 0.f);
}

// Record m: a staged Gaussian in one view. Returns whether it is visible.
template <Source kSource, int kDegree, bool kFisheye, typename Rows>
__device__ __forceinline__ bool make_record(const RecordParams& a, int64_t m, const ItemView& view,
                                            const Rows& staged, int row) {
  const ProjectParams<float>& p = a.p;
  const ColorParams<float>& c = a.c;
  const float4 q0 = staged.rows[row][0], q1 = staged.rows[row][1], q2 = staged.rows[row][2];
  const Vec3<float> mean = {q0.x, q0.y, q0.z};
  const int32_t id = __float_as_int(q2.z);
  // The fisheye model takes so many registers that only a kernel without colours has it.
  ProjectOptions<float> options = p.options;
  if (kFisheye) options.camera_model = CameraModel::kFisheye;
  if (!kFisheye && options.camera_model != CameraModel::kOrtho) options.camera_model = CameraModel::kPinhole;
  Record<float> record;
  int32_t radii[2];
  const Visibility seen =
      project_gaussian(view.view, options, world_to_camera(view.view, mean),
                       Sym3<float>{q1.x, q1.y, q1.z, q1.w, q2.x, q2.y}, q0.w, record, radii);
  bool invalid = seen == Visibility::kInvalid;
  if (seen != Visibility::kVisible) {
    record = Record<float>{0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
    radii[0] = radii[1] = 0;
  } else if constexpr (kSource == Source::kGiven) {
    float v[kMaxProjectedChannels];
    const int64_t lead = c.per_camera ? view.image : c.shared ? 0 : view.image / int32_t(p.n_cameras);
    invalid = !load_given(c, lead * p.n_gaussians + id, v);
    write_given(c, m, v, record.depth);
  } else if constexpr (kSource != Source::kNone) {
    float rgb[3];
    const Vec3<float> d = {mean.x - view.center.x, mean.y - view.center.y, mean.z - view.center.z};
    if constexpr (kSource == Source::kSh) {
      constexpr int kPitch = coeff_pitch(kSource, kDegree);
      sh_color<kDegree>(d, rgb, [&](int i) { return staged.coeffs[row * kPitch + coeff_place<kPitch>(row, i)]; });
    } else {
      sh_color<kDegree>(d, c.colors + 3 * c.n_bases * (view.image * p.n_gaussians + id), sh_rows_are_aligned(c),
                        rgb);
    }
    invalid = !(is_finite(rgb[0]) && is_finite(rgb[1]) && is_finite(rgb[2]));
    if (invalid) rgb[0] = rgb[1] = rgb[2] = 0.f;
    const float last = c.depth_channel == DepthChannel::kAppended ? record.depth : 0.f;
    *reinterpret_cast<float4*>(c.record_colors + m * c.color_stride) = make_float4(rgb[0], rgb[1], rgb[2], last);
  }
  if (invalid) {
    record.opacity = 0.f;  // nothing of it is drawn
    add_to(p.n_invalid + view.image, 1);
  }
  float4* out = reinterpret_cast<float4*>(p.records + m);
  out[0] = make_float4(record.x, record.y, record.conic_a, record.conic_b);
  out[1] = make_float4(record.conic_c, record.opacity, record.depth, record.compensation);
  reinterpret_cast<int2*>(p.radii)[m] = make_int2(radii[0], radii[1]);
  p.gaussian_ids[m] = id;
  a.s.image_ids[m] = view.image;
  if (a.boxes.depth_keys != nullptr) tell_bin(a.boxes, m, record, radii);
  return radii[0] > 0;
}

// For each word of the item's ballots the place of its first record.
__device__ __forceinline__ void write_word_bases(const RecordParams& a, const ItemShared& s, const ItemView* views,
                                                 const uint32_t* words) {
  const int lane = threadIdx.x % 32;
  for (int k = threadIdx.x / 32; k < s.n_cameras; k += kRecordWarps) {
    const uint32_t count = lane < kChunkWords ? __popc(words[k * kChunkWords + lane]) : 0;
    const uint32_t end = inclusive_sum(count, lane);
    if (lane < kChunkWords && s.first_word + lane < a.n_words) {
      a.s.word_bases[uint32_t(views[k].image) * uint32_t(a.n_words) + s.first_word + lane] =
          s.image_bases[k] + s.item_bases[k] + end - count;
    }
  }
}

template <Source kSource, int kDegree, bool kFisheye>
__global__ void __launch_bounds__(kRecordThreads, kFisheye || kSource == Source::kCameraSh ? 5 : kRecordBlocks)
    record_kernel(const __grid_constant__ RecordParams a) {
  constexpr int kPitch = coeff_pitch(kSource, kDegree);
  extern __shared__ float4 memory[];
  const ProjectParams<float>& p = a.p;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t below = (1u << lane) - 1;
  const int most_cameras = int(min(int64_t(kGroup), p.n_cameras));
  const RecordLayout<kPitch> layout(most_cameras);
  char* const bytes = reinterpret_cast<char*>(memory);
  ItemShared& s = *reinterpret_cast<ItemShared*>(bytes);
  ItemView* const views = reinterpret_cast<ItemView*>(bytes + layout.views);
  uint32_t* const words = reinterpret_cast<uint32_t*>(bytes + layout.words);  // [cameras, kChunkWords]
  uint32_t* const masks = reinterpret_cast<uint32_t*>(bytes + layout.masks);  // [kChunkWords, cameras] of 32 rows
  auto& own = *reinterpret_cast<RowsShared<kPitch>*>(bytes + layout.rows + warp * layout.rows_pitch);
  uint16_t* const list = reinterpret_cast<uint16_t*>(bytes + layout.rows + warp * layout.rows_pitch +
                                                     RecordLayout<kPitch>::round(sizeof own));

  wait_for_kernel_before();
  uint32_t n_visible = 0;
  int32_t group_at_hand = -1;
  for (int32_t item = blockIdx.x; item < a.n_items;) {
    {
      const int32_t group = item / a.n_chunks;
      const int32_t chunk = item - group * a.n_chunks;
      const int32_t scene = group / a.n_groups;
      const int32_t first_camera = (group - scene * a.n_groups) * kGroup;
      const int n_cameras = min(kGroup, int32_t(p.n_cameras) - first_camera);
      const int32_t first_image = scene * int32_t(p.n_cameras) + first_camera;
      const int32_t first_word = chunk * kChunkWords;
      if (threadIdx.x == 0) {
        s.first_gaussian = scene * p.n_gaussians + int64_t(first_word) * 32;
        s.first_colors = a.c.shared ? int64_t(first_word) * 32 : s.first_gaussian;
        s.first_word = first_word;
        s.n_cameras = n_cameras;
        s.next_item = gridDim.x + atomicAdd(a.s.next_item, 1u);
      }
      for (int i = threadIdx.x; i < n_cameras * kChunkWords; i += kRecordThreads) {
        const uint32_t image = first_image + i / kChunkWords;
        const int32_t word = first_word + i % kChunkWords;
        words[i] = word < a.n_words ? a.s.ballots[image * uint32_t(a.n_words) + word] : 0;
      }
      if (group != group_at_hand) {
        group_at_hand = group;
        for (int i = threadIdx.x; i < n_cameras * kViewQuads; i += kRecordThreads) {
          const int k = i / kViewQuads, quad = i % kViewQuads;
          float4 v = reinterpret_cast<const float4*>(a.s.views + first_image + k)[quad];
          if (quad == kViewQuads - 1) v.z = __int_as_float(first_image + k);
          reinterpret_cast<float4*>(views)[i] = v;
        }
        if (warp == kRecordWarps - 1) {
          uint32_t before = 0;
          for (int32_t i = lane; i < first_image; i += 32) before += a.s.image_counts[i];
          before = warp_sum(before);
          const uint32_t count = lane < n_cameras ? a.s.image_counts[first_image + lane] : 0;
          const uint32_t end = before + inclusive_sum(count, lane);
          if (lane < n_cameras) {
            s.image_bases[lane] = end - count;
            if (chunk == 0) {
              p.image_offsets[first_image + lane] = end - count;
              if (first_image + lane == a.n_images - 1) {
                p.image_offsets[a.n_images] = end;
                a.counts->n_records = end;
              }
            }
          }
        }
      }
      const int32_t n_spans = chunk / kSpanChunks, first_chunk = n_spans * kSpanChunks;
      for (int k = warp; k < n_cameras; k += kRecordWarps) {
        const uint32_t* spans = a.s.span_counts + uint32_t(first_image + k) * uint32_t(a.n_spans);
        const uint32_t* chunks = a.s.chunk_counts + uint32_t(first_image + k) * uint32_t(a.n_chunks) + first_chunk;
        static_assert(kSpanChunks == 64, "a lane adds two chunks");
        uint32_t sum = lane < chunk - first_chunk ? chunks[lane] : 0;
        sum += lane + 32 < chunk - first_chunk ? chunks[lane + 32] : 0;
        for (int32_t i = lane; i < n_spans; i += 32) sum += spans[i];
        sum = warp_sum(sum);
        if (lane == 0) s.item_bases[k] = sum;
      }
    }
    __syncthreads();
    item = s.next_item;

    const int n_cameras = s.n_cameras;
    if (a.s.word_bases != nullptr) write_word_bases(a, s, views, words);
    uint32_t any = 0;
    if (lane < kChunkWords) {
      for (int k = 0; k < n_cameras; ++k) any |= words[k * kChunkWords + lane];
    }
    const uint32_t end = inclusive_sum(__popc(any), lane);
    const int n_rows = int(__shfl_sync(kFullWarp, end, 31));
    if (n_rows == 0) {
      __syncthreads();
      continue;
    }
#pragma unroll
    for (int i = 0; i < kChunkWords / kRecordWarps; ++i) {
      const int word = i * kRecordWarps + warp;
      const uint32_t bits = __shfl_sync(kFullWarp, any, word);
      const uint32_t at = __shfl_sync(kFullWarp, end, word) - __popc(bits);
      if (bits >> lane & 1u) s.row_ids[at + __popc(bits & below)] = uint16_t(word * 32 + lane);
    }
    __syncthreads();
    for (int first = warp * kRows; first < n_rows; first += kRecordThreads) {
      const bool exists = first + lane < n_rows;
      const int id = exists ? s.row_ids[first + lane] : 0;
      uint32_t mask = 0;
      for (int k = 0; k < n_cameras; ++k) {
        const uint32_t seen = __ballot_sync(kFullWarp, exists && (words[k * kChunkWords + id / 32] >> id % 32 & 1u));
        if (lane == k) mask = seen;
      }
      if (lane < n_cameras) masks[first / kRows * most_cameras + lane] = mask;
    }
    __syncthreads();

    // From here on each warp is by itself.
    for (int first = warp * kRows; first < n_rows; first += kRecordThreads) {
      const int id = s.row_ids[min(first + lane, n_rows - 1)];
      if constexpr (kSource == Source::kSh) {
        stage_coeffs<kDegree, kPitch>(a.c, s.first_colors, id, n_rows - first, own.coeffs);
      }
      if (first + lane < n_rows) stage_row(p, s.first_gaussian + id, s.first_word * 32 + id, own.rows[lane]);
      // Records of these rows in (camera, Gaussian) order, so that the warp writes neighbouring places.
      uint32_t mask = 0;
      uint32_t place = 0;
      if (lane < s.n_cameras) {
        place = s.image_bases[lane] + s.item_bases[lane];
        for (int i = 0; i < first / kRows; ++i) place += __popc(masks[i * most_cameras + lane]);
        mask = masks[first / kRows * most_cameras + lane];
      }
      const uint32_t count = __popc(mask), end = inclusive_sum(count, lane);
      if (lane < s.n_cameras) own.first_places[lane] = place - (end - count);
      for (uint32_t some = __ballot_sync(kFullWarp, mask != 0); some != 0; some &= some - 1) {
        const int k = __ffs(some) - 1;
        const uint32_t rows = __shfl_sync(kFullWarp, mask, k);
        const uint32_t at = __shfl_sync(kFullWarp, end - count, k);
        if (rows >> lane & 1u) list[at + __popc(rows & below)] = uint16_t(lane | k << kRowBits);
      }
      const int n_records = int(__shfl_sync(kFullWarp, end, 31));
      if constexpr (kSource == Source::kSh) __pipeline_wait_prior(0);
      __syncwarp();
      for (int r = lane; r < n_records; r += 32) {
        const int row = list[r] % kRows, k = list[r] / kRows;
        const int64_t m = own.first_places[k] + uint32_t(r);
        if (m < p.capacity) n_visible += make_record<kSource, kDegree, kFisheye>(a, m, views[k], own, row);
      }
      __syncwarp();
    }
    __syncthreads();
  }
  if (a.s.n_visible != nullptr) {
    n_visible = warp_sum(n_visible);
    if (lane == 0) add_to(a.s.n_visible, n_visible);
  }
}

}  // namespace
}  // namespace rapfast
