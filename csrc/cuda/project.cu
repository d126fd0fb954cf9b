// Stage 1 on the GPU, in three kernels.
//
// prepare  Cameras as the kernels want them; memory that later kernels add to is cleared.
// cull     Each Gaussian is tested against a group of cameras with its parameters loaded once: one bit per
//          pair, and the bits of each run of words counted.
// record   Blocks take items of work, a run of Gaussians and a group of cameras. What one of the cameras may
//          see of the run is staged in shared memory, parameters and SH coefficients, once for all of them;
//          then every set bit becomes a record, one thread each, so that no lane idles on a culled pair.
//
// A record's place follows (image, Gaussian) order, as the counts before it add up, so records are the same
// on every run and for every division of the work. A pair that passes the cheap test and fails the full one
// keeps its place as a dead record: opacity and radii 0.
#include "../project.h"

#include <cuda_pipeline_primitives.h>

#include <atomic>
#include <cstddef>

#include "check.cuh"
#include "records.cuh"
#include "scratch.h"
#include "tile_count.cuh"
#include "warp_sums.cuh"

namespace rapfast {
namespace {

constexpr int kGroup = 32;        // most cameras that a Gaussian meets per load, one per lane
constexpr int kWarpWords = 2;     // words of 32 Gaussians that a warp of the cull kernel tests
static_assert(kChunkWords == kWarpWords * kThreads / 32, "a block tests one chunk");

constexpr int kRows = 32;          // Gaussians that a warp of the record kernel stages at a time
constexpr int kRowBits = 5;
constexpr int kRowQuads = 3;       // mean, opacity and covariance, in pieces of 16 bytes
constexpr int kRecordThreads = 128, kRecordWarps = kRecordThreads / 32;
constexpr int kRecordBlocks = 6;   // on a processor at once
constexpr int kViewQuads = sizeof(DeviceView) / 16 - sizeof(FrustumTest<float>) / 16;
constexpr int kTestQuads = sizeof(FrustumTest<float>) / 16;
static_assert(sizeof(FrustumTest<float>) % 16 == 0, "tests are copied in pieces of 16 bytes");

// ------------------------------------------------------------------------------------------- launch

// Where the GPU has it, cull and record are launched before the kernel in front has ended (programmatic dependent
// launch); until they have waited for it they touch nothing that it writes.
__device__ __forceinline__ void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel be launched once every block has come here.
__device__ __forceinline__ void let_next_kernel_come() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

struct DeviceFacts {
  int processors;
  bool programmatic;  // has dependent launches
};

DeviceFacts device_facts() {
  constexpr int kMaxDevices = 64;
  static std::atomic<int> known[kMaxDevices];  // processors, negative without dependent launches
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  int value = device < kMaxDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (value == 0) {
    int major = 0;
    check(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
    if (major < 9) value = -value;
    if (device < kMaxDevices) known[device].store(value, std::memory_order_relaxed);
  }
  return {value < 0 ? -value : value, value > 0};
}

template <typename... Parameters, typename... Arguments>
void launch_behind(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
                   cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = device_facts().programmatic ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

// ------------------------------------------------------------------------------------------ prepare

constexpr int kPrepareThreads = 128;

struct PrepareParams {
  const float* viewmats;   // [I, 4, 4]
  const float* Ks;         // [I, 3, 3]
  int64_t n_images, n_gaussians;
  ProjectOptions<float> options;
  DeviceView* views;       // [I]
  int64_t* image_offsets;  // [I + 1] or null, with what follows
  int64_t* n_invalid;      // [I]
  Counts* counts;
  int64_t* n_visible;      // or null
  ClearedMemory cleared[2];
};

__global__ void __launch_bounds__(kPrepareThreads) prepare_kernel(const __grid_constant__ PrepareParams a) {
  let_next_kernel_come();
  RAPFAST_GRID_STRIDE(i, a.n_images + 1) {
    if (i < a.n_images) {
      DeviceView v{};
      v.view = load_view(a.viewmats + 16 * i, a.Ks + 9 * i, a.options.width, a.options.height);
      v.test = make_frustum_test(v.view, a.options);
      if (v.view.valid) {
        v.center = camera_center(v.view);
      } else {
        v.test.near_plane = INFINITY;
        v.test.far_plane = -INFINITY;
      }
      a.views[i] = v;
      // An unusable view counts all Gaussians as invalid.
      if (a.n_invalid != nullptr) a.n_invalid[i] = v.view.valid ? 0 : a.n_gaussians;
    }
    if (a.image_offsets != nullptr) {
      a.image_offsets[i] = 0;  // stays so where there is nothing to project
      if (i == 0) *a.counts = Counts{0, 0};
      if (i == 0 && a.n_visible != nullptr) *a.n_visible = 0;
    }
  }
  for (const ClearedMemory& memory : a.cleared) {
    RAPFAST_GRID_STRIDE(i, memory.bytes / 16) static_cast<uint4*>(memory.begin)[i] = make_uint4(0, 0, 0, 0);
  }
}

void prepare(const PrepareParams& a, cudaStream_t stream) {
  const int64_t bytes = max_of(a.cleared[0].bytes, a.cleared[1].bytes);
  const int64_t n = max_of(a.n_images + 1, bytes / 16);
  prepare_kernel<<<grid_for(n, kPrepareThreads), kPrepareThreads, 0, stream>>>(a);
  check_launch("prepare_kernel");
}

// --------------------------------------------------------------------------------------------- cull

// A Gaussian that does not exist or is invalid has a mean of NaN, which no view sees.
struct Candidate {
  Vec3<float> mean;
  Extent<float> extent;
};

// Gaussians first, first + 32, ... of this lane, `left` being the number there is from `first` on (at least
// one); all loads are under way before one is waited for. Sets bit i of `invalid` for the i-th.
__device__ __forceinline__ void load_candidates(const ProjectParams<float>& p, int64_t first, int left,
                                                Candidate* candidates, uint32_t* invalid) {
  const float* means = p.means + 3 * first;
  const float* opacities = p.opacities + first;
  float mean[kWarpWords][3], opacity[kWarpWords], sigma[kWarpWords], zero[kWarpWords];
  bool valid[kWarpWords];
#pragma unroll
  for (int i = 0; i < kWarpWords; ++i) {
    const int at = min(32 * i, left - 1);
#pragma unroll
    for (int j = 0; j < 3; ++j) mean[i][j] = __ldg(means + 3 * at + j);
    opacity[i] = __ldg(opacities + at);
  }
  if (p.covars != nullptr) {
    const float* covars = p.covars + 9 * first;
#pragma unroll
    for (int i = 0; i < kWarpWords; ++i) {
      const Sym3<float> cov = upper_triangle(covars + 9 * min(32 * i, left - 1));
      zero[i] = zero_if_finite(cov);
      sigma[i] = sigma_of_covariance(cov);
      valid[i] = true;
    }
  } else {
    const float4* quats = reinterpret_cast<const float4*>(p.quats) + first;
    const float* scales = p.scales + 3 * first;
    float4 q[kWarpWords];
    float scale[kWarpWords][3];
#pragma unroll
    for (int i = 0; i < kWarpWords; ++i) {
      const int at = min(32 * i, left - 1);
      q[i] = __ldg(quats + at);
#pragma unroll
      for (int j = 0; j < 3; ++j) scale[i][j] = __ldg(scales + 3 * at + j);
    }
#pragma unroll
    for (int i = 0; i < kWarpWords; ++i) {
      const float quat[4] = {q[i].x, q[i].y, q[i].z, q[i].w};
      valid[i] = valid_quaternion(quat);
      zero[i] = zero_if_finite(scale[i], 3);
      sigma[i] = sigma_of_scales(scale[i]);
    }
  }
  *invalid = 0;
#pragma unroll
  for (int i = 0; i < kWarpWords; ++i) {
    Candidate& c = candidates[i];
    c.mean = {mean[i][0], mean[i][1], mean[i][2]};
    c.extent = extent_of(c.mean.x, c.mean.y, c.mean.z, sigma[i], opacity[i]);
    const bool exists = 32 * i < left;
    const bool good = valid[i] && multiply_add(0.f, opacity[i], zero[i] + zero_if_finite(mean[i], 3)) == 0.f;
    if (!exists || !good) c.mean.z = NAN;
    if (exists && !good) *invalid |= 1u << i;
  }
}

template <CameraModel kModel>
__device__ void cull_group(const ProjectParams<float>& p, int64_t scene_and_group, int64_t n_groups,
                           const ProjectScratch& s) {
  __shared__ float4 tests[kGroup][kTestQuads];
  __shared__ alignas(8) uint32_t kept[kGroup][kChunkWords];
  const int64_t scene = scene_and_group / n_groups;
  const int64_t first_camera = scene_and_group % n_groups * kGroup;
  const int n_cameras = int(min(int64_t(kGroup), p.n_cameras - first_camera));
  const int64_t first_image = scene * p.n_cameras + first_camera;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t chunk = blockIdx.x;
  const int64_t first = (chunk * kChunkWords + warp * kWarpWords) * 32 + lane;
  const int left = int(min(p.n_gaussians - first, int64_t(32 * kWarpWords)));
  Candidate candidates[kWarpWords];
  uint32_t invalid = 0;
  if (left > 0) {
    load_candidates(p, scene * p.n_gaussians + first, left, candidates, &invalid);
  } else {
#pragma unroll
    for (Candidate& c : candidates) c = Candidate{{0.f, 0.f, NAN}, {0.f, 0.f}};
  }
  wait_for_kernel_before();
  for (int i = threadIdx.x; i < n_cameras * kTestQuads; i += kThreads) {
    const DeviceView& view = s.views[first_image + i / kTestQuads];
    tests[0][i] = reinterpret_cast<const float4*>(&view.test)[i % kTestQuads];
  }
  const uint32_t n_invalid = __reduce_add_sync(kFullWarp, __popc(invalid));
  if (n_invalid != 0 && lane < n_cameras && s.views[first_image + lane].view.valid) {
    add_to(p.n_invalid + first_image + lane, n_invalid);
  }
  __syncthreads();

  for (int k = 0; k < n_cameras; ++k) {
    alignas(16) FrustumTest<float> test;
#pragma unroll
    for (int i = 0; i < kTestQuads; ++i) reinterpret_cast<float4*>(&test)[i] = tests[k][i];
    uint32_t words[kWarpWords];
#pragma unroll
    for (int i = 0; i < kWarpWords; ++i) {
      const Candidate& c = candidates[i];
      words[i] = __ballot_sync(kFullWarp, may_be_seen<kModel>(test, c.mean.x, c.mean.y, c.mean.z, c.extent));
    }
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < kWarpWords; ++i) kept[k][warp * kWarpWords + i] = words[i];
    }
  }
  __syncthreads();

  const int64_t n_words = ballot_words(p.n_gaussians);
  for (int first = threadIdx.x - lane; first < n_cameras * kChunkWords; first += kThreads) {
    const int k = (first + lane) / kChunkWords, word = (first + lane) % kChunkWords;
    const bool exists = k < n_cameras;
    const uint32_t bits = exists ? kept[k][word] : 0;
    uint32_t count = __popc(bits);
#pragma unroll
    for (int step = 1; step < kChunkWords; step *= 2) count += __shfl_xor_sync(kFullWarp, count, step);
    if (!exists) continue;
    const int64_t image = first_image + k;
    if (chunk * kChunkWords + word < n_words) s.ballots[image * n_words + chunk * kChunkWords + word] = bits;
    if (word == 0) {
      s.chunk_counts[image * gridDim.x + chunk] = count;
      if (count != 0) {
        atomicAdd(s.span_counts + image * ballot_spans(p.n_gaussians) + chunk / kSpanChunks, count);
        atomicAdd(s.image_counts + image, count);
      }
    }
  }
}

template <CameraModel kModel>
__global__ void __launch_bounds__(kThreads)
    cull_kernel(const __grid_constant__ ProjectParams<float> p, const __grid_constant__ ProjectScratch s) {
  let_next_kernel_come();
  const int64_t n_groups = (p.n_cameras + kGroup - 1) / kGroup;
  for (int64_t i = blockIdx.y; i < p.n_scenes * n_groups; i += gridDim.y) {
    cull_group<kModel>(p, i, n_groups, s);
    __syncthreads();  // before the next group's tests replace these
  }
}

// ------------------------------------------------------------------------------------------- record

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
  TileCounting counting;       // depth_keys null: nobody wants it
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
  const float* mean = p.means + 3 * g;
  Sym3<float> cov;
  if (p.covars != nullptr) {
    cov = upper_triangle(p.covars + 9 * g);
  } else {
    const float4 q = __ldg(reinterpret_cast<const float4*>(p.quats) + g);
    const float quat[4] = {q.x, q.y, q.z, q.w};
    cov = covariance(quat, p.scales + 3 * g);
  }
  row[0] = make_float4(mean[0], mean[1], mean[2], p.opacities[g]);
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
  if (a.counting.depth_keys != nullptr) count_tiles(a.counting, m, record, radii);
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

template <Source kSource, int kDegree = 0, bool kFisheye = false>
void launch_record(RecordParams& a, cudaStream_t stream) {
  a.n_items = int32_t(a.n_chunks * a.p.n_scenes * a.n_groups);
  const auto kernel = record_kernel<kSource, kDegree, kFisheye>;
  const RecordLayout<coeff_pitch(kSource, kDegree)> layout(int(min_of<int64_t>(kGroup, a.p.n_cameras)));
  if (layout.size > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, layout.size),
          "cudaFuncSetAttribute");
  }
  const int64_t blocks = min_of<int64_t>(a.n_items, int64_t(device_facts().processors) * kRecordBlocks);
  launch_behind("record_kernel", kernel, dim3(unsigned(blocks)), kRecordThreads, size_t(layout.size), stream, a);
}

template <int kDegree>
void launch_sh(RecordParams& a, cudaStream_t stream) {
  if (a.c.per_camera) {
    launch_record<Source::kCameraSh, kDegree>(a, stream);
  } else {
    launch_record<Source::kSh, kDegree>(a, stream);
  }
}

}  // namespace

ProjectScratch project_scratch(Arena& arena, int64_t n_images, int64_t n_gaussians,
                               int64_t record_capacity) {
  ProjectScratch s{};
  s.views = arena.take<DeviceView>(n_images);
  s.image_ids = arena.take<int32_t>(record_capacity);
  s.ballots = arena.take<uint32_t>(n_images * ballot_words(n_gaussians));
  s.chunk_counts = arena.take<uint32_t>(n_images * ballot_chunks(n_gaussians));
  const int64_t n_spans = n_images * ballot_spans(n_gaussians);
  const int64_t n_cleared = n_spans + n_images + 1;
  s.span_counts = arena.take<uint32_t>(n_cleared);
  s.image_counts = s.span_counts == nullptr ? nullptr : s.span_counts + n_spans;
  s.next_item = s.span_counts == nullptr ? nullptr : s.image_counts + n_images;
  s.cleared = {s.span_counts, (4 * n_cleared + 15) / 16 * 16};
  return s;
}

void views_cuda(const float* viewmats, const float* Ks, int64_t n_images,
                const ProjectOptions<float>& options, DeviceView* views, cudaStream_t stream) {
  if (n_images == 0) return;
  prepare({viewmats, Ks, n_images, 0, options, views, nullptr, nullptr, nullptr, nullptr, {}}, stream);
}

void project_cuda(const ProjectParams<float>& p, const ProjectScratch& s, Counts* counts,
                  const ProjectExtras& extras, cudaStream_t stream) {
  const int64_t n_images = p.n_scenes * p.n_cameras;
  prepare({p.viewmats, p.Ks, n_images, p.n_gaussians, p.options, s.views, p.image_offsets, p.n_invalid, counts,
           s.n_visible, {s.cleared, extras.cleared}},
          stream);
  if (n_images == 0 || p.n_gaussians == 0) return;

  const int64_t n_groups = (p.n_cameras + kGroup - 1) / kGroup;
  const dim3 grid(unsigned(ballot_chunks(p.n_gaussians)), unsigned(min_of<int64_t>(p.n_scenes * n_groups, 65535)));
  const auto cull = [&](auto kernel) { launch_behind("cull_kernel", kernel, grid, kThreads, 0, stream, p, s); };
  switch (p.options.camera_model) {
    case CameraModel::kPinhole: cull(cull_kernel<CameraModel::kPinhole>); break;
    case CameraModel::kOrtho: cull(cull_kernel<CameraModel::kOrtho>); break;
    case CameraModel::kFisheye: cull(cull_kernel<CameraModel::kFisheye>); break;
  }

  RecordParams a{};
  a.p = p;
  a.s = s;
  a.counts = counts;
  a.n_images = int32_t(n_images);
  a.n_groups = int32_t(n_groups);
  a.n_words = int32_t(ballot_words(p.n_gaussians));
  a.n_chunks = int32_t(ballot_chunks(p.n_gaussians));
  a.n_spans = int32_t(ballot_spans(p.n_gaussians));
  if (extras.counting != nullptr) a.counting = *extras.counting;
  if (p.options.camera_model == CameraModel::kFisheye) return launch_record<Source::kNone, 0, true>(a, stream);
  if (extras.color == nullptr) return launch_record<Source::kNone>(a, stream);
  a.c = *extras.color;
  switch (a.c.depth_channel == DepthChannel::kOnly ? -1 : a.c.sh_degree) {
    case 0: return launch_sh<0>(a, stream);
    case 1: return launch_sh<1>(a, stream);
    case 2: return launch_sh<2>(a, stream);
    case 3: return launch_sh<3>(a, stream);
    case 4: return launch_sh<4>(a, stream);
    default: return launch_record<Source::kGiven>(a, stream);
  }
}

}  // namespace rapfast
