// A cheap test that a Gaussian may be seen by a view: the sphere around it against the frustum. It
// never drops a Gaussian that project_gaussian would keep or call invalid.
#pragma once

#include "gaussian.h"

namespace rapfast {

template <typename T>
struct FrustumTest {
  View<T> view;
  T gain_x, gain_y;  // variance in pixels per unit of size2 (and of 1 / z^2 in perspective)
  T width, height, eps2d, near_plane, far_plane;
  int32_t perspective;  // pinhole: x and y are divided by z
  int32_t bounded;      // the model has the bound below; fisheye has not
};

template <typename T>
RAPFAST_HD FrustumTest<T> make_frustum_test(const View<T>& v, const ProjectOptions<T>& o) {
  FrustumTest<T> f;
  f.view = v;
  f.perspective = o.camera_model == CameraModel::kPinhole;
  f.bounded = o.camera_model != CameraModel::kFisheye;
  // Rows of the Jacobian are at most f sqrt(1 + u^2) / z long, u being the clamped x / z.
  const T ux = f.perspective ? max_of(max_of(v.lim_x_neg, -v.lim_x_neg), max_of(v.lim_x_pos, -v.lim_x_pos)) : T(0);
  const T uy = f.perspective ? max_of(max_of(v.lim_y_neg, -v.lim_y_neg), max_of(v.lim_y_pos, -v.lim_y_pos)) : T(0);
  f.gain_x = v.fx * v.fx * (T(1) + ux * ux) * v.norm2;
  f.gain_y = v.fy * v.fy * (T(1) + uy * uy) * v.norm2;
  f.width = T(o.width);
  f.height = T(o.height);
  f.eps2d = o.eps2d;
  f.near_plane = o.near_plane;
  f.far_plane = o.far_plane;
  return f;
}

// `size2` bounds the largest eigenvalue of the covariance. Written without branches: the CPU runs it
// on vectors.
template <typename T>
RAPFAST_HD bool may_be_seen(const FrustumTest<T>& f, T mx, T my, T mz, T size2, T opacity) {
  const T* m = f.view.R.m;
  const T x = m[0] * mx + m[1] * my + m[2] * mz + f.view.t.x;
  const T y = m[3] * mx + m[4] * my + m[5] * mz + f.view.t.y;
  const T z = m[6] * mx + m[7] * my + m[8] * mz + f.view.t.z;
  const T rz = f.perspective ? T(1) / z : T(1);
  const T u = f.view.fx * x * rz + f.view.cx;
  const T v = f.view.fy * y * rz + f.view.cy;
  const T var_x = f.gain_x * size2 * rz * rz + f.eps2d;
  const T var_y = f.gain_y * size2 * rz * rz + f.eps2d;
  const T abs_u = u < T(0) ? -u : u;
  const T abs_v = v < T(0) ? -v : v;
  // A radius is rounded up to a pixel; the rest is slack for rounding.
  const T rx = Constants<T>::kBoxExtent * sqrt(var_x) * T(1.001) + T(2) + T(1e-4) * abs_u;
  const T ry = Constants<T>::kBoxExtent * sqrt(var_y) * T(1.001) + T(2) + T(1e-4) * abs_v;
  // Past this size a 2D covariance may overflow: project_gaussian decides.
  const T huge = T(1e15);
  const bool safe = (var_x < huge) & (var_y < huge) & (abs_u < huge) & (abs_v < huge);
  const bool outside = (u + rx <= T(0)) | (u - rx >= f.width) | (v + ry <= T(0)) | (v - ry >= f.height);
  const bool faint = opacity < Constants<T>::kAlphaCut;
  const bool in_depth = (z >= f.near_plane) & (z <= f.far_plane);
  // A fisheye view has no such bound; its faint Gaussians go too, far from where anything overflows.
  const bool tiny = (var_x < T(1e9)) & (var_y < T(1e9));
  const bool bounded = f.bounded != 0;
  return in_depth & !((bounded & safe & (outside | faint)) | (!bounded & tiny & faint));
}

// Bounds for may_be_seen: the largest squared scale, or a covariance's Frobenius norm.
template <typename T>
RAPFAST_HD T size2_of_scales(const T* s) {
  return max_of(s[0] * s[0], max_of(s[1] * s[1], s[2] * s[2]));
}

template <typename T>
RAPFAST_HD T size2_of_covariance(const Sym3<T>& c) {
  return sqrt(c.xx * c.xx + c.yy * c.yy + c.zz * c.zz +
              T(2) * (c.xy * c.xy + c.xz * c.xz + c.yz * c.yz));
}

// 0 for finite numbers, NaN if one is not: unlike their sum it cannot overflow.
template <typename T>
RAPFAST_HD T zero_if_finite(const T* values, int n) {
  T sum = T(0);
  for (int i = 0; i < n; ++i) sum += T(0) * values[i];
  return sum;
}

template <typename T>
RAPFAST_HD T zero_if_finite(const Sym3<T>& c) {
  return T(0) * c.xx + T(0) * c.xy + T(0) * c.xz + T(0) * c.yy + T(0) * c.yz + T(0) * c.zz;
}

template <typename T>
RAPFAST_HD Sym3<T> upper_triangle(const T* c /* [3, 3] */) {
  return {c[0], c[1], c[2], c[4], c[5], c[8]};
}

template <typename T>
RAPFAST_HD bool valid_quaternion(const T* q) {
  const T norm2 = q[0] * q[0] + q[1] * q[1] + q[2] * q[2] + q[3] * q[3];
  return norm2 > T(0) && is_finite(norm2);
}

}  // namespace rapfast
