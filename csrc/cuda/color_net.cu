// Stage 2 by a colour network on the GPU, fp32: a block of threads takes 32 or 64 records through all
// layers, activations in shared memory. fp16 is in color_net_half.cu.
#include "color_net.cuh"

namespace rapfast {
namespace {

// Columns of activations are [width, kRecords]. A thread takes kRecords / 32 neighbouring records and 16
// outputs at a time, so that a weight serves a whole warp and is read as a broadcast.
template <int kRecords>
__global__ void __launch_bounds__(kNetThreads, 3)
    full_kernel(const __grid_constant__ ColorNetParams<float> net, int width, int64_t n_images,
                const DeviceView* __restrict__ device_views, const int32_t* __restrict__ image_ids) {
  constexpr int kLaneRecords = kRecords / 32;
  constexpr int kOutputs = kNetBlock;
  constexpr int kSharing = kNetThreads / kRecords;  // threads that fetch one record's inputs
  extern __shared__ float columns[];
  float* x = columns;
  float* y = x + width * kRecords;
  float* toward = y + width * kRecords;
  __shared__ int32_t gaussians[kRecords];

  const ColorParams<float>& p = net.color;
  const float* base = static_cast<const float*>(net.base);
  const float* weights = static_cast<const float*>(net.weights);
  const int record = threadIdx.x % kRecords, share = threadIdx.x / kRecords;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t n = min(p.image_offsets[n_images], p.capacity);

  for (int64_t first = int64_t(blockIdx.x) * kRecords; first < n; first += int64_t(gridDim.x) * kRecords) {
    // Behind the end the last record again, whose results are not kept.
    const int64_t own = min(first + record, n - 1);
    const int32_t gaussian = p.gaussian_ids[own];
    const int32_t image = image_ids[own];
    const Vec3<float> center = device_views[image].center;
    if (share == 0) {
      const Vec3<float> d = view_direction(p.means + 3 * int64_t(gaussian), center);
      toward[record] = d.x, toward[kRecords + record] = d.y, toward[2 * kRecords + record] = d.z;
      gaussians[record] = gaussian;
    }
    float v[4];
    if (net.input == NetInput::kMaps) {
      const Taps taps = find_taps<float>(net, image, gaussian);
      const NetView view = net.views[image];
#pragma unroll
      for (int map = 0; map < kMaps; ++map) {
        for (int part = share; part < 4; part += kSharing) {
          sample_four<float>(view, taps.at[map], taps.fx[map], taps.fy[map], part, v);
          for (int i = 0; i < 4; ++i) x[(map * kMapFeatures + 4 * part + i) * kRecords + record] = v[i];
        }
      }
    } else {
      for (int column = 4 * share; column < net.layers[0].n_in; column += 4 * kSharing) {
        feature_four(net, image, gaussian, column, v);
        for (int i = 0; i < 4; ++i) x[(column + i) * kRecords + record] = v[i];
      }
    }
    __syncthreads();

    for (int l = 0; l < net.n_layers; ++l) {
      const NetLayer layer = net.layers[l];
      for (int out = kOutputs * warp; out < layer.n_out; out += kOutputs * kNetThreads / 32) {
        float sums[kLaneRecords][kOutputs];
#pragma unroll
        for (int r = 0; r < kLaneRecords; ++r) {
          const float* b = layer.base >= 0
                               ? base + gaussians[kLaneRecords * lane + r] * net.base_stride + layer.base
                               : net.biases + layer.biases;
#pragma unroll
          for (int i = 0; i < kOutputs; i += 4) load_four_once(b + out + i, sums[r] + i);
        }
        const float* row = weights + layer.weights + out;
        const auto add = [&](const float* column) {
          float w[kOutputs];
#pragma unroll
          for (int i = 0; i < kOutputs; i += 4) load_four(row + i, w + i);
          row += layer.n_out;
#pragma unroll
          for (int r = 0; r < kLaneRecords; ++r) {
            const float value = column[kLaneRecords * lane + r];
#pragma unroll
            for (int i = 0; i < kOutputs; ++i) sums[r][i] = fmaf(value, w[i], sums[r][i]);
          }
        };
#pragma unroll 4
        for (int k = 0; k < layer.n_in; ++k) add(x + k * kRecords);
        if (layer.takes_direction) {
          for (int k = 0; k < 3; ++k) add(toward + k * kRecords);
        }
        const bool with_relu = l + 1 < net.n_layers;
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) {
#pragma unroll
          for (int r = 0; r < kLaneRecords; ++r) {
            const float sum = sums[r][i];
            y[(out + i) * kRecords + kLaneRecords * lane + r] = with_relu && sum < 0.f ? 0.f : sum;
          }
        }
      }
      __syncthreads();
      float* const done = y;
      y = x;
      x = done;
    }

    if (net.output == NetOutput::kRaw) {
      for (int column = share; column < net.n_outputs; column += kSharing) {
        if (first + record < n) p.record_colors[own * p.color_stride + column] = x[column * kRecords + record];
      }
    } else if (share == 0 && first + record < n && is_drawn(p, own)) {
      if (net.output == NetOutput::kSh) {
        write_sh(net, own, image, from_center(net, center, gaussian), x + record, kRecords);
      } else {
        const float rgb[3] = {x[record], x[kRecords + record], x[2 * kRecords + record]};
        write_rgb(p, own, image, rgb);
      }
    }
    __syncthreads();
  }
}

template <int kRecords>
void launch_full(const ColorNetParams<float>& net, int width, int64_t n_images, const DeviceView* views,
                 const int32_t* image_ids, cudaStream_t stream) {
  const auto kernel = full_kernel<kRecords>;
  const size_t shared = sizeof(float) * kRecords * (2 * size_t(width) + 3);
  allow_shared_memory(kernel);
  const unsigned grid = resident_blocks(kernel, shared, net.color.capacity, kRecords);
  kernel<<<grid, kNetThreads, shared, stream>>>(net, width, n_images, views, image_ids);
}

}  // namespace

void color_net_cuda(const ColorNetParams<float>& net, const DeviceView* views, const int32_t* image_ids,
                    cudaStream_t stream) {
  const int64_t n_images = net.color.n_scenes * net.color.n_cameras;
  if (net.color.capacity == 0 || n_images == 0) return;
  if (net.half) {
    color_net_half_cuda(net, views, image_ids, stream);
  } else {
    int width = 0;
    for (int l = 0; l < net.n_layers; ++l) {
      width = std::max({width, net.layers[l].n_in, net.layers[l].n_out});
    }
    if (width <= kMaxNetWidth / 2) {
      launch_full<64>(net, width, n_images, views, image_ids, stream);
    } else {
      launch_full<32>(net, width, n_images, views, image_ids, stream);
    }
  }
  check_launch("color net kernel");
}

}  // namespace rapfast
