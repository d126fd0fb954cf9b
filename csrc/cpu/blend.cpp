#include "../blend.h"

#include <algorithm>
#include <vector>

#include "blend_alpha.h"
#include "thread_pool.h"

namespace rapfast {
namespace {

constexpr int kBatch = 16;          // Gaussians whose weights are kept at a time: 16 KiB in float
constexpr int kChannelBlock = 4;    // channels whose sums stay in registers

// One tile's working set. Pixels are row-major, kTileSize to a row.
template <typename T>
struct TileState {
  alignas(64) T live[kTilePixels];           // transmittance, 0 once the pixel has stopped
  alignas(64) T transmittance[kTilePixels];  // the same, kept after the stop
  alignas(64) T weights[kBatch][kTilePixels];
  int row_begin[kBatch], row_end[kBatch];    // rows a Gaussian of the batch may touch
  std::vector<T> batch_colors;               // [kBatch, D padded to kChannelBlock]
  std::vector<T> sums;                       // [D padded, kTilePixels]
};

// Weight alpha x transmittance of one Gaussian in every pixel of its rows; updates the transmittance.
template <typename T>
void weigh(const Record<T>& r, T alpha_cap, T tile_x, T tile_y, int row_begin, int row_end,
           TileState<T>& s, T* weights) {
  typedef typename Simd<T>::V V;
  constexpr int kLanes = Simd<T>::kLanes;
  const V lane = lane_centres<T>(), zero = V{};

  for (int row = row_begin; row < row_end; ++row) {
    const T dy = r.y - (tile_y + T(row) + T(0.5));
    for (int col = 0; col < kTileSize; col += kLanes) {
      const int i = row * kTileSize + col;
      const V dx = r.x - ((tile_x + T(col)) + lane);
      const V alpha = pixel_alphas(r, alpha_cap, dx, dy).alpha;
      const V before = load<V>(s.live + i);
      const V after = before * (T(1) - alpha);
      // A stopped pixel has before = 0 and stays stopped.
      const auto stop = after <= Constants<T>::kTransmittanceStop;
      store(weights + i, stop ? zero : alpha * before);
      store(s.live + i, stop ? zero : after);
      store(s.transmittance + i, stop ? load<V>(s.transmittance + i) : after);
    }
  }
}

// sums[d][pixel] += colour[g][d] * weight[g][pixel], Gaussians in order, for all channels.
template <typename T>
void accumulate(int n_batch, int64_t d_padded, TileState<T>& s) {
  typedef typename Simd<T>::V V;
  constexpr int kVectors = kTileSize / Simd<T>::kLanes;
  for (int64_t d = 0; d < d_padded; d += kChannelBlock) {
    for (int row = 0; row < kTileSize; ++row) {
      T* sums = s.sums.data() + d * kTilePixels + row * kTileSize;
      V acc[kChannelBlock][kVectors];
      for (int c = 0; c < kChannelBlock; ++c) {
        for (int v = 0; v < kVectors; ++v) {
          acc[c][v] = load<V>(sums + c * kTilePixels + v * Simd<T>::kLanes);
        }
      }
      for (int g = 0; g < n_batch; ++g) {
        if (row < s.row_begin[g] || row >= s.row_end[g]) continue;
        const T* color = s.batch_colors.data() + g * d_padded + d;
        for (int v = 0; v < kVectors; ++v) {
          const V w = load<V>(s.weights[g] + row * kTileSize + v * Simd<T>::kLanes);
          for (int c = 0; c < kChannelBlock; ++c) acc[c][v] += color[c] * w;
        }
      }
      for (int c = 0; c < kChannelBlock; ++c) {
        for (int v = 0; v < kVectors; ++v) {
          store(sums + c * kTilePixels + v * Simd<T>::kLanes, acc[c][v]);
        }
      }
    }
  }
}

template <typename T>
void blend_tile(const BlendParams<T>& p, int64_t image, int32_t tx, int32_t ty) {
  thread_local TileState<T> s;
  const int64_t tile = (image * p.tiles_y + ty) * p.tiles_x + tx;
  const int64_t begin = p.tile_offsets[tile], end = p.tile_offsets[tile + 1];
  const int64_t first_record = p.image_offsets[image];
  const int64_t d_padded = (p.n_channels + kChannelBlock - 1) / kChannelBlock * kChannelBlock;
  const T tile_x = T(tx * kTileSize), tile_y = T(ty * kTileSize);
  const int columns = std::min(kTileSize, p.width - tx * kTileSize);
  const int rows = std::min(kTileSize, p.height - ty * kTileSize);

  for (int i = 0; i < kTilePixels; ++i) {
    // Pixels outside the image count as stopped.
    s.live[i] = i % kTileSize < columns && i / kTileSize < rows ? T(1) : T(0);
    s.transmittance[i] = T(1);
  }
  s.sums.assign(size_t(d_padded) * kTilePixels, T(0));
  s.batch_colors.assign(size_t(d_padded) * kBatch, T(0));

  for (int64_t b = begin; b < end && any_live(s.live); b += kBatch) {
    const int n_batch = int(std::min<int64_t>(kBatch, end - b));
    for (int g = 0; g < n_batch; ++g) {
      const int64_t m = first_record + p.tile_records[b + g];
      const T* color = p.record_colors + m * p.color_stride;
      std::copy(color, color + p.n_channels, s.batch_colors.data() + g * d_padded);
      row_range(p.records[m], tile_y, s.row_begin[g], s.row_end[g]);
      weigh(p.records[m], p.alpha_cap, tile_x, tile_y, s.row_begin[g], s.row_end[g], s,
            s.weights[g]);
    }
    accumulate(n_batch, d_padded, s);
  }

  for (int row = 0; row < rows; ++row) {
    const int64_t pixel = (image * p.height + ty * kTileSize + row) * p.width + tx * kTileSize;
    for (int col = 0; col < columns; ++col) {
      const int i = row * kTileSize + col;
      p.alphas[pixel + col] = T(1) - s.transmittance[i];
      T* out = p.colors + (pixel + col) * p.n_channels;
      for (int64_t d = 0; d < p.n_channels; ++d) out[d] = s.sums[size_t(d) * kTilePixels + size_t(i)];
    }
  }
}

}  // namespace

template <typename T>
void blend_cpu(const BlendParams<T>& p, int threads) {
  const int64_t tiles = int64_t(p.tiles_x) * p.tiles_y;
  parallel_for(p.n_images * tiles, threads, [&](int64_t item) {
    const int32_t tile = int32_t(item % tiles);
    blend_tile(p, item / tiles, tile % p.tiles_x, tile / p.tiles_x);
  });
}

template void blend_cpu<float>(const BlendParams<float>&, int);
template void blend_cpu<double>(const BlendParams<double>&, int);

}  // namespace rapfast
