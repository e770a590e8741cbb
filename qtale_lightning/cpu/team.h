// Threads that compute together, phase by phase: started once for all phases, with a barrier between two of them, which
// takes a fraction of the time of starting them again.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace qtale {

struct Team {
  int64_t rank, size;

  // Everybody's writes before it are seen by everybody behind it.
  void wait() const {
    if (size > 1) {
#pragma omp barrier
    }
  }

  // Of `count` items those that are this thread's, from first to second.
  std::pair<int64_t, int64_t> share(int64_t count) const { return {count * rank / size, count * (rank + 1) / size}; }
};

// Calls `run(Team)` in up to `threads` threads at once; it must not throw.
template <typename F>
void together(int threads, F&& run) {
#pragma omp parallel num_threads(threads)
  run(Team{omp_get_thread_num(), omp_get_num_threads()});
}

}  // namespace qtale
