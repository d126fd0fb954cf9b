#include "thread_pool.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

namespace rapfast {
namespace {

thread_local bool inside_item = false;

struct Job {
  int64_t n;
  void (*fn)(void*, int64_t);
  void* context;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  std::mutex error_mutex;

  void work() {
    inside_item = true;
    for (int64_t i = next.fetch_add(1); i < n && !failed.load(std::memory_order_relaxed);
         i = next.fetch_add(1)) {
      try {
        fn(context, i);
      } catch (...) {
        std::lock_guard<std::mutex> lock(error_mutex);
        if (!error) error = std::current_exception();
        failed.store(true);
      }
    }
    inside_item = false;
  }
};

class Pool {
 public:
  void run(Job& job, int threads) {
    std::lock_guard<std::mutex> one_job_at_a_time(run_mutex_);
    const int helpers = threads - 1;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (n_workers_ < helpers) {
        std::thread([this, id = n_workers_] { loop(id); }).detach();
        ++n_workers_;
      }
      job_ = &job;
      helpers_ = helpers;
      running_ = helpers;
      ++generation_;
    }
    start_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
    job_ = nullptr;
  }

 private:
  void loop(int id) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      start_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (id >= helpers_) continue;  // more workers exist than this job wants
      Job* job = job_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex run_mutex_;
  std::mutex mutex_;
  std::condition_variable start_, done_;
  Job* job_ = nullptr;
  int n_workers_ = 0, helpers_ = 0, running_ = 0;
  uint64_t generation_ = 0;
};

// The pool is never destroyed: its threads may outlive static destructors. A child of fork has none
// of the threads and perhaps a locked mutex, so it leaves the old pool behind and starts afresh.
std::atomic<Pool*> pool{nullptr};

Pool& get_pool() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] {
    pool.store(nullptr);
    inside_item = false;
  });
  (void)registered;
  Pool* current = pool.load();
  if (current == nullptr) {
    Pool* fresh = new Pool;
    if (pool.compare_exchange_strong(current, fresh)) return *fresh;
    delete fresh;  // another thread was first
  }
  return *current;
}

}  // namespace

void run_parallel(int64_t n, int threads, void (*fn)(void*, int64_t), void* context) {
  if (n < threads) threads = int(n);
  if (threads <= 1 || inside_item) {
    for (int64_t i = 0; i < n; ++i) fn(context, i);
    return;
  }
  Job job;
  job.n = n;
  job.fn = fn;
  job.context = context;
  get_pool().run(job, threads);
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace rapfast
