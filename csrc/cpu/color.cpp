#include "../color.h"

#include <algorithm>
#include <cstring>

#include "../math/camera.h"
#include "../math/sh.h"
#include "thread_pool.h"

namespace rapfast {
namespace {

constexpr int64_t kChunk = 1024;  // records per work item

template <typename T>
void sh_color(const T* coeffs /* [K, 3] */, const T* basis, int n_bases, T* out /* [3] */) {
  T rgb[3] = {T(0), T(0), T(0)};
  for (int k = 0; k < n_bases; ++k) {
    for (int c = 0; c < 3; ++c) rgb[c] += basis[k] * coeffs[3 * k + c];
  }
  for (int c = 0; c < 3; ++c) {
    // What is not finite passes the clamp, so that the caller sees it.
    const T v = rgb[c] + Constants<T>::kShOffset;
    out[c] = v < T(0) && is_finite(v) ? T(0) : v;
  }
}

template <typename T>
void color_range(const ColorParams<T>& p, int64_t image, int64_t begin, int64_t end) {
  const int64_t scene = image / p.n_cameras;
  const int64_t row = p.per_camera ? image : scene;  // of colors' leading dimension
  const int64_t d_out = output_channels(p);
  const bool with_colors = p.depth_channel != DepthChannel::kOnly;
  const bool with_sh = with_colors && p.sh_degree >= 0;
  const View<T> view = load_view(p.viewmats + 16 * image, p.Ks + 9 * image, p.width, p.height);
  const Vec3<T> center = camera_center(view);
  int64_t n_invalid = 0;

  for (int64_t m = begin; m < end; ++m) {
    Record<T>& record = p.records[m];
    T* out = p.record_colors + m * p.color_stride;
    const int64_t g = p.gaussian_ids[m];
    if (with_sh) {
      const T* mean = p.means + 3 * (scene * p.n_gaussians + g);
      T basis[sh_bases(kMaxShDegree)];
      sh_basis(p.sh_degree, Vec3<T>{mean[0] - center.x, mean[1] - center.y, mean[2] - center.z},
               basis);
      sh_color(p.colors + 3 * p.n_bases * (row * p.n_gaussians + g), basis, sh_bases(p.sh_degree),
               out);
    } else if (with_colors) {
      std::memcpy(out, p.colors + p.n_channels * (row * p.n_gaussians + g),
                  sizeof(T) * size_t(p.n_channels));
    }
    bool finite = true;
    for (int64_t d = 0; with_colors && d < p.n_channels; ++d) finite = finite && is_finite(out[d]);
    if (!finite) {
      // Nothing of it may be drawn, and 0 x NaN would still be NaN in the blend's sums.
      record.opacity = T(0);
      for (int64_t d = 0; d < d_out; ++d) out[d] = T(0);
      ++n_invalid;
    }
    if (p.depth_channel != DepthChannel::kNone) out[d_out - 1] = record.depth;
  }
  if (n_invalid > 0) __atomic_fetch_add(p.n_invalid + image, n_invalid, __ATOMIC_RELAXED);
}

}  // namespace

template <typename T>
void color_cpu(const ColorParams<T>& p, int threads) {
  const int64_t n_images = p.n_scenes * p.n_cameras;
  const int64_t n_records = p.image_offsets[n_images];
  parallel_for((n_records + kChunk - 1) / kChunk, threads, [&](int64_t item) {
    int64_t begin = item * kChunk;
    const int64_t end = std::min(begin + kChunk, n_records);
    int64_t image =
        std::upper_bound(p.image_offsets, p.image_offsets + n_images + 1, begin) - p.image_offsets - 1;
    for (; begin < end; ++image) {
      const int64_t stop = std::min(end, p.image_offsets[image + 1]);
      if (stop > begin) color_range(p, image, begin, stop);
      begin = std::max(begin, stop);
    }
  });
}

template void color_cpu<float>(const ColorParams<float>&, int);
template void color_cpu<double>(const ColorParams<double>&, int);

}  // namespace rapfast
