// Stage 5 on the GPU: one thread per output pixel.
#include "../composite.h"

#include <cuda_fp16.h>

#include "../math/composite.h"
#include "check.cuh"

namespace rapfast {
namespace {

__device__ float finish_channel(const CompositeParams<float>& p, int64_t image, int64_t index, int64_t d) {
  float v = p.colors[index * p.n_channels + d];
  if (d < p.n_color_channels) {
    if (p.background_kind != BackgroundKind::kNone) {
      const int64_t row = p.background_kind == BackgroundKind::kImage ? index : image;
      v += (1.f - p.alphas[index]) * p.backgrounds[row * p.n_color_channels + d];
    }
    if (p.clamp) v = clamp_to(v, p.clamp_min, p.clamp_max);
  } else if (p.expected_depth) {
    v = v / max_of(p.alphas[index], Constants<float>::kMinAlpha);
  }
  return v;
}

__device__ void write_value(const CompositeParams<float>& p, int64_t index, float v) {
  switch (p.pixel_type) {
    case PixelType::kFloat16: static_cast<__half*>(p.out)[index] = __float2half_rn(v); break;
    case PixelType::kUint8: static_cast<uint8_t*>(p.out)[index] = to_byte(v); break;
    default: static_cast<float*>(p.out)[index] = v;
  }
}

__global__ void __launch_bounds__(kThreads) composite_kernel(CompositeParams<float> p) {
  const int64_t out_pixels = int64_t(p.out_width) * p.out_height;
  const int64_t in_pixels = int64_t(p.width) * p.height;
  const bool resize = p.out_width != p.width || p.out_height != p.height;
  RAPFAST_GRID_STRIDE(i, p.n_images * out_pixels) {
    const int64_t image = i / out_pixels, pixel = i - image * out_pixels;
    const int64_t first = image * in_pixels;
    Lerp<float> ly{}, lx{};
    if (resize) {
      ly = resize_lerp<float>(pixel / p.out_width, p.height, p.out_height);
      lx = resize_lerp<float>(pixel % p.out_width, p.width, p.out_width);
    }
    const int64_t s00 = first + ly.i0 * p.width + lx.i0, s01 = first + ly.i0 * p.width + lx.i1;
    const int64_t s10 = first + ly.i1 * p.width + lx.i0, s11 = first + ly.i1 * p.width + lx.i1;
    if (p.out_alphas != nullptr) {
      p.out_alphas[i] =
          resize ? bilinear(ly, lx, p.alphas[s00], p.alphas[s01], p.alphas[s10], p.alphas[s11])
                 : p.alphas[i];
    }
    for (int64_t d = 0; d < p.n_channels; ++d) {
      float v = resize ? bilinear(ly, lx, finish_channel(p, image, s00, d), finish_channel(p, image, s01, d),
                                  finish_channel(p, image, s10, d), finish_channel(p, image, s11, d))
                       : finish_channel(p, image, i, d);
      if (d < p.n_color_channels) {
        if (p.mean != nullptr) v -= p.mean[d];
        if (p.std != nullptr) v /= p.std[d];
      }
      write_value(p, p.channels_first ? (image * p.n_channels + d) * out_pixels + pixel
                                      : i * p.n_channels + d, v);
    }
  }
}

}  // namespace

void composite_cuda(const CompositeParams<float>& p, cudaStream_t stream) {
  const int64_t n = p.n_images * p.out_width * p.out_height;
  if (n == 0) return;
  composite_kernel<<<grid_for(n), kThreads, 0, stream>>>(p);
  check_launch("composite_kernel");
}

}  // namespace rapfast
