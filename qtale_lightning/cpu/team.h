// Threads that compute together, phase by phase: started once for all phases, with a barrier between two of them, which
// takes a fraction of the time of starting them again.
#pragma once

#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace qtale {

constexpr int PATIENCE = 2000;  // looks, some 20 µs, before a thread lets others have its processor

class Team {
 public:
  const int64_t rank, size;

  Team(int64_t rank, int64_t size, std::atomic<int64_t>& arrived) : rank(rank), size(size), arrived_(arrived) {}

  // Everybody's writes before it are seen by everybody behind it. OpenMP's own barrier takes several times as long, and
  // where other processes want the processors, it looks on for milliseconds while the thread it waits for can't run.
  void wait() {
    if (size == 1) return;
    everybody_ += size;
    arrived_.fetch_add(1, std::memory_order_acq_rel);
    for (int looks = 0; arrived_.load(std::memory_order_acquire) < everybody_; looks++)
      if (looks < PATIENCE) relax();
      else sched_yield();
  }

  // Of `count` items those that are this thread's, from first to second.
  std::pair<int64_t, int64_t> share(int64_t count) const { return {count * rank / size, count * (rank + 1) / size}; }

 private:
  std::atomic<int64_t>& arrived_;  // in all phases together
  int64_t everybody_ = 0;

  static void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    asm volatile("yield");
#endif
  }
};

// Calls `run(Team&)` in up to `threads` threads at once; it must not throw.
template <typename F>
void together(int threads, F&& run) {
  struct alignas(64) Alone {  // in its line of the caches
    std::atomic<int64_t> arrived{0};
  } shared;
#pragma omp parallel num_threads(threads)
  {
    Team team(omp_get_thread_num(), omp_get_num_threads(), shared.arrived);
    run(team);
  }
}

}  // namespace qtale
