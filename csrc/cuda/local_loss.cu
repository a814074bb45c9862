// The host code of the fused local loss: the launch plan, and the launch.
#include "device.cuh"
#include "job.h"
#include "launch.h"

#include <algorithm>
#include <cmath>

namespace sid {
namespace {

// The alignment of a matrix: where its rows start within 16 bytes.
struct Alignment {
  uint64_t address, step;  // bytes
  DType dtype;
  bool matches(const Alignment& other, int64_t rows) const {
    return dtype == other.dtype && (address - other.address) % 16 == 0 && (rows <= 1 || (step - other.step) % 16 == 0);
  }
};
template <class Matrix> Alignment alignment_of(const Matrix& m) {
  return {reinterpret_cast<uint64_t>(m.data), static_cast<uint64_t>(m.stride * size_of(m.dtype)), m.dtype};
}

int power_of_two(int64_t least) {
  int n = 1;
  while (n < least) n *= 2;
  return n;
}

float log_probability(float q) { return std::log(std::max(q, 1.17549435e-38f)); }

}  // namespace

LaunchPlan plan_local_loss(const LocalLossProblem& problem, int multiprocessors, bool clusters) {
  LaunchPlan plan;
  // 16-byte accesses need one dtype, and rows with the same offset within 16 bytes in every matrix.
  const Alignment z = alignment_of(problem.logits);
  const bool same_alignment = (!problem.prior.data || alignment_of(problem.prior).matches(z, problem.rows)) &&
                              (!problem.belief.data || alignment_of(problem.belief).matches(z, problem.rows)) &&
                              (!problem.dlogits.data || alignment_of(problem.dlogits).matches(z, problem.rows));
  plan.kind = !same_alignment ? Kind::any : static_cast<Kind>(problem.logits.dtype);
  const int pack = pack_size(plan.kind), held = held_packs(plan.kind);
  const int64_t packs = (problem.classes + pack - 1) / pack;
  const bool only_packs =
      pack == 1 || (z.address % 16 == 0 && (problem.rows <= 1 || z.step % 16 == 0) && problem.classes % pack == 0);

  if (packs <= 32 * held) {
    // Two packs per lane while a row needs less than a warp, and one lane for each element outside whole packs.
    plan.warp = 1;
    plan.lanes = std::min(32, std::max(power_of_two((packs + 1) / 2), only_packs ? 1 : 2 * pack));
    plan.threads = kWarpThreads;
    const int64_t rows_per_block = plan.threads / plan.lanes;
    plan.blocks = static_cast<int>(std::min<int64_t>((problem.rows + rows_per_block - 1) / rows_per_block,
                                                     multiprocessors * (kResidentThreads / plan.threads)));
  } else {
    // Use enough threads to hold the row in registers. First add threads while two blocks still fit a
    // multiprocessor, so that one reads while the other writes. Then add blocks, then use blocks of the full size.
    const int threads_per_row = power_of_two((packs + held - 1) / held), max_cluster = clusters ? kMaxCluster : 1;
    plan.threads = std::min(threads_per_row, kBlockThreads / 2);
    plan.cluster = std::min(threads_per_row / plan.threads, max_cluster);
    plan.threads = std::min(threads_per_row / plan.cluster, kBlockThreads);
    // For few rows, use more blocks per row while multiprocessors are idle and each thread keeps two packs.
    while (plan.cluster < max_cluster && problem.rows * plan.cluster * 2 <= multiprocessors &&
           packs >= int64_t{4} * plan.threads * plan.cluster)
      plan.cluster *= 2;
    plan.lanes = plan.threads;
    const int64_t concurrent_rows = std::max(1, multiprocessors * (kResidentThreads / plan.threads) / plan.cluster);
    plan.blocks = static_cast<int>(std::min(problem.rows, concurrent_rows)) * plan.cluster;
  }
  plan.blocks = std::max(plan.cluster, std::min(plan.blocks, kMaxBlocks));
  plan.count_first = problem.spec.options.reduction == Reduction::mean && problem.spec.labels &&
                     problem.rows > kMaxRowsCountedPerBlock;
  return plan;
}

namespace {

using namespace device;

constexpr int kCountThreads = 256;

SID_KERNEL(kCountThreads, 1) count_labels(const Job job) {
  uint32_t& counted = *reinterpret_cast<uint32_t*>(shared_memory());
  if (thread() == 0) counted = 0;
  sync_block();
  unsigned count = 0;
  for (int64_t r = block() * threads() + thread(); r < job.problem.rows; r += kCountBlocks * threads())
    count += job.problem.spec.labels[r] != job.problem.spec.options.ignore_index;
  if (count) atomic_add(&counted, count);
  sync_block();
  if (thread() == 0) job.workspace->counted[block()] = counted;
}

}  // namespace

const char* enqueue(const LocalLossProblem& problem, const LaunchPlan& plan, void* workspace, void* stream) {
  Job job = {};
  job.problem = problem;
  job.plan = plan;
  job.workspace = static_cast<Workspace*>(workspace);
  const float classes = static_cast<float>(problem.classes), s = problem.spec.options.label_smoothing;
  job.constants = {s, 1.0f - s, s / classes, 1.0f - s + s / classes, 0.0f, 0.0f, 1.0f / classes, -std::log(classes)};
  job.constants.log_off = log_probability(job.constants.off);
  job.constants.log_on = log_probability(job.constants.on);
  job.needs_logit_sum = !problem.prior.data || (problem.spec.labels && s > 0.0f);
  while (1 << job.lanes_log2 < plan.lanes * plan.cluster) ++job.lanes_log2;
  const int rows = static_cast<int>(problem.rows), rows_per_warp = plan.warp ? 32 / plan.lanes : 1;
  job.row_limit = (rows + rows_per_warp - 1) / rows_per_warp * rows_per_warp;
  job.row_step = plan.warp ? plan.blocks * (plan.threads / plan.lanes) : plan.blocks / plan.cluster;
  if (plan.count_first) {
    const Grid grid{kCountBlocks, kCountThreads, 1, sizeof(uint32_t)};
    if (const char* error = launch(count_labels, grid, stream, job)) return error;
  }
  switch (plan.kind) {
    case Kind::f32: return enqueue_f32(job, stream);
    case Kind::bf16: return enqueue_bf16(job, stream);
    case Kind::f16: return enqueue_f16(job, stream);
    default: return enqueue_any(job, stream);
  }
}

size_t workspace_bytes() { return sizeof(Workspace); }

const char* local_loss_cuda(const LocalLossProblem& problem, void* workspace, void* stream, int device) {
  // An index may exceed the end by the grid's step.
  constexpr int64_t kMaxIndex = (int64_t{1} << 31) - (int64_t{1} << 24);
  if (problem.rows < 0 || problem.rows > kMaxIndex) return "the number of rows must be at most 2^31 - 2^24";
  if (problem.classes < 1 || problem.classes > kMaxIndex)
    return "the number of classes must be at least 1 and at most 2^31 - 2^24";
  if (!problem.spec.labels == !problem.spec.soft.data && problem.rows > 0)
    return "either labels or class probabilities must be given";
  if (problem.rows == 0 && problem.spec.options.reduction == Reduction::none) return nullptr;
  DeviceProperties properties;
  if (const char* error = device_properties(device, &properties)) return error;
  return enqueue(problem, plan_local_loss(problem, properties.multiprocessors, properties.clusters), workspace, stream);
}

}  // namespace sid
