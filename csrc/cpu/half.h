// float to IEEE binary16, round to nearest even, by bits: gcc 11 has no half type for x86 in C++.
#pragma once

#include <cstdint>
#include <cstring>

namespace rapfast {

inline uint16_t to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u);   // NaN
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds past 65504: infinity
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 leaves the value, in units of 2^-24, in the low mantissa bits, rounded.
    float f;
    std::memcpy(&f, &magnitude, sizeof(f));
    f += 0.5f;
    uint32_t shifted;
    std::memcpy(&shifted, &f, sizeof(shifted));
    return uint16_t(sign | (shifted - 0x3f000000u));
  }
  const uint32_t odd = (magnitude >> 13) & 1u;
  return uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
}

}  // namespace rapfast
