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
  const T xx = x * x, yy = y * y, zz = z * z, wx = w * x, wy = w * y, wz = w * z;
  return {{multiply_add(T(-2), yy + zz, T(1)) * s[0], T(2) * multiply_add(x, y, -wz) * s[1],
           T(2) * multiply_add(x, z, wy) * s[2], T(2) * multiply_add(x, y, wz) * s[0],
           multiply_add(T(-2), xx + zz, T(1)) * s[1], T(2) * multiply_add(y, z, -wx) * s[2],
           T(2) * multiply_add(x, z, -wy) * s[0], T(2) * multiply_add(y, z, wx) * s[1],
           multiply_add(T(-2), xx + yy, T(1)) * s[2]}};
}

// R(q) S S R(q)^T
template <typename T>
RAPFAST_HD Sym3<T> covariance(const T* q, const T* s) {
  const Mat3<T> m = scaled_rotation(q, s);
  const Vec3<T> x = {m.m[0], m.m[1], m.m[2]}, y = {m.m[3], m.m[4], m.m[5]}, z = {m.m[6], m.m[7], m.m[8]};
  return {dot(x, x), dot(x, y), dot(x, z), dot(y, y), dot(y, z), dot(z, z)};
}

// Rows of J R: the 2D covariance is (J R) cov (J R)^T.
template <typename T>
RAPFAST_HD Vec3<T> row_times(const Vec3<T>& j, const Mat3<T>& R) {
  const T* m = R.m;
  return {dot(j, Vec3<T>{m[0], m[3], m[6]}), dot(j, Vec3<T>{m[1], m[4], m[7]}),
          dot(j, Vec3<T>{m[2], m[5], m[8]})};
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

// Adjoint of covariance. Scales of 0 are no special case: they are factors, never divisors.
template <typename T>
RAPFAST_HD void covariance_vjp(const T* q, const T* s, const Sym3<T>& v_cov, T* v_q /* [4] */,
                               T* v_s /* [3] */) {
  const T one[3] = {T(1), T(1), T(1)};
  const Mat3<T> rotation = scaled_rotation(q, one);
  const T* r = rotation.m;
  T v_r[9];  // of the rotation
  for (int k = 0; k < 3; ++k) {
    // M = R S and cov = M M^T, so v_M = (V + V^T) M.
    const T m0 = r[k] * s[k], m1 = r[3 + k] * s[k], m2 = r[6 + k] * s[k];
    const T v0 = T(2) * v_cov.xx * m0 + v_cov.xy * m1 + v_cov.xz * m2;
    const T v1 = v_cov.xy * m0 + T(2) * v_cov.yy * m1 + v_cov.yz * m2;
    const T v2 = v_cov.xz * m0 + v_cov.yz * m1 + T(2) * v_cov.zz * m2;
    v_s[k] += v0 * r[k] + v1 * r[3 + k] + v2 * r[6 + k];
    v_r[k] = v0 * s[k];
    v_r[3 + k] = v1 * s[k];
    v_r[6 + k] = v2 * s[k];
  }
  const T inv_norm = T(1) / sqrt(q[0] * q[0] + q[1] * q[1] + q[2] * q[2] + q[3] * q[3]);
  const T w = q[0] * inv_norm, x = q[1] * inv_norm, y = q[2] * inv_norm, z = q[3] * inv_norm;
  const T v_w = T(2) * (x * (v_r[7] - v_r[5]) + y * (v_r[2] - v_r[6]) + z * (v_r[3] - v_r[1]));
  const T v_x = T(2) * (w * (v_r[7] - v_r[5]) + y * (v_r[1] + v_r[3]) + z * (v_r[2] + v_r[6]) -
                        T(2) * x * (v_r[4] + v_r[8]));
  const T v_y = T(2) * (w * (v_r[2] - v_r[6]) + x * (v_r[1] + v_r[3]) + z * (v_r[5] + v_r[7]) -
                        T(2) * y * (v_r[0] + v_r[8]));
  const T v_z = T(2) * (w * (v_r[3] - v_r[1]) + x * (v_r[2] + v_r[6]) + y * (v_r[5] + v_r[7]) -
                        T(2) * z * (v_r[0] + v_r[4]));
  // The length of q does not matter, so its gradient is tangent to the sphere.
  const T radial = w * v_w + x * v_x + y * v_y + z * v_z;
  v_q[0] += (v_w - w * radial) * inv_norm;
  v_q[1] += (v_x - x * radial) * inv_norm;
  v_q[2] += (v_y - y * radial) * inv_norm;
  v_q[3] += (v_z - z * radial) * inv_norm;
}

template <typename T>
RAPFAST_HD void row_times_vjp(const Vec3<T>& j, const Mat3<T>& R, const Vec3<T>& v_out, Vec3<T>& v_j,
                              Mat3<T>& v_R) {
  const T* m = R.m;
  v_j.x += m[0] * v_out.x + m[1] * v_out.y + m[2] * v_out.z;
  v_j.y += m[3] * v_out.x + m[4] * v_out.y + m[5] * v_out.z;
  v_j.z += m[6] * v_out.x + m[7] * v_out.y + m[8] * v_out.z;
  T* v_m = v_R.m;
  v_m[0] += j.x * v_out.x;
  v_m[1] += j.x * v_out.y;
  v_m[2] += j.x * v_out.z;
  v_m[3] += j.y * v_out.x;
  v_m[4] += j.y * v_out.y;
  v_m[5] += j.y * v_out.z;
  v_m[6] += j.z * v_out.x;
  v_m[7] += j.z * v_out.y;
  v_m[8] += j.z * v_out.z;
}

// Adjoint of project_gaussian for a Gaussian that it found visible; `v_record` is the gradient of its
// record. Adds to the gradients of its arguments.
template <typename T>
RAPFAST_HD void project_gaussian_vjp(const View<T>& view, CameraModel camera_model, bool antialiased,
                                     T eps2d, const Vec3<T>& mean_c, const Sym3<T>& cov, T opacity,
                                     const Record<T>& v_record, Vec3<T>& v_mean_c, Sym3<T>& v_cov,
                                     T& v_opacity, ViewGrad<T>& v_view) {
  const Projection2d<T> p = project_point(camera_model, view, mean_c);
  const Vec3<T> mx = row_times(p.jx, view.R);
  const Vec3<T> my = row_times(p.jy, view.R);
  const Sym2<T> sharp = {bilinear_form(cov, mx, mx), bilinear_form(cov, mx, my),
                         bilinear_form(cov, my, my)};
  const Sym2<T> blurred = {sharp.xx + eps2d, sharp.xy, sharp.yy + eps2d};
  const T det = determinant(blurred);
  const T inv_det = T(1) / det;

  // Of an inverse, Q = X^-1: v_X = -Q V Q. Off the diagonal V has half of v_record's, which stands for
  // two entries; v_X's two entries there make one gradient.
  const T a = blurred.yy * inv_det, b = -blurred.xy * inv_det, c = blurred.xx * inv_det;
  const T va = v_record.conic_a, vb = T(0.5) * v_record.conic_b, vc = v_record.conic_c;
  const T qv00 = a * va + b * vb, qv01 = a * vb + b * vc;
  const T qv10 = b * va + c * vb, qv11 = b * vb + c * vc;
  Sym2<T> v_cov2d = {-(qv00 * a + qv01 * b), T(-2) * (qv00 * b + qv01 * c), -(qv10 * b + qv11 * c)};

  const T ratio = max_of(T(0), determinant(sharp) * inv_det);
  const T compensation = sqrt(ratio);
  const T v_compensation =
      v_record.compensation + (antialiased ? v_record.opacity * opacity : T(0));
  v_opacity += antialiased ? v_record.opacity * compensation : v_record.opacity;
  if (v_compensation != T(0) && compensation > T(0)) {
    const T v_ratio = T(0.5) * v_compensation / compensation;
    determinant_vjp(sharp, v_ratio * inv_det, v_cov2d);
    determinant_vjp(blurred, -v_ratio * ratio * inv_det, v_cov2d);
  }

  Vec3<T> v_mx = {T(0), T(0), T(0)}, v_my = {T(0), T(0), T(0)};
  bilinear_form_vjp(cov, mx, mx, v_cov2d.xx, v_cov, v_mx, v_mx);
  bilinear_form_vjp(cov, mx, my, v_cov2d.xy, v_cov, v_mx, v_my);
  bilinear_form_vjp(cov, my, my, v_cov2d.yy, v_cov, v_my, v_my);
  Projection2d<T> v_p = {v_record.x, v_record.y, {T(0), T(0), T(0)}, {T(0), T(0), T(0)}};
  row_times_vjp(p.jx, view.R, v_mx, v_p.jx, v_view.R);
  row_times_vjp(p.jy, view.R, v_my, v_p.jy, v_view.R);
  project_point_vjp(camera_model, view, mean_c, v_p, v_mean_c, v_view);
  v_mean_c.z += v_record.depth;
}

}  // namespace rapfast
