// The argument of the local-loss kernel, and the memory its blocks share.
#pragma once
#include <cstddef>

#include "plan.h"

namespace sid {

// Device memory that persists between launches.
struct Workspace {
  uint32_t ticket;                 // number of blocks that have finished; 0 between launches
  uint32_t counted[kCountBlocks];  // rows that are not ignored, as counted by each block of the counting kernel
  double partial[kMaxBlocks][3];   // each block's sums of loss, fidelity and consistency
};

// Values that are the same for every row, computed by the host.
struct Constants {
  float smoothing, keep;           // y <- keep y + off
  float off, on, log_off, log_on;  // hard labels: smoothed y at other classes and at the label
  float uniform, log_uniform;      // the prior if none is given
};

struct Job {
  LocalLossProblem problem;
  Constants constants;
  LaunchPlan plan;
  bool needs_logit_sum;
  int lanes_log2;  // log2 of the threads per row, in the whole cluster
  int row_step;    // rows the grid processes at once
  int row_limit;   // the number of rows, rounded up so that all lanes of a warp leave the loop together
  Workspace* workspace;
};

// The shared memory of a block.
constexpr int kMaxGroups = kWarpThreads;  // the most rows a block processes at once
struct SharedMemory {
  uint32_t counted, is_last;
  float weight;  // factor of a row's gradient: 1, or 1 / counted
  double scratch[32][3];
  double totals[kMaxGroups][3];  // sums of loss, fidelity and consistency of each group of lanes
  // If a row belongs to a cluster, float slots[2][1 + sums][warps of the cluster] follow.
};
inline size_t shared_bytes(const LaunchPlan& plan, int sums) {
  const size_t slots = static_cast<size_t>(plan.threads / 32 * plan.cluster);
  return sizeof(SharedMemory) + (plan.warp ? 0 : 2 * static_cast<size_t>(1 + sums) * slots * sizeof(float));
}

// Launch the local loss according to `plan`. Return null, or an error message.
const char* enqueue(const LocalLossProblem& problem, const LaunchPlan& plan, void* workspace, void* stream);
// Launch the kernel of one storage type. Each is a translation unit of its own.
const char* enqueue_f32(const Job& job, void* stream);
const char* enqueue_bf16(const Job& job, void* stream);
const char* enqueue_f16(const Job& job, void* stream);
const char* enqueue_any(const Job& job, void* stream);

}  // namespace sid
