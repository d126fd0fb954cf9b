// The CPU backend's threads: one pool per process, started on first use, empty again after fork.
#pragma once

#include <cstdint>

namespace rapfast {

// Calls fn(context, i) once for each i in [0, n), on up to `threads` threads, the caller's among
// them. Items are handed out one at a time, so no result may depend on which thread takes which.
// A call from inside an item runs inline. The first exception an item throws is thrown again here.
void run_parallel(int64_t n, int threads, void (*fn)(void* context, int64_t i), void* context);

template <typename Body>
void parallel_for(int64_t n, int threads, Body&& body) {
  run_parallel(
      n, threads, [](void* context, int64_t i) { (*static_cast<Body*>(context))(i); }, &body);
}

}  // namespace rapfast
