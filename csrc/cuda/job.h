// What one launch of the fused local loss is given, and the memory its blocks share.
#pragma once
#include <cstddef>

#include "plan.h"

namespace sid {

// Device memory that outlives a launch.
struct Workspace {
  uint32_t ticket;                 // blocks that have finished; 0 between launches
  uint32_t counted[kCountBlocks];  // rows that are not ignored, as each block of the counting launch found them
  double partial[kMaxBlocks][3];   // fidelity, consistency, loss: sums over each block's rows
};

// What no row changes, computed by the host.
struct Constants {
  float smoothing, keep;           // y <- keep y + off
  float off, on, log_off, log_on;  // hard labels: y elsewhere and at the label
  float uniform, log_uniform;      // the prior where there is none
};
Constants constants_of(const LocalLoss& problem);

struct Job {
  LocalLoss a;
  Constants constants;
  Plan plan;
  bool needs_logit_sum;
  int lanes_log2;  // of the threads a row, over its whole cluster
  int row_step;    // rows the grid works on at once
  int row_limit;   // the number of rows, rounded up so that the lanes of a warp stop together
  Workspace* workspace;
};

// A block's shared memory.
constexpr int kMaxGroups = kWarpThreads;  // rows a block works on at a time
struct Shared {
  uint32_t counted, last;
  float weight;  // of a row's gradient: 1, or 1 / counted
  double scratch[32][3];
  double totals[kMaxGroups][3];  // fidelity, consistency, loss: sums over the rows of each group of lanes
  // then float slots[2][1 + sums][warps of the cluster], where a row is more than a warp's
};
inline size_t shared_bytes(const Plan& plan, int sums) {
  const size_t slots = static_cast<size_t>(plan.threads / 32 * plan.cluster);
  return sizeof(Shared) + (plan.warp ? 0 : 2 * static_cast<size_t>(1 + sums) * slots * sizeof(float));
}

// Enqueues the problem as `plan` says.
const char* enqueue(const LocalLoss& problem, const Plan& plan, void* workspace, void* stream);
// The same for one storage type: each has a translation unit of its own.
const char* enqueue_f32(const Job& job, void* stream);
const char* enqueue_bf16(const Job& job, void* stream);
const char* enqueue_f16(const Job& job, void* stream);
const char* enqueue_any(const Job& job, void* stream);

}  // namespace sid
