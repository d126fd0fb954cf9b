// What stands at the end of a call with fixed room, for instance in a CUDA graph: where there was too
// little of it, nobody must take the outputs for a picture.
#include "../render.h"

#include "check.cuh"

namespace rapfast {
namespace {

constexpr int kMaxOverflowBlocks = 264;  // nearly every call only looks at two numbers

__device__ void raise_to(int64_t* largest, int64_t value) {
  atomicMax(reinterpret_cast<long long*>(largest), static_cast<long long>(value));
}

__global__ void __launch_bounds__(kThreads)
    overflow_kernel(const __grid_constant__ OverflowParams p) {
  const Counts counts = p.status->counts;
  const bool overflowed = counts.n_records > p.record_capacity || counts.n_intersections > p.capacity;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    p.status->overflowed = overflowed;
    if (p.worst != nullptr) {
      raise_to(&p.worst->counts.n_records, counts.n_records);
      raise_to(&p.worst->counts.n_intersections, counts.n_intersections);
      raise_to(&p.worst->overflowed, overflowed);
    }
  }
  if (!overflowed) return;
  for (int k = 0; k < p.n_spans; ++k) {
    const PoisonSpan span = p.spans[k];
    uint32_t* const words = static_cast<uint32_t*>(span.begin);
    RAPFAST_GRID_STRIDE(i, span.bytes / 4) { words[i] = span.pattern; }
    // An odd number of halves or bytes.
    const int64_t rest = span.bytes % 4;
    if (blockIdx.x == 0 && threadIdx.x < rest) {
      static_cast<uint8_t*>(span.begin)[span.bytes - rest + threadIdx.x] =
          uint8_t(span.pattern >> 8 * threadIdx.x);
    }
  }
}

}  // namespace

void overflow_cuda(const OverflowParams& p, cudaStream_t stream) {
  int64_t words = 1;
  for (int k = 0; k < p.n_spans; ++k) words = max_of(words, p.spans[k].bytes / 4);
  overflow_kernel<<<min_of<unsigned>(grid_for(words), kMaxOverflowBlocks), kThreads, 0, stream>>>(p);
  check_launch("overflow_kernel");
}

}  // namespace rapfast
