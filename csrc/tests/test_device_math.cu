// csrc/math on the host against csrc/math on the device. The compiler fuses multiply-adds on the device
// and nowhere else, so numbers may differ, by as much as Bounded says float arithmetic may err and no
// more; decisions may differ where Bounded calls one unclear, and that seldom.
//
// Returns 77, which ctest reads as "skipped", where there is no GPU.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>

#include "bounded.h"
#include "device_math_cases.h"

using namespace rapfast;
using namespace rapfast_bounded;

namespace {

constexpr int kSkipped = 77;
constexpr int kItems = 20000;           // of each case, half of them edge values
constexpr double kMaxBand = 0.01;       // share of items whose unclear decision fell differently
constexpr double kSharp = 1e-3;         // largest relative bound that is worth comparing with
constexpr double kMinSharp = 0.75;      // share of ordinary values that must have such a bound
constexpr double kMinSharpOfSums = 0.5; // the same for long sums, whose terms cancel more often

int failures = 0;

void expect(bool ok, const char* name, const char* what) {
  if (ok) return;
  std::printf("%s: %s\n", name, what);
  ++failures;
}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

// Memory of the device that is filled with a pattern no result has.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) : bytes_(count * sizeof(T)) {
    check(cudaMalloc(&data_, bytes_ + 1), "cudaMalloc");
    check(cudaMemset(data_, 0xa5, bytes_ + 1), "cudaMemset");
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* get() const { return static_cast<T*>(data_); }
  void fill(const std::vector<T>& from) {
    check(cudaMemcpy(data_, from.data(), bytes_, cudaMemcpyHostToDevice), "copy to the device");
  }
  void read(std::vector<T>& to) const {
    check(cudaMemcpy(to.data(), data_, bytes_, cudaMemcpyDeviceToHost), "copy from the device");
  }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

template <typename Case>
__global__ void evaluate(const float* inputs, float* values, int32_t* decisions, int n) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  Case::template run<float>(inputs + i * Case::kInputs, values + i * Case::kValues,
                            decisions + i * Case::kDecisions);
}

template <typename Case>
struct Batch {
  std::vector<float> inputs = std::vector<float>(size_t(kItems) * Case::kInputs);
  // What the device makes of them.
  std::vector<float> values = std::vector<float>(size_t(kItems) * Case::kValues);
  std::vector<int32_t> decisions = std::vector<int32_t>(size_t(kItems) * Case::kDecisions);
};

bool is_edge(int item) { return item % 2 == 1; }

template <typename Case>
Batch<Case> run_on_device(uint64_t seed) {
  Batch<Case> batch;
  Random random(seed);
  for (int i = 0; i < kItems; ++i) {
    Case::draw(random, is_edge(i), batch.inputs.data() + size_t(i) * Case::kInputs);
  }
  DeviceArray<float> inputs(batch.inputs.size()), values(batch.values.size());
  DeviceArray<int32_t> decisions(batch.decisions.size());
  inputs.fill(batch.inputs);
  evaluate<Case><<<(kItems + 127) / 128, 128>>>(inputs.get(), values.get(), decisions.get(), kItems);
  check(cudaGetLastError(), Case::kName);
  check(cudaDeviceSynchronize(), Case::kName);
  values.read(batch.values);
  decisions.read(batch.decisions);
  return batch;
}

// Whether two values may both be what float arithmetic makes of b.
bool agree(float host, float device, const Bounded& b, bool overflowed) {
  if (host == device || (host != host && device != device)) return true;
  // Past float's range a fused operation may still give a number where the other gives infinity.
  if (overflowed) return true;
  return std::abs(double(host) - double(device)) <= 2 * b.error + 2 * kUnitRoundoff * magnitude(b.value);
}

template <typename Case>
void compare(uint64_t seed, double min_sharp = kMinSharp) {
  const Batch<Case> batch = run_on_device<Case>(seed);
  std::vector<float> host(Case::kValues);
  std::vector<int32_t> decided(Case::kDecisions), unused(Case::kDecisions);
  std::vector<Bounded> exact(Case::kInputs), bounded(Case::kValues);
  int band = 0, wrong = 0;
  int64_t sharp = 0, ordinary = 0;
  double worst = 0;  // difference of ordinary values over what it may be
  for (int i = 0; i < kItems; ++i) {
    const float* in = batch.inputs.data() + size_t(i) * Case::kInputs;
    const float* device = batch.values.data() + size_t(i) * Case::kValues;
    const int32_t* device_decided = batch.decisions.data() + size_t(i) * Case::kDecisions;
    Case::template run<float>(in, host.data(), decided.data());
    for (int k = 0; k < Case::kInputs; ++k) exact[size_t(k)] = Bounded(double(in[k]));
    bounded_flags() = BoundedFlags();
    Case::template run<Bounded>(exact.data(), bounded.data(), unused.data());
    const BoundedFlags flags = bounded_flags();

    char difference[160] = "";
    for (size_t k = 0; k < decided.size(); ++k) {
      if (decided[k] == device_decided[k]) continue;
      std::snprintf(difference, sizeof difference, "decision %d is %d on the host, %d on the device", int(k),
                    decided[k], device_decided[k]);
    }
    for (size_t k = 0; k < host.size() && difference[0] == '\0'; ++k) {
      const Bounded& b = bounded[k];
      if (!agree(host[k], device[k], b, flags.overflowed)) {
        std::snprintf(difference, sizeof difference,
                      "value %d is %.9g on the host, %.9g on the device, and may err by %.2g", int(k),
                      double(host[k]), double(device[k]), b.error);
      }
      if (is_edge(i) || flags.unclear || flags.overflowed || b.value == 0) continue;
      ++ordinary;
      sharp += b.error <= kSharp * magnitude(b.value);
      if (b.error > 0) worst = std::fmax(worst, std::abs(double(host[k]) - double(device[k])) / (2 * b.error));
    }
    if (difference[0] == '\0') continue;
    if (flags.unclear) {
      ++band;
      continue;
    }
    if (++wrong > 3) continue;  // enough to see what is wrong
    std::printf("%s, item %d: %s\n  inputs:", Case::kName, i, difference);
    for (int k = 0; k < Case::kInputs; ++k) std::printf(" %.9g", double(in[k]));
    std::printf("\n");
  }
  const double share = ordinary == 0 ? 1 : double(sharp) / double(ordinary);
  std::printf("%-38s %d wrong, %d of %d in the boundary band, difference at most %.2f of the bound, %.1f%% sharp\n",
              Case::kName, wrong, band, kItems, worst, 100 * share);
  expect(wrong == 0, Case::kName, "host and device disagree");
  expect(band <= kMaxBand * kItems, Case::kName, "too many decisions fell differently");
  expect(share >= min_sharp, Case::kName, "the bounds are too wide to tell anything");
}

// The cheap test may drop nothing that the full one, on the same device, would keep or count.
template <typename Case>
void cheap_test_keeps_what_the_full_one_keeps(uint64_t seed) {
  const Batch<Case> batch = run_on_device<Case>(seed);
  int kept = 0, lost = 0;
  for (size_t i = 0; i < size_t(kItems); ++i) {
    const int32_t* d = batch.decisions.data() + i * Case::kDecisions;
    const bool wanted = d[0] == int32_t(Visibility::kVisible) || d[0] == int32_t(Visibility::kInvalid);
    kept += wanted;
    lost += wanted && d[3] == 0;
  }
  expect(kept > kItems / 20, Case::kName, "hardly a Gaussian was visible");
  expect(lost == 0, Case::kName, "the cheap test dropped a Gaussian");
}

template <CameraModel kModel>
void test_model() {
  compare<MayBeSeenCase<kModel>>(8);
  compare<ProjectPointCase<kModel>>(11);
  compare<ProjectCase<kModel, false>>(12);
  compare<ProjectCase<kModel, true>>(13);
  compare<ProjectPointVjpCase<kModel>>(16);
  compare<ProjectVjpCase<kModel, false>>(17, kMinSharpOfSums);
  compare<ProjectVjpCase<kModel, true>>(18, kMinSharpOfSums);
  cheap_test_keeps_what_the_full_one_keeps<ProjectCase<kModel, false>>(14);
  cheap_test_keeps_what_the_full_one_keeps<ProjectCase<kModel, true>>(15);
}

}  // namespace

int main() {
  int n_devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&n_devices);
  if (error != cudaSuccess || n_devices == 0) {
    std::printf("Host and device math were not compared: no CUDA device (%s).\n", cudaGetErrorString(error));
    return kSkipped;
  }
  compare<CovarianceCase>(1);
  compare<LoadViewCase>(2);
  compare<CameraCenterCase>(3);
  test_model<CameraModel::kPinhole>();
  test_model<CameraModel::kOrtho>();
  test_model<CameraModel::kFisheye>();
  compare<ShBasisCase>(4);
  compare<CovarianceVjpCase>(19);
  compare<CameraCenterVjpCase>(20);
  compare<ShBasisVjpCase>(21);
  compare<TileRectCase>(5);
  compare<TileRowsCase>(6);
  compare<DepthKeyCase>(7);
  compare<ResizeCase>(9);
  compare<ToByteCase>(10);
  std::printf(failures == 0 ? "host and device math agree\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
