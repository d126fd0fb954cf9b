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
  return a.x * b.x + a.y * b.y + a.z * b.z;
}

template <typename T>
RAPFAST_HD T determinant(const Mat3<T>& a) {
  const T* m = a.m;
  return m[0] * (m[4] * m[8] - m[5] * m[7]) - m[1] * (m[3] * m[8] - m[5] * m[6]) +
         m[2] * (m[3] * m[7] - m[4] * m[6]);
}

template <typename T>
RAPFAST_HD T determinant(const Sym2<T>& s) {
  return s.xx * s.yy - s.xy * s.xy;
}

// u^T S v
template <typename T>
RAPFAST_HD T bilinear_form(const Sym3<T>& s, const Vec3<T>& u, const Vec3<T>& v) {
  const Vec3<T> sv = {s.xx * v.x + s.xy * v.y + s.xz * v.z,
                      s.xy * v.x + s.yy * v.y + s.yz * v.z,
                      s.xz * v.x + s.yz * v.y + s.zz * v.z};
  return dot(u, sv);
}

}  // namespace rapfast
