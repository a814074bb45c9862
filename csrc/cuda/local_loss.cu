// The host code of the fused local loss: the launch plan, and the launch.
#include "device.cuh"
#include "job.h"
#include "launch.h"

#include <algorithm>
#include <cmath>

namespace sid {
namespace {

// The alignment of a matrix: where its rows start within 16 bytes.
struct Layout {
  uint64_t address, step;  // bytes
  DType dtype;
  bool starts_as(const Layout& other, int64_t rows) const {
    return dtype == other.dtype && (address - other.address) % 16 == 0 && (rows <= 1 || (step - other.step) % 16 == 0);
  }
};
template <class Matrix> Layout layout(const Matrix& m) {
  return {reinterpret_cast<uint64_t>(m.data), static_cast<uint64_t>(m.stride * size_of(m.dtype)), m.dtype};
}

int power_of_two(int64_t least) {
  int n = 1;
  while (n < least) n *= 2;
  return n;
}

float log_probability(float q) { return std::log(std::max(q, 1.17549435e-38f)); }

}  // namespace

Plan plan_local_loss(const LocalLoss& a, int multiprocessors, bool clusters) {
  Plan plan;
  // 16-byte accesses need one dtype, and rows with the same offset within 16 bytes in every matrix.
  const Layout z = layout(a.logits);
  const bool alike = (!a.prior.data || layout(a.prior).starts_as(z, a.rows)) &&
                     (!a.belief.data || layout(a.belief).starts_as(z, a.rows)) &&
                     (!a.dlogits.data || layout(a.dlogits).starts_as(z, a.rows));
  plan.kind = !alike ? Kind::any : static_cast<Kind>(a.logits.dtype);
  const int pack = pack_size(plan.kind), held = held_packs(plan.kind);
  const int64_t packs = (a.classes + pack - 1) / pack;
  const bool whole = pack == 1 || (z.address % 16 == 0 && (a.rows <= 1 || z.step % 16 == 0) && a.classes % pack == 0);

  if (packs <= 32 * held) {
    // Two packs per lane while a row needs less than a warp, and one lane for each element outside whole packs.
    plan.warp = 1;
    plan.lanes = std::min(32, std::max(power_of_two((packs + 1) / 2), whole ? 1 : 2 * pack));
    plan.threads = kWarpThreads;
    const int64_t rows_a_block = plan.threads / plan.lanes;
    plan.blocks = static_cast<int>(std::min<int64_t>((a.rows + rows_a_block - 1) / rows_a_block,
                                                     multiprocessors * (kResidentThreads / plan.threads)));
  } else {
    // Use enough threads to hold the row in registers. First add threads while two blocks still fit a
    // multiprocessor, so that one reads while the other writes. Then add blocks, then use blocks of the full size.
    const int wanted = power_of_two((packs + held - 1) / held), most = clusters ? kMaxCluster : 1;
    plan.threads = std::min(wanted, kBlockThreads / 2);
    plan.cluster = std::min(wanted / plan.threads, most);
    plan.threads = std::min(wanted / plan.cluster, kBlockThreads);
    // For few rows, use more blocks per row while multiprocessors are idle and each thread keeps two packs.
    while (plan.cluster < most && a.rows * plan.cluster * 2 <= multiprocessors &&
           packs >= int64_t{4} * plan.threads * plan.cluster)
      plan.cluster *= 2;
    plan.lanes = plan.threads;
    const int64_t at_once = std::max(1, multiprocessors * (kResidentThreads / plan.threads) / plan.cluster);
    plan.blocks = static_cast<int>(std::min(a.rows, at_once)) * plan.cluster;
  }
  plan.blocks = std::max(plan.cluster, std::min(plan.blocks, kMaxBlocks));
  plan.count_first = a.reduction == Reduction::mean && a.labels && a.rows > kCountItself;
  return plan;
}

namespace {

using namespace device;

constexpr int kCountThreads = 256;

SID_KERNEL(kCountThreads, 1) count_labels(const Job job) {
  uint32_t& counted = *reinterpret_cast<uint32_t*>(shared_memory());
  if (thread() == 0) counted = 0;
  sync_block();
  unsigned mine = 0;
  for (int64_t r = block() * threads() + thread(); r < job.a.rows; r += kCountBlocks * threads())
    mine += job.a.labels[r] != job.a.ignore_index;
  if (mine) atomic_add(&counted, mine);
  sync_block();
  if (thread() == 0) job.workspace->counted[block()] = counted;
}

}  // namespace

const char* enqueue(const LocalLoss& a, const Plan& plan, void* workspace, void* stream) {
  Job job = {};
  job.a = a;
  job.plan = plan;
  job.workspace = static_cast<Workspace*>(workspace);
  const float classes = static_cast<float>(a.classes), s = a.label_smoothing;
  job.constants = {s, 1.0f - s, s / classes, 1.0f - s + s / classes, 0.0f, 0.0f, 1.0f / classes, -std::log(classes)};
  job.constants.log_off = log_probability(job.constants.off);
  job.constants.log_on = log_probability(job.constants.on);
  job.needs_logit_sum = !a.prior.data || (a.labels && s > 0.0f);
  while (1 << job.lanes_log2 < plan.lanes * plan.cluster) ++job.lanes_log2;
  const int rows = static_cast<int>(a.rows), rows_a_warp = plan.warp ? 32 / plan.lanes : 1;
  job.row_limit = (rows + rows_a_warp - 1) / rows_a_warp * rows_a_warp;
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

const char* local_loss_cuda(const LocalLoss& a, void* workspace, void* stream, int device) {
  constexpr int64_t kMost = (int64_t{1} << 31) - (int64_t{1} << 24);  // an index may exceed the end by the grid's step
  if (a.rows < 0 || a.rows > kMost) return "the number of rows must be at most 2^31 - 2^24";
  if (a.classes < 1 || a.classes > kMost) return "the number of classes must be at least 1 and at most 2^31 - 2^24";
  if (!a.labels == !a.soft.data && a.rows > 0) return "either labels or class probabilities must be given";
  if (a.rows == 0 && a.reduction == Reduction::none) return nullptr;
  Facts known;
  if (const char* error = facts(device, &known)) return error;
  return enqueue(a, plan_local_loss(a, known.multiprocessors, known.clusters), workspace, stream);
}

}  // namespace sid
