// Cameras: a view in the form projection wants it, and the three camera models.
#pragma once

#include "constants.h"
#include "vec.h"

namespace rapfast {

enum class CameraModel : int32_t { kPinhole = 0, kOrtho = 1, kFisheye = 2 };

template <typename T>
struct View {
  Mat3<T> R;  // world to camera
  Vec3<T> t;
  T fx, fy, cx, cy;                        // pixels
  T lim_x_neg, lim_x_pos, lim_y_neg, lim_y_pos;  // clamp of x/z and y/z for the Jacobian
  T norm2;     // upper bound of |R|^2 (spectral norm), 1 for a rotation
  // 0 or 1: finite, invertible, positive focal lengths. Not a bool, so that a View has no padding, of
  // which the GPU would copy uninitialised bytes.
  int32_t valid;
};

template <typename T>
RAPFAST_HD View<T> load_view(const T* viewmat,  // [4, 4] row-major world-to-camera
                             const T* K,        // [3, 3]
                             int32_t width, int32_t height) {
  View<T> v;
  v.R = {{viewmat[0], viewmat[1], viewmat[2], viewmat[4], viewmat[5], viewmat[6], viewmat[8],
          viewmat[9], viewmat[10]}};
  v.t = {viewmat[3], viewmat[7], viewmat[11]};
  v.fx = K[0];
  v.fy = K[4];
  v.cx = K[2];
  v.cy = K[5];

  const T margin_x = Constants<T>::kFovMargin * T(0.5) * T(width) / v.fx;
  const T margin_y = Constants<T>::kFovMargin * T(0.5) * T(height) / v.fy;
  v.lim_x_pos = (T(width) - v.cx) / v.fx + margin_x;
  v.lim_x_neg = v.cx / v.fx + margin_x;
  v.lim_y_pos = (T(height) - v.cy) / v.fy + margin_y;
  v.lim_y_neg = v.cy / v.fy + margin_y;

  bool finite = true;
  T frobenius2 = T(0);
  for (int i = 0; i < 12; ++i) finite = finite && is_finite(viewmat[i]);
  for (int i = 0; i < 9; ++i) {
    finite = finite && is_finite(K[i]);
    frobenius2 += v.R.m[i] * v.R.m[i];
  }
  const T det = determinant(v.R);
  v.valid = finite && v.fx > T(0) && v.fy > T(0) && det != T(0) && is_finite(det);

  // The spectral norm of a rotation is 1; for anything else the Frobenius norm bounds it.
  T off = T(0);
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) {
      const T* a = v.R.m + 3 * i;
      const T* b = v.R.m + 3 * j;
      const T e = a[0] * b[0] + a[1] * b[1] + a[2] * b[2] - (i == j ? T(1) : T(0));
      off = max_of(off, e < T(0) ? -e : e);
    }
  }
  v.norm2 = off < T(1e-3) ? T(1.01) : frobenius2;
  return v;
}

// Camera centre -R^-1 t by the adjugate, in double: SH directions are differences from it.
template <typename T>
RAPFAST_HD Vec3<T> camera_center(const View<T>& v) {
  double m[9];
  for (int i = 0; i < 9; ++i) m[i] = double(v.R.m[i]);
  const double c00 = m[4] * m[8] - m[5] * m[7], c01 = m[2] * m[7] - m[1] * m[8],
               c02 = m[1] * m[5] - m[2] * m[4];
  const double c10 = m[5] * m[6] - m[3] * m[8], c11 = m[0] * m[8] - m[2] * m[6],
               c12 = m[2] * m[3] - m[0] * m[5];
  const double c20 = m[3] * m[7] - m[4] * m[6], c21 = m[1] * m[6] - m[0] * m[7],
               c22 = m[0] * m[4] - m[1] * m[3];
  const double inv_det = 1.0 / (m[0] * c00 + m[1] * c10 + m[2] * c20);
  const double x = double(v.t.x), y = double(v.t.y), z = double(v.t.z);
  return {T(-(c00 * x + c01 * y + c02 * z) * inv_det), T(-(c10 * x + c11 * y + c12 * z) * inv_det),
          T(-(c20 * x + c21 * y + c22 * z) * inv_det)};
}

template <typename T>
RAPFAST_HD Vec3<T> world_to_camera(const View<T>& v, const Vec3<T>& p) {
  const T* m = v.R.m;
  return {m[0] * p.x + m[1] * p.y + m[2] * p.z + v.t.x,
          m[3] * p.x + m[4] * p.y + m[5] * p.z + v.t.y,
          m[6] * p.x + m[7] * p.y + m[8] * p.z + v.t.z};
}

// Image point of a camera-space point and the Jacobian of that map: rows d(x)/d(p), d(y)/d(p).
template <typename T>
struct Projection2d {
  T x, y;
  Vec3<T> jx, jy;
};

// The Jacobian is taken at a point clamped to the widened frustum (EWA splatting, Zwicker et al.
// 2001, with INRIA's clamp), the image point is not clamped.
template <typename T>
RAPFAST_HD Projection2d<T> project_pinhole(const View<T>& v, const Vec3<T>& p) {
  const T rz = T(1) / p.z;
  const T ux = clamp_to(p.x * rz, -v.lim_x_neg, v.lim_x_pos);
  const T uy = clamp_to(p.y * rz, -v.lim_y_neg, v.lim_y_pos);
  Projection2d<T> out;
  out.x = v.fx * p.x * rz + v.cx;
  out.y = v.fy * p.y * rz + v.cy;
  out.jx = {v.fx * rz, T(0), -v.fx * ux * rz};
  out.jy = {T(0), v.fy * rz, -v.fy * uy * rz};
  return out;
}

template <typename T>
RAPFAST_HD Projection2d<T> project_ortho(const View<T>& v, const Vec3<T>& p) {
  Projection2d<T> out;
  out.x = v.fx * p.x + v.cx;
  out.y = v.fy * p.y + v.cy;
  out.jx = {v.fx, T(0), T(0)};
  out.jy = {T(0), v.fy, T(0)};
  return out;
}

// Equidistant fisheye: the image radius is f times the angle from the optical axis.
template <typename T>
RAPFAST_HD Projection2d<T> project_fisheye(const View<T>& v, const Vec3<T>& p) {
  const T eps = Constants<T>::kFisheyeEps;
  const T radius = sqrt(p.x * p.x + p.y * p.y) + eps;
  const T theta = atan2(radius, p.z + eps);
  Projection2d<T> out;
  out.x = p.x * v.fx * theta / radius + v.cx;
  out.y = p.y * v.fy * theta / radius + v.cy;
  const T x2 = p.x * p.x + eps;
  const T y2 = p.y * p.y;
  const T xy = p.x * p.y;
  const T r2 = x2 + y2;
  const T inv_d2 = T(1) / (r2 + p.z * p.z);
  const T b = atan2(radius, p.z) / radius / r2;
  const T a = p.z * inv_d2 / r2;
  out.jx = {v.fx * (x2 * a + y2 * b), v.fx * xy * (a - b), -v.fx * p.x * inv_d2};
  out.jy = {v.fy * xy * (a - b), v.fy * (y2 * a + x2 * b), -v.fy * p.y * inv_d2};
  return out;
}

template <typename T>
RAPFAST_HD Projection2d<T> project_point(CameraModel model, const View<T>& v, const Vec3<T>& p) {
  if (model == CameraModel::kOrtho) return project_ortho(v, p);
  if (model == CameraModel::kFisheye) return project_fisheye(v, p);
  return project_pinhole(v, p);
}

}  // namespace rapfast
