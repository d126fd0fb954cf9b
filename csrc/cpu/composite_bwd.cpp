#include "../composite_bwd.h"

#include <algorithm>
#include <vector>

#include "../math/composite.h"
#include "thread_pool.h"

namespace rapfast {
namespace {

template <typename T>
T output_gradient(const CompositeBwdParams<T>& p, int64_t image, int64_t out_pixel, int64_t d) {
  const int64_t out_pixels = int64_t(p.out_width) * p.out_height;
  const int64_t index = p.channels_first ? (image * p.n_channels + d) * out_pixels + out_pixel
                                         : (image * out_pixels + out_pixel) * p.n_channels + d;
  const T v = p.v_out[index];
  return d < p.n_color_channels && p.std != nullptr ? v / p.std[d] : v;
}

// Adds to a row of the image before it was resized, [W, D + 1] with alpha last, what output row
// `out_row` gives it with `weight`.
template <typename T>
void resize_row_vjp(const CompositeBwdParams<T>& p, int64_t image, int64_t out_row, T weight,
                    const std::vector<Lerp<T>>& columns, std::vector<T>& v_row) {
  const int64_t d_all = p.n_channels, stride = d_all + 1;
  for (int64_t x = 0; x < p.out_width; ++x) {
    const Lerp<T>& lerp = columns[size_t(x)];
    const int64_t out_pixel = out_row * p.out_width + x;
    T* v0 = v_row.data() + lerp.i0 * stride;
    T* v1 = v_row.data() + lerp.i1 * stride;
    for (int64_t d = 0; d <= d_all; ++d) {
      const T v = weight * (d < d_all ? output_gradient(p, image, out_pixel, d)
                                      : p.v_out_alphas[image * p.out_width * p.out_height + out_pixel]);
      v0[d] += lerp.w0 * v;
      if (lerp.w1 != T(0)) v1[d] += lerp.w1 * v;
    }
  }
}

// The gradient of row y of the image before it was resized, [W, D + 1] with alpha last.
template <typename T>
void gather_row(const CompositeBwdParams<T>& p, int64_t image, int64_t y,
                const std::vector<Lerp<T>>& columns, std::vector<T>& v_row) {
  std::fill(v_row.begin(), v_row.end(), T(0));
  // Source rows grow with output rows: those that touch row y lie side by side.
  int64_t low = 0, high = p.out_height;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (resize_lerp<T>(middle, p.height, p.out_height).i1 < y) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  for (int64_t out_row = low; out_row < p.out_height; ++out_row) {
    const Lerp<T> lerp = resize_lerp<T>(out_row, p.height, p.out_height);
    if (lerp.i0 > y) break;
    const T weight = (lerp.i0 == y ? lerp.w0 : T(0)) + (lerp.i1 == y ? lerp.w1 : T(0));
    if (weight != T(0)) resize_row_vjp(p, image, out_row, weight, columns, v_row);
  }
}

// Adjoint of one source pixel's background, expected depth and clamp. `v` is [D + 1] with alpha last;
// a background colour's gradient is added to `v_background`.
template <typename T>
void finish_pixel_vjp(const CompositeBwdParams<T>& p, int64_t image, int64_t pixel, const T* v,
                      double* v_background /* [Dc] */) {
  const int64_t index = image * p.width * p.height + pixel;
  const T* color = p.colors + index * p.n_channels;
  const T alpha = p.alphas[index];
  const bool is_image = p.background_kind == BackgroundKind::kImage;
  const T* background = p.background_kind == BackgroundKind::kNone
                            ? nullptr
                            : p.backgrounds + (is_image ? index : image) * p.n_color_channels;
  T v_alpha = v[p.n_channels];
  T* v_color = p.v_colors + index * p.n_channels;
  for (int64_t d = 0; d < p.n_channels; ++d) {
    T v_value = v[d];
    if (d < p.n_color_channels) {
      if (p.clamp) {
        const T value = background == nullptr ? color[d] : color[d] + (T(1) - alpha) * background[d];
        if (!(value >= p.clamp_min && value <= p.clamp_max)) v_value = T(0);
      }
      if (background != nullptr) {
        v_alpha -= v_value * background[d];
        if (p.v_backgrounds != nullptr) {
          const T v_of = (T(1) - alpha) * v_value;
          if (is_image) {
            p.v_backgrounds[index * p.n_color_channels + d] = v_of;
          } else {
            v_background[d] += double(v_of);
          }
        }
      }
    } else if (p.expected_depth) {
      const T divisor = max_of(alpha, Constants<T>::kMinAlpha);
      v_value /= divisor;
      if (alpha >= Constants<T>::kMinAlpha) v_alpha -= v_value * (color[d] / divisor);
    }
    v_color[d] = v_value;
  }
  p.v_alphas[index] = v_alpha;
}

}  // namespace

// Rows of the blended image run side by side; each gathers from the output rows that were made of it.
template <typename T>
void composite_bwd_cpu(const CompositeBwdParams<T>& p, int threads) {
  const int64_t stride = p.n_channels + 1, n_rows = p.n_images * p.height;
  const bool one_color = p.background_kind == BackgroundKind::kColor && p.v_backgrounds != nullptr;
  std::vector<double> row_backgrounds(one_color ? size_t(n_rows * p.n_color_channels) : 0, 0.0);
  std::vector<Lerp<T>> columns(size_t(p.out_width));
  for (int64_t x = 0; x < p.out_width; ++x) {
    columns[size_t(x)] = resize_lerp<T>(x, p.width, p.out_width);
  }
  parallel_for(n_rows, threads, [&](int64_t row) {
    const int64_t image = row / p.height, y = row % p.height;
    std::vector<T> v_row(size_t(p.width * stride));
    gather_row(p, image, y, columns, v_row);
    double* v_background = one_color ? row_backgrounds.data() + row * p.n_color_channels : nullptr;
    for (int64_t x = 0; x < p.width; ++x) {
      finish_pixel_vjp(p, image, y * p.width + x, v_row.data() + x * stride, v_background);
    }
  });
  if (!one_color) return;
  for (int64_t image = 0; image < p.n_images; ++image) {
    for (int64_t d = 0; d < p.n_color_channels; ++d) {
      double sum = 0.0;
      for (int64_t y = 0; y < p.height; ++y) {
        sum += row_backgrounds[size_t((image * p.height + y) * p.n_color_channels + d)];
      }
      p.v_backgrounds[image * p.n_color_channels + d] = T(sum);
    }
  }
}

template void composite_bwd_cpu<float>(const CompositeBwdParams<float>&, int);
template void composite_bwd_cpu<double>(const CompositeBwdParams<double>&, int);

}  // namespace rapfast
