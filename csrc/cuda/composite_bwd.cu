// Backward of stage 5 on the GPU: one thread per pixel of the blended images, which gathers from the output pixels that
// were made of it.
#include "../render_bwd.h"

#include "../math/composite.h"
#include "check.cuh"
#include "warp_sums.cuh"

namespace rapfast {
namespace {

// Output indices [begin, end) that source index i takes part in.
struct Range {
  int32_t begin, end;
};

__device__ __forceinline__ Range outputs_of(int64_t i, int64_t n_in, int64_t n_out) {
  // Source indices grow with output indices: those that touch i lie side by side.
  int64_t low = 0, high = n_out;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (resize_lerp<float>(middle, n_in, n_out).i1 < i) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  const int64_t begin = low;
  high = n_out;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (resize_lerp<float>(middle, n_in, n_out).i0 <= i) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return {int32_t(begin), int32_t(low)};
}

__device__ __forceinline__ float share_of(int64_t i, const Lerp<float>& lerp) {
  return (lerp.i0 == i ? lerp.w0 : 0.f) + (lerp.i1 == i ? lerp.w1 : 0.f);
}

// Channel d of the gradient in output pixel `out_pixel`; d = n_channels: of alpha.
__device__ __forceinline__ float output_gradient(const CompositeBwdParams<float>& p, int64_t image, int64_t out_pixel,
                                                 int64_t d) {
  const int64_t out_pixels = int64_t(p.out_width) * p.out_height;
  if (d == p.n_channels) return p.v_out_alphas == nullptr ? 0.f : p.v_out_alphas[image * out_pixels + out_pixel];
  if (p.v_out == nullptr) return 0.f;
  const float v = p.v_out[p.channels_first ? (image * p.n_channels + d) * out_pixels + out_pixel
                                           : (image * out_pixels + out_pixel) * p.n_channels + d];
  return d < p.n_color_channels && p.std != nullptr ? v / p.std[d] : v;
}

struct Footprint {
  Range rows, columns;
};

// Channel d of the gradient in source pixel (x, y), before the resize.
__device__ __forceinline__ float source_gradient(const CompositeBwdParams<float>& p, int64_t image, int64_t x, int64_t y, bool resize,
                                 const Footprint& f, int64_t d) {
  if (!resize) return output_gradient(p, image, y * p.width + x, d);
  float sum = 0.f;
  for (int32_t row = f.rows.begin; row < f.rows.end; ++row) {
    const float share = share_of(y, resize_lerp<float>(row, p.height, p.out_height));
    if (share == 0.f) continue;
    float of_row = 0.f;
    for (int32_t column = f.columns.begin; column < f.columns.end; ++column) {
      const float part = share_of(x, resize_lerp<float>(column, p.width, p.out_width));
      if (part != 0.f) of_row += part * output_gradient(p, image, int64_t(row) * p.out_width + column, d);
    }
    sum += share * of_row;
  }
  return sum;
}

// Adds a block's values and leaves their sum in `to`.
__device__ void block_sum(float value, float* to) {
  __shared__ float of_warps[kThreads / 32];
  const float sum = sum32(value);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.f;
    for (float part : of_warps) total += part;
    *to = total;
  }
  __syncthreads();
}

// Block (x, y) takes 256 pixels of images y, y + gridDim.y, ... `partial` [I, blocks, Dc] or null: of background colours.
__global__ void __launch_bounds__(kThreads)
    composite_bwd_kernel(const __grid_constant__ CompositeBwdParams<float> p, float* __restrict__ partial) {
  const int64_t pixels = int64_t(p.width) * p.height, pixel = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const bool exists = pixel < pixels, resize = p.out_width != p.width || p.out_height != p.height;
  const bool is_image = p.background_kind == BackgroundKind::kImage;
  const bool with_background = p.background_kind != BackgroundKind::kNone;
  const int64_t y = exists ? pixel / p.width : 0, x = exists ? pixel - y * p.width : 0;
  Footprint footprint{};
  if (resize && exists) footprint = {outputs_of(y, p.height, p.out_height), outputs_of(x, p.width, p.out_width)};
  for (int64_t image = blockIdx.y; image < p.n_images; image += gridDim.y) {
    const int64_t index = image * pixels + pixel;
    const float alpha = exists ? p.alphas[index] : 0.f;
    float v_alpha = exists ? source_gradient(p, image, x, y, resize, footprint, p.n_channels) : 0.f;
    for (int64_t d = 0; d < p.n_channels; ++d) {
      const bool is_color = d < p.n_color_channels;
      float v_background = 0.f;
      if (exists) {
        float v = source_gradient(p, image, x, y, resize, footprint, d);
        const float background =
            is_color && with_background ? p.backgrounds[(is_image ? index : image) * p.n_color_channels + d] : 0.f;
        if (is_color && p.clamp) {
          float value = p.colors[index * p.n_channels + d];
          if (with_background) value += (1.f - alpha) * background;
          if (!(value >= p.clamp_min && value <= p.clamp_max)) v = 0.f;
        }
        if (is_color && with_background) {
          v_alpha -= v * background;
          v_background = (1.f - alpha) * v;
          if (is_image && p.v_backgrounds != nullptr) p.v_backgrounds[index * p.n_color_channels + d] = v_background;
        }
        if (!is_color && p.expected_depth) {
          const float divisor = max_of(alpha, Constants<float>::kMinAlpha);
          v /= divisor;
          if (alpha >= Constants<float>::kMinAlpha) v_alpha -= v * (p.colors[index * p.n_channels + d] / divisor);
        }
        p.v_colors[index * p.n_channels + d] = v;
      }
      if (partial != nullptr && is_color) {
        block_sum(v_background, partial + (image * gridDim.x + blockIdx.x) * p.n_color_channels + d);
      }
    }
    if (exists) p.v_alphas[index] = v_alpha;
  }
}

// Blocks' sums to that of image and channel blockIdx.x, in an order that depends on their number alone.
__global__ void __launch_bounds__(kThreads)
    background_kernel(const float* __restrict__ partial, int64_t blocks, int64_t channels,
                      float* __restrict__ v_backgrounds) {
  __shared__ float total;
  const int64_t image = blockIdx.x / channels, d = blockIdx.x - image * channels;
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < blocks; i += kThreads) sum += double(partial[(image * blocks + i) * channels + d]);
  block_sum(float(sum), &total);
  if (threadIdx.x == 0) v_backgrounds[blockIdx.x] = total;
}

}  // namespace

int64_t background_blocks(int64_t n_pixels) { return (n_pixels + kThreads - 1) / kThreads; }

void composite_bwd_cuda(const CompositeBwdParams<float>& p, float* scratch, cudaStream_t stream) {
  const int64_t pixels = int64_t(p.width) * p.height, blocks = background_blocks(pixels);
  if (p.n_images == 0 || pixels == 0) return;
  const bool one_color = p.background_kind == BackgroundKind::kColor && p.v_backgrounds != nullptr;
  const dim3 grid(unsigned(blocks), unsigned(min_of<int64_t>(p.n_images, 65535)));
  composite_bwd_kernel<<<grid, kThreads, 0, stream>>>(p, one_color ? scratch : nullptr);
  check_launch("composite_bwd_kernel");
  if (!one_color) return;
  const int64_t sums = p.n_images * p.n_color_channels;
  if (sums == 0) return;
  background_kernel<<<unsigned(sums), kThreads, 0, stream>>>(scratch, blocks, p.n_color_channels, p.v_backgrounds);
  check_launch("background_kernel");
}

}  // namespace rapfast
