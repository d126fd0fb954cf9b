#include "../bin.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "thread_pool.h"

namespace rapfast {
namespace {

template <typename T>
using DepthKey = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

// Indices 0..n-1 in the order of their keys, ties by index: a stable radix sort, 11 bits a pass.
template <typename Key>
std::vector<int32_t> sorted_order(const std::vector<Key>& keys) {
  constexpr int kBits = 11, kBuckets = 1 << kBits;
  const size_t n = keys.size();
  struct Item {
    Key key;
    int32_t index;
  };
  std::vector<Item> items(n), other(n);
  for (size_t i = 0; i < n; ++i) items[i] = {keys[i], int32_t(i)};
  for (int shift = 0; shift < int(8 * sizeof(Key)); shift += kBits) {
    size_t starts[kBuckets] = {};
    for (const Item& item : items) ++starts[(item.key >> shift) & (kBuckets - 1)];
    // Keys that agree in these bits need no pass: most depths of a room share their exponent.
    if (n > 0 && starts[(items[0].key >> shift) & (kBuckets - 1)] == n) continue;
    size_t sum = 0;
    for (size_t& s : starts) {
      const size_t count = s;
      s = sum;
      sum += count;
    }
    for (const Item& item : items) other[starts[(item.key >> shift) & (kBuckets - 1)]++] = item;
    items.swap(other);
  }
  std::vector<int32_t> order(n);
  for (size_t i = 0; i < n; ++i) order[i] = items[i].index;
  return order;
}

template <typename T>
struct ImageBins {
  std::vector<int32_t> order;    // record indices, front to back
  std::vector<TileRect> rects;   // in that order
};

template <typename T>
void sort_image(const BinParams<T>& p, int64_t image, ImageBins<T>& bins) {
  const int64_t first = p.image_offsets[image];
  const size_t n = size_t(p.image_offsets[image + 1] - first);
  std::vector<DepthKey<T>> keys(n);
  for (size_t i = 0; i < n; ++i) keys[i] = depth_key(p.records[first + int64_t(i)].depth);
  bins.order = sorted_order(keys);
  bins.rects.resize(n);
  for (size_t i = 0; i < n; ++i) {
    const int64_t m = first + bins.order[i];
    bins.rects[i] = tile_rect(p.records[m].x, p.records[m].y, p.radii + 2 * m, p.tiles_x, p.tiles_y,
                              p.first_tile_row);
  }
}

// Calls visit(listed tile of the image, record relative to the image) for the tiles of the listed rows
// [y0, y1), in depth order within each tile.
template <typename T, typename Visit>
void for_each_intersection(const BinParams<T>& p, int64_t image, const ImageBins<T>& bins,
                           int32_t y0, int32_t y1, Visit&& visit) {
  const int64_t first = p.image_offsets[image];
  for (size_t i = 0; i < bins.order.size(); ++i) {
    const TileRect& rect = bins.rects[i];
    const int32_t begin = std::max(rect.y0, p.first_tile_row + y0);
    const int32_t end = std::min(rect.y1, p.first_tile_row + y1);
    if (begin >= end) continue;
    const CutEllipse<T> ellipse = cut_ellipse(p.records[first + bins.order[i]]);
    for (int32_t ty = begin; ty < end; ++ty) {
      int32_t x0, x1;
      tile_row_range(ellipse, rect, ty, x0, x1);
      const int64_t row = int64_t(ty - p.first_tile_row) * p.tiles_x;
      for (int32_t tx = x0; tx < x1; ++tx) visit(row + tx, bins.order[i]);
    }
  }
}

}  // namespace

// Images are sorted side by side. Counting and filling then run over (image, band of tile rows)
// pairs: each writes only its own tiles, so what a tile holds does not depend on the split.
template <typename T>
void bin_cpu(const BinParams<T>& p, int threads) {
  const int64_t tiles = int64_t(p.tiles_x) * p.tiles_y;
  std::vector<ImageBins<T>> bins(size_t(p.n_images));
  parallel_for(p.n_images, threads, [&](int64_t i) { sort_image(p, i, bins[size_t(i)]); });

  const int64_t wanted = p.n_images >= 4 * int64_t(threads) ? 1 : 2 * int64_t(threads);
  const int64_t n_bands = std::max<int64_t>(1, std::min<int64_t>(p.tiles_y, wanted));
  const auto for_each_band = [&](auto&& body) {
    parallel_for(p.n_images * n_bands, threads, [&](int64_t item) {
      const int64_t image = item / n_bands, band = item % n_bands;
      body(image, int32_t(band * p.tiles_y / n_bands), int32_t((band + 1) * p.tiles_y / n_bands));
    });
  };

  for_each_band([&](int64_t image, int32_t y0, int32_t y1) {
    int64_t* counts = p.tile_offsets + image * tiles;
    std::fill(counts + int64_t(y0) * p.tiles_x, counts + int64_t(y1) * p.tiles_x, 0);
    for_each_intersection(p, image, bins[size_t(image)], y0, y1,
                          [&](int64_t tile, int32_t) { ++counts[tile]; });
  });
  int64_t total = 0;
  for (int64_t t = 0; t < p.n_images * tiles; ++t) {
    const int64_t count = p.tile_offsets[t];
    p.tile_offsets[t] = total;
    total += count;
  }
  p.tile_offsets[p.n_images * tiles] = total;
  if (total > p.capacity) return;

  for_each_band([&](int64_t image, int32_t y0, int32_t y1) {
    const int64_t begin = image * tiles + int64_t(y0) * p.tiles_x;
    std::vector<int64_t> next(p.tile_offsets + begin, p.tile_offsets + image * tiles + int64_t(y1) * p.tiles_x);
    const int64_t first_tile = int64_t(y0) * p.tiles_x;
    for_each_intersection(p, image, bins[size_t(image)], y0, y1, [&](int64_t tile, int32_t record) {
      p.tile_records[next[size_t(tile - first_tile)]++] = record;
    });
  });
}

template void bin_cpu<float>(const BinParams<float>&, int);
template void bin_cpu<double>(const BinParams<double>&, int);

}  // namespace rapfast
