#include "../composite.h"

#include <algorithm>
#include <vector>

#include "../math/composite.h"
#include "half.h"
#include "thread_pool.h"

namespace rapfast {
namespace {

// One source pixel, composited: background, expected depth, clamp.
template <typename T>
void finish_pixel(const CompositeParams<T>& p, int64_t image, int64_t pixel, T* out /* [D] */) {
  const int64_t index = image * p.width * p.height + pixel;
  const T* color = p.colors + index * p.n_channels;
  const T alpha = p.alphas[index];
  const T* background = nullptr;
  if (p.background_kind != BackgroundKind::kNone) {
    const bool is_image = p.background_kind == BackgroundKind::kImage;
    background = p.backgrounds + (is_image ? index : image) * p.n_color_channels;
  }
  for (int64_t d = 0; d < p.n_channels; ++d) {
    T v = color[d];
    if (d < p.n_color_channels) {
      if (background != nullptr) v += (T(1) - alpha) * background[d];
      if (p.clamp) v = clamp_to(v, p.clamp_min, p.clamp_max);
    } else if (p.expected_depth) {
      v = v / max_of(alpha, Constants<T>::kMinAlpha);
    }
    out[d] = v;
  }
}

template <typename T>
void write_value(const CompositeParams<T>& p, int64_t index, T value) {
  switch (p.pixel_type) {
    case PixelType::kSame: static_cast<T*>(p.out)[index] = value; break;
    case PixelType::kFloat32: static_cast<float*>(p.out)[index] = float(value); break;
    case PixelType::kFloat16: static_cast<uint16_t*>(p.out)[index] = to_half(float(value)); break;
    case PixelType::kUint8: static_cast<uint8_t*>(p.out)[index] = to_byte(value); break;
  }
}

template <typename T>
void composite_row(const CompositeParams<T>& p, int64_t image, int64_t y) {
  const int64_t d_all = p.n_channels;
  const bool resize = p.out_width != p.width || p.out_height != p.height;
  const int64_t out_pixels = int64_t(p.out_width) * p.out_height;
  std::vector<T> taps(size_t(4 * d_all));
  T* value = taps.data();

  const Lerp<T> ly = resize_lerp<T>(y, p.height, p.out_height);
  for (int64_t x = 0; x < p.out_width; ++x) {
    const int64_t out_pixel = y * p.out_width + x;
    if (resize) {
      const Lerp<T> lx = resize_lerp<T>(x, p.width, p.out_width);
      const int64_t source[4] = {ly.i0 * p.width + lx.i0, ly.i0 * p.width + lx.i1,
                                 ly.i1 * p.width + lx.i0, ly.i1 * p.width + lx.i1};
      for (int t = 0; t < 4; ++t) finish_pixel(p, image, source[t], taps.data() + t * d_all);
      for (int64_t d = 0; d < d_all; ++d) {
        value[d] = bilinear(ly, lx, taps[size_t(d)], taps[size_t(d_all + d)],
                            taps[size_t(2 * d_all + d)], taps[size_t(3 * d_all + d)]);
      }
      if (p.out_alphas != nullptr) {
        const T* a = p.alphas + image * p.width * p.height;
        p.out_alphas[image * out_pixels + out_pixel] =
            bilinear(ly, lx, a[source[0]], a[source[1]], a[source[2]], a[source[3]]);
      }
    } else {
      finish_pixel(p, image, out_pixel, value);
      if (p.out_alphas != nullptr) {
        p.out_alphas[image * out_pixels + out_pixel] = p.alphas[image * out_pixels + out_pixel];
      }
    }
    for (int64_t d = 0; d < d_all; ++d) {
      T v = value[d];
      if (d < p.n_color_channels) {
        if (p.mean != nullptr) v -= p.mean[d];
        if (p.std != nullptr) v /= p.std[d];
      }
      const int64_t index = p.channels_first ? (image * d_all + d) * out_pixels + out_pixel
                                             : (image * out_pixels + out_pixel) * d_all + d;
      write_value(p, index, v);
    }
  }
}

}  // namespace

template <typename T>
void composite_cpu(const CompositeParams<T>& p, int threads) {
  parallel_for(p.n_images * p.out_height, threads, [&](int64_t item) {
    composite_row(p, item / p.out_height, item % p.out_height);
  });
}

template void composite_cpu<float>(const CompositeParams<float>&, int);
template void composite_cpu<double>(const CompositeParams<double>&, int);

}  // namespace rapfast
