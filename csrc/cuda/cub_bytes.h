// How much temporary memory a CUB algorithm wants, asked once per size: each question costs several
// calls of the CUDA runtime, which a small batch would feel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <utility>

#include "check.cuh"

namespace rapfast {

// query(bytes) asks CUB for a problem of n items. `Algorithm` tells the algorithms apart.
template <typename Algorithm, typename Query>
size_t cub_bytes(int64_t n, const char* what, Query&& query) {
  thread_local std::map<std::pair<int, int64_t>, size_t> known;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::pair<int, int64_t> key(device, n);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  size_t bytes = 0;
  check(query(bytes), what);
  if (known.size() >= 1024) known.clear();
  known[key] = bytes;
  return bytes;
}

}  // namespace rapfast
