// What the two colour stages, by spherical harmonics and by a network, share.
#pragma once

#include <algorithm>

#include "../color.h"
#include "../math/sh.h"
#include "thread_pool.h"

namespace rapfast {

// Calls body(image, begin, end) for ranges of records that each lie in one image, all records once.
template <typename Body>
void for_record_ranges(const int64_t* image_offsets /* [n_images + 1] */, int64_t n_images,
                       int threads, Body&& body) {
  constexpr int64_t kChunk = 1024;  // records per work item
  const int64_t n_records = image_offsets[n_images];
  parallel_for((n_records + kChunk - 1) / kChunk, threads, [&](int64_t item) {
    int64_t begin = item * kChunk;
    const int64_t end = std::min(begin + kChunk, n_records);
    int64_t image =
        std::upper_bound(image_offsets, image_offsets + n_images + 1, begin) - image_offsets - 1;
    for (; begin < end; ++image) {
      const int64_t stop = std::min(end, image_offsets[image + 1]);
      if (stop > begin) body(image, begin, stop);
      begin = std::max(begin, stop);
    }
  });
}

template <typename T>
void sh_color(const T* coeffs /* [K, 3] */, const T* basis, int n_bases, T* out /* [3] */) {
  T rgb[3] = {T(0), T(0), T(0)};
  for (int k = 0; k < n_bases; ++k) {
    for (int c = 0; c < 3; ++c) rgb[c] += basis[k] * coeffs[3 * k + c];
  }
  for (int c = 0; c < 3; ++c) {
    // What is not finite passes the clamp, so that the caller sees it.
    const T v = rgb[c] + Constants<T>::kShOffset;
    out[c] = v < T(0) && is_finite(v) ? T(0) : v;
  }
}

// Call when the record's colours are written: takes it out if they are not finite, and appends the
// depth. True if it stays.
template <typename T>
bool finish_record(const ColorParams<T>& p, int64_t m) {
  Record<T>& record = p.records[m];
  T* out = p.record_colors + m * p.color_stride;
  const int64_t d_out = output_channels(p);
  const int64_t n_colors = p.depth_channel == DepthChannel::kOnly ? 0 : p.n_channels;
  bool finite = true;
  for (int64_t d = 0; d < n_colors; ++d) finite = finite && is_finite(out[d]);
  if (!finite) {
    // Nothing of it may be drawn, and 0 x NaN would still be NaN in the blend's sums.
    record.opacity = T(0);
    for (int64_t d = 0; d < d_out; ++d) out[d] = T(0);
  }
  if (p.depth_channel != DepthChannel::kNone) out[d_out - 1] = record.depth;
  return finite;
}

// From several threads.
inline void add_invalid(int64_t* n_invalid /* [I] */, int64_t image, int64_t count) {
  if (count > 0) __atomic_fetch_add(n_invalid + image, count, __ATOMIC_RELAXED);
}

}  // namespace rapfast
