// Small vectors and matrices: just what projection needs.
#pragma once

#include "host_device.h"

namespace rapfast {

template <typename T>
struct Vec3 {
  T x, y, z;
};

// Row-major 3x3.
template <typename T>
struct Mat3 {
  T m[9];
};

// Symmetric 3x3, upper triangle.
template <typename T>
struct Sym3 {
  T xx, xy, xz, yy, yz, zz;
};

// Symmetric 2x2, upper triangle.
template <typename T>
struct Sym2 {
  T xx, xy, yy;
};

template <typename T>
RAPFAST_HD T dot(const Vec3<T>& a, const Vec3<T>& b) {
  return multiply_add(a.z, b.z, multiply_add(a.y, b.y, a.x * b.x));
}

template <typename T>
RAPFAST_HD T determinant(const Mat3<T>& a) {
  const T* m = a.m;
  return m[0] * (m[4] * m[8] - m[5] * m[7]) - m[1] * (m[3] * m[8] - m[5] * m[6]) +
         m[2] * (m[3] * m[7] - m[4] * m[6]);
}

template <typename T>
RAPFAST_HD T determinant(const Sym2<T>& s) {
  return multiply_add(s.xx, s.yy, -(s.xy * s.xy));
}

// u^T S v
template <typename T>
RAPFAST_HD T bilinear_form(const Sym3<T>& s, const Vec3<T>& u, const Vec3<T>& v) {
  const Vec3<T> sv = {dot(Vec3<T>{s.xx, s.xy, s.xz}, v), dot(Vec3<T>{s.xy, s.yy, s.yz}, v),
                      dot(Vec3<T>{s.xz, s.yz, s.zz}, v)};
  return dot(u, sv);
}

// Adjoints. A `_vjp` takes the gradient `v_out` of its formula's result and adds to the gradients of
// its arguments. Where a symmetric matrix is an argument, an entry off the diagonal stands for both of
// its places, and so does its gradient.

template <typename T>
RAPFAST_HD void determinant_vjp(const Sym2<T>& s, T v_out, Sym2<T>& v_s) {
  v_s.xx += v_out * s.yy;
  v_s.xy -= T(2) * v_out * s.xy;
  v_s.yy += v_out * s.xx;
}

// u and v may be one vector; then v_u and v_v are one gradient too.
template <typename T>
RAPFAST_HD void bilinear_form_vjp(const Sym3<T>& s, const Vec3<T>& u, const Vec3<T>& v, T v_out,
                                  Sym3<T>& v_s, Vec3<T>& v_u, Vec3<T>& v_v) {
  v_s.xx += v_out * (u.x * v.x);
  v_s.xy += v_out * (u.x * v.y + u.y * v.x);
  v_s.xz += v_out * (u.x * v.z + u.z * v.x);
  v_s.yy += v_out * (u.y * v.y);
  v_s.yz += v_out * (u.y * v.z + u.z * v.y);
  v_s.zz += v_out * (u.z * v.z);
  v_u.x += v_out * (s.xx * v.x + s.xy * v.y + s.xz * v.z);
  v_u.y += v_out * (s.xy * v.x + s.yy * v.y + s.yz * v.z);
  v_u.z += v_out * (s.xz * v.x + s.yz * v.y + s.zz * v.z);
  v_v.x += v_out * (s.xx * u.x + s.xy * u.y + s.xz * u.z);
  v_v.y += v_out * (s.xy * u.x + s.yy * u.y + s.yz * u.z);
  v_v.z += v_out * (s.xz * u.x + s.yz * u.y + s.zz * u.z);
}

}  // namespace rapfast
