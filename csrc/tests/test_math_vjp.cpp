// The adjoints of csrc/math against central differences, in double.
#include <cmath>
#include <cstdio>
#include <functional>
#include <vector>

#include "../math/camera.h"
#include "../math/gaussian.h"
#include "../math/sh.h"

using namespace rapfast;

namespace {

int failures = 0;

// A repeatable number in [-1, 1].
double random_number() {
  static uint64_t state = 88172645463325252ull;
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return double(state >> 11) / double(1ull << 52) - 1.0;
}

// `gradient` of the function `f` at x, both as long as x.
void expect_gradient(const char* what, const std::function<double(const std::vector<double>&)>& f,
                     const std::vector<double>& x, const std::vector<double>& gradient) {
  double largest = 0;
  for (double g : gradient) largest = std::max(largest, std::abs(g));
  if (!(largest > 1e-3)) {
    std::printf("%s: the gradient is too small to say anything\n", what);
    ++failures;
  }
  for (size_t i = 0; i < x.size(); ++i) {
    const double step = 1e-6 * std::max(1.0, std::abs(x[i]));
    std::vector<double> at = x;
    at[i] = x[i] + step;
    const double above = f(at);
    at[i] = x[i] - step;
    const double want = (above - f(at)) / (2 * step);
    if (!(std::abs(gradient[i] - want) <= 1e-6 * std::max(1.0, largest))) {
      std::printf("%s, input %zu: got %.9g, want %.9g\n", what, i, gradient[i], want);
      ++failures;
    }
  }
}

void test_covariance() {
  const std::vector<double> w = {0.3, -1.1, 0.7, 0.9, -0.4, 1.3};
  const auto f = [&](const std::vector<double>& x) {
    const Sym3<double> c = covariance(x.data(), x.data() + 4);
    return w[0] * c.xx + w[1] * c.xy + w[2] * c.xz + w[3] * c.yy + w[4] * c.yz + w[5] * c.zz;
  };
  for (const std::vector<double>& x :
       {std::vector<double>{0.4, -0.8, 1.1, 0.3, 0.5, 1.2, 2.0}, {-2.0, 0.1, 0.7, -1.0, 0.0, 0.3, 1.0}}) {
    std::vector<double> gradient(7, 0.0);
    const Sym3<double> v_cov = {w[0], w[1], w[2], w[3], w[4], w[5]};
    covariance_vjp(x.data(), x.data() + 4, v_cov, gradient.data(), gradient.data() + 4);
    expect_gradient("covariance", f, x, gradient);
  }
}

void test_camera_center() {
  const double K[9] = {50, 0, 32, 0, 60, 24, 0, 0, 1};
  const Vec3<double> w = {0.7, -0.4, 1.2};
  std::vector<double> x = {1.1, -0.2, 0.3, 0.5, 0.4, 0.9, -0.1, -1.5, 0.2, 0.3, 1.3, 2.0};
  const auto view_of = [&](const std::vector<double>& rows) {
    std::vector<double> viewmat(rows);
    viewmat.insert(viewmat.end(), {0, 0, 0, 1});
    return load_view(viewmat.data(), K, 64, 48);
  };
  const View<double> view = view_of(x);
  ViewGrad<double> g = {};
  camera_center_vjp(view, camera_center(view), w, g);
  std::vector<double> gradient;
  const double t[3] = {g.t.x, g.t.y, g.t.z};
  for (int i = 0; i < 3; ++i) {
    gradient.insert(gradient.end(), g.R.m + 3 * i, g.R.m + 3 * i + 3);
    gradient.push_back(t[i]);
  }
  expect_gradient(
      "camera centre",
      [&](const std::vector<double>& at) { return dot(w, camera_center(view_of(at))); }, x, gradient);
}

// All numbers of one projection: mean, covariance, opacity, viewmat and intrinsics.
struct Inputs {
  static constexpr size_t kCov = 3, kOpacity = 9, kViewmat = 10, kK = 22, kSize = 26;
  View<double> view;
  Vec3<double> mean;
  Sym3<double> cov;
  double opacity;

  explicit Inputs(const std::vector<double>& x) {
    double viewmat[16] = {}, K[9] = {x[kK], 0, x[kK + 2], 0, x[kK + 1], x[kK + 3], 0, 0, 1};
    for (size_t i = 0; i < 12; ++i) viewmat[i] = x[kViewmat + i];
    view = load_view(viewmat, K, 64, 48);
    mean = {x[0], x[1], x[2]};
    cov = {x[kCov], x[kCov + 1], x[kCov + 2], x[kCov + 3], x[kCov + 4], x[kCov + 5]};
    opacity = x[kOpacity];
  }
};

void test_projection(const char* what, CameraModel model, bool antialiased, double mean_x,
                     double mean_y, double size) {
  const ProjectOptions<double> options = {64, 48, model, antialiased, 0.3, 0.01, 1e10, 0.0};
  const Record<double> w = {0.3, -0.2, 2.0, -3.0, 1.7, 0.8, 0.1, antialiased ? 0.0 : 0.6};
  const std::vector<double> x = {mean_x, mean_y, 2.5,                                    // mean
                                 size, 0.2 * size, -0.1 * size, 0.8 * size, 0.15 * size, 0.6 * size,
                                 0.7,                                                    // opacity
                                 0.98, -0.1, 0.12, 0.05, 0.11, 1.02, -0.06, -0.1, -0.09, 0.07, 0.97, 0.2,
                                 model == CameraModel::kOrtho ? 15.0 : 50.0,
                                 model == CameraModel::kOrtho ? 17.0 : 57.0, 31.0, 25.0};
  const auto f = [&](const std::vector<double>& at) {
    const Inputs in(at);
    Record<double> r;
    int32_t radii[2];
    const Visibility seen = project_gaussian(in.view, options, world_to_camera(in.view, in.mean),
                                             in.cov, in.opacity, r, radii);
    if (seen != Visibility::kVisible) {
      std::printf("%s: the Gaussian is not visible\n", what);
      ++failures;
      return 0.0;
    }
    return w.x * r.x + w.y * r.y + w.conic_a * r.conic_a + w.conic_b * r.conic_b +
           w.conic_c * r.conic_c + w.opacity * r.opacity + w.depth * r.depth +
           w.compensation * r.compensation;
  };

  const Inputs in(x);
  const Vec3<double> mean_c = world_to_camera(in.view, in.mean);
  Vec3<double> v_mean_c = {}, v_mean = {};
  Sym3<double> v_cov = {};
  double v_opacity = 0;
  ViewGrad<double> v_view = {};
  project_gaussian_vjp(in.view, model, antialiased, 0.3, mean_c, in.cov, in.opacity, w, v_mean_c,
                       v_cov, v_opacity, v_view);
  world_to_camera_vjp(in.view, in.mean, v_mean_c, v_mean, v_view);
  const double* R = v_view.R.m;
  expect_gradient(what, f, x,
                  {v_mean.x, v_mean.y, v_mean.z, v_cov.xx, v_cov.xy, v_cov.xz, v_cov.yy, v_cov.yz,
                   v_cov.zz, v_opacity, R[0], R[1], R[2], v_view.t.x, R[3], R[4], R[5], v_view.t.y,
                   R[6], R[7], R[8], v_view.t.z, v_view.fx, v_view.fy, v_view.cx, v_view.cy});
}

void test_sh() {
  for (int degree = 1; degree <= kMaxShDegree; ++degree) {
    std::vector<double> w(25);
    for (double& v : w) v = random_number();
    const auto f = [&](const std::vector<double>& d) {
      double basis[25], sum = 0;
      sh_basis(degree, Vec3<double>{d[0], d[1], d[2]}, basis);
      for (int k = 0; k < sh_bases(degree); ++k) sum += w[size_t(k)] * basis[k];
      return sum;
    };
    for (int trial = 0; trial < 5; ++trial) {
      const std::vector<double> d = {random_number(), random_number(), 1.5 * random_number()};
      const Vec3<double> v = sh_basis_vjp(degree, Vec3<double>{d[0], d[1], d[2]}, w.data());
      expect_gradient("spherical harmonics", f, d, {v.x, v.y, v.z});
    }
  }
}

}  // namespace

int main() {
  test_covariance();
  test_camera_center();
  for (bool antialiased : {false, true}) {
    test_projection("pinhole", CameraModel::kPinhole, antialiased, 0.3, -0.2, 0.01);
    // Past the limits of x / z and y / z, on either side, and wide enough to reach into the image.
    test_projection("pinhole, right of the Jacobian's clamp", CameraModel::kPinhole, antialiased, 3.0, 0.1, 0.9);
    test_projection("pinhole, above the Jacobian's clamp", CameraModel::kPinhole, antialiased, 0.2, -2.5, 0.9);
    test_projection("orthographic", CameraModel::kOrtho, antialiased, 0.3, -0.2, 0.02);
    test_projection("fisheye", CameraModel::kFisheye, antialiased, 0.5, -0.3, 0.02);
    test_projection("fisheye, far from the axis", CameraModel::kFisheye, antialiased, -1.6, 0.4, 0.05);
  }
  test_sh();
  if (failures > 0) std::printf("%d failures\n", failures);
  return failures > 0;
}
