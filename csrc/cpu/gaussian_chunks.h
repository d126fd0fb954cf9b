// How backward stages add up over records: a work item owns a chunk of Gaussians and meets the cameras
// in order, so sums need no atomics and do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <vector>

#include "thread_pool.h"

namespace rapfast {

constexpr int64_t kGaussianChunk = 1024;

inline int64_t gaussian_chunks(int64_t n_gaussians) {
  return (n_gaussians + kGaussianChunk - 1) / kGaussianChunk;
}

// Calls body(scene, chunk, first Gaussian, count) for every chunk.
template <typename Body>
void for_gaussian_chunks(int64_t n_scenes, int64_t n_gaussians, int threads, Body&& body) {
  const int64_t n_chunks = gaussian_chunks(n_gaussians);
  parallel_for(n_scenes * n_chunks, threads, [&](int64_t item) {
    const int64_t first = item % n_chunks * kGaussianChunk;
    body(item / n_chunks, item % n_chunks, first, std::min(kGaussianChunk, n_gaussians - first));
  });
}

struct RecordRange {
  int64_t begin, end;
};

// The records of an image whose Gaussians are [first, first + count): they lie side by side.
inline RecordRange records_of(const int64_t* image_offsets, const int32_t* gaussian_ids, int64_t image,
                              int64_t first, int64_t count) {
  const int32_t* begin = gaussian_ids + image_offsets[image];
  const int32_t* end = gaussian_ids + image_offsets[image + 1];
  const auto before = [](int32_t id, int64_t bound) { return id < bound; };
  const int32_t* low = std::lower_bound(begin, end, first, before);
  const int32_t* high = std::lower_bound(low, end, first + count, before);
  return {low - gaussian_ids, high - gaussian_ids};
}

// Sums per image, of `width` numbers each: every (scene, chunk) has its own, added in order at the end.
// In double, since a view's gradient has terms of all that it sees.
class ImageSums {
 public:
  ImageSums(bool wanted, int64_t n_scenes, int64_t n_cameras, int64_t n_gaussians, int width)
      : n_cameras_(n_cameras), n_chunks_(gaussian_chunks(n_gaussians)), width_(width) {
    if (wanted) sums_.assign(size_t(n_scenes * n_chunks_ * n_cameras * width), 0.0);
  }

  bool wanted() const { return !sums_.empty(); }

  double* of(int64_t scene, int64_t chunk, int64_t camera) {
    return sums_.data() + ((scene * n_chunks_ + chunk) * n_cameras_ + camera) * width_;
  }

  void total(int64_t image, double* out /* [width] */) {
    std::fill(out, out + width_, 0.0);
    if (!wanted()) return;
    for (int64_t chunk = 0; chunk < n_chunks_; ++chunk) {
      const double* part = of(image / n_cameras_, chunk, image % n_cameras_);
      for (int i = 0; i < width_; ++i) out[i] += part[i];
    }
  }

 private:
  int64_t n_cameras_, n_chunks_;
  int width_;
  std::vector<double> sums_;
};

}  // namespace rapfast
