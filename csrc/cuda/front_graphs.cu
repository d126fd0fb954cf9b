// Graphs of the first part of calls, see render.h.
#include "../render.h"

#include "check.cuh"

namespace rapfast {
namespace {

constexpr int kOften = 3;        // calls with the same addresses after which the next makes a graph
constexpr size_t kMaxGraphs = 8;  // of one form of call; the allocator takes two or three blocks in turn

// A capture must not be disturbed by what other threads do, nor disturb them.
class RelaxedCapture {
 public:
  RelaxedCapture() { check(cudaThreadExchangeStreamCaptureMode(&mode_), "cudaThreadExchangeStreamCaptureMode"); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

cudaGraphExec_t make_graph(const std::function<void(cudaStream_t)>& queue) {
  const RelaxedCapture relaxed;
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  try {
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed), "cudaStreamBeginCapture");
    try {
      queue(stream);
    } catch (...) {
      cudaStreamEndCapture(stream, &graph);
      throw;
    }
    check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
    check(cudaGraphInstantiateWithFlags(&exec, graph, 0), "cudaGraphInstantiate");
  } catch (...) {
    if (graph != nullptr) cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
    throw;
  }
  check(cudaGraphDestroy(graph), "cudaGraphDestroy");
  check(cudaStreamDestroy(stream), "cudaStreamDestroy");
  return exec;
}

}  // namespace

struct FrontGraphs::Entry {
  Key key;
  int seen;
  cudaGraphExec_t exec;
};

FrontGraphs::FrontGraphs() = default;

FrontGraphs::~FrontGraphs() {
  // Without a check: at the end of a process the driver may be gone.
  for (const Entry& entry : entries_) {
    if (entry.exec != nullptr) cudaGraphExecDestroy(entry.exec);
  }
}

bool FrontGraphs::launch(const Key& key, cudaStream_t stream, const std::function<void()>& prepare,
                         const std::function<void(cudaStream_t)>& queue) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto found = std::find_if(entries_.begin(), entries_.end(), [&](const Entry& e) { return e.key == key; });
  if (found == entries_.end()) {
    if (entries_.size() == kMaxGraphs) {
      if (entries_.front().exec != nullptr) cudaGraphExecDestroy(entries_.front().exec);
      entries_.erase(entries_.begin());
    }
    entries_.push_back({key, 0, nullptr});
    found = entries_.end() - 1;
  } else {
    std::rotate(found, found + 1, entries_.end());
    found = entries_.end() - 1;
  }
  if (found->exec == nullptr) {
    if (found->seen++ < kOften) return false;
    found->exec = make_graph(queue);
  }
  prepare();
  check(cudaGraphLaunch(found->exec, stream), "cudaGraphLaunch");
  return true;
}

int64_t FrontGraphs::count() {
  std::lock_guard<std::mutex> lock(mutex_);
  return std::count_if(entries_.begin(), entries_.end(), [](const Entry& e) { return e.exec != nullptr; });
}

}  // namespace rapfast
