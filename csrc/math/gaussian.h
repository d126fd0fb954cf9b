// One Gaussian in one view: covariance, projection (EWA), opacity-aware bounds, visibility.
#pragma once

#include "camera.h"
#include "constants.h"
#include "vec.h"

namespace rapfast {

// What the later stages read of a visible (image, Gaussian) pair: one 32-byte sector in float.
template <typename T>
struct Record {
  T x, y;                        // mean2d, pixels
  T conic_a, conic_b, conic_c;   // inverse of the blurred 2D covariance, upper triangle
  T opacity;                     // times the compensation when antialiased; 0: draws nothing
  T depth;                       // camera-space z
  T compensation;                // sqrt(det before blur / det after)
};

enum class Visibility : int32_t {
  kCulled = 0,   // outside the view, too faint or too small
  kVisible = 1,
  kInvalid = 2,  // non-finite or degenerate: culled, and counted
};

// Rotation matrix of a quaternion (w, x, y, z) of any norm but zero, scaled: R(q) S, row-major.
template <typename T>
RAPFAST_HD Mat3<T> scaled_rotation(const T* q, const T* s) {
  const T inv_norm = T(1) / sqrt(q[0] * q[0] + q[1] * q[1] + q[2] * q[2] + q[3] * q[3]);
  const T w = q[0] * inv_norm, x = q[1] * inv_norm, y = q[2] * inv_norm, z = q[3] * inv_norm;
  return {{(T(1) - T(2) * (y * y + z * z)) * s[0], T(2) * (x * y - w * z) * s[1],
           T(2) * (x * z + w * y) * s[2], T(2) * (x * y + w * z) * s[0],
           (T(1) - T(2) * (x * x + z * z)) * s[1], T(2) * (y * z - w * x) * s[2],
           T(2) * (x * z - w * y) * s[0], T(2) * (y * z + w * x) * s[1],
           (T(1) - T(2) * (x * x + y * y)) * s[2]}};
}

// R(q) S S R(q)^T
template <typename T>
RAPFAST_HD Sym3<T> covariance(const T* q, const T* s) {
  const Mat3<T> a = scaled_rotation(q, s);
  const T* m = a.m;
  return {m[0] * m[0] + m[1] * m[1] + m[2] * m[2], m[0] * m[3] + m[1] * m[4] + m[2] * m[5],
          m[0] * m[6] + m[1] * m[7] + m[2] * m[8], m[3] * m[3] + m[4] * m[4] + m[5] * m[5],
          m[3] * m[6] + m[4] * m[7] + m[5] * m[8], m[6] * m[6] + m[7] * m[7] + m[8] * m[8]};
}

// Rows of J R: the 2D covariance is (J R) cov (J R)^T.
template <typename T>
RAPFAST_HD Vec3<T> row_times(const Vec3<T>& j, const Mat3<T>& R) {
  const T* m = R.m;
  return {j.x * m[0] + j.y * m[3] + j.z * m[6], j.x * m[1] + j.y * m[4] + j.z * m[7],
          j.x * m[2] + j.y * m[5] + j.z * m[8]};
}

// A radius as int32, saturating as the device's conversion does.
template <typename T>
RAPFAST_HD int32_t saturate_to_int32(T x) {
  return x >= T(2147483647) ? 2147483647 : int32_t(x);
}

template <typename T>
struct ProjectOptions {
  int32_t width, height;
  CameraModel camera_model;
  bool antialiased;
  T eps2d;         // pixels^2 added to the diagonal of the 2D covariance
  T near_plane, far_plane;
  T radius_clip;   // pixels
};

// Decides whether the Gaussian is seen and fills `record` and `radii` if it is. `mean_c` is the mean
// in camera space, inside [near_plane, far_plane]; `view` is valid, `cov` and `opacity` are finite.
template <typename T>
RAPFAST_HD Visibility project_gaussian(const View<T>& view, const ProjectOptions<T>& o,
                                       const Vec3<T>& mean_c, const Sym3<T>& cov, T opacity,
                                       Record<T>& record, int32_t* radii /* [2] */) {
  const Projection2d<T> p = project_point(o.camera_model, view, mean_c);
  const Vec3<T> mx = row_times(p.jx, view.R);
  const Vec3<T> my = row_times(p.jy, view.R);
  Sym2<T> cov2d = {bilinear_form(cov, mx, mx), bilinear_form(cov, mx, my),
                   bilinear_form(cov, my, my)};

  const T det_sharp = determinant(cov2d);
  cov2d.xx += o.eps2d;
  cov2d.yy += o.eps2d;
  const T det = determinant(cov2d);
  if (!is_finite(p.x) || !is_finite(p.y) || !is_finite(det)) return Visibility::kInvalid;
  // A covariance that is not positive definite has no ellipse, nor has one whose inverse overflows.
  const T inv_det = T(1) / det;
  if (!(det > T(0)) || !(cov2d.xx > T(0)) || !is_finite(cov2d.xx * inv_det) ||
      !is_finite(cov2d.yy * inv_det)) {
    return Visibility::kCulled;
  }

  // The blur widens the Gaussian; the compensation takes back the energy that adds.
  const T compensation = sqrt(max_of(T(0), det_sharp / det));
  const T drawn_opacity = o.antialiased ? opacity * compensation : opacity;
  if (!(drawn_opacity >= Constants<T>::kAlphaCut)) return Visibility::kCulled;

  // Where alpha falls under the cut (Radl et al. 2024, StopThePop, appendix B.2).
  const T extent = min_of(Constants<T>::kBoxExtent,
                          T(sqrt(T(2) * log(drawn_opacity / Constants<T>::kAlphaCut))));
  const T radius_x = ceil(extent * sqrt(cov2d.xx));
  const T radius_y = ceil(extent * sqrt(cov2d.yy));
  if (radius_x <= o.radius_clip && radius_y <= o.radius_clip) return Visibility::kCulled;
  if (p.x + radius_x <= T(0) || p.x - radius_x >= T(o.width) || p.y + radius_y <= T(0) ||
      p.y - radius_y >= T(o.height)) {
    return Visibility::kCulled;
  }

  record = {p.x,    p.y, cov2d.yy * inv_det, -cov2d.xy * inv_det, cov2d.xx * inv_det, drawn_opacity,
            mean_c.z, compensation};
  radii[0] = saturate_to_int32(radius_x);
  radii[1] = saturate_to_int32(radius_y);
  return Visibility::kVisible;
}

}  // namespace rapfast
