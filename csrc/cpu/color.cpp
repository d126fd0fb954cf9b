#include "../color.h"

#include <cstring>

#include "../math/camera.h"
#include "../math/sh.h"
#include "record_colors.h"

namespace rapfast {
namespace {

template <typename T>
void color_range(const ColorParams<T>& p, int64_t image, int64_t begin, int64_t end) {
  const int64_t scene = image / p.n_cameras;
  const int64_t row = color_set(p, image);
  const bool with_colors = p.depth_channel != DepthChannel::kOnly;
  const bool with_sh = with_colors && p.sh_degree >= 0;
  const View<T> view = load_view(p.viewmats + 16 * image, p.Ks + 9 * image, p.width, p.height);
  const Vec3<T> center = camera_center(view);
  int64_t n_invalid = 0;

  for (int64_t m = begin; m < end; ++m) {
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
    n_invalid += finish_record(p, m) ? 0 : 1;
  }
  add_invalid(p.n_invalid, image, n_invalid);
}

}  // namespace

template <typename T>
void color_cpu(const ColorParams<T>& p, int threads) {
  for_record_ranges(
      p.image_offsets, p.n_scenes * p.n_cameras, threads,
      [&](int64_t image, int64_t begin, int64_t end) { color_range(p, image, begin, end); });
}

template void color_cpu<float>(const ColorParams<float>&, int);
template void color_cpu<double>(const ColorParams<double>&, int);

}  // namespace rapfast
