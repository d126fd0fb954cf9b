// A number with a bound on what float arithmetic may make of it. csrc/math run on it tells, for each
// result, how far two correct float evaluations may lie apart (one fuses multiply-adds, the other does
// not), and whether a comparison on the way was too close to call.
//
// Running error analysis (Higham, Accuracy and Stability of Numerical Algorithms, section 3.3): every
// operation adds its own rounding to what its operands' errors become.
#pragma once

#include <cmath>
#include <cstdint>

#include "../math/host_device.h"

// Not in rapfast: its functions are found by their argument, and hide none of csrc/math's.
namespace rapfast_bounded {

// What happened since reset(): read after an evaluation.
struct BoundedFlags {
  bool unclear = false;     // a comparison or a rounding to an integer could fall either way
  bool overflowed = false;  // a value left the range of float
};

inline BoundedFlags& bounded_flags() {
  static BoundedFlags flags;
  return flags;
}

// Bounded is evaluated on the host alone; that its functions also compile for the device lets the
// functions of csrc/math, which are for both, call them.
RAPFAST_HD void note_unclear() {
#if !defined(__CUDA_ARCH__)
  bounded_flags().unclear = true;
#endif
}

RAPFAST_HD void note_overflow() {
#if !defined(__CUDA_ARCH__)
  bounded_flags().overflowed = true;
#endif
}

struct Bounded {
  double value = 0;
  double error = 0;  // |what float arithmetic gives - value| is at most this

  constexpr Bounded() = default;
  // Numbers enter as the float that they become in float code.
  RAPFAST_HD constexpr Bounded(double v) : value(double(float(v))) {}
  RAPFAST_HD constexpr Bounded(double v, double e) : value(v), error(e) {}

  RAPFAST_HD explicit operator double() const { return value; }
  RAPFAST_HD explicit operator int32_t() const { return int32_t(truncated()); }
  RAPFAST_HD explicit operator int64_t() const { return int64_t(truncated()); }
  RAPFAST_HD explicit operator uint8_t() const { return uint8_t(truncated()); }

 private:
  RAPFAST_HD double truncated() const {
    if (error > 0 && ::trunc(value - error) != ::trunc(value + error)) note_unclear();
    return ::trunc(value);
  }
};

constexpr double kUnitRoundoff = 5.9604644775390625e-8;  // 2^-24
constexpr double kSmallestFloat = 1.401298464324817e-45;
constexpr double kLargestFloat = 3.4028234663852886e38;
constexpr double kInfinity = __builtin_huge_val();

RAPFAST_HD constexpr double magnitude(double x) { return x < 0 ? -x : x; }

// A float operation whose exact result is v, from operands whose errors can move it by `propagated`;
// `roundings` of 1 is a correctly rounded operation.
RAPFAST_HD constexpr Bounded rounded(double v, double propagated, double roundings = 1) {
  const double size = magnitude(v) + propagated;
  if (!(size <= kLargestFloat)) {
    if (v - v != 0) return Bounded(v, 0);  // of infinities or NaN, which need no bound
    note_overflow();
    if (size < 4 * kLargestFloat || propagated > magnitude(v)) note_unclear();
    return Bounded(v < 0 ? -kInfinity : kInfinity, 0);
  }
  if (propagated == 0 && roundings == 1 && double(float(v)) == v) return Bounded(v, 0);
  return Bounded(v, propagated + roundings * kUnitRoundoff * size + kSmallestFloat);
}

// Operands that are not finite have error 0, and 0 x infinity must not become a bound.
RAPFAST_HD constexpr double spread(double factor, double error) {
  return error == 0 ? 0 : magnitude(factor) * error;
}

RAPFAST_HD constexpr Bounded operator+(Bounded a, Bounded b) {
  return rounded(a.value + b.value, a.error + b.error);
}
RAPFAST_HD constexpr Bounded operator-(Bounded a, Bounded b) {
  return rounded(a.value - b.value, a.error + b.error);
}
RAPFAST_HD constexpr Bounded operator-(Bounded a) { return Bounded(-a.value, a.error); }
RAPFAST_HD constexpr Bounded operator*(Bounded a, Bounded b) {
  return rounded(a.value * b.value,
                 spread(a.value, b.error) + spread(b.value, a.error) + spread(a.error, b.error));
}
RAPFAST_HD constexpr Bounded operator/(Bounded a, Bounded b) {
  const double q = a.value / b.value;
  if (b.error > 0 && magnitude(b.value) <= b.error) {  // the divisor may be 0
    note_unclear();
    note_overflow();
    return Bounded(q, 0);
  }
  return rounded(q, a.error + b.error == 0
                        ? 0
                        : (a.error + spread(q, b.error)) / (magnitude(b.value) - b.error));
}
RAPFAST_HD Bounded& operator+=(Bounded& a, Bounded b) { return a = a + b; }
RAPFAST_HD Bounded& operator-=(Bounded& a, Bounded b) { return a = a - b; }

RAPFAST_HD void note_comparison(Bounded a, Bounded b) {
  const double error = a.error + b.error;
  if (error > 0 && magnitude(a.value - b.value) <= error) note_unclear();
}
RAPFAST_HD bool operator<(Bounded a, Bounded b) { return note_comparison(a, b), a.value < b.value; }
RAPFAST_HD bool operator>(Bounded a, Bounded b) { return note_comparison(a, b), a.value > b.value; }
RAPFAST_HD bool operator<=(Bounded a, Bounded b) { return note_comparison(a, b), a.value <= b.value; }
RAPFAST_HD bool operator>=(Bounded a, Bounded b) { return note_comparison(a, b), a.value >= b.value; }
RAPFAST_HD bool operator==(Bounded a, Bounded b) { return note_comparison(a, b), a.value == b.value; }
RAPFAST_HD bool operator!=(Bounded a, Bounded b) { return note_comparison(a, b), a.value != b.value; }

// Continuous, so nothing is unclear about them; what counts as NaN follows the templates they replace.
RAPFAST_HD Bounded min_of(Bounded a, Bounded b) {
  const Bounded& m = b.value < a.value ? b : a;
  return Bounded(m.value, a.error > b.error ? a.error : b.error);
}
RAPFAST_HD Bounded max_of(Bounded a, Bounded b) {
  const Bounded& m = a.value < b.value ? b : a;
  return Bounded(m.value, a.error > b.error ? a.error : b.error);
}
RAPFAST_HD bool is_finite(Bounded x) { return x.value - x.value == 0; }

RAPFAST_HD Bounded sqrt(Bounded x) {
  if (x.value - x.error < 0 && x.error > 0) note_unclear();  // NaN or a number
  const double root = ::sqrt(x.value);
  if (x.error == 0) return rounded(root, 0);
  const double low = x.value > x.error ? ::sqrt(x.value - x.error) : 0;
  const double up = ::sqrt(x.value + x.error) - root, down = root - low;
  return rounded(root, up > down ? up : down);
}

// CUDA C++ Programming Guide, maximum errors in units of the last place: logf 1, atan2f 3.
RAPFAST_HD Bounded log(Bounded x) {
  if (x.error > 0 && x.value <= x.error) note_unclear();
  return rounded(::log(x.value), x.error == 0 ? 0 : x.error / magnitude(x.value - x.error), 3);
}
RAPFAST_HD Bounded atan2(Bounded y, Bounded x) {
  const double r2 = x.value * x.value + y.value * y.value;
  return rounded(::atan2(y.value, x.value),
                 r2 == 0 ? 0 : (spread(x.value, y.error) + spread(y.value, x.error)) / r2, 8);
}
// Maximum errors 2 for sinf, 2 for cosf.
RAPFAST_HD Bounded sin(Bounded x) { return rounded(::sin(x.value), x.error, 4); }
RAPFAST_HD Bounded cos(Bounded x) { return rounded(::cos(x.value), x.error, 4); }

RAPFAST_HD Bounded ceil(Bounded x) {
  if (x.error > 0 && ::ceil(x.value - x.error) != ::ceil(x.value + x.error)) note_unclear();
  return Bounded(::ceil(x.value), 0);
}
RAPFAST_HD Bounded floor(Bounded x) {
  if (x.error > 0 && ::floor(x.value - x.error) != ::floor(x.value + x.error)) note_unclear();
  return Bounded(::floor(x.value), 0);
}

}  // namespace rapfast_bounded
