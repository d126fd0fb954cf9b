// csrc/math against values worked out by hand. A CUDA build runs the same checks on the device later.
#include <cmath>
#include <cstdio>
#include <vector>

#include "../cpu/half.h"
#include "../cpu/simd.h"
#include "../math/camera.h"
#include "../math/composite.h"
#include "../math/gaussian.h"
#include "../math/sh.h"
#include "../math/tile.h"

using namespace rapfast;

namespace {

int failures = 0;

void expect_near(const char* what, double got, double want, double tolerance) {
  if (!(std::abs(got - want) <= tolerance)) {
    std::printf("%s: got %.9g, want %.9g\n", what, got, want);
    ++failures;
  }
}

void expect(const char* what, bool ok) {
  if (!ok) {
    std::printf("%s\n", what);
    ++failures;
  }
}

const double kIdentity[16] = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1};
const double kK[9] = {100, 0, 32, 0, 50, 24, 0, 0, 1};

void test_covariance() {
  // A quarter turn about z carries the x scale to the y axis, whatever the quaternion's norm.
  const double q[4] = {3 * std::sqrt(0.5), 0, 0, 3 * std::sqrt(0.5)}, s[3] = {2, 1, 0.5};
  const Sym3<double> c = covariance(q, s);
  expect_near("cov xx", c.xx, 1, 1e-12);
  expect_near("cov yy", c.yy, 4, 1e-12);
  expect_near("cov zz", c.zz, 0.25, 1e-12);
  expect_near("cov xy", c.xy, 0, 1e-12);
}

void test_camera() {
  // Rotated, scaled and shifted: R c + t must be 0 at the centre.
  const double v[16] = {0, -2, 0, 1, 2, 0, 0, -3, 0, 0, 2, 5, 0, 0, 0, 1};
  const View<double> view = load_view(v, kK, 64, 48);
  expect("view is valid", view.valid);
  const Vec3<double> zero = world_to_camera(view, camera_center(view));
  expect_near("centre x", zero.x, 0, 1e-12);
  expect_near("centre y", zero.y, 0, 1e-12);
  expect_near("centre z", zero.z, 0, 1e-12);
  double bad[9];
  for (int i = 0; i < 9; ++i) bad[i] = kK[i];
  bad[4] = 0;
  expect("a focal length of 0 is invalid", !load_view(v, bad, 64, 48).valid);
  double singular[16] = {};
  expect("a singular view is invalid", !load_view(singular, kK, 64, 48).valid);
}

// Every model's Jacobian against central differences, inside the frustum where nothing is clamped.
void test_jacobians() {
  const View<double> view = load_view(kIdentity, kK, 64, 48);
  const Vec3<double> p = {0.2, -0.3, 1.7};
  const double h = 1e-6;
  for (CameraModel model : {CameraModel::kPinhole, CameraModel::kOrtho, CameraModel::kFisheye}) {
    const Projection2d<double> at = project_point(model, view, p);
    const double jx[3] = {at.jx.x, at.jx.y, at.jx.z}, jy[3] = {at.jy.x, at.jy.y, at.jy.z};
    for (int i = 0; i < 3; ++i) {
      const Vec3<double> step = {i == 0 ? h : 0, i == 1 ? h : 0, i == 2 ? h : 0};
      const Vec3<double> a = {p.x + step.x, p.y + step.y, p.z + step.z};
      const Vec3<double> b = {p.x - step.x, p.y - step.y, p.z - step.z};
      const Projection2d<double> pa = project_point(model, view, a);
      const Projection2d<double> pb = project_point(model, view, b);
      // The fisheye's epsilon of 1e-7 in x^2 shows at this size.
      expect_near("jacobian x", jx[i], (pa.x - pb.x) / (2 * h), 1e-4);
      expect_near("jacobian y", jy[i], (pa.y - pb.y) / (2 * h), 1e-4);
    }
  }
}

void test_projection() {
  const View<double> view = load_view(kIdentity, kK, 64, 48);
  const ProjectOptions<double> o = {64, 48, CameraModel::kPinhole, false, 0.3, 0.01, 1e10, 0};
  Record<double> r;
  int32_t radii[2];
  const Sym3<double> cov = {0.01, 0, 0, 0.01, 0, 0.01};
  const Visibility seen = project_gaussian(view, o, {0, 0, 2}, cov, 1.0, r, radii);
  expect("a Gaussian in front is visible", seen == Visibility::kVisible);
  expect_near("mean2d x", r.x, 32, 1e-12);
  expect_near("mean2d y", r.y, 24, 1e-12);
  expect_near("conic a", r.conic_a, 1 / (0.01 * 2500 + 0.3), 1e-12);
  expect_near("conic c", r.conic_c, 1 / (0.01 * 625 + 0.3), 1e-12);
  expect_near("radius x", radii[0], std::ceil(std::sqrt(2 * std::log(255.0)) * std::sqrt(25.3)), 0);
  expect("faint Gaussians are culled",
         project_gaussian(view, o, {0, 0, 2}, cov, 0.003, r, radii) == Visibility::kCulled);
  const Sym3<double> wild = {1e300, 0, 0, 1e300, 0, 1e300};
  expect("overflow is invalid",
         project_gaussian(view, o, {0, 0, 2}, wild, 1.0, r, radii) == Visibility::kInvalid);
}

// The bases are orthonormal on the sphere: their Gram matrix by quadrature is the identity.
void test_sh_orthonormal() {
  const int n = 200;
  std::vector<double> gram(25 * 25, 0.0);
  const double pi = std::acos(-1.0);
  for (int i = 0; i < n; ++i) {
    const double z = -1 + (i + 0.5) * 2 / n, r = std::sqrt(1 - z * z);
    for (int j = 0; j < n; ++j) {
      const double phi = (j + 0.5) * 2 * pi / n;
      double b[25];
      sh_basis(4, Vec3<double>{3 * r * std::cos(phi), 3 * r * std::sin(phi), 3 * z}, b);
      for (int u = 0; u < 25; ++u) {
        for (int v = 0; v < 25; ++v) gram[u * 25 + v] += b[u] * b[v] * 4 * pi / (n * n);
      }
    }
  }
  for (int u = 0; u < 25; ++u) {
    for (int v = 0; v < 25; ++v) expect_near("sh gram", gram[u * 25 + v], u == v, 1e-3);
  }
}

// Every pixel centre whose alpha reaches the cut lies in a tile the row test keeps.
void test_tile_rows() {
  uint32_t state = 1;
  const auto uniform = [&] {
    state = state * 1664525u + 1013904223u;
    return float(state >> 8) / float(1 << 24);
  };
  int kept = 0, box = 0;
  for (int trial = 0; trial < 400; ++trial) {
    const float sx = 0.6f + 40 * uniform() * uniform(), sy = 0.6f + 40 * uniform() * uniform();
    const float rho = 1.98f * uniform() - 0.99f;
    const float xx = sx * sx, yy = sy * sy, xy = rho * sx * sy, det = xx * yy - xy * xy;
    Record<float> r = {200 * uniform() - 20, 160 * uniform() - 20, yy / det, -xy / det,
                       xx / det,             0.0f,                 1,        1};
    r.opacity = 0.004f + 0.99f * uniform();
    const float extent = std::fmin(3.33f, std::sqrt(2 * std::log(255 * r.opacity)));
    const int32_t radii[2] = {int32_t(std::ceil(extent * sx)), int32_t(std::ceil(extent * sy))};
    const TileRect rect = tile_rect(r.x, r.y, radii, 10, 8);
    const CutEllipse<float> e = cut_ellipse(r);
    for (int ty = rect.y0; ty < rect.y1; ++ty) {
      int32_t x0, x1;
      tile_row_range(e, rect, ty, x0, x1);
      kept += x1 - x0;
      box += rect.x1 - rect.x0;
      for (int tx = rect.x0; tx < rect.x1; ++tx) {
        bool reached = false;
        for (int i = 0; i < kTilePixels; ++i) {
          const float dx = r.x - (tx * 16 + i % 16 + 0.5f), dy = r.y - (ty * 16 + i / 16 + 0.5f);
          const float sigma = 0.5f * (r.conic_a * dx * dx + r.conic_c * dy * dy) + r.conic_b * dx * dy;
          reached = reached || (sigma >= 0 && r.opacity * std::exp(-sigma) >= 1 / 255.f);
        }
        if (reached) expect("a reached tile is kept", tx >= x0 && tx < x1);
      }
    }
  }
  expect("the row test drops tiles of the box", kept < box * 8 / 10);
}

// Needles hundreds to thousands of pixels long: their determinant cancels in float, so the bounds
// must notice and keep the box.
void test_needles() {
  uint32_t state = 3;
  const auto uniform = [&] {
    state = state * 1664525u + 1013904223u;
    return float(state >> 8) / float(1 << 24);
  };
  for (int trial = 0; trial < 200; ++trial) {
    const float length = 100.f * std::pow(40.f, uniform()), angle = 3.14159f * uniform();
    const float ux = std::cos(angle), uy = std::sin(angle), l2 = length * length;
    const float xx = l2 * ux * ux + 0.3f, xy = l2 * ux * uy, yy = l2 * uy * uy + 0.3f;
    const float inv_det = 1 / (xx * yy - xy * xy);
    if (!(inv_det > 0) || !is_finite(inv_det)) continue;
    const float along = (2.4f + 0.7f * uniform()) * length;  // from the mean to the image's centre
    const Record<float> r = {128 - along * ux, 128 - along * uy, yy * inv_det, -xy * inv_det,
                             xx * inv_det,     1.f,              1,            1};
    const int32_t radii[2] = {int32_t(std::ceil(3.33f * std::sqrt(xx))),
                              int32_t(std::ceil(3.33f * std::sqrt(yy)))};
    const TileRect rect = tile_rect(r.x, r.y, radii, 16, 16);
    const CutEllipse<float> e = cut_ellipse(r);
    for (int y = 0; y < 256; ++y) {
      int32_t x0 = 0, x1 = 0;
      const bool row_in_box = y / 16 >= rect.y0 && y / 16 < rect.y1;
      if (row_in_box) tile_row_range(e, rect, y / 16, x0, x1);
      for (int x = 0; x < 256 && row_in_box; ++x) {
        const float dx = r.x - (x + 0.5f), dy = r.y - (y + 0.5f);
        const float sigma = 0.5f * (r.conic_a * dx * dx + r.conic_c * dy * dy) + r.conic_b * dx * dy;
        const bool drawn = sigma >= 0 && std::exp(-sigma) >= 1 / 255.f;
        if (drawn && x / 16 >= rect.x0 && x / 16 < rect.x1) {
          expect("a needle's tile is kept", x / 16 >= x0 && x / 16 < x1);
        }
      }
    }
  }
}

void test_depth_keys() {
  const float depths[] = {-2.f, -1.f, -0.f, 1e-30f, 1.f, 1.0000001f, 3e38f};
  for (int i = 0; i + 1 < 7; ++i) expect("keys rise", depth_key(depths[i]) < depth_key(depths[i + 1]));
  expect("zeros are equal", depth_key(-0.f) == depth_key(0.f));
  expect("double keys rise", depth_key(-1.0) < depth_key(-0.5) && depth_key(-0.5) < depth_key(2.0));
}

void test_exp() {
  for (int i = 0; i <= 8000; ++i) {
    const double x = -i / 100.0;
    Simd<float>::V f = {};
    f += float(x);
    Simd<double>::V d = {};
    d += x;
    const double want = std::exp(double(float(x)));
    expect_near("exp float", exp_nonpositive(f)[3] / want, 1, 3e-7);
    expect_near("exp double", exp_nonpositive(d)[1] / std::exp(x), 1, 4e-15);
  }
}

void test_half_and_bytes() {
  const struct { float value; uint16_t bits; } halves[] = {
      {0.f, 0x0000}, {-0.f, 0x8000}, {1.f, 0x3c00}, {65504.f, 0x7bff}, {65519.f, 0x7bff},
      {65520.f, 0x7c00}, {-1e30f, 0xfc00}, {5.9604645e-8f, 0x0001}, {6.0975552e-5f, 0x03ff},
      {0.333251953125f, 0x3555}, {1.00048828125f, 0x3c00}, {1.00146484375f, 0x3c02}};
  for (const auto& h : halves) expect_near("half", to_half(h.value), h.bits, 0);
  expect("half NaN", (to_half(std::nanf("")) & 0x7fff) > 0x7c00);
  expect_near("byte 0.5", to_byte(0.5f), 128, 0);
  expect_near("byte below", to_byte(-3.f), 0, 0);
  expect_near("byte above", to_byte(7.f), 255, 0);
  expect_near("byte NaN", to_byte(std::nanf("")), 0, 0);
}

void test_lerp() {
  const Lerp<double> l = resize_lerp<double>(0, 4, 2);  // half size: the mean of two
  expect_near("lerp i0", double(l.i0), 0, 0);
  expect_near("lerp w1", l.w1, 0.5, 1e-15);
  const Lerp<double> edge = resize_lerp<double>(7, 4, 8);
  expect_near("lerp edge", double(edge.i1), 3, 0);
}

}  // namespace

int main() {
  test_covariance();
  test_camera();
  test_jacobians();
  test_projection();
  test_sh_orthonormal();
  test_tile_rows();
  test_needles();
  test_depth_keys();
  test_exp();
  test_half_and_bytes();
  test_lerp();
  std::printf(failures == 0 ? "all math tests passed\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
