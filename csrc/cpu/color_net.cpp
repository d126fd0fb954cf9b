// Records are taken in blocks; a layer multiplies the block's inputs by a panel of columns of W after
// the other, a few records at a time, whose sums stay in registers. A record's numbers come from the
// same operations in the same order whatever shares its block.
#include "../color_net.h"

#include <algorithm>
#include <vector>

#include "../math/camera.h"
#include "../math/sh.h"
#include "record_colors.h"
#include "simd.h"

namespace rapfast {
namespace {

constexpr int kGroup = 6;            // records whose sums are held in registers together
constexpr int kBlock = 4 * kGroup;   // a block's inputs and a panel fit a small L1 cache
constexpr int kVectors = 2;          // per panel: with kGroup, 12 sums, 2 weights and 1 input
constexpr int kDirection = 3;        // of a layer's kNetBlock further inputs those that are not 0
constexpr int kRow = kMaxNetWidth + kNetBlock;  // a multiple of 16 but not of 32: spreads over the cache

template <typename T>
constexpr int kPanel = kVectors * Simd<T>::kLanes;  // outputs; divides kNetBlock

template <typename T>
struct Layer {
  int n_in, n_out;  // n_in with the direction
  bool takes_direction;
  std::vector<T> panels;  // [n_out / kPanel, n_in, kPanel]
  const T* start;         // of record with Gaussian g at start + g * stride
  int64_t stride;
};

template <typename T>
std::vector<Layer<T>> load_layers(const ColorNetParams<T>& p) {
  std::vector<Layer<T>> layers(static_cast<size_t>(p.n_layers));
  for (int i = 0; i < p.n_layers; ++i) {
    const NetLayer& from = p.layers[i];
    Layer<T>& to = layers[size_t(i)];
    to.takes_direction = from.takes_direction != 0;
    to.n_in = from.n_in + (to.takes_direction ? kDirection : 0);
    to.n_out = from.n_out;
    if (from.base >= 0) {
      to.start = static_cast<const T*>(p.base) + from.base;
      to.stride = p.base_stride;
    } else {
      to.start = p.biases + from.biases;
      to.stride = 0;
    }
    const T* weights = static_cast<const T*>(p.weights) + from.weights;
    to.panels.reserve(size_t(to.n_in) * size_t(to.n_out));
    for (int j = 0; j < to.n_out; j += kPanel<T>) {
      for (int k = 0; k < to.n_in; ++k) {
        const T* row = weights + int64_t(k) * to.n_out + j;
        to.panels.insert(to.panels.end(), row, row + kPanel<T>);
      }
    }
  }
  return layers;
}

template <typename T>
struct Block {
  int n;  // records, a multiple of kGroup: the last one stands in for those that are missing
  int64_t gaussians[kBlock];
  T directions[kBlock][kDirection];
  T values[2][kBlock][kRow];  // a layer's inputs and outputs, in turn
};

// One view's records: what they share.
template <typename T>
struct ViewInputs {
  int64_t image;
  const T *viewmat, *K;
  Vec3<T> center;
  const T* map;
  int32_t map_width, map_height;
  T weight;
};

template <typename T>
ViewInputs<T> load_view_inputs(const ColorNetParams<T>& p, int64_t image) {
  ViewInputs<T> v;
  v.image = image;
  v.viewmat = p.color.viewmats + 16 * image;
  v.K = p.color.Ks + 9 * image;
  v.center = camera_center(load_view(v.viewmat, v.K, p.color.width, p.color.height));
  v.map = static_cast<const T*>(p.views[image].map);
  v.map_width = p.views[image].width;
  v.map_height = p.views[image].height;
  v.weight = T(p.views[image].weight);
  return v;
}

// The pixels of a view's map around one place, from channel `first_channel` on.
template <typename T>
struct Pixels {
  const T* first;      // null: outside, all 0
  int64_t right, down;  // offsets of the neighbours
  T fx, fy;            // their shares
};

template <typename T>
Pixels<T> pixels_at(const ViewInputs<T>& v, int first_channel, double x, double y) {
  const MapTap<T> tap = map_tap<T>(x, y, v.map_width, v.map_height);
  const int64_t row = int64_t(v.map_width) * kMapChannels;
  return {v.map + tap.y * row + int64_t(tap.x) * kMapChannels + first_channel,
          v.map_width < 2 ? 0 : kMapChannels, v.map_height < 2 ? 0 : row, tap.fx, tap.fy};
}

// A Gaussian's pixels on the three maps.
template <typename T>
void find_pixels(const ColorNetParams<T>& p, const ViewInputs<T>& v, int64_t g, Pixels<T>* out) {
  const T* at = p.box_coord + 6 * g;
  for (int map = 0; map < 2; ++map) {
    out[map] = pixels_at(v, map * kMapFeatures, at[2 * map] / double(p.coord_scale),
                         at[2 * map + 1] / double(p.coord_scale));
  }
  double x, y;
  const bool valid = projected_place(v.viewmat, v.K, p.color.means + 3 * g, at + 4, &x, &y);
  out[2] = valid ? pixels_at(v, 2 * kMapFeatures, x, y) : Pixels<T>{};
}

// They lie anywhere in megabytes of map: asking for all of a block's before reading the first hides
// most of the wait.
template <typename T>
void prefetch(const Pixels<T>& at) {
  if (at.first == nullptr) return;
  for (size_t byte = 0; byte < sizeof(T) * kMapFeatures; byte += 64) {
    const char* p = reinterpret_cast<const char*>(at.first) + byte;
    __builtin_prefetch(p);
    __builtin_prefetch(p + sizeof(T) * at.right);
    __builtin_prefetch(p + sizeof(T) * at.down);
    __builtin_prefetch(p + sizeof(T) * (at.right + at.down));
  }
}

template <typename T>
void sample(const Pixels<T>& at, T weight, T* out /* [kMapFeatures] */) {
  if (at.first == nullptr) {
    std::fill(out, out + kMapFeatures, T(0));
    return;
  }
  typedef typename Simd<T>::V V;
  const V zero = {};
  const V right_share = at.fx - zero, left_share = T(1) - right_share;
  const V lower_share = at.fy - zero, upper_share = T(1) - lower_share;
  const T *upper = at.first, *lower = at.first + at.down;
  for (int c = 0; c < kMapFeatures; c += Simd<T>::kLanes) {
    const V top = load<V>(upper + c) * left_share + load<V>(upper + c + at.right) * right_share;
    const V bottom = load<V>(lower + c) * left_share + load<V>(lower + c + at.right) * right_share;
    store(out + c, (top * upper_share + bottom * lower_share) * weight);
  }
}

template <typename T>
void map_inputs(const ColorNetParams<T>& p, const ViewInputs<T>& v, Block<T>& block) {
  Pixels<T> pixels[kBlock][kMaps];
  for (int r = 0; r < block.n; ++r) find_pixels(p, v, block.gaussians[r], pixels[r]);
  for (int r = 0; r < block.n; ++r) {
    for (const Pixels<T>& at : pixels[r]) prefetch(at);
  }
  for (int r = 0; r < block.n; ++r) {
    for (int map = 0; map < kMaps; ++map) {
      sample(pixels[r][map], v.weight, block.values[0][r] + map * kMapFeatures);
    }
  }
}

template <typename T>
void load_inputs(const ColorNetParams<T>& p, const ViewInputs<T>& v, Block<T>& block) {
  const int64_t first_row = p.per_camera_features ? v.image * p.color.n_gaussians : 0;
  if (p.input == NetInput::kMaps) map_inputs(p, v, block);
  for (int r = 0; r < block.n; ++r) {
    const int64_t g = block.gaussians[r];
    T* x = block.values[0][r];
    if (p.input != NetInput::kMaps) {
      const int64_t row = p.input == NetInput::kEmbedding ? v.image : first_row + g;
      const T* features = p.features + row * p.n_inputs;
      for (int k = 0; k < p.n_inputs; ++k) x[k] = features[k] * v.weight;
    }
    std::fill(x + p.n_inputs, x + p.layers[0].n_in, T(0));
    const Vec3<T> d = view_direction(p.color.means + 3 * g, v.center);
    block.directions[r][0] = d.x;
    block.directions[r][1] = d.y;
    block.directions[r][2] = d.z;
  }
}

// The layer's inputs are values[from], its outputs the others.
template <typename T>
void apply_layer(const Layer<T>& layer, bool with_relu, int from, Block<T>& block) {
  typedef typename Simd<T>::V V;
  constexpr int kLanes = Simd<T>::kLanes;
  const V zero = {};
  T(*inputs)[kRow] = block.values[from];
  T(*outputs)[kRow] = block.values[1 - from];
  if (layer.takes_direction) {
    for (int r = 0; r < block.n; ++r) {
      std::copy(block.directions[r], block.directions[r] + kDirection,
                inputs[r] + layer.n_in - kDirection);
    }
  }
  const T* panel = layer.panels.data();
  for (int j = 0; j < layer.n_out; j += kPanel<T>) {
    for (int group = 0; group < block.n; group += kGroup) {
      V sum[kGroup][kVectors];
      for (int r = 0; r < kGroup; ++r) {
        const T* start = layer.start + block.gaussians[group + r] * layer.stride + j;
        for (int v = 0; v < kVectors; ++v) sum[r][v] = load<V>(start + v * kLanes);
        __builtin_prefetch(start + kPanel<T>);  // for the next panel
      }
      const T* w = panel;
      const T* x = inputs[group];
      for (int k = 0; k < layer.n_in; ++k, w += kPanel<T>) {
        V weights[kVectors];
        for (int v = 0; v < kVectors; ++v) weights[v] = load<V>(w + v * kLanes);
        for (int r = 0; r < kGroup; ++r) {
          const V input = x[r * kRow + k] - zero;
          for (int v = 0; v < kVectors; ++v) sum[r][v] = multiply_add(input, weights[v], sum[r][v]);
        }
      }
      for (int r = 0; r < kGroup; ++r) {
        for (int v = 0; v < kVectors; ++v) {
          // NaN is not below 0 and passes.
          const V s = with_relu ? (sum[r][v] < zero ? zero : sum[r][v]) : sum[r][v];
          store(outputs[group + r] + j + v * kLanes, s);
        }
      }
    }
    panel += int64_t(layer.n_in) * kPanel<T>;
  }
}

// A record's colour from the last layer's outputs. False if it is not finite.
template <typename T>
bool write_record(const ColorNetParams<T>& p, const ViewInputs<T>& v, int64_t m, const T* y) {
  T* out = p.color.record_colors + m * p.color.color_stride;
  if (p.output == NetOutput::kSh) {
    const T* mean = p.color.means + 3 * int64_t(p.color.gaussian_ids[m]);
    T basis[sh_bases(kMaxShDegree)];
    sh_basis(p.sh_degree,
             Vec3<T>{mean[0] - v.center.x, mean[1] - v.center.y, mean[2] - v.center.z}, basis);
    sh_color(y, basis, sh_bases(p.sh_degree), out);
  } else {
    std::copy(y, y + p.n_outputs, out);
  }
  return p.output == NetOutput::kRaw || finish_record(p.color, m);
}

template <typename T>
void color_net_range(const ColorNetParams<T>& p, const std::vector<Layer<T>>& layers, int64_t image,
                     int64_t begin, int64_t end) {
  thread_local Block<T> block;
  const ViewInputs<T> view = load_view_inputs(p, image);
  int64_t n_invalid = 0;
  for (; begin < end; begin += kBlock) {
    const int n_records = int(std::min<int64_t>(kBlock, end - begin));
    block.n = (n_records + kGroup - 1) / kGroup * kGroup;
    for (int r = 0; r < block.n; ++r) {
      block.gaussians[r] = p.color.gaussian_ids[begin + std::min(r, n_records - 1)];
    }
    load_inputs(p, view, block);
    const int n_layers = int(layers.size());
    for (int i = 0; i < n_layers; ++i) apply_layer(layers[size_t(i)], i + 1 < n_layers, i % 2, block);
    const T(*outputs)[kRow] = block.values[n_layers % 2];
    for (int r = 0; r < n_records; ++r) {
      n_invalid += write_record(p, view, begin + r, outputs[r]) ? 0 : 1;
    }
  }
  add_invalid(p.color.n_invalid, image, n_invalid);
}

}  // namespace

template <typename T>
void color_net_cpu(const ColorNetParams<T>& p, int threads) {
  const std::vector<Layer<T>> layers = load_layers(p);
  for_record_ranges(p.color.image_offsets, p.color.n_scenes * p.color.n_cameras, threads,
                    [&](int64_t image, int64_t begin, int64_t end) {
                      color_net_range(p, layers, image, begin, end);
                    });
}

template void color_net_cpu<float>(const ColorNetParams<float>&, int);
template void color_net_cpu<double>(const ColorNetParams<double>&, int);

}  // namespace rapfast
