// The CPU stages run as a caller without Python would run them: a batch equals its views bit by bit,
// whatever the number of threads; too little capacity writes nothing; the pool survives a fork.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "../bin.h"
#include "../blend.h"
#include "../color.h"
#include "../composite.h"
#include "../cpu/thread_pool.h"
#include "../project.h"

using namespace rapfast;

namespace {

int failures = 0;

void expect(const char* what, bool ok) {
  if (!ok) {
    std::printf("%s\n", what);
    ++failures;
  }
}

constexpr int kWidth = 75, kHeight = 41;

template <typename T>
struct Scene {
  std::vector<T> means, quats, scales, opacities, sh, viewmats, Ks;
  int64_t n, c;
};

template <typename T>
Scene<T> random_scene(int64_t n, int64_t c) {
  uint32_t state = 7;
  const auto uniform = [&] {
    state = state * 1664525u + 1013904223u;
    return T(state >> 8) / T(1 << 24);
  };
  Scene<T> s;
  s.n = n;
  s.c = c;
  for (int64_t i = 0; i < n; ++i) {
    for (int k = 0; k < 3; ++k) s.means.push_back(T(4) * uniform() - T(2));
    for (int k = 0; k < 4; ++k) s.quats.push_back(uniform() - T(0.4));
    for (int k = 0; k < 3; ++k) s.scales.push_back(T(0.01) + T(0.2) * uniform() * uniform());
    s.opacities.push_back(uniform());
    for (int k = 0; k < 12; ++k) s.sh.push_back(uniform() - T(0.5));
  }
  for (int64_t i = 0; i < c; ++i) {
    const T view[16] = {1, 0, 0, T(0.1) * T(i), 0, 1, 0, 0, 0, 0, 1, T(2.5), 0, 0, 0, 1};
    const T K[9] = {60, 0, kWidth / T(2), 0, 60, kHeight / T(2), 0, 0, 1};
    s.viewmats.insert(s.viewmats.end(), view, view + 16);
    s.Ks.insert(s.Ks.end(), K, K + 9);
  }
  return s;
}

template <typename T>
struct Picture {
  std::vector<T> colors, alphas;
  int64_t n_records;
};

template <typename T>
Picture<T> render(const Scene<T>& s, int64_t camera, int64_t n_cameras, int threads) {
  const int32_t tiles_x = (kWidth + 15) / 16, tiles_y = (kHeight + 15) / 16;
  std::vector<Record<T>> records(size_t(s.n * n_cameras));
  std::vector<int32_t> radii(2 * records.size()), gaussian_ids(records.size());
  std::vector<int64_t> image_offsets(size_t(n_cameras + 1)), n_invalid(static_cast<size_t>(n_cameras));
  ProjectParams<T> project{};
  project.n_scenes = 1;
  project.n_cameras = n_cameras;
  project.n_gaussians = s.n;
  project.capacity = int64_t(records.size());
  project.options = {kWidth, kHeight, CameraModel::kPinhole, false, T(0.3), T(0.01), T(1e10), T(0)};
  project.means = s.means.data();
  project.quats = s.quats.data();
  project.scales = s.scales.data();
  project.opacities = s.opacities.data();
  project.viewmats = s.viewmats.data() + 16 * camera;
  project.Ks = s.Ks.data() + 9 * camera;
  project.records = records.data();
  project.radii = radii.data();
  project.gaussian_ids = gaussian_ids.data();
  project.image_offsets = image_offsets.data();
  project.n_invalid = n_invalid.data();

  ProjectParams<T> small = project;
  small.capacity = 1;
  std::memset(static_cast<void*>(records.data()), 0x5a, 2 * sizeof(Record<T>));
  project_cpu(small, threads);
  const unsigned char* bytes = reinterpret_cast<const unsigned char*>(records.data());
  expect("too little capacity writes no record", image_offsets.back() > 1 && bytes[0] == 0x5a);
  project_cpu(project, threads);
  Picture<T> out;
  out.n_records = image_offsets.back();

  std::vector<T> colors(size_t(4 * out.n_records));
  ColorParams<T> color{};
  color.n_scenes = 1;
  color.n_cameras = n_cameras;
  color.n_gaussians = s.n;
  color.width = kWidth;
  color.height = kHeight;
  color.sh_degree = 1;
  color.n_bases = 4;
  color.n_channels = 3;
  color.capacity = out.n_records;
  color.color_stride = 4;
  color.depth_channel = DepthChannel::kAppended;
  color.means = project.means;
  color.viewmats = project.viewmats;
  color.Ks = project.Ks;
  color.colors = s.sh.data();
  color.gaussian_ids = gaussian_ids.data();
  color.image_offsets = image_offsets.data();
  color.records = records.data();
  color.record_colors = colors.data();
  color.n_invalid = n_invalid.data();
  color_cpu(color, threads);

  std::vector<int64_t> tile_offsets(size_t(n_cameras * tiles_x * tiles_y + 1));
  std::vector<int32_t> tile_records(size_t(out.n_records * tiles_x * tiles_y));
  BinParams<T> bin{};
  bin.n_images = n_cameras;
  bin.tiles_x = tiles_x;
  bin.tiles_y = tiles_y;
  bin.record_capacity = out.n_records;
  bin.capacity = int64_t(tile_records.size());
  bin.records = records.data();
  bin.radii = radii.data();
  bin.image_offsets = image_offsets.data();
  bin.tile_offsets = tile_offsets.data();
  bin.tile_records = tile_records.data();
  bin_cpu(bin, threads);

  out.colors.assign(size_t(n_cameras * kWidth * kHeight * 4), T(-7));
  out.alphas.assign(size_t(n_cameras * kWidth * kHeight), T(-7));
  BlendParams<T> blend{};
  blend.n_images = n_cameras;
  blend.width = kWidth;
  blend.height = kHeight;
  blend.tiles_x = tiles_x;
  blend.tiles_y = tiles_y;
  blend.n_channels = 4;
  blend.alpha_cap = T(0.999);
  blend.records = records.data();
  blend.record_colors = colors.data();
  blend.color_stride = 4;
  blend.image_offsets = image_offsets.data();
  blend.tile_offsets = tile_offsets.data();
  blend.tile_records = tile_records.data();
  blend.colors = out.colors.data();
  blend.alphas = out.alphas.data();
  blend_cpu(blend, threads);
  for (T a : out.alphas) expect("every alpha is written", a >= T(0) && a < T(1));
  return out;
}

template <typename T>
void test_batch_equals_views() {
  const Scene<T> scene = random_scene<T>(5000, 3);
  const Picture<T> batch = render(scene, 0, 3, 1);
  expect("threads change no bit", render(scene, 0, 3, 5).colors == batch.colors);
  const size_t pixels = size_t(kWidth) * kHeight;
  int64_t n_records = 0;
  for (int64_t c = 0; c < 3; ++c) {
    const Picture<T> view = render(scene, c, 1, 2);
    n_records += view.n_records;
    expect("a view of a batch is the view alone",
           std::memcmp(view.colors.data(), batch.colors.data() + size_t(c) * pixels * 4,
                       sizeof(T) * pixels * 4) == 0 &&
               std::memcmp(view.alphas.data(), batch.alphas.data() + size_t(c) * pixels,
                           sizeof(T) * pixels) == 0);
  }
  expect("records add up", n_records == batch.n_records);
}

// Poisoned outputs: every value of a resized, channels-first byte image is written.
void test_composite() {
  const int64_t w = 5, h = 4, out_w = 3, out_h = 7;
  std::vector<float> colors(size_t(2 * w * h * 3), 0.25f), alphas(size_t(2 * w * h), 0.5f);
  const float background[6] = {1, 1, 1, 0, 0, 0};
  std::vector<uint8_t> out(size_t(2 * 3 * out_w * out_h), 77);
  std::vector<float> out_alphas(size_t(2 * out_w * out_h), -1.f);
  CompositeParams<float> p{};
  p.n_images = 2;
  p.width = int32_t(w);
  p.height = int32_t(h);
  p.out_width = int32_t(out_w);
  p.out_height = int32_t(out_h);
  p.n_channels = p.n_color_channels = 3;
  p.channels_first = true;
  p.background_kind = BackgroundKind::kColor;
  p.pixel_type = PixelType::kUint8;
  p.colors = colors.data();
  p.alphas = alphas.data();
  p.backgrounds = background;
  p.out = out.data();
  p.out_alphas = out_alphas.data();
  composite_cpu(p, 3);
  bool ok = true;
  for (size_t i = 0; i < out.size(); ++i) ok = ok && out[i] == (i < out.size() / 2 ? 191 : 64);
  for (float a : out_alphas) ok = ok && a == 0.5f;
  expect("composite writes every pixel", ok);
}

void test_pool() {
  std::vector<int> hits(1000, 0);
  parallel_for(1000, 4, [&](int64_t i) {
    parallel_for(3, 4, [&](int64_t) { ++hits[size_t(i)]; });  // nested: inline
  });
  bool ok = true;
  for (int h : hits) ok = ok && h == 3;
  expect("each item runs once", ok);

  bool thrown = false;
  try {
    parallel_for(100, 4, [](int64_t i) {
      if (i == 42) throw std::runtime_error("42");
    });
  } catch (const std::runtime_error&) {
    thrown = true;
  }
  expect("an exception comes back to the caller", thrown);

  const pid_t child = fork();
  if (child == 0) {
    int64_t sum[64] = {};
    parallel_for(64, 4, [&](int64_t i) { sum[i] = i; });
    int64_t total = 0;
    for (int64_t s : sum) total += s;
    _exit(total == 64 * 63 / 2 ? 0 : 1);
  }
  int status = 1;
  waitpid(child, &status, 0);
  expect("the pool works in a forked child", WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

}  // namespace

int main() {
  test_batch_equals_views<float>();
  test_batch_equals_views<double>();
  test_composite();
  test_pool();
  std::printf(failures == 0 ? "all stage tests passed\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
