// Reductions across threads: the sums of a row, the losses of a block, and the number of rows that count.
#pragma once
#include "device_math.cuh"
#include "job.h"

namespace sid {
namespace {

using namespace device;

// The sums of a part of a row, relative to the part's maximum.
template <template <class> class Divergence> struct RowState {
  static constexpr int N = Divergence<float>::N;
  float max;
  Divergence<float> part;

  SID_DEVICE void clear() {
    max = kMasked;
    part.clear();
  }
  // Make the sums relative to a larger maximum.
  SID_DEVICE void raise_max(float next) {
    part.rescale(max, next);
    max = next;
  }
  // Merge the states of `lanes` neighboring lanes; `lanes` is a power of two. All of them get equal bits.
  SID_DEVICE void merge_lanes(int lanes) {
    float next = max;
    for (int mask = lanes / 2; mask > 0; mask /= 2) next = fmaxf(next, shuffle_xor(next, mask));
    raise_max(next);
    for (int mask = lanes / 2; mask > 0; mask /= 2) {
#pragma unroll
      for (int i = 0; i < N; ++i) part.sums.v[i] += shuffle_xor(part.sums.v[i], mask);
    }
  }
  // Merge the states of a whole cluster. Each warp writes its state into the `slots` of every block. After a barrier,
  // all threads read the slots. They must not be the slots of the previous row, which another block may still read.
  SID_DEVICE void merge_cluster(float* slots, int cluster) {
    merge_lanes(32);
    const int warps = threads() >> 5, lane = thread() & 31, count = warps * cluster;
    if (lane < cluster) {
      float* slot = slots + (cluster > 1 ? cluster_rank() * warps : 0) + (thread() >> 5);
      float* to = cluster > 1 ? in_block(slot, lane) : slot;
      to[0] = max;
#pragma unroll
      for (int i = 0; i < N; ++i) to[(1 + i) * count] = part.sums.v[i];
    }
    cluster > 1 ? sync_cluster() : sync_block();
    const int lanes = count < 32 ? count : 32;
    clear();
    for (int s = lane & (lanes - 1); s < count; s += lanes) {
      RowState other;
      other.max = slots[s];
#pragma unroll
      for (int i = 0; i < N; ++i) other.part.sums.v[i] = slots[(1 + i) * count + s];
      const float next = fmaxf(max, other.max);
      raise_max(next);
      other.raise_max(next);
      part.sums.merge(other.part.sums);
    }
    merge_lanes(lanes);
  }
};

// Sum x over the block in a fixed order. Only thread 0 gets the result.
SID_DEVICE void sum_block(double (&x)[3], double (*scratch)[3], int warps) {
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    for (int mask = 16; mask > 0; mask /= 2) x[i] += shuffle_xor(x[i], mask);
    if ((thread() & 31) == 0) scratch[thread() >> 5][i] = x[i];
  }
  sync_block();
  if (thread() == 0)
    for (int w = 1; w < warps; ++w)
      for (int i = 0; i < 3; ++i) x[i] += scratch[w][i];
}

// Count the labels first, first + step, ... that are not ignore_index.
SID_DEVICE unsigned count_labels(const LocalLossProblem& problem, int first, int step) {
  unsigned n = 0;
  for (int64_t r = first; r < problem.rows; r += step) n += problem.spec.labels[r] != problem.spec.options.ignore_index;
  return n;
}

// Add up in shared.counted the number of rows that the reduction "mean" divides by.
SID_DEVICE void count_rows(const Job& job, SharedMemory& shared, int size) {
  unsigned count = 0;
  if (!job.problem.spec.labels) count = thread() == 0 ? static_cast<unsigned>(job.problem.rows) : 0;
  else if (!job.plan.count_first) count = count_labels(job.problem, thread(), size);
  else
    for (int i = thread(); i < kCountBlocks; i += size) count += job.workspace->counted[i];
  if (count) atomic_add(&shared.counted, count);
  sync_block();
}

}  // namespace
}  // namespace sid
