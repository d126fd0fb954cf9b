#include "../project.h"

#include <algorithm>
#include <vector>

#include "../math/frustum.h"
#include "thread_pool.h"

namespace rapfast {
namespace {

constexpr int kChunk = 1024;       // Gaussians per work item: their parameters stay in the L2 cache
constexpr int64_t kGroup = 64;     // cameras for which a chunk stays loaded

// A chunk's parameters, one array per component and padded to kChunk, so that the frustum test runs
// the same vector code for every Gaussian whatever its place.
template <typename T>
struct Chunk {
  alignas(64) T x[kChunk], y[kChunk], z[kChunk];
  alignas(64) T sigma[kChunk], size[kChunk];  // Extent
  alignas(64) uint8_t valid[kChunk];
  alignas(64) int32_t maybe[kChunk];
  Sym3<T> cov[kChunk];
  bool has_cov[kChunk];
  int64_t n_invalid = 0;
};

template <typename T>
struct Visible {
  Record<T> record;
  int32_t radii[2];
  int32_t gaussian_id;
};

template <typename T>
struct ChunkResult {
  std::vector<Visible<T>> visible;   // camera by camera
  std::vector<int64_t> n_visible;    // per camera of the group
  std::vector<int64_t> n_invalid;
};

template <typename T>
void load_chunk(const ProjectParams<T>& p, int64_t scene, int64_t first, int count, Chunk<T>& c) {
  const int64_t base = scene * p.n_gaussians + first;
  for (int i = 0; i < kChunk; ++i) {
    const int64_t g = base + std::min(i, count - 1);
    const T* mean = p.means + 3 * g;
    c.x[i] = mean[0];
    c.y[i] = mean[1];
    c.z[i] = mean[2];
    T sum = zero_if_finite(mean, 3) + zero_if_finite(p.opacities + g, 1);
    bool valid = true;
    T sigma;
    if (p.covars != nullptr) {
      const Sym3<T> cov = upper_triangle(p.covars + 9 * g);
      sum += zero_if_finite(cov);
      sigma = sigma_of_covariance(cov);
    } else {
      sum += zero_if_finite(p.scales + 3 * g, 3);
      valid = valid_quaternion(p.quats + 4 * g);
      sigma = sigma_of_scales(p.scales + 3 * g);
    }
    const Extent<T> extent = extent_of(mean[0], mean[1], mean[2], sigma, p.opacities[g]);
    c.sigma[i] = extent.sigma;
    c.size[i] = extent.size;
    c.valid[i] = i < count && valid && sum == T(0);
    c.n_invalid += i < count && !c.valid[i];
    c.has_cov[i] = false;
  }
}

// Indices of the chunk's Gaussians that this view may see.
template <CameraModel kModel, typename T>
int frustum_test(const FrustumTest<T>& f, Chunk<T>& c) {
  alignas(64) uint8_t keep[kChunk];
#pragma omp simd
  for (int i = 0; i < kChunk; ++i) {
    keep[i] = uint8_t(c.valid[i] &
                      may_be_seen<kModel>(f, c.x[i], c.y[i], c.z[i], Extent<T>{c.sigma[i], c.size[i]}));
  }
  int n = 0;
  for (int i = 0; i < kChunk; ++i) {
    c.maybe[n] = i;
    n += keep[i];
  }
  return n;
}

template <typename T>
int frustum_test(CameraModel model, const FrustumTest<T>& f, Chunk<T>& c) {
  if (model == CameraModel::kOrtho) return frustum_test<CameraModel::kOrtho>(f, c);
  if (model == CameraModel::kFisheye) return frustum_test<CameraModel::kFisheye>(f, c);
  return frustum_test<CameraModel::kPinhole>(f, c);
}

template <typename T>
void project_chunk(const ProjectParams<T>& p, int64_t scene, int64_t first_gaussian,
                   int64_t first_camera, int64_t n_cameras, ChunkResult<T>& out) {
  thread_local Chunk<T> c;
  c.n_invalid = 0;
  const int count = int(std::min<int64_t>(kChunk, p.n_gaussians - first_gaussian));
  load_chunk(p, scene, first_gaussian, count, c);
  out.n_visible.assign(size_t(n_cameras), 0);
  out.n_invalid.assign(size_t(n_cameras), c.n_invalid);

  for (int64_t k = 0; k < n_cameras; ++k) {
    const int64_t image = scene * p.n_cameras + first_camera + k;
    const View<T> view =
        load_view(p.viewmats + 16 * image, p.Ks + 9 * image, p.options.width, p.options.height);
    if (!view.valid) {
      out.n_invalid[size_t(k)] = count;
      continue;
    }
    const int n_maybe = frustum_test(p.options.camera_model, make_frustum_test(view, p.options), c);
    const size_t before = out.visible.size();
    for (int j = 0; j < n_maybe; ++j) {
      const int i = c.maybe[j];
      const int64_t g = scene * p.n_gaussians + first_gaussian + i;
      if (!c.has_cov[i]) {
        c.cov[i] = p.covars != nullptr ? upper_triangle(p.covars + 9 * g)
                                       : covariance(p.quats + 4 * g, p.scales + 3 * g);
        c.has_cov[i] = true;
      }
      const Vec3<T> mean_c = world_to_camera(view, Vec3<T>{c.x[i], c.y[i], c.z[i]});
      Visible<T> v;
      const Visibility seen = project_gaussian(view, p.options, mean_c, c.cov[i], p.opacities[g],
                                               v.record, v.radii);
      if (seen == Visibility::kVisible) {
        v.gaussian_id = int32_t(first_gaussian + i);
        out.visible.push_back(v);
      } else if (seen == Visibility::kInvalid) {
        ++out.n_invalid[size_t(k)];
      }
    }
    out.n_visible[size_t(k)] = int64_t(out.visible.size() - before);
  }
}

}  // namespace

// Work items are (scene, camera group, chunk of Gaussians). Each keeps what it finds until all are
// done; then every (image, chunk) knows its place, and the items are copied there.
template <typename T>
void project_cpu(const ProjectParams<T>& p, int threads) {
  const int64_t n_images = p.n_scenes * p.n_cameras;
  const int64_t n_chunks = (p.n_gaussians + kChunk - 1) / kChunk;
  const int64_t n_groups = (p.n_cameras + kGroup - 1) / kGroup;
  std::vector<ChunkResult<T>> results(size_t(p.n_scenes * n_groups * n_chunks));
  parallel_for(int64_t(results.size()), threads, [&](int64_t item) {
    const int64_t chunk = item % n_chunks, group = item / n_chunks % n_groups;
    const int64_t first_camera = group * kGroup;
    project_chunk(p, item / n_chunks / n_groups, chunk * kChunk, first_camera,
                  std::min(kGroup, p.n_cameras - first_camera), results[size_t(item)]);
  });

  std::vector<int64_t> starts(size_t(n_images * n_chunks));
  int64_t total = 0;
  for (int64_t image = 0; image < n_images; ++image) {
    const int64_t scene = image / p.n_cameras, camera = image % p.n_cameras;
    p.image_offsets[image] = total;
    p.n_invalid[image] = 0;
    for (int64_t chunk = 0; chunk < n_chunks; ++chunk) {
      const ChunkResult<T>& r =
          results[size_t((scene * n_groups + camera / kGroup) * n_chunks + chunk)];
      starts[size_t(image * n_chunks + chunk)] = total;
      total += r.n_visible[size_t(camera % kGroup)];
      p.n_invalid[image] += r.n_invalid[size_t(camera % kGroup)];
    }
  }
  p.image_offsets[n_images] = total;
  if (total > p.capacity) return;

  parallel_for(int64_t(results.size()), threads, [&](int64_t item) {
    const int64_t chunk = item % n_chunks, group = item / n_chunks % n_groups;
    const int64_t scene = item / n_chunks / n_groups;
    ChunkResult<T>& r = results[size_t(item)];
    const Visible<T>* next = r.visible.data();
    for (size_t k = 0; k < r.n_visible.size(); ++k) {
      const int64_t image = scene * p.n_cameras + group * kGroup + int64_t(k);
      int64_t m = starts[size_t(image * n_chunks + chunk)];
      for (int64_t j = 0; j < r.n_visible[k]; ++j, ++m, ++next) {
        p.records[m] = next->record;
        p.radii[2 * m] = next->radii[0];
        p.radii[2 * m + 1] = next->radii[1];
        p.gaussian_ids[m] = next->gaussian_id;
      }
    }
    r = ChunkResult<T>();  // gives the memory back as early as possible
  });
}

template void project_cpu<float>(const ProjectParams<float>&, int);
template void project_cpu<double>(const ProjectParams<double>&, int);

}  // namespace rapfast
