// What the kernels of stage 1 share: how the work is divided.
#pragma once

#include "../project.h"
#include "check.cuh"
#include "launch.cuh"
#include "scratch.h"

namespace rapfast {
namespace {

constexpr int kGroup = 32;        // most cameras that a Gaussian meets per load, one per lane
constexpr int kWarpWords = 2;     // words of 32 Gaussians that a warp of the cull kernel tests
static_assert(kChunkWords == kWarpWords * kThreads / 32, "a block tests one chunk");

constexpr int kRows = 32;          // Gaussians that a warp of the record kernel stages at a time
constexpr int kRowBits = 5;
constexpr int kRowQuads = 3;       // mean, opacity and covariance, in pieces of 16 bytes
constexpr int kRecordThreads = 128, kRecordWarps = kRecordThreads / 32;
constexpr int kRecordBlocks = 6;   // on a processor at once
constexpr int kViewQuads = sizeof(DeviceView) / 16 - sizeof(FrustumTest<float>) / 16;
constexpr int kTestQuads = sizeof(FrustumTest<float>) / 16;
static_assert(sizeof(FrustumTest<float>) % 16 == 0, "tests are copied in pieces of 16 bytes");

}  // namespace
}  // namespace rapfast
