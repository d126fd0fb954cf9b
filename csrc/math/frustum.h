// A cheap test that a Gaussian may be seen by a view: the sphere around it against the frustum. It
// never drops a Gaussian that project_gaussian would keep or call invalid.
//
// Seen from the camera, with w = z (pinhole), 1 (ortho) or the distance from the camera (fisheye), the
// box of a Gaussian reaches over the left edge of the image only where
//
//   x + left w + reach_x sigma > 0,
//
// sigma being its largest standard deviation, and likewise at the other edges.
// - Pinhole and ortho: that is u + radius > 0 times w / fx, since the radius is at most
//   3.33 (fx |Jacobian row| sigma / w + sqrt(eps2d)) + 1.
// - Fisheye: u is -fx a left of the principal point, a = theta cos(phi) for a direction at the angle theta
//   from the axis and phi around it. As sin is concave, sin(a) >= cos(phi) sin(theta) = -x / d for
//   a <= pi / 2. So where -x / d exceeds sin(c) + delta, at least sin(c + delta), a exceeds c + delta:
//   c is the angle of the edge and delta that of the radius. A cone around the image's corners cuts off
//   more: theta <= cone + delta needs cos(theta) >= cos(cone) - delta. The Jacobian's rows are at most
//   f max(1, theta / sin(theta)) / d long, and theta / sin(theta) is at most pi / 2 before the camera.
#pragma once

#include "gaussian.h"

namespace rapfast {

template <typename T>
struct FrustumTest {
  Mat3<T> R;  // world to camera
  Vec3<T> t;
  T left, right, top, bottom;
  T reach_x, reach_y;
  // The bounds hold where z (ortho: 1) exceeds safe_scale x size + safe_offset; nearer to the camera plane
  // something may overflow, and project_gaussian decides.
  T safe_scale, safe_offset;
  T near_plane, far_plane;
  T cone;      // fisheye: cosine of the angle of the farthest corner, less slack
  T cone_reach;
};

template <typename T>
RAPFAST_HD T magnitude_of(T x) {
  return x < T(0) ? -x : x;
}

// Of a number and NaN it may give either.
template <typename T>
RAPFAST_HD T larger_of(T a, T b) {
  return max_of(a, b);
}

#if defined(__CUDA_ARCH__)
RAPFAST_HD float magnitude_of(float x) { return fabsf(x); }
RAPFAST_HD float larger_of(float a, float b) { return fmaxf(a, b); }
#endif

// For a fisheye edge at this angle from the principal point. A principal point beyond the edge counts as
// one on it; an edge behind the camera cuts nothing.
template <typename T>
RAPFAST_HD T sine_of_edge(T angle) {
  return !(angle < T(1.57)) ? T(1.001) : (angle > T(0) ? T(sin(angle)) : T(0));
}

template <typename T>
RAPFAST_HD FrustumTest<T> make_frustum_test(const View<T>& v, const ProjectOptions<T>& o) {
  FrustumTest<T> f;
  f.R = v.R;
  f.t = v.t;
  f.near_plane = o.near_plane;
  f.far_plane = o.far_plane;

  const bool fisheye = o.camera_model == CameraModel::kFisheye;
  const bool pinhole = o.camera_model == CameraModel::kPinhole;
  // Length of the Jacobian's rows times w / f: the point where it is taken is clamped to the widened frustum.
  const T ux = pinhole ? max_of(magnitude_of(v.lim_x_neg), magnitude_of(v.lim_x_pos)) : T(0);
  const T uy = pinhole ? max_of(magnitude_of(v.lim_y_neg), magnitude_of(v.lim_y_pos)) : T(0);
  const T bend = fisheye ? T(1.5708) : T(1);
  const T gain_x = bend * sqrt((T(1) + ux * ux) * v.norm2);
  const T gain_y = bend * sqrt((T(1) + uy * uy) * v.norm2);
  f.reach_x = T(1.001) * Constants<T>::kBoxExtent * gain_x;
  f.reach_y = T(1.001) * Constants<T>::kBoxExtent * gain_y;
  f.cone_reach = T(1.4143) * max_of(f.reach_x, f.reach_y);

  // Pixels around the image: the blur's share of a radius, the rounding up of it, and slack.
  const T width = T(o.width), height = T(o.height);
  const T margin = T(1.001) * Constants<T>::kBoxExtent * sqrt(o.eps2d) + T(2);
  const T margin_x = margin + T(1e-5) * (magnitude_of(v.cx) + width);
  const T margin_y = margin + T(1e-5) * (magnitude_of(v.cy) + height);
  f.left = (v.cx + margin_x) / v.fx;
  f.right = (width - v.cx + margin_x) / v.fx;
  f.top = (v.cy + margin_y) / v.fy;
  f.bottom = (height - v.cy + margin_y) / v.fy;
  f.cone = T(-1);
  if (fisheye) {
    const T slack = T(1e-3);  // radians: kFisheyeEps moves points by less
    const T x = max_of(f.left, f.right) + slack, y = max_of(f.top, f.bottom) + slack;
    const T corner = sqrt(x * x + y * y);
    if (corner < T(3.1415)) f.cone = T(cos(corner)) - T(1e-6);
    f.left = sine_of_edge(f.left + slack);
    f.right = sine_of_edge(f.right + slack);
    f.top = sine_of_edge(f.top + slack);
    f.bottom = sine_of_edge(f.bottom + slack);
  }

  // Coordinates below 1e14 w / f and standard deviations below 1e7 w / f pixels.
  const T* m = v.R.m;
  const T sum_x = magnitude_of(m[0]) + magnitude_of(m[1]) + magnitude_of(m[2]);
  const T sum_y = magnitude_of(m[3]) + magnitude_of(m[4]) + magnitude_of(m[5]);
  f.safe_scale = T(1e-7) * max_of(v.fx * gain_x, v.fy * gain_y) + T(1e-14) * max_of(v.fx * sum_x, v.fy * sum_y);
  f.safe_offset = T(1e-14) * max_of(v.fx * magnitude_of(v.t.x), v.fy * magnitude_of(v.t.y)) +
                  (fisheye ? T(1e-3) : T(1e-30));
  const T largest = max_of(max_of(magnitude_of(v.cx), magnitude_of(v.cy)),
                           max_of(max_of(magnitude_of(v.t.x), magnitude_of(v.t.y)), o.eps2d));
  if (!(largest < T(1e14))) f.safe_offset = T(INFINITY);
  return f;
}

// What the test wants to know of a Gaussian. `sigma` is at least its largest standard deviation.
template <typename T>
struct Extent {
  T sigma;  // minus infinity where it is too faint to be drawn at all
  T size;   // at least |sigma| and the mean's coordinates
};

template <typename T>
RAPFAST_HD Extent<T> extent_of(T mx, T my, T mz, T sigma, T opacity) {
  const T size =
      larger_of(larger_of(sigma, magnitude_of(mx)), larger_of(magnitude_of(my), magnitude_of(mz)));
  return {opacity < Constants<T>::kAlphaCut ? -T(INFINITY) : sigma, size < T(1e15) ? size : T(INFINITY)};
}

// Written without branches: the CPU runs it on vectors.
template <CameraModel kModel, typename T>
RAPFAST_HD bool may_be_seen(const FrustumTest<T>& f, T mx, T my, T mz, const Extent<T>& extent) {
  const Vec3<T> p = world_to_camera(f.R, f.t, Vec3<T>{mx, my, mz});
  const T z_or_1 = kModel == CameraModel::kOrtho ? T(1) : p.z;
  T w = z_or_1;
  if (kModel == CameraModel::kFisheye) w = sqrt(p.x * p.x + p.y * p.y + p.z * p.z);
  const T sigma = extent.sigma;
  bool inside = (multiply_add(f.left, w, multiply_add(f.reach_x, sigma, p.x)) > T(0)) &
                (multiply_add(f.right, w, multiply_add(f.reach_x, sigma, -p.x)) > T(0)) &
                (multiply_add(f.top, w, multiply_add(f.reach_y, sigma, p.y)) > T(0)) &
                (multiply_add(f.bottom, w, multiply_add(f.reach_y, sigma, -p.y)) > T(0));
  if (kModel == CameraModel::kFisheye) inside = inside & (multiply_add(f.cone_reach, sigma, p.z) > f.cone * w);
  const bool safe = z_or_1 > multiply_add(f.safe_scale, extent.size, f.safe_offset);
  return (p.z >= f.near_plane) & (p.z <= f.far_plane) & (inside | !safe);
}

template <typename T>
RAPFAST_HD T sigma_of_scales(const T* s) {
  return larger_of(magnitude_of(s[0]), larger_of(magnitude_of(s[1]), magnitude_of(s[2])));
}

// The Frobenius norm bounds the largest eigenvalue.
template <typename T>
RAPFAST_HD T sigma_of_covariance(const Sym3<T>& c) {
  const T norm2 = c.xx * c.xx + c.yy * c.yy + c.zz * c.zz + T(2) * (c.xy * c.xy + c.xz * c.xz + c.yz * c.yz);
  return sqrt(sqrt(norm2));
}

// 0 for finite numbers, NaN if one is not: unlike their sum it cannot overflow.
template <typename T>
RAPFAST_HD T zero_if_finite(const T* values, int n) {
  T sum = T(0);
  for (int i = 0; i < n; ++i) sum = multiply_add(T(0), values[i], sum);
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
  const T norm2 = multiply_add(q[3], q[3], multiply_add(q[2], q[2], multiply_add(q[1], q[1], q[0] * q[0])));
  return norm2 > T(0) && is_finite(norm2);
}

}  // namespace rapfast
