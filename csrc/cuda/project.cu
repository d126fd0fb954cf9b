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

#include "check.cuh"
#include "project_cull.cuh"
#include "project_record.cuh"

namespace rapfast {
namespace {

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
  if (extras.boxes != nullptr) a.boxes = *extras.boxes;
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
