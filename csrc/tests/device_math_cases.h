// The functions of csrc/math as cases of a test: what each reads, what it gives, and the seeded inputs
// it is tried on. A case reads `kInputs` floats and writes `kValues` numbers and `kDecisions` integers.
#pragma once

#include <limits>
#include <vector>

#include "../math/camera.h"
#include "../math/composite.h"
#include "../math/frustum.h"
#include "../math/gaussian.h"
#include "../math/sh.h"
#include "../math/tile.h"

namespace rapfast {

// A linear congruential generator: the same inputs everywhere.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2654435761u + 1) {}
  float uniform(float low = 0.f, float high = 1.f) {
    state_ = state_ * 6364136223846793005ull + 1442695040888963407ull;
    return low + (high - low) * float(uint32_t(state_ >> 40)) / 16777216.f;
  }
  float power(float low, float high) { return std::pow(10.f, uniform(low, high)); }
  int below(int n) { return int(uniform() * float(n)) % n; }
  float sign() { return uniform() < 0.5f ? -1.f : 1.f; }

 private:
  uint64_t state_;
};

// Numbers at which something begins, ends or breaks.
inline float special(Random& r) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const float values[] = {0.f,   -0.f,  1.f,    -1.f,   0.5f,   1e-45f, -1e-40f, 1e-38f, 1e-30f, 1e-20f, 1e-7f,
                          1e7f,  1e15f, -1e15f, 1e19f,  -1e19f, 1e30f,  -1e30f,  3e38f,  -3e38f, kInf,   -kInf,
                          NAN,   16.f,  32.f,   255.f,  1 / 255.f, 2.f, 1e-3f,   0.01f,  1e10f};
  return values[r.below(int(sizeof values / sizeof *values))];
}

inline void random_quaternion(Random& r, float* q) {
  const float norm = r.power(-3.f, 3.f);
  for (int i = 0; i < 4; ++i) q[i] = norm * r.uniform(-1.f, 1.f);
}

// A camera [16 + 9] near the origin that looks along z, turned a little; one in four is no rotation.
inline void random_camera(Random& r, float width, float height, float* in) {
  float q[4] = {1.f, r.uniform(-0.4f, 0.4f), r.uniform(-0.4f, 0.4f), r.uniform(-0.4f, 0.4f)};
  const float one[3] = {1.f, 1.f, 1.f};
  Mat3<float> R = scaled_rotation(q, one);
  const bool skewed = r.uniform() < 0.25f;
  for (float& x : R.m) x = skewed ? 1.3f * x + r.uniform(-0.2f, 0.2f) : x;
  const float rows[16] = {R.m[0], R.m[1], R.m[2], r.uniform(-1.f, 1.f), R.m[3], R.m[4], R.m[5], r.uniform(-1.f, 1.f),
                          R.m[6], R.m[7], R.m[8], r.uniform(-1.f, 4.f), 0.f,    0.f,    0.f,    1.f};
  for (int i = 0; i < 16; ++i) in[i] = rows[i];
  const float size = width > height ? width : height;
  const float K[9] = {size * r.uniform(0.4f, 1.6f), 0.f, width * r.uniform(0.3f, 0.7f), 0.f,
                      size * r.uniform(0.4f, 1.6f), height * r.uniform(0.3f, 0.7f), 0.f, 0.f, 1.f};
  for (int i = 0; i < 9; ++i) in[16 + i] = K[i];
}

struct CovarianceCase {
  static constexpr const char* kName = "covariance";
  static constexpr int kInputs = 7, kValues = 6, kDecisions = 0;

  template <typename T>
  RAPFAST_HD static void run(const T* in, T* values, int32_t*) {
    const Sym3<T> c = covariance(in, in + 4);
    const T all[6] = {c.xx, c.xy, c.xz, c.yy, c.yz, c.zz};
    for (int i = 0; i < 6; ++i) values[i] = all[i];
  }

  static void draw(Random& r, bool edge, float* in) {
    random_quaternion(r, in);
    for (int i = 4; i < 7; ++i) in[i] = r.power(-4.f, 2.f);
    if (edge) in[r.below(7)] = special(r);
  }
};

struct LoadViewCase {
  static constexpr const char* kName = "load_view";
  static constexpr int kInputs = 27, kValues = 21, kDecisions = 1;

  template <typename T>
  RAPFAST_HD static void run(const T* in, T* values, int32_t* decisions) {
    const View<T> v = load_view(in, in + 16, int32_t(in[25]), int32_t(in[26]));
    for (int i = 0; i < 9; ++i) values[i] = v.R.m[i];
    const T rest[12] = {v.t.x, v.t.y, v.t.z, v.fx, v.fy, v.cx, v.cy,
                        v.lim_x_neg, v.lim_x_pos, v.lim_y_neg, v.lim_y_pos, v.norm2};
    for (int i = 0; i < 12; ++i) values[9 + i] = rest[i];
    decisions[0] = v.valid;
  }

  static void draw(Random& r, bool edge, float* in) {
    in[25] = float(1 + r.below(2000));
    in[26] = float(1 + r.below(2000));
    random_camera(r, in[25], in[26], in);
    if (!edge) return;
    const int kind = r.below(40);
    if (kind == 0) {
      for (int i = 0; i < 12; ++i) in[i] = 0.f;
    } else if (kind == 1) {
      for (int i = 0; i < 3; ++i) in[4 + i] = 2.f * in[i];  // singular but for rounding
    } else {
      in[r.below(25)] = special(r);
    }
  }
};

struct CameraCenterCase {
  static constexpr const char* kName = "camera_center";
  static constexpr int kInputs = 25, kValues = 3, kDecisions = 0;

  template <typename T>
  RAPFAST_HD static void run(const T* in, T* values, int32_t*) {
    const Vec3<T> c = camera_center(load_view(in, in + 16, 640, 480));
    values[0] = c.x;
    values[1] = c.y;
    values[2] = c.z;
  }

  static void draw(Random& r, bool edge, float* in) {
    random_camera(r, 640.f, 480.f, in);
    if (edge) {
      const float scale = r.power(-12.f, 12.f);
      for (int i = 0; i < 12; ++i) in[i] *= scale;
    }
  }
};

template <CameraModel kModel>
struct ProjectPointCase {
  static constexpr const char* kName = kModel == CameraModel::kPinhole ? "project_pinhole"
                                       : kModel == CameraModel::kOrtho ? "project_ortho"
                                                                       : "project_fisheye";
  static constexpr int kInputs = 28, kValues = 8, kDecisions = 0;

  template <typename T>
  RAPFAST_HD static void run(const T* in, T* values, int32_t*) {
    const View<T> view = load_view(in, in + 16, 640, 480);
    const Projection2d<T> p = project_point(kModel, view, Vec3<T>{in[25], in[26], in[27]});
    const T all[8] = {p.x, p.y, p.jx.x, p.jx.y, p.jx.z, p.jy.x, p.jy.y, p.jy.z};
    for (int i = 0; i < 8; ++i) values[i] = all[i];
  }

  static void draw(Random& r, bool edge, float* in) {
    random_camera(r, 640.f, 480.f, in);
    in[27] = r.power(-2.f, 3.f);
    in[25] = in[27] * r.uniform(-3.f, 3.f);
    in[26] = in[27] * r.uniform(-3.f, 3.f);
    if (edge) in[25 + r.below(3)] = special(r);
    if (edge && r.below(4) == 0) in[25] = in[26] = 0.f;  // on the axis
  }
};

// A Gaussian through the whole of stage 1: near and far, both tests, the record.
template <CameraModel kModel, bool kAntialiased>
struct ProjectCase {
  static constexpr const char* kNames[3][2] = {
      {"project_gaussian pinhole", "project_gaussian pinhole antialiased"},
      {"project_gaussian ortho", "project_gaussian ortho antialiased"},
      {"project_gaussian fisheye", "project_gaussian fisheye antialiased"}};
  static constexpr const char* kName = kNames[int(kModel)][kAntialiased];
  static constexpr int kInputs = 41, kValues = 8, kDecisions = 4;
  static constexpr int kNotInDepth = 3;

  template <typename T>
  RAPFAST_HD static void run(const T* in, T* values, int32_t* decisions) {
    const int32_t width = int32_t(in[36]), height = int32_t(in[37]);
    const View<T> view = load_view(in, in + 16, width, height);
    const ProjectOptions<T> options = {width, height, kModel, kAntialiased, in[38], in[39], in[40], T(0)};
    const Vec3<T> mean_c = world_to_camera(view, Vec3<T>{in[25], in[26], in[27]});
    const Sym3<T> cov = covariance(in + 28, in + 32);
    Record<T> record = {T(0), T(0), T(0), T(0), T(0), T(0), T(0), T(0)};
    decisions[0] = kNotInDepth;
    decisions[1] = decisions[2] = 0;
    if (mean_c.z >= options.near_plane && mean_c.z <= options.far_plane) {
      decisions[0] = int32_t(project_gaussian(view, options, mean_c, cov, in[35], record, decisions + 1));
    }
    decisions[3] = may_be_seen<kModel>(make_frustum_test(view, options), in[25], in[26], in[27],
                                       extent_of(in[25], in[26], in[27], sigma_of_scales(in + 32), in[35]));
    if (decisions[0] != int32_t(Visibility::kVisible)) {
      record = {T(0), T(0), T(0), T(0), T(0), T(0), T(0), T(0)};
      decisions[1] = decisions[2] = 0;
    }
    const T all[8] = {record.x,       record.y,     record.conic_a, record.conic_b, record.conic_c,
                      record.opacity, record.depth, record.compensation};
    for (int i = 0; i < 8; ++i) values[i] = all[i];
  }

  static void draw(Random& r, bool edge, float* in) {
    in[36] = float(1 + r.below(900));
    in[37] = float(1 + r.below(600));
    random_camera(r, in[36], in[37], in);
    for (int i = 25; i < 28; ++i) in[i] = r.uniform(-3.f, 3.f);
    random_quaternion(r, in + 28);
    for (int i = 32; i < 35; ++i) in[i] = r.power(-3.f, 0.f);
    in[35] = r.uniform();
    in[38] = 0.3f;
    in[39] = 0.01f;
    in[40] = 1e10f;
    if (!edge) return;
    const int kind = r.below(6);
    if (kind == 0) in[25 + r.below(3)] = r.sign() * r.power(-10.f, 38.f);
    if (kind == 1) in[32 + r.below(3)] = r.power(-30.f, 19.f);
    if (kind == 2) in[35] = r.below(2) == 0 ? 1.f / 255.f : r.uniform(0.f, 0.008f);
    if (kind == 3) in[38] = 0.f;
    if (kind == 4) in[33] = in[34] = 1e-4f;  // a needle
    if (kind == 5) in[35] = r.power(0.f, 3.f);
  }
};

struct ShBasisCase {
  static constexpr const char* kName = "sh_basis";
  static constexpr int kInputs = 3, kValues = 25, kDecisions = 0;

  template <typename T>
  RAPFAST_HD static void run(const T* in, T* values, int32_t*) {
    sh_basis(4, Vec3<T>{in[0], in[1], in[2]}, values);
  }

  static void draw(Random& r, bool edge, float* in) {
    const float norm = r.power(-3.f, 3.f);
    for (int i = 0; i < 3; ++i) in[i] = norm * r.uniform(-1.f, 1.f);
    if (!edge) return;
    const int kind = r.below(3);
    if (kind == 0) in[0] = in[1] = in[2] = 0.f;
    if (kind == 1) in[r.below(3)] = in[r.below(3)] = 0.f;
    if (kind == 2) in[r.below(3)] = special(r);
  }
};

// Adjoints. What flows in is read last, as numbers between -1 and 1.

struct CovarianceVjpCase {
  static constexpr const char* kName = "covariance_vjp";
  static constexpr int kInputs = 13, kValues = 7, kDecisions = 0;

  template <typename T>
  RAPFAST_HD static void run(const T* in, T* values, int32_t*) {
    for (int i = 0; i < kValues; ++i) values[i] = T(0);
    covariance_vjp(in, in + 4, Sym3<T>{in[7], in[8], in[9], in[10], in[11], in[12]}, values, values + 4);
  }

  static void draw(Random& r, bool edge, float* in) {
    random_quaternion(r, in);
    for (int i = 4; i < 7; ++i) in[i] = r.power(-4.f, 2.f);
    for (int i = 7; i < 13; ++i) in[i] = r.uniform(-1.f, 1.f);
    if (edge) in[r.below(13)] = special(r);
  }
};

struct CameraCenterVjpCase {
  static constexpr const char* kName = "camera_center_vjp";
  static constexpr int kInputs = 28, kValues = 12, kDecisions = 0;

  template <typename T>
  RAPFAST_HD static void run(const T* in, T* values, int32_t*) {
    const View<T> pose = load_pose(in);
    ViewGrad<T> v = {};
    camera_center_vjp(pose, camera_center(pose), Vec3<T>{in[25], in[26], in[27]}, v);
    for (int i = 0; i < 9; ++i) values[i] = v.R.m[i];
    values[9] = v.t.x;
    values[10] = v.t.y;
    values[11] = v.t.z;
  }

  static void draw(Random& r, bool edge, float* in) {
    random_camera(r, 640.f, 480.f, in);
    for (int i = 25; i < 28; ++i) in[i] = r.uniform(-1.f, 1.f);
    if (edge) in[25 + r.below(3)] = special(r);
  }
};

template <CameraModel kModel>
struct ProjectPointVjpCase {
  static constexpr const char* kName = kModel == CameraModel::kPinhole ? "project_pinhole_vjp"
                                       : kModel == CameraModel::kOrtho ? "project_ortho_vjp"
                                                                       : "project_fisheye_vjp";
  static constexpr int kInputs = 36, kValues = 7, kDecisions = 0;

  template <typename T>
  RAPFAST_HD static void run(const T* in, T* values, int32_t*) {
    const View<T> view = load_view(in, in + 16, 640, 480);
    const Projection2d<T> v_out = {in[28], in[29], {in[30], in[31], in[32]}, {in[33], in[34], in[35]}};
    Vec3<T> v_p = {T(0), T(0), T(0)};
    ViewGrad<T> v = {};
    project_point_vjp(kModel, view, Vec3<T>{in[25], in[26], in[27]}, v_out, v_p, v);
    const T all[7] = {v_p.x, v_p.y, v_p.z, v.fx, v.fy, v.cx, v.cy};
    for (int i = 0; i < 7; ++i) values[i] = all[i];
  }

  static void draw(Random& r, bool edge, float* in) {
    ProjectPointCase<kModel>::draw(r, edge, in);
    for (int i = 28; i < 36; ++i) in[i] = r.uniform(-1.f, 1.f);
  }
};

// The whole adjoint of stage 1 for one visible Gaussian.
template <CameraModel kModel, bool kAntialiased>
struct ProjectVjpCase {
  static constexpr const char* kNames[3][2] = {
      {"project_gaussian_vjp pinhole", "project_gaussian_vjp pinhole antialiased"},
      {"project_gaussian_vjp ortho", "project_gaussian_vjp ortho antialiased"},
      {"project_gaussian_vjp fisheye", "project_gaussian_vjp fisheye antialiased"}};
  static constexpr const char* kName = kNames[int(kModel)][kAntialiased];
  static constexpr int kInputs = 48, kValues = 26, kDecisions = 1;

  template <typename T>
  RAPFAST_HD static void run(const T* in, T* values, int32_t* decisions) {
    using Forward = ProjectCase<kModel, kAntialiased>;
    T record[Forward::kValues];
    int32_t forward[Forward::kDecisions];
    Forward::run(in, record, forward);
    decisions[0] = forward[0];
    for (int i = 0; i < kValues; ++i) values[i] = T(0);
    if (forward[0] != int32_t(Visibility::kVisible)) return;
    const View<T> view = load_view(in, in + 16, int32_t(in[36]), int32_t(in[37]));
    const Vec3<T> mean = {in[25], in[26], in[27]};
    const Record<T> v_record = {in[41], in[42], in[43], in[44], in[45], in[46], in[47], T(0)};
    Vec3<T> v_mean_c = {T(0), T(0), T(0)}, v_mean = {T(0), T(0), T(0)};
    Sym3<T> v_cov = {T(0), T(0), T(0), T(0), T(0), T(0)};
    T v_opacity = T(0);
    ViewGrad<T> v = {};
    project_gaussian_vjp(view, kModel, kAntialiased, in[38], world_to_camera(view, mean),
                         covariance(in + 28, in + 32), in[35], v_record, v_mean_c, v_cov, v_opacity, v);
    world_to_camera_vjp(view, mean, v_mean_c, v_mean, v);
    const T all[17] = {v_mean.x, v_mean.y, v_mean.z, v_cov.xx, v_cov.xy, v_cov.xz, v_cov.yy, v_cov.yz, v_cov.zz,
                       v_opacity, v.t.x, v.t.y, v.t.z, v.fx, v.fy, v.cx, v.cy};
    for (int i = 0; i < 17; ++i) values[i] = all[i];
    for (int i = 0; i < 9; ++i) values[17 + i] = v.R.m[i];
  }

  static void draw(Random& r, bool edge, float* in) {
    ProjectCase<kModel, kAntialiased>::draw(r, edge, in);
    for (int i = 41; i < 48; ++i) in[i] = r.uniform(-1.f, 1.f);
  }
};

struct ShBasisVjpCase {
  static constexpr const char* kName = "sh_basis_vjp";
  static constexpr int kInputs = 28, kValues = 3, kDecisions = 0;

  template <typename T>
  RAPFAST_HD static void run(const T* in, T* values, int32_t*) {
    const Vec3<T> v = sh_basis_vjp(4, Vec3<T>{in[0], in[1], in[2]}, in + 3);
    values[0] = v.x;
    values[1] = v.y;
    values[2] = v.z;
  }

  static void draw(Random& r, bool edge, float* in) {
    ShBasisCase::draw(r, edge, in);
    for (int i = 3; i < 28; ++i) in[i] = r.uniform(-1.f, 1.f);
  }
};

struct TileRectCase {
  static constexpr const char* kName = "tile_rect";
  static constexpr int kInputs = 6, kValues = 0, kDecisions = 4;

  template <typename T>
  RAPFAST_HD static void run(const T* in, T*, int32_t* decisions) {
    const int32_t radii[2] = {int32_t(in[2]), int32_t(in[3])};
    const TileRect rect = tile_rect(in[0], in[1], radii, int32_t(in[4]), int32_t(in[5]));
    decisions[0] = rect.x0;
    decisions[1] = rect.x1;
    decisions[2] = rect.y0;
    decisions[3] = rect.y1;
  }

  static void draw(Random& r, bool edge, float* in) {
    for (int i = 0; i < 2; ++i) {
      in[i] = r.uniform(-200.f, 2000.f);
      in[2 + i] = std::floor(r.power(0.f, 3.f));
      in[4 + i] = float(1 + r.below(120));
    }
    if (!edge) return;
    for (int i = 0; i < 2; ++i) {
      if (r.below(2) == 0) in[i] = 16.f * std::floor(in[i] / 16.f);  // on a tile's edge
      if (r.below(3) == 0) in[i] = r.sign() * r.power(5.f, 38.f);
      if (r.below(3) == 0) in[2 + i] = 2147483520.f;  // the largest float that int32 holds
    }
  }
};

// The rows of a 10 x 8 grid of tiles.
struct TileRowsCase {
  static constexpr const char* kName = "cut_ellipse, tile_row_range";
  static constexpr int kInputs = 8, kValues = 3, kDecisions = 16;

  template <typename T>
  RAPFAST_HD static void run(const T* in, T* values, int32_t* decisions) {
    const Record<T> record = {in[0], in[1], in[2], in[3], in[4], in[5], T(1), T(1)};
    const int32_t radii[2] = {int32_t(in[6]), int32_t(in[7])};
    const TileRect rect = tile_rect(record.x, record.y, radii, 10, 8);
    const CutEllipse<T> ellipse = cut_ellipse(record);
    values[0] = ellipse.level;
    values[1] = ellipse.half_height;
    values[2] = ellipse.dy_of_right;
    for (int32_t ty = 0; ty < 8; ++ty) {
      decisions[2 * ty] = decisions[2 * ty + 1] = 0;
      if (ty >= rect.y0 && ty < rect.y1) {
        tile_row_range(ellipse, rect, ty, decisions[2 * ty], decisions[2 * ty + 1]);
      }
    }
  }

  static void draw(Random& r, bool edge, float* in) {
    const float sx = 0.55f + r.power(-1.f, 1.8f), sy = 0.55f + r.power(-1.f, 1.8f);
    const float rho = edge ? r.sign() * (1.f - r.power(-6.f, -1.f)) : r.uniform(-0.9f, 0.9f);
    const float xx = sx * sx, yy = sy * sy, xy = rho * sx * sy, det = xx * yy - xy * xy;
    in[0] = r.uniform(-20.f, 180.f);
    in[1] = r.uniform(-20.f, 150.f);
    in[2] = yy / det;
    in[3] = -xy / det;
    in[4] = xx / det;
    in[5] = r.uniform(0.004f, 1.f);
    if (edge && r.below(4) == 0) in[5] = r.below(2) == 0 ? 0.f : r.power(0.f, 2.f);
    const float extent = std::fmin(3.33f, std::sqrt(2.f * std::log(std::fmax(1.01f, 255.f * in[5]))));
    in[6] = std::ceil(extent * sx);
    in[7] = std::ceil(extent * sy);
  }
};

// As bits, so that float and Bounded agree on what the case gives: an exact map has no bound.
struct DepthKeyCase {
  static constexpr const char* kName = "depth_key";
  static constexpr int kInputs = 1, kValues = 0, kDecisions = 3;

  template <typename T>
  RAPFAST_HD static void run(const T* in, T*, int32_t* decisions) {
    const double depth = double(in[0]);
    const uint64_t key = depth_key(depth * 1.0000000001);
    decisions[0] = int32_t(depth_key(float(depth)));
    decisions[1] = int32_t(key);
    decisions[2] = int32_t(key >> 32);
  }

  static void draw(Random& r, bool edge, float* in) {
    in[0] = r.sign() * r.power(-38.f, 38.f);
    do {
      if (edge) in[0] = special(r);
    } while (in[0] != in[0]);  // a NaN's bits may differ
  }
};

template <CameraModel kModel>
struct MayBeSeenCase {
  static constexpr const char* kNames[3] = {"may_be_seen pinhole", "may_be_seen ortho", "may_be_seen fisheye"};
  static constexpr const char* kName = kNames[int(kModel)];
  static constexpr int kInputs = 31, kValues = 7, kDecisions = 1;

  template <typename T>
  RAPFAST_HD static void run(const T* in, T* values, int32_t* decisions) {
    const View<T> view = load_view(in, in + 16, 640, 480);
    const ProjectOptions<T> options = {640, 480, kModel, false, T(0.3), in[30], T(1e10), T(0)};
    const FrustumTest<T> test = make_frustum_test(view, options);
    values[0] = test.reach_x;
    values[1] = test.reach_y;
    values[2] = test.left;
    values[3] = test.bottom;
    values[4] = test.safe_scale;
    values[5] = test.safe_offset;
    values[6] = test.cone + T(2);  // which may be 0 itself
    decisions[0] = may_be_seen<kModel>(test, in[25], in[26], in[27],
                                       extent_of(in[25], in[26], in[27], in[28], in[29]));
  }

  static void draw(Random& r, bool edge, float* in) {
    random_camera(r, 640.f, 480.f, in);
    for (int i = 25; i < 28; ++i) in[i] = r.uniform(-6.f, 6.f);
    in[28] = r.power(-6.f, 0.f);
    in[29] = r.uniform();
    in[30] = 0.01f;
    if (edge) in[25 + r.below(5)] = special(r);
  }
};

struct ResizeCase {
  static constexpr const char* kName = "resize_lerp, bilinear";
  static constexpr int kInputs = 8, kValues = 3, kDecisions = 0;

  // The position i0 + w1 instead of i0, which jumps where the position is a whole number.
  template <typename T>
  RAPFAST_HD static void run(const T* in, T* values, int32_t*) {
    const Lerp<T> y = resize_lerp<T>(int64_t(in[0]), int64_t(in[1]), int64_t(in[2]));
    const Lerp<T> x = resize_lerp<T>(int64_t(in[3]), 640, 427);
    values[0] = T(double(y.i0)) + y.w1;
    values[1] = T(double(y.i1)) - T(double(y.i0)) + x.w0 + x.w1;
    values[2] = bilinear(y, x, in[4], in[5], in[6], in[7]);
  }

  static void draw(Random& r, bool edge, float* in) {
    in[1] = float(1 + r.below(3000));
    in[2] = edge ? (r.below(2) == 0 ? in[1] : 1.f) : float(1 + r.below(3000));
    in[0] = float(edge && r.below(2) == 0 ? int(in[2]) - 1 : r.below(int(in[2])));
    in[3] = float(r.below(427));
    for (int i = 4; i < 8; ++i) in[i] = edge ? special(r) : r.uniform(-1.f, 2.f);
  }
};

struct ToByteCase {
  static constexpr const char* kName = "to_byte";
  static constexpr int kInputs = 1, kValues = 0, kDecisions = 1;

  template <typename T>
  RAPFAST_HD static void run(const T* in, T*, int32_t* decisions) {
    decisions[0] = to_byte(in[0]);
  }

  static void draw(Random& r, bool edge, float* in) { in[0] = edge ? special(r) : r.uniform(-0.5f, 1.5f); }
};

}  // namespace rapfast
