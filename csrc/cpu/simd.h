// Vectors of 32 bytes by the compiler's vector extension: AVX2 and NEON code from one source.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__FMA__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace rapfast {

template <typename T>
struct Simd;

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(32)));
  typedef int32_t I __attribute__((vector_size(32)));
  static constexpr int kLanes = 8;
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(32)));
  typedef int64_t I __attribute__((vector_size(32)));
  static constexpr int kLanes = 4;
};

template <typename V, typename T>
inline V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <typename V, typename T>
inline void store(T* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

// a * b + c, rounded once where the CPU has an instruction for it, else twice (never by a call).
inline Simd<float>::V multiply_add(Simd<float>::V a, Simd<float>::V b, Simd<float>::V c) {
#if defined(__FMA__)
  return (Simd<float>::V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  float32x4_t x[2], y[2], z[2];
  std::memcpy(x, &a, sizeof(a));
  std::memcpy(y, &b, sizeof(b));
  std::memcpy(z, &c, sizeof(c));
  for (int i = 0; i < 2; ++i) z[i] = vfmaq_f32(z[i], x[i], y[i]);
  std::memcpy(&c, z, sizeof(c));
  return c;
#else
  return a * b + c;
#endif
}

inline Simd<double>::V multiply_add(Simd<double>::V a, Simd<double>::V b, Simd<double>::V c) {
#if defined(__FMA__)
  return (Simd<double>::V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
  float64x2_t x[2], y[2], z[2];
  std::memcpy(x, &a, sizeof(a));
  std::memcpy(y, &b, sizeof(b));
  std::memcpy(z, &c, sizeof(c));
  for (int i = 0; i < 2; ++i) z[i] = vfmaq_f64(z[i], x[i], y[i]);
  std::memcpy(&c, z, sizeof(c));
  return c;
#else
  return a * b + c;
#endif
}

// exp(x) for x in [-80, 0], to about one unit in the last place: x = n ln 2 + r with |r| <= ln 2 / 2,
// a Taylor polynomial for exp(r), and n added to the exponent. n comes out of the low bits of
// x / ln 2 + 1.5 * 2^(mantissa bits), where the addition rounds to an integer.
inline Simd<float>::V exp_nonpositive(Simd<float>::V x) {
  typedef Simd<float>::V V;
  typedef Simd<float>::I I;
  const float magic = 12582912.f;
  const V shifted = x * 1.44269504088896341f + magic;
  const V n = shifted - magic;
  const V r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  V p = r * (1.f / 5040.f) + (1.f / 720.f);
  p = p * r + (1.f / 120.f);
  p = p * r + (1.f / 24.f);
  p = p * r + (1.f / 6.f);
  p = p * r + 0.5f;
  p = p * (r * r) + r + 1.f;
  return (V)((I)p + ((I)shifted << 23));
}

inline Simd<double>::V exp_nonpositive(Simd<double>::V x) {
  typedef Simd<double>::V V;
  typedef Simd<double>::I I;
  const double magic = 6755399441055744.0;
  const V shifted = x * 1.4426950408889634074 + magic;
  const V n = shifted - magic;
  const V r = (x - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
  V p = r * (1.0 / 6227020800.0) + (1.0 / 479001600.0);
  p = p * r + (1.0 / 39916800.0);
  p = p * r + (1.0 / 3628800.0);
  p = p * r + (1.0 / 362880.0);
  p = p * r + (1.0 / 40320.0);
  p = p * r + (1.0 / 5040.0);
  p = p * r + (1.0 / 720.0);
  p = p * r + (1.0 / 120.0);
  p = p * r + (1.0 / 24.0);
  p = p * r + (1.0 / 6.0);
  p = p * r + 0.5;
  p = p * (r * r) + r + 1.0;
  return (V)((I)p + ((I)shifted << 52));
}

}  // namespace rapfast
