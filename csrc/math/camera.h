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
RAPFAST_HD Vec3<T> world_to_camera(const Mat3<T>& R, const Vec3<T>& t, const Vec3<T>& p) {
  const T* m = R.m;
  return {multiply_add(m[2], p.z, multiply_add(m[1], p.y, m[0] * p.x)) + t.x,
          multiply_add(m[5], p.z, multiply_add(m[4], p.y, m[3] * p.x)) + t.y,
          multiply_add(m[8], p.z, multiply_add(m[7], p.y, m[6] * p.x)) + t.z};
}

template <typename T>
RAPFAST_HD Vec3<T> world_to_camera(const View<T>& v, const Vec3<T>& p) {
  return world_to_camera(v.R, v.t, p);
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
  out.x = multiply_add(v.fx * p.x, rz, v.cx);
  out.y = multiply_add(v.fy * p.y, rz, v.cy);
  out.jx = {v.fx * rz, T(0), -v.fx * ux * rz};
  out.jy = {T(0), v.fy * rz, -v.fy * uy * rz};
  return out;
}

template <typename T>
RAPFAST_HD Projection2d<T> project_ortho(const View<T>& v, const Vec3<T>& p) {
  Projection2d<T> out;
  out.x = multiply_add(v.fx, p.x, v.cx);
  out.y = multiply_add(v.fy, p.y, v.cy);
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

// Of a view its rotation and translation alone, which is what camera_center reads.
template <typename T>
RAPFAST_HD View<T> load_pose(const T* viewmat /* [4, 4] */) {
  View<T> v = {};
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) v.R.m[3 * i + j] = viewmat[4 * i + j];
  }
  v.t = {viewmat[3], viewmat[7], viewmat[11]};
  return v;
}

// Gradients of what a View is made of: viewmat and K.
template <typename T>
struct ViewGrad {
  Mat3<T> R;
  Vec3<T> t;
  T fx, fy, cx, cy;
};

// Adjoint of camera_center, whose result is `center`: R center = -t.
template <typename T>
RAPFAST_HD void camera_center_vjp(const View<T>& v, const Vec3<T>& center, const Vec3<T>& v_center,
                                  ViewGrad<T>& v_view) {
  double m[9];
  for (int i = 0; i < 9; ++i) m[i] = double(v.R.m[i]);
  // Columns of the inverse times the determinant: u = R^-T v_center by Cramer's rule.
  const double x = double(v_center.x), y = double(v_center.y), z = double(v_center.z);
  const double c00 = m[4] * m[8] - m[5] * m[7], c01 = m[5] * m[6] - m[3] * m[8],
               c02 = m[3] * m[7] - m[4] * m[6];
  const double c10 = m[2] * m[7] - m[1] * m[8], c11 = m[0] * m[8] - m[2] * m[6],
               c12 = m[1] * m[6] - m[0] * m[7];
  const double c20 = m[1] * m[5] - m[2] * m[4], c21 = m[2] * m[3] - m[0] * m[5],
               c22 = m[0] * m[4] - m[1] * m[3];
  const double inv_det = 1.0 / (m[0] * c00 + m[1] * c01 + m[2] * c02);
  const T u[3] = {T((c00 * x + c01 * y + c02 * z) * inv_det),
                  T((c10 * x + c11 * y + c12 * z) * inv_det),
                  T((c20 * x + c21 * y + c22 * z) * inv_det)};
  for (int i = 0; i < 3; ++i) {
    v_view.R.m[3 * i] -= u[i] * center.x;
    v_view.R.m[3 * i + 1] -= u[i] * center.y;
    v_view.R.m[3 * i + 2] -= u[i] * center.z;
  }
  v_view.t.x -= u[0];
  v_view.t.y -= u[1];
  v_view.t.z -= u[2];
}

template <typename T>
RAPFAST_HD void world_to_camera_vjp(const View<T>& v, const Vec3<T>& p, const Vec3<T>& v_out,
                                    Vec3<T>& v_p, ViewGrad<T>& v_view) {
  const T* m = v.R.m;
  v_p.x += m[0] * v_out.x + m[3] * v_out.y + m[6] * v_out.z;
  v_p.y += m[1] * v_out.x + m[4] * v_out.y + m[7] * v_out.z;
  v_p.z += m[2] * v_out.x + m[5] * v_out.y + m[8] * v_out.z;
  T* v_m = v_view.R.m;
  v_m[0] += v_out.x * p.x;
  v_m[1] += v_out.x * p.y;
  v_m[2] += v_out.x * p.z;
  v_m[3] += v_out.y * p.x;
  v_m[4] += v_out.y * p.y;
  v_m[5] += v_out.y * p.z;
  v_m[6] += v_out.z * p.x;
  v_m[7] += v_out.z * p.y;
  v_m[8] += v_out.z * p.z;
  v_view.t.x += v_out.x;
  v_view.t.y += v_out.y;
  v_view.t.z += v_out.z;
}

// One axis of the pinhole's Jacobian, (f / z, -f u / z) with u = p / z clamped to [-lim_neg, lim_pos],
// and of its image point f p / z + c. The limits move with f and c.
template <typename T>
RAPFAST_HD void pinhole_axis_vjp(T p, T rz, T f, T lim_neg, T lim_pos, T v_x, T v_jp, T v_jz, T& v_p,
                                 T& v_rz, T& v_f, T& v_c) {
  const T ratio = p * rz;
  const T u = clamp_to(ratio, -lim_neg, lim_pos);
  const T v_u = -v_jz * f * rz;
  v_p += v_x * f * rz;
  v_rz += f * (v_x * p + v_jp - v_jz * u);
  v_f += rz * (v_x * p + v_jp - v_jz * u);
  v_c += v_x;
  if (ratio >= -lim_neg && ratio <= lim_pos) {
    v_p += v_u * rz;
    v_rz += v_u * p;
  } else {
    v_f -= v_u * u / f;
    v_c -= v_u / f;
  }
}

template <typename T>
RAPFAST_HD void project_pinhole_vjp(const View<T>& v, const Vec3<T>& p, const Projection2d<T>& v_out,
                                    Vec3<T>& v_p, ViewGrad<T>& v_view) {
  const T rz = T(1) / p.z;
  T v_rz = T(0);
  pinhole_axis_vjp(p.x, rz, v.fx, v.lim_x_neg, v.lim_x_pos, v_out.x, v_out.jx.x, v_out.jx.z, v_p.x,
                   v_rz, v_view.fx, v_view.cx);
  pinhole_axis_vjp(p.y, rz, v.fy, v.lim_y_neg, v.lim_y_pos, v_out.y, v_out.jy.y, v_out.jy.z, v_p.y,
                   v_rz, v_view.fy, v_view.cy);
  v_p.z -= v_rz * rz * rz;
}

template <typename T>
RAPFAST_HD void project_ortho_vjp(const View<T>& v, const Vec3<T>& p, const Projection2d<T>& v_out,
                                  Vec3<T>& v_p, ViewGrad<T>& v_view) {
  v_p.x += v_out.x * v.fx;
  v_p.y += v_out.y * v.fy;
  v_view.fx += v_out.x * p.x + v_out.jx.x;
  v_view.fy += v_out.y * p.y + v_out.jy.y;
  v_view.cx += v_out.x;
  v_view.cy += v_out.y;
}

template <typename T>
RAPFAST_HD void project_fisheye_vjp(const View<T>& v, const Vec3<T>& p, const Projection2d<T>& v_out,
                                    Vec3<T>& v_p, ViewGrad<T>& v_view) {
  const T eps = Constants<T>::kFisheyeEps;
  const T length = sqrt(p.x * p.x + p.y * p.y);
  const T radius = length + eps;
  const T angle = atan2(radius, p.z + eps) / radius;  // of the image point, per unit of radius
  const T x2 = p.x * p.x + eps;
  const T y2 = p.y * p.y;
  const T xy = p.x * p.y;
  const T r2 = x2 + y2;
  const T inv_d2 = T(1) / (r2 + p.z * p.z);
  const T b = atan2(radius, p.z) / radius / r2;
  const T a = p.z * inv_d2 / r2;
  const Vec3<T>& jx = v_out.jx;
  const Vec3<T>& jy = v_out.jy;

  v_view.fx += v_out.x * p.x * angle + jx.x * (x2 * a + y2 * b) + jx.y * xy * (a - b) -
               jx.z * p.x * inv_d2;
  v_view.fy += v_out.y * p.y * angle + jy.x * xy * (a - b) + jy.y * (y2 * a + x2 * b) -
               jy.z * p.y * inv_d2;
  v_view.cx += v_out.x;
  v_view.cy += v_out.y;

  const T gx = v.fx * jx.x, gy = v.fy * jy.y, gm = v.fx * jx.y + v.fy * jy.x;
  const T v_a = gx * x2 + gm * xy + gy * y2;
  const T v_b = gx * y2 - gm * xy + gy * x2;
  const T v_angle = v_out.x * v.fx * p.x + v_out.y * v.fy * p.y;
  const T v_inv_d2 = v_a * p.z / r2 - v.fx * jx.z * p.x - v.fy * jy.z * p.y;
  const T v_d2 = -v_inv_d2 * inv_d2 * inv_d2;
  const T v_r2 = v_d2 - (v_a * a + v_b * b) / r2;
  T v_radius = -(v_b * b + v_angle * angle) / radius;

  // atan2(r, z): d by r is z / (r^2 + z^2), d by z is -r / (r^2 + z^2). The two angles differ in eps.
  const T ze = p.z + eps;
  const T v_theta = v_angle / radius / (radius * radius + ze * ze);
  const T v_theta_j = v_b / radius / r2 / (radius * radius + p.z * p.z);
  v_radius += v_theta * ze + v_theta_j * p.z;
  v_p.z += v_a * inv_d2 / r2 + T(2) * p.z * v_d2 - radius * (v_theta + v_theta_j);

  const T v_x2 = gx * a + gy * b + v_r2;
  const T v_y2 = gx * b + gy * a + v_r2;
  const T v_xy = gm * (a - b);
  const T v_length = length > T(0) ? v_radius / length : T(0);
  v_p.x += v_out.x * v.fx * angle - v.fx * jx.z * inv_d2 + T(2) * p.x * v_x2 + p.y * v_xy +
           v_length * p.x;
  v_p.y += v_out.y * v.fy * angle - v.fy * jy.z * inv_d2 + T(2) * p.y * v_y2 + p.x * v_xy +
           v_length * p.y;
}

template <typename T>
RAPFAST_HD void project_point_vjp(CameraModel model, const View<T>& v, const Vec3<T>& p,
                                  const Projection2d<T>& v_out, Vec3<T>& v_p, ViewGrad<T>& v_view) {
  if (model == CameraModel::kOrtho) return project_ortho_vjp(v, p, v_out, v_p, v_view);
  if (model == CameraModel::kFisheye) return project_fisheye_vjp(v, p, v_out, v_p, v_view);
  project_pinhole_vjp(v, p, v_out, v_p, v_view);
}

}  // namespace rapfast
