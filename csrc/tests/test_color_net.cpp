// The colour network on the CPU against plain loops in double: all ways in and out of it, widths that
// fill no block, views without records; and that a record's colour has the same bits in any company.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "../color_net.h"
#include "../math/sh.h"

using namespace rapfast;

namespace {

int failures = 0;

void expect(const std::string& what, bool ok) {
  if (!ok) {
    std::printf("%s\n", what.c_str());
    ++failures;
  }
}

uint32_t state = 1;

double uniform(double lo, double hi) {
  state = state * 1664525u + 1013904223u;
  return lo + (hi - lo) * double(state >> 8) / double(1 << 24);
}

template <typename T>
std::vector<T> numbers(int64_t n, double lo, double hi) {
  std::vector<T> out(static_cast<size_t>(n));
  for (T& v : out) v = T(uniform(lo, hi));
  return out;
}

int padded(int width) { return (width + kNetBlock - 1) / kNetBlock * kNetBlock; }

constexpr int64_t kGaussians = 211;
constexpr int kCameras = 5;
constexpr int64_t kOffsets[kCameras + 1] = {0, 83, 83, 84, 1401, 1430};  // of the views' records
constexpr int64_t kRecords = kOffsets[kCameras];
constexpr double kAngle = 0.3;  // between a view and the next, about the vertical

// A network of layers `width[0] -> width[1] -> ...`, its input and its views, all at random. Layer 0
// and 2 have a base, layer 1 and the last one take the direction.
template <typename T>
struct Case {
  std::vector<int> widths;
  std::vector<T> means, viewmats, Ks, weights, biases, base, box_coord, features;
  std::vector<std::vector<T>> maps;
  std::vector<NetView> views;
  std::vector<int32_t> gaussian_ids;
  std::vector<int64_t> image_offsets;
  ColorNetParams<T> p{};

  Case(NetInput input, NetOutput output, bool per_camera_features, std::vector<int> all_widths)
      : widths(std::move(all_widths)) {
    const int n_layers = int(widths.size()) - 1;
    p.color.n_scenes = 1;
    p.color.n_cameras = kCameras;
    p.color.n_gaussians = kGaussians;
    p.color.capacity = kRecords;
    p.color.width = 64;
    p.color.height = 48;
    p.color.n_channels = output == NetOutput::kRaw ? widths.back() : 3;
    p.color.depth_channel = output == NetOutput::kSh ? DepthChannel::kAppended : DepthChannel::kNone;
    p.color.color_stride = output == NetOutput::kRaw ? widths.back() : 5;
    p.input = input;
    p.output = output;
    p.n_inputs = widths[0];
    p.n_outputs = widths.back();
    p.n_layers = n_layers;
    p.coord_scale = T(1.25);
    p.per_camera_features = per_camera_features;

    means = numbers<T>(3 * kGaussians, -1, 1);
    for (int c = 0; c < kCameras; ++c) {
      const T cos = T(std::cos(kAngle * c)), sin = T(std::sin(kAngle * c));
      const T view[16] = {cos, 0, sin, T(0.1) * T(c), 0, 1, 0, T(0.2), -sin, 0, cos, T(1.2), 0, 0, 0, 1};
      const T K[9] = {40, 0, 30, 0, 45, 25, 0, 0, 1};
      viewmats.insert(viewmats.end(), view, view + 16);
      Ks.insert(Ks.end(), K, K + 9);
      // The first map has one row, the last one column.
      const int32_t height = c == 0 ? 1 : 9 + c, width = c + 1 == kCameras ? 1 : 7 + 2 * c;
      maps.push_back(numbers<T>(int64_t(height) * width * kMapChannels, -1, 1));
      // No pixel beyond the map is read, be it with share 0.
      maps.back().resize(maps.back().size() + size_t(width + 1) * kMapChannels,
                         std::numeric_limits<T>::quiet_NaN());
      views.push_back({nullptr, height, width, c == 2 ? 0 : 0.4 * (c + 1)});
    }
    for (int64_t m = 0; m < kRecords; ++m) {
      gaussian_ids.push_back(int32_t(uniform(0, double(kGaussians))));
    }
    image_offsets.assign(kOffsets, kOffsets + kCameras + 1);
    box_coord = numbers<T>(6 * kGaussians, -1.5, 1.5);
    for (int64_t g = 0; g < kGaussians; ++g) {
      for (int i = 4; i < 6; ++i) box_coord[size_t(6 * g + i)] = T(uniform(20, 90));
    }
    const int64_t n_rows = input == NetInput::kEmbedding ? kCameras
                           : per_camera_features         ? kCameras * kGaussians
                                                         : kGaussians;
    features = numbers<T>(n_rows * p.n_inputs, -1, 1);

    for (int i = 0; i < n_layers; ++i) add_layer(i, i == 0 || i == 2, i == 1 || i + 1 == n_layers);
    base = numbers<T>(kGaussians * p.base_stride, -0.5, 0.5);
  }

  void add_layer(int i, bool with_base, bool takes_direction) {
    NetLayer& layer = p.layers[i];
    layer.n_in = padded(widths[size_t(i)]);
    layer.n_out = padded(widths[size_t(i) + 1]);
    layer.takes_direction = takes_direction;
    layer.weights = int64_t(weights.size());
    layer.base = with_base ? p.base_stride : -1;
    layer.biases = int64_t(biases.size());
    if (with_base) p.base_stride += layer.n_out;
    const double reach = std::sqrt(3.0 / widths[size_t(i)]);
    for (int k = 0; k < layer.n_in + (takes_direction ? kNetBlock : 0); ++k) {
      const int direction = k - layer.n_in;
      const bool is_input = direction < 0 ? k < widths[size_t(i)] : direction < 3;
      for (int j = 0; j < layer.n_out; ++j) {
        weights.push_back(is_input && j < widths[size_t(i) + 1] ? T(uniform(-reach, reach)) : T(0));
      }
    }
    for (int j = 0; j < layer.n_out; ++j) {
      biases.push_back(j < widths[size_t(i) + 1] ? T(uniform(-0.5, 0.5)) : T(0));
    }
  }

  // Addresses, taken when nothing moves any more.
  const ColorNetParams<T>& params() {
    p.color.means = means.data();
    p.color.viewmats = viewmats.data();
    p.color.Ks = Ks.data();
    p.color.gaussian_ids = gaussian_ids.data();
    p.color.image_offsets = image_offsets.data();
    p.weights = weights.data();
    p.biases = biases.data();
    p.base = base.data();
    p.box_coord = box_coord.data();
    p.features = features.data();
    for (size_t c = 0; c < views.size(); ++c) views[c].map = maps[c].data();
    p.views = views.data();
    return p;
  }
};

template <typename T>
struct Result {
  std::vector<T> colors;
  std::vector<Record<T>> records;
  std::vector<int64_t> n_invalid;
};

template <typename T>
Result<T> run(Case<T>& c, int threads) {
  ColorNetParams<T> p = c.params();
  const size_t n = c.gaussian_ids.size();
  Result<T> out;
  out.colors.assign(n * size_t(p.color.color_stride), T(-7));
  if (p.output != NetOutput::kRaw) {
    for (size_t m = 0; m < n; ++m) {
      Record<T> record{};
      record.opacity = T(0.5);
      record.depth = T(m);
      out.records.push_back(record);
    }
    out.n_invalid.assign(kCameras, 10);
    p.color.records = out.records.data();
    p.color.n_invalid = out.n_invalid.data();
  }
  p.color.record_colors = out.colors.data();
  color_net_cpu(p, threads);
  return out;
}

// ------------------------------------------------------------------------------ the plain evaluation

// One channel of a map at (x, y) as torch's grid_sample does it: bilinear, border, corners not aligned.
template <typename T>
double plain_sample(const Case<T>& c, int view, int channel, double x, double y) {
  const int height = c.views[size_t(view)].height, width = c.views[size_t(view)].width;
  const double column = std::fmin(std::fmax(((x + 1) * width - 1) / 2, 0), width - 1);
  const double row = std::fmin(std::fmax(((y + 1) * height - 1) / 2, 0), height - 1);
  double sum = 0;
  for (int i = 0; i < height; ++i) {
    for (int j = 0; j < width; ++j) {
      const double share = std::fmax(1 - std::fabs(row - i), 0) * std::fmax(1 - std::fabs(column - j), 0);
      sum += share * double(c.maps[size_t(view)][size_t((i * width + j) * kMapChannels + channel)]);
    }
  }
  return sum;
}

template <typename T>
std::vector<double> plain_inputs(const Case<T>& c, int view, int64_t g) {
  const double weight = c.views[size_t(view)].weight;
  std::vector<double> x;
  if (c.p.input != NetInput::kMaps) {
    const int64_t row = c.p.input == NetInput::kEmbedding ? view
                        : c.p.per_camera_features         ? view * kGaussians + g
                                                          : g;
    for (int k = 0; k < c.p.n_inputs; ++k) {
      x.push_back(weight * double(c.features[size_t(row * c.p.n_inputs + k)]));
    }
    return x;
  }
  const T* box = c.box_coord.data() + 6 * g;
  const T* R = c.viewmats.data() + 16 * view;
  const T* K = c.Ks.data() + 9 * view;
  double local[3], image[3] = {};
  for (int i = 0; i < 3; ++i) {
    local[i] = double(R[4 * i + 3]);
    for (int j = 0; j < 3; ++j) local[i] += double(R[4 * i + j]) * double(c.means[size_t(3 * g + j)]);
  }
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) image[i] += double(K[3 * i + j]) * local[j];
  }
  const double u = image[0] / (image[2] + 0.01), v = image[1] / (image[2] + 0.01);
  const double height = double(box[4]), width = double(box[5]);
  const bool valid = image[2] > 0 && u > 0 && v > 0 && u < width && v < height;
  for (int channel = 0; channel < kMapChannels; ++channel) {
    const int map = channel / kMapFeatures;
    const double scale = double(c.p.coord_scale);
    const double at_x = map < 2 ? double(box[2 * map]) / scale : u / (width / 2) - 1;
    const double at_y = map < 2 ? double(box[2 * map + 1]) / scale : v / (height / 2) - 1;
    x.push_back(map < 2 || valid ? weight * plain_sample(c, view, channel, at_x, at_y) : 0);
  }
  return x;
}

template <typename T>
std::vector<double> plain_colors(const Case<T>& c, int view, int64_t g) {
  double offset[3], length2 = 0;  // the Gaussian from the camera, at -R^T t
  for (int i = 0; i < 3; ++i) {
    offset[i] = double(c.means[size_t(3 * g + i)]);
    for (int j = 0; j < 3; ++j) {
      const T* row = c.viewmats.data() + 16 * view + 4 * j;
      offset[i] += double(row[i]) * double(row[3]);
    }
    length2 += offset[i] * offset[i];
  }
  std::vector<double> x = plain_inputs(c, view, g);
  for (int i = 0; i < c.p.n_layers; ++i) {
    const NetLayer& layer = c.p.layers[i];
    x.resize(size_t(layer.n_in), 0.0);
    if (layer.takes_direction) {
      for (double o : offset) x.push_back(o / (std::sqrt(length2) + 1e-5));
    }
    std::vector<double> y;
    for (int j = 0; j < layer.n_out; ++j) {
      double sum = layer.base < 0 ? double(c.biases[size_t(layer.biases + j)])
                                  : double(c.base[size_t(g * c.p.base_stride + layer.base + j)]);
      for (size_t k = 0; k < x.size(); ++k) {
        sum += x[k] * double(c.weights[size_t(layer.weights) + k * size_t(layer.n_out) + size_t(j)]);
      }
      y.push_back(i + 1 < c.p.n_layers && sum < 0 ? 0 : sum);
    }
    x = y;
  }
  x.resize(size_t(c.p.n_outputs));
  if (c.p.output != NetOutput::kSh) return x;
  double basis[sh_bases(kMaxShDegree)];
  sh_basis(c.p.sh_degree, Vec3<double>{offset[0], offset[1], offset[2]}, basis);
  std::vector<double> color(3, 0.5);
  for (int k = 0; k < sh_bases(c.p.sh_degree); ++k) {
    for (int i = 0; i < 3; ++i) color[size_t(i)] += basis[k] * x[size_t(3 * k + i)];
  }
  for (double& v : color) v = v < 0 ? 0 : v;
  return color;
}

// --------------------------------------------------------------------------------------------- tests

template <typename T>
void test_values(const std::string& name, Case<T> c) {
  const double tolerance = sizeof(T) == 4 ? 2e-6 : 1e-14;
  const Result<T> got = run(c, 1);
  const int64_t stride = c.p.color.color_stride;
  double worst = 0, largest = 0;
  bool rest = true;
  for (int view = 0; view < kCameras; ++view) {
    for (int64_t m = kOffsets[view]; m < kOffsets[view + 1]; ++m) {
      const std::vector<double> want = plain_colors(c, view, c.gaussian_ids[size_t(m)]);
      const T* out = got.colors.data() + m * stride;
      for (size_t d = 0; d < want.size(); ++d) {
        const double error = std::fabs(double(out[d]) - want[d]);
        worst = error <= worst ? worst : error;  // a NaN is the worst
        largest = std::fmax(largest, std::fabs(want[d]));
      }
      int64_t d = int64_t(want.size());
      if (c.p.color.depth_channel == DepthChannel::kAppended) rest = rest && out[d++] == T(m);
      for (; d < stride; ++d) rest = rest && out[d] == T(-7);
    }
  }
  expect(name + ": worst error " + std::to_string(worst), worst <= tolerance * largest && largest > 0.1);
  expect(name + ": the depth is appended and nothing else written", rest);
  for (int64_t n : got.n_invalid) expect(name + ": nothing is invalid", n == 10);
  for (const Record<T>& r : got.records) expect(name + ": every record stays", r.opacity == T(0.5));

  for (int threads = 2; threads <= 3; ++threads) {
    expect(name + ": threads change no bit", run(c, threads).colors == got.colors);
  }
  const int64_t ends_of_blocks_and_views[] = {0, 5, 6, 23, 24, 82, 83, 84, 700, 1107, 1108, 1400, 1429};
  for (int64_t m : ends_of_blocks_and_views) {
    Case<T> alone = c;
    alone.gaussian_ids = {c.gaussian_ids[size_t(m)]};
    for (int i = 0; i <= kCameras; ++i) alone.image_offsets[size_t(i)] = kOffsets[i] > m ? 1 : 0;
    const size_t n = size_t(c.p.output == NetOutput::kRaw ? c.p.n_outputs : 3);
    expect(name + ": a record alone is the record in the batch",
           std::memcmp(run(alone, 1).colors.data(), got.colors.data() + m * stride, n * sizeof(T)) == 0);
  }
  Case<T> empty = c;
  empty.gaussian_ids.clear();
  empty.image_offsets.assign(kCameras + 1, 0);
  run(empty, 2);
}

// What is not finite anywhere in the network comes out, and takes the record out, its neighbours not.
template <typename T>
void test_not_finite(NetOutput output, T value) {
  Case<T> c(NetInput::kFeatures, output, false, {5, 20, 33, 17, output == NetOutput::kSh ? 12 : 3});
  c.p.sh_degree = 1;
  const Result<T> before = run(c, 1);
  const int32_t in_base = c.gaussian_ids[90], in_features = c.gaussian_ids[91];
  for (int j = 0; j < 4; ++j) c.base[size_t(in_base * c.p.base_stride + j)] = value;
  c.features[size_t(5 * in_features + 3)] = value;
  const Result<T> after = run(c, 2);
  const size_t stride = size_t(c.p.color.color_stride);
  std::vector<int64_t> n_invalid(kCameras, 10);
  bool ok = true;
  for (int view = 0; view < kCameras; ++view) {
    for (size_t m = size_t(kOffsets[view]); m < size_t(kOffsets[view + 1]); ++m) {
      const T* out = after.colors.data() + m * stride;
      const bool hit = c.gaussian_ids[m] == in_base || c.gaussian_ids[m] == in_features;
      if (!hit) {
        ok = ok && std::memcmp(out, before.colors.data() + m * stride, stride * sizeof(T)) == 0;
      } else if (output == NetOutput::kRaw) {
        bool finite = true;
        for (size_t d = 0; d < stride; ++d) finite = finite && std::isfinite(out[d]);
        ok = ok && !finite;
      } else {
        const T depth = output == NetOutput::kSh ? T(m) : T(-7);
        ok = ok && out[0] == 0 && out[1] == 0 && out[2] == 0 && out[3] == depth && out[4] == T(-7);
        ++n_invalid[size_t(view)];
      }
      if (output != NetOutput::kRaw) ok = ok && after.records[m].opacity == (hit ? T(0) : T(0.5));
    }
  }
  expect("what is not finite takes its record out, and no other", ok);
  expect("records taken out are counted", output == NetOutput::kRaw || after.n_invalid == n_invalid);
}

template <typename T>
void test_type(const std::string& type) {
  const std::vector<int> hidden = {128, 50, 63, 5};
  for (int input = 0; input < 4; ++input) {
    for (int output = 0; output < 3; ++output) {
      const NetInput kind = static_cast<NetInput>(input < 3 ? input : 2);
      std::vector<int> widths = {kind == NetInput::kMaps ? kMapChannels : 37};
      widths.insert(widths.end(), hidden.begin(), hidden.end());
      widths.push_back(output == 0 ? 3 : output == 1 ? 27 : 19);
      Case<T> c(kind, static_cast<NetOutput>(output), input == 3, widths);
      c.p.sh_degree = output;  // with spherical harmonics 1, of degree 2 stored
      test_values(type + ", input " + std::to_string(input) + ", output " + std::to_string(output),
                  std::move(c));
    }
  }
  test_values(type + ", one layer", Case<T>(NetInput::kEmbedding, NetOutput::kColor, false, {1, 3}));
  test_values(type + ", the widest and the most layers",
              Case<T>(NetInput::kFeatures, NetOutput::kRaw, true,
                      {256, 256, 255, 3, 2, 1, 17, 16, 15, 31, 32, 33, 8, 9, 10, 11, 256}));
  for (T value : {std::numeric_limits<T>::quiet_NaN(), std::numeric_limits<T>::infinity()}) {
    test_not_finite(NetOutput::kColor, value);
    test_not_finite(NetOutput::kSh, value);
    test_not_finite(NetOutput::kRaw, value);
  }
}

}  // namespace

int main() {
  test_type<float>("float");
  test_type<double>("double");
  std::printf(failures == 0 ? "all colour network tests passed\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
