// Graphs of the first part of calls, see render.h.
#include "../render.h"

#include "check.cuh"

namespace rapfast {
namespace {

constexpr int kOften = 1;        // calls with the same addresses after which the next makes a graph
constexpr size_t kMaxGraphs = 8;  // of one form of call; the allocator takes two or three blocks in turn

// A capture must not be disturbed by what other threads do, nor disturb them.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace

struct FrontGraphs::Entry {
  Key key;
  Arguments arguments{};
  int seen = 0;
  // The node is the first kernel's, and lives as long as the graph that the other was made from.
  cudaGraph_t graph = nullptr;
  cudaGraphNode_t first = nullptr;
  cudaGraphExec_t exec = nullptr;

  void make(const std::function<void(cudaStream_t)>& queue) {
    const RelaxedCapture relaxed;
    cudaStream_t stream = nullptr;
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
      size_t n_roots = 1;
      check(cudaGraphGetRootNodes(graph, &first, &n_roots), "cudaGraphGetRootNodes");
      check(cudaGraphInstantiateWithFlags(&exec, graph, 0), "cudaGraphInstantiate");
    } catch (...) {
      cudaStreamDestroy(stream);
      drop();
      throw;
    }
    check(cudaStreamDestroy(stream), "cudaStreamDestroy");
  }

  // Without checks: at the end of a process the driver may be gone. It may also come while the caller captures a
  // graph, from the cache of plans.
  void drop() {
    const RelaxedCapture relaxed;
    if (exec != nullptr) cudaGraphExecDestroy(exec);
    if (graph != nullptr) cudaGraphDestroy(graph);
    exec = nullptr;
    graph = nullptr;
  }
};

FrontGraphs::FrontGraphs() = default;

FrontGraphs::~FrontGraphs() {
  for (Entry& entry : entries_) entry.drop();
}

bool FrontGraphs::launch(const Key& key, const Arguments& arguments, cudaStream_t stream,
                         const std::function<void(cudaGraphExec_t, cudaGraphNode_t)>& update,
                         const std::function<void(cudaStream_t)>& queue) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto found = std::find_if(entries_.begin(), entries_.end(), [&](const Entry& e) { return e.key == key; });
  if (found == entries_.end()) {
    if (entries_.size() == kMaxGraphs) {
      entries_.front().drop();
      entries_.erase(entries_.begin());
    }
    entries_.push_back({key});
    found = entries_.end() - 1;
  } else {
    std::rotate(found, found + 1, entries_.end());
    found = entries_.end() - 1;
  }
  if (found->exec == nullptr) {
    if (found->seen++ < kOften) return false;
    found->make(queue);
  } else if (found->arguments != arguments) {
    update(found->exec, found->first);
  }
  found->arguments = arguments;
  check(cudaGraphLaunch(found->exec, stream), "cudaGraphLaunch");
  return true;
}

int64_t FrontGraphs::count() {
  std::lock_guard<std::mutex> lock(mutex_);
  return std::count_if(entries_.begin(), entries_.end(), [](const Entry& e) { return e.exec != nullptr; });
}

}  // namespace rapfast
