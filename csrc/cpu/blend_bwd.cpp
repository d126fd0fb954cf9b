#include "../blend_bwd.h"

#include <algorithm>
#include <vector>

#include "blend_alpha.h"
#include "thread_pool.h"

namespace rapfast {
namespace {

constexpr int kBatch = 16;         // Gaussians between two checkpoints
constexpr int kChannelBlock = 4;   // channels whose sums stay in registers
constexpr int64_t kWindowBytes = 64 << 20;  // partial sums that are kept at a time

// Sums over pixels, of g = alpha d(loss)/d(alpha), times the offset (dx, dy) from the mean: all that the
// gradients of a record need. They add up over tiles.
struct Moment {
  static constexpr int k1 = 0, kX = 1, kY = 2, kXX = 3, kXY = 4, kYY = 5, kCount = 6;
};

// One tile's working set. Pixels are row-major, kTileSize to a row.
template <typename T>
struct TileState {
  alignas(64) T live[kTilePixels];           // transmittance, 0 once the pixel has stopped
  alignas(64) T transmittance[kTilePixels];  // the same, kept after the stop
  alignas(64) T behind[kTilePixels];         // gradient that flows through the transmittance behind
  alignas(64) T weight[kTilePixels];
  // Of a batch, per Gaussian: alpha, 0 where not drawn; the same, 0 where the cap holds it; and the
  // transmittance in front of it.
  alignas(64) T alpha[kBatch][kTilePixels];
  alignas(64) T gain[kBatch][kTilePixels];
  alignas(64) T before[kBatch][kTilePixels];
  int row_begin[kBatch], row_end[kBatch];
  bool drawn[kBatch];
  std::vector<T> checkpoints;  // [batches, kTilePixels] `live` in front of each batch
  std::vector<T> v_out;        // [D padded, kTilePixels]
};

template <typename T>
struct Layout {
  int64_t d_padded;  // channels, a multiple of kChannelBlock
  int64_t abs;       // where |gradient of (x, y)| is, if it is wanted
  int64_t colors;    // where the colour's gradient is
  int64_t size;      // numbers per (tile, record) pair

  explicit Layout(const BlendBwdParams<T>& p) {
    d_padded = (p.n_channels + kChannelBlock - 1) / kChannelBlock * kChannelBlock;
    abs = Moment::kCount;
    colors = abs + (p.v_means2d_abs != nullptr ? 2 : 0);
    size = colors + d_padded;
  }
};

template <typename V>
auto sum_of_lanes(V v) {
  auto sum = v[0];
  for (size_t k = 1; k < sizeof(V) / sizeof(sum); ++k) sum += v[k];
  return sum;
}

// Draws one Gaussian as the blend does. Of place g of a batch it keeps what the way back needs.
template <bool kKeep, typename T>
void draw(const Record<T>& r, T alpha_cap, T tile_x, T tile_y, int g, TileState<T>& s) {
  typedef typename Simd<T>::V V;
  constexpr int kLanes = Simd<T>::kLanes;
  const V lane = lane_centres<T>(), zero = V{};
  V any = zero;
  row_range(r, tile_y, s.row_begin[g], s.row_end[g]);
  for (int row = s.row_begin[g]; row < s.row_end[g]; ++row) {
    const T dy = r.y - (tile_y + T(row) + T(0.5));
    for (int col = 0; col < kTileSize; col += kLanes) {
      const int i = row * kTileSize + col;
      const V dx = r.x - ((tile_x + T(col)) + lane);
      const PixelAlphas<T> at = pixel_alphas(r, alpha_cap, dx, dy);
      const V before = load<V>(s.live + i);
      const V after = before * (T(1) - at.alpha);
      const auto stop = after <= Constants<T>::kTransmittanceStop;
      store(s.live + i, stop ? zero : after);
      if (kKeep) {
        const V alpha = stop ? zero : at.alpha;
        store(s.alpha[g] + i, alpha);
        store(s.gain[g] + i, at.uncapped > alpha_cap ? zero : alpha);
        store(s.before[g] + i, before);
        any += alpha;
      } else {
        store(s.transmittance + i, stop ? load<V>(s.transmittance + i) : after);
      }
    }
  }
  s.drawn[g] = sum_of_lanes(any) > T(0);
}

// The gradients of one Gaussian of a batch in this tile, the Gaussians behind it being done.
template <bool kAbs, typename T>
void moments(const Record<T>& r, const T* color, T tile_x, T tile_y, int64_t n_channels, int g,
             TileState<T>& s, T* out, T* out_abs) {
  typedef typename Simd<T>::V V;
  constexpr int kLanes = Simd<T>::kLanes;
  const V lane = lane_centres<T>(), zero = V{};
  V m1 = zero, mx = zero, my = zero, mxx = zero, mxy = zero, myy = zero, abs_x = zero, abs_y = zero;
  for (int row = s.row_begin[g]; row < s.row_end[g]; ++row) {
    const T dy = r.y - (tile_y + T(row) + T(0.5));
    V row1 = zero, row_x = zero, row_xx = zero;
    for (int col = 0; col < kTileSize; col += kLanes) {
      const int i = row * kTileSize + col;
      const V dx = r.x - ((tile_x + T(col)) + lane);
      const V alpha = load<V>(s.alpha[g] + i);
      const V before = load<V>(s.before[g] + i);
      V v_weight = zero;  // of alpha x transmittance
      for (int64_t d = 0; d < n_channels; ++d) {
        v_weight += color[d] * load<V>(s.v_out.data() + d * kTilePixels + i);
      }
      const V behind = load<V>(s.behind + i);
      const V v_alpha = before * v_weight - behind / (T(1) - alpha);
      const V weight = alpha * before;
      store(s.weight + i, weight);
      store(s.behind + i, behind + weight * v_weight);

      const V v = load<V>(s.gain[g] + i) * v_alpha;
      const V vx = v * dx;
      row1 += v;
      row_x += vx;
      row_xx += vx * dx;
      if (kAbs) {
        // Far from the mean the offset may overflow; nothing is drawn there.
        const V gx = v * (r.conic_a * dx + r.conic_b * dy), gy = v * (r.conic_b * dx + r.conic_c * dy);
        abs_x += alpha > zero ? (gx < zero ? -gx : gx) : zero;
        abs_y += alpha > zero ? (gy < zero ? -gy : gy) : zero;
      }
    }
    m1 += row1;
    mx += row_x;
    mxx += row_xx;
    my += row1 * dy;
    mxy += row_x * dy;
    myy += (row1 * dy) * dy;
  }
  out[Moment::k1] = sum_of_lanes(m1);
  out[Moment::kX] = sum_of_lanes(mx);
  out[Moment::kY] = sum_of_lanes(my);
  out[Moment::kXX] = sum_of_lanes(mxx);
  out[Moment::kXY] = sum_of_lanes(mxy);
  out[Moment::kYY] = sum_of_lanes(myy);
  if (kAbs) {
    out_abs[0] = sum_of_lanes(abs_x);
    out_abs[1] = sum_of_lanes(abs_y);
  }
}

// out[d] = sum over pixels of weight x v_out[d].
template <typename T>
void color_sums(int64_t d_padded, int row_begin, int row_end, const TileState<T>& s, T* out) {
  typedef typename Simd<T>::V V;
  constexpr int kLanes = Simd<T>::kLanes;
  for (int64_t d = 0; d < d_padded; d += kChannelBlock) {
    const T* v_out = s.v_out.data() + d * kTilePixels;
    V sums[kChannelBlock] = {};
    for (int i = row_begin * kTileSize; i < row_end * kTileSize; i += kLanes) {
      const V weight = load<V>(s.weight + i);
      for (int c = 0; c < kChannelBlock; ++c) sums[c] += weight * load<V>(v_out + c * kTilePixels + i);
    }
    for (int c = 0; c < kChannelBlock; ++c) out[d + c] = sum_of_lanes(sums[c]);
  }
}

// Fills the partial sums of the tile's list as far as any pixel is drawn; returns how far that is.
template <typename T>
int64_t blend_tile_bwd(const BlendBwdParams<T>& p, const Layout<T>& layout, int64_t tile, T* partials) {
  thread_local TileState<T> s;
  const int64_t tiles = int64_t(p.tiles_x) * p.tiles_y;
  const int64_t image = tile / tiles;
  const int32_t ty = int32_t(tile % tiles / p.tiles_x), tx = int32_t(tile % p.tiles_x);
  const int64_t begin = p.tile_offsets[tile], end = p.tile_offsets[tile + 1];
  const int64_t first_record = p.image_offsets[image];
  const T tile_x = T(tx * kTileSize), tile_y = T(ty * kTileSize);
  const int columns = std::min(kTileSize, p.width - tx * kTileSize);
  const int rows = std::min(kTileSize, p.height - ty * kTileSize);
  if (begin == end) return 0;

  // Front to back once, to know where the list ends for these pixels and what is left of the light.
  for (int i = 0; i < kTilePixels; ++i) {
    // Pixels outside the image count as stopped.
    s.live[i] = i % kTileSize < columns && i / kTileSize < rows ? T(1) : T(0);
    s.transmittance[i] = T(1);
  }
  s.checkpoints.clear();
  int64_t reached = begin;
  while (reached < end && any_live(s.live)) {
    s.checkpoints.insert(s.checkpoints.end(), s.live, s.live + kTilePixels);
    const int64_t stop = std::min<int64_t>(reached + kBatch, end);
    for (; reached < stop; ++reached) {
      draw<false>(p.records[first_record + p.tile_records[reached]], p.alpha_cap, tile_x, tile_y, 0, s);
    }
  }

  s.v_out.assign(size_t(layout.d_padded) * kTilePixels, T(0));
  std::fill(s.behind, s.behind + kTilePixels, T(0));
  for (int row = 0; row < rows; ++row) {
    const int64_t pixel = (image * p.height + ty * kTileSize + row) * p.width + tx * kTileSize;
    for (int col = 0; col < columns; ++col) {
      const int i = row * kTileSize + col;
      // Where nothing is drawn no gradient is read: a loss that divides by alpha gives NaN there.
      if (s.transmittance[i] == T(1)) continue;
      // alphas is 1 - transmittance.
      s.behind[i] = -p.v_alphas[pixel + col] * s.transmittance[i];
      const T* v = p.v_colors + (pixel + col) * p.n_channels;
      for (int64_t d = 0; d < p.n_channels; ++d) s.v_out[size_t(d) * kTilePixels + size_t(i)] = v[d];
    }
  }

  // Back to front, a batch at a time from its checkpoint: the transmittances are those of the blend,
  // where dividing by 1 - alpha on the way would lose digits at every step.
  for (int64_t batch = (reached - begin + kBatch - 1) / kBatch - 1; batch >= 0; --batch) {
    const int64_t b = begin + batch * kBatch;
    const int n_batch = int(std::min<int64_t>(kBatch, reached - b));
    const T* checkpoint = s.checkpoints.data() + batch * kTilePixels;
    std::copy(checkpoint, checkpoint + kTilePixels, s.live);
    for (int g = 0; g < n_batch; ++g) {
      draw<true>(p.records[first_record + p.tile_records[b + g]], p.alpha_cap, tile_x, tile_y, g, s);
    }
    for (int g = n_batch - 1; g >= 0; --g) {
      T* out = partials + (b + g - begin) * layout.size;
      if (!s.drawn[g]) {
        std::fill(out, out + layout.size, T(0));
        continue;
      }
      const int64_t m = first_record + p.tile_records[b + g];
      const auto run = p.v_means2d_abs != nullptr ? &moments<true, T> : &moments<false, T>;
      run(p.records[m], p.record_colors + m * p.color_stride, tile_x, tile_y, p.n_channels, g, s, out,
          out + layout.abs);
      color_sums(layout.d_padded, s.row_begin[g], s.row_end[g], s, out + layout.colors);
    }
  }
  return reached - begin;
}

// Adds the partial sums of tiles [first, last) to the records [low, high), in the order of the tiles.
template <typename T>
void add_partials(const BlendBwdParams<T>& p, const Layout<T>& layout, int64_t first, int64_t last,
                  const std::vector<T>& partials, const std::vector<int64_t>& reached, int64_t low,
                  int64_t high) {
  const int64_t tiles = int64_t(p.tiles_x) * p.tiles_y;
  for (int64_t tile = first; tile < last; ++tile) {
    const int64_t first_record = p.image_offsets[tile / tiles];
    const int64_t begin = p.tile_offsets[tile];
    for (int64_t k = 0; k < reached[size_t(tile - first)]; ++k) {
      const int64_t m = first_record + p.tile_records[begin + k];
      if (m < low || m >= high) continue;
      const T* part = partials.data() + (begin - p.tile_offsets[first] + k) * layout.size;
      Record<T>& v = p.v_records[m];
      v.opacity += part[Moment::k1];
      v.x += part[Moment::kX];
      v.y += part[Moment::kY];
      v.conic_a += part[Moment::kXX];
      v.conic_b += part[Moment::kXY];
      v.conic_c += part[Moment::kYY];
      for (int64_t d = 0; d < p.n_channels; ++d) {
        p.v_record_colors[m * p.color_stride + d] += part[layout.colors + d];
      }
      if (p.v_means2d_abs != nullptr) {
        p.v_means2d_abs[2 * m] += part[layout.abs];
        p.v_means2d_abs[2 * m + 1] += part[layout.abs + 1];
      }
    }
  }
}

// From moments to the gradient of the record: sigma = (a dx^2 + c dy^2) / 2 + b dx dy, alpha = opacity
// exp(-sigma), so d(loss)/d(sigma) = -g and d(loss)/d(opacity) = g / opacity.
template <typename T>
Record<T> record_gradient(const Record<T>& r, const Record<T>& moments) {
  return {-(r.conic_a * moments.x + r.conic_b * moments.y),
          -(r.conic_b * moments.x + r.conic_c * moments.y),
          T(-0.5) * moments.conic_a,
          -moments.conic_b,
          T(-0.5) * moments.conic_c,
          r.opacity > T(0) ? moments.opacity / r.opacity : T(0),
          T(0),
          T(0)};
}

}  // namespace

// Tiles run side by side and each keeps its own sums for every record of its list. A window of tiles at
// a time, these are added to the records in the order of the tiles: the bits do not depend on the
// threads, nor on the size of the window.
template <typename T>
void blend_bwd_cpu(const BlendBwdParams<T>& p, int threads) {
  const Layout<T> layout(p);
  const int64_t n_records = p.image_offsets[p.n_images];
  const int64_t n_tiles = p.n_images * p.tiles_x * p.tiles_y;
  const auto split_records = [&](auto&& body) {
    parallel_for(threads, threads, [&](int64_t part) {
      body(n_records * part / threads, n_records * (part + 1) / threads);
    });
  };
  split_records([&](int64_t low, int64_t high) {
    std::fill(p.v_records + low, p.v_records + high, Record<T>{});
    std::fill(p.v_record_colors + low * p.color_stride, p.v_record_colors + high * p.color_stride, T(0));
    if (p.v_means2d_abs != nullptr) std::fill(p.v_means2d_abs + 2 * low, p.v_means2d_abs + 2 * high, T(0));
  });

  const int64_t window = std::max<int64_t>(1, kWindowBytes / (layout.size * int64_t(sizeof(T))));
  std::vector<T> partials;
  std::vector<int64_t> reached;
  for (int64_t first = 0, last = 0; first < n_tiles; first = last) {
    do ++last;
    while (last < n_tiles && p.tile_offsets[last + 1] - p.tile_offsets[first] <= window);
    partials.resize(size_t((p.tile_offsets[last] - p.tile_offsets[first]) * layout.size));
    reached.resize(size_t(last - first));
    parallel_for(last - first, threads, [&](int64_t item) {
      const int64_t at = p.tile_offsets[first + item] - p.tile_offsets[first];
      reached[size_t(item)] = blend_tile_bwd(p, layout, first + item, partials.data() + at * layout.size);
    });
    split_records([&](int64_t low, int64_t high) {
      add_partials(p, layout, first, last, partials, reached, low, high);
    });
  }
  split_records([&](int64_t low, int64_t high) {
    for (int64_t m = low; m < high; ++m) p.v_records[m] = record_gradient(p.records[m], p.v_records[m]);
  });
}

template void blend_bwd_cpu<float>(const BlendBwdParams<float>&, int);
template void blend_bwd_cpu<double>(const BlendBwdParams<double>&, int);

}  // namespace rapfast
