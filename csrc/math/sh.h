// Real spherical harmonics up to degree 4 in the order and signs of 3D Gaussian splatting, by the
// recurrences of Sloan, "Efficient Spherical Harmonic Evaluation" (JCGT 2013).
#pragma once

#include "constants.h"
#include "vec.h"

namespace rapfast {

RAPFAST_HD constexpr int sh_bases(int degree) { return (degree + 1) * (degree + 1); }

// Values of the first (degree + 1)^2 bases in direction d, which need not be normalised. The zero
// vector counts as no direction: every basis that depends on it is evaluated at 0.
template <typename T>
RAPFAST_HD void sh_basis(int degree, const Vec3<T>& d, T* basis /* [25] */) {
  basis[0] = T(0.2820947917738781);
  if (degree < 1) return;

  const T norm2 = dot(d, d);
  const T inv_norm = norm2 > T(0) ? T(1) / sqrt(norm2) : T(0);
  const T x = d.x * inv_norm, y = d.y * inv_norm, z = d.z * inv_norm;
  basis[1] = T(-0.48860251190292) * y;
  basis[2] = T(0.48860251190292) * z;
  basis[3] = T(-0.48860251190292) * x;
  if (degree < 2) return;

  const T z2 = z * z;
  const T c1 = multiply_add(x, x, -(y * y));  // cos(2 phi), sin(2 phi) times sin^2(theta)
  const T s1 = T(2) * x * y;
  const T b2 = T(-1.092548430592079) * z;
  basis[4] = T(0.5462742152960395) * s1;
  basis[5] = b2 * y;
  basis[6] = multiply_add(T(0.9461746957575601), z2, T(-0.3153915652525201));
  basis[7] = b2 * x;
  basis[8] = T(0.5462742152960395) * c1;
  if (degree < 3) return;

  const T c2 = multiply_add(x, c1, -(y * s1));
  const T s2 = multiply_add(y, c1, x * s1);
  const T c3 = multiply_add(T(-2.285228997322329), z2, T(0.4570457994644658));
  const T b3 = T(1.445305721320277) * z;
  basis[9] = T(-0.5900435899266435) * s2;
  basis[10] = b3 * s1;
  basis[11] = c3 * y;
  basis[12] = z * multiply_add(T(1.865881662950577), z2, T(-1.119528997770346));
  basis[13] = c3 * x;
  basis[14] = b3 * c1;
  basis[15] = T(-0.5900435899266435) * c2;
  if (degree < 4) return;

  const T d4 = z * multiply_add(T(-4.683325804901025), z2, T(2.007139630671868));
  const T c4 = multiply_add(T(3.31161143515146), z2, T(-0.47308734787878));
  const T b4 = T(-1.770130769779931) * z;
  basis[16] = T(0.6258357354491763) * multiply_add(y, c2, x * s2);
  basis[17] = b4 * s2;
  basis[18] = c4 * s1;
  basis[19] = d4 * y;
  basis[20] = multiply_add(T(1.984313483298443) * z, basis[12], -(T(1.006230589874905) * basis[6]));
  basis[21] = d4 * x;
  basis[22] = c4 * c1;
  basis[23] = b4 * c2;
  basis[24] = T(0.6258357354491763) * multiply_add(x, c2, -(y * s2));
}

// Gradient of direction d, given that of the bases (the first (degree + 1)^2). The recurrences make
// derivatives easy: with s_n, c_n the sine and cosine of n phi times sin^n(theta),
// d s_n = n (s_{n-1} dx + c_{n-1} dy) and d c_n = n (c_{n-1} dx - s_{n-1} dy).
template <typename T>
RAPFAST_HD Vec3<T> sh_basis_vjp(int degree, const Vec3<T>& d, const T* v_basis /* [25] */) {
  if (degree < 1) return {T(0), T(0), T(0)};
  const T norm2 = dot(d, d);
  // The zero vector is its own direction.
  const T inv_norm = norm2 > T(0) ? T(1) / sqrt(norm2) : T(1);
  const T x = d.x * inv_norm, y = d.y * inv_norm, z = d.z * inv_norm;
  T v_x = T(-0.48860251190292) * v_basis[3];
  T v_y = T(-0.48860251190292) * v_basis[1];
  T v_z = T(0.48860251190292) * v_basis[2];

  if (degree >= 2) {
    const T z2 = z * z;
    const T c1 = x * x - y * y, s1 = T(2) * x * y;
    const T b2 = T(-1.092548430592079) * z;
    T v_s1 = T(0.5462742152960395) * v_basis[4];
    T v_c1 = T(0.5462742152960395) * v_basis[8];
    T v_z2 = T(0.9461746957575601) * v_basis[6];
    v_y += b2 * v_basis[5];
    v_x += b2 * v_basis[7];
    v_z += T(-1.092548430592079) * (y * v_basis[5] + x * v_basis[7]);

    if (degree >= 3) {
      const T c2 = x * c1 - y * s1, s2 = x * s1 + y * c1;
      const T c3 = T(-2.285228997322329) * z2 + T(0.4570457994644658);
      const T b3 = T(1.445305721320277) * z;
      T v_s2 = T(-0.5900435899266435) * v_basis[9];
      T v_c2 = T(-0.5900435899266435) * v_basis[15];
      T v_b12 = v_basis[12];
      v_s1 += b3 * v_basis[10];
      v_c1 += b3 * v_basis[14];
      v_z += T(1.445305721320277) * (s1 * v_basis[10] + c1 * v_basis[14]);
      v_y += c3 * v_basis[11];
      v_x += c3 * v_basis[13];
      v_z2 += T(-2.285228997322329) * (y * v_basis[11] + x * v_basis[13]);

      if (degree >= 4) {
        const T b12 = z * (T(1.865881662950577) * z2 - T(1.119528997770346));
        const T d4 = z * (T(-4.683325804901025) * z2 + T(2.007139630671868));
        const T c4 = T(3.31161143515146) * z2 - T(0.47308734787878);
        const T b4 = T(-1.770130769779931) * z;
        const T v_s3 = T(0.6258357354491763) * v_basis[16];
        const T v_c3 = T(0.6258357354491763) * v_basis[24];
        v_x += T(4) * (s2 * v_s3 + c2 * v_c3);
        v_y += T(4) * (c2 * v_s3 - s2 * v_c3);
        v_s2 += b4 * v_basis[17];
        v_c2 += b4 * v_basis[23];
        v_z += T(-1.770130769779931) * (s2 * v_basis[17] + c2 * v_basis[23]);
        v_s1 += c4 * v_basis[18];
        v_c1 += c4 * v_basis[22];
        v_z2 += T(3.31161143515146) * (s1 * v_basis[18] + c1 * v_basis[22]);
        v_y += d4 * v_basis[19];
        v_x += d4 * v_basis[21];
        v_z += (T(-14.049977414703075) * z2 + T(2.007139630671868)) *
               (y * v_basis[19] + x * v_basis[21]);
        v_z += T(1.984313483298443) * b12 * v_basis[20];
        v_b12 += T(1.984313483298443) * z * v_basis[20];
        v_z2 += T(-1.006230589874905) * T(0.9461746957575601) * v_basis[20];
      }
      v_x += T(3) * (s1 * v_s2 + c1 * v_c2);
      v_y += T(3) * (c1 * v_s2 - s1 * v_c2);
      v_z += (T(5.597644988851731) * z2 - T(1.119528997770346)) * v_b12;
    }
    v_x += T(2) * (y * v_s1 + x * v_c1);
    v_y += T(2) * (x * v_s1 - y * v_c1);
    v_z += T(2) * z * v_z2;
  }
  const T radial = x * v_x + y * v_y + z * v_z;
  return {(v_x - x * radial) * inv_norm, (v_y - y * radial) * inv_norm,
          (v_z - z * radial) * inv_norm};
}

}  // namespace rapfast
