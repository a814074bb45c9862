// The local-loss kernel: one launch reads z and q and writes belief, dlogits and losses.
//
// A row is processed by some lanes of a warp, or by all threads of a cluster of blocks. Each thread has packs of 16
// bytes of the row (view.cuh) and processes them in rounds:
//   1. Sum. Load the rounds from the last to the first, and add their elements to the thread's sums (row_math.h).
//   2. Merge. Combine the sums of all threads of the row (merge.cuh).
//   3. Write. Round 0 is still in registers, so its belief and dlogits are written first. Then the other rounds are
//      loaded again in ascending order: those read most recently are most likely still in the L2 cache.
// A row that fits in registers is read from memory once. Longer rows take the same path.
#pragma once
#include "merge.cuh"
#include "view.cuh"

namespace sid {
namespace {

// A row as row_math.h expects it. Values that are equal for all rows stay in the kernel's parameters, not in registers.
struct DeviceRow {
  const Job& job;
  float alpha, smoothing, label_logit;
  bool has_prior, hard;
  SID_DEVICE float off_label() const { return job.constants.off; }
  SID_DEVICE float on_label() const { return job.constants.on; }
  SID_DEVICE float log_off_label() const { return job.constants.log_off; }
  SID_DEVICE float log_on_label() const { return job.constants.log_on; }
  SID_DEVICE float uniform() const { return job.constants.uniform; }
  SID_DEVICE float log_uniform() const { return job.constants.log_uniform; }
};

// Load U smoothed target probabilities of a row. For hard labels, set y to the value of a class other than the label.
template <int U> SID_DEVICE void targets(const Job& job, int row, int element, float (&y)[U]) {
  const Rows& soft = job.problem.spec.soft;
  const int size = soft.dtype == DType::f32 ? 4 : 2;
  if (soft.data) load_some(soft.dtype, static_cast<const char*>(soft.data) + row * soft.stride * size, element, y);
#pragma unroll
  for (int i = 0; i < U; ++i) y[i] = soft.data ? y[i] * job.constants.keep + job.constants.off : job.constants.off;
}

// Add U elements to the sums. The maximum of the state must be at least that of the elements.
template <int U, template <class> class Divergence>
SID_DEVICE void add(const Job& job, RowState<Divergence>& state, int row, int element, const float (&z)[U],
                    const float (&q)[U]) {
  float t[U], e[U];
#pragma unroll
  for (int i = 0; i < U; ++i) {
    t[i] = z[i] - reference(state.max);
    e[i] = exp_(t[i]);
    state.part.add(t[i], e[i]);
  }
  if (job.problem.prior.data) {
#pragma unroll
    for (int i = 0; i < U; ++i) state.part.add_prior(t[i], e[i], q[i]);
  }
  if (job.needs_logit_sum) {
#pragma unroll
    for (int i = 0; i < U; ++i) state.part.add_logit(t[i], 1.0f);
  }
  if (job.problem.spec.soft.data) {
    float y[U];
    targets(job, row, element, y);
#pragma unroll
    for (int i = 0; i < U; ++i) state.part.add_target(t[i], e[i], y[i]);
  }
}

template <class T, template <class> class Divergence> SID_KERNEL(kBlockThreads, 1) local_loss(const Job job) {
  constexpr int V = View<T>::V, K = View<T>::K, U = V < 4 ? V : 4;
  const LocalLossProblem& problem = job.problem;
  SharedMemory& shared = *reinterpret_cast<SharedMemory*>(shared_memory());
  float* slots = reinterpret_cast<float*>(&shared + 1);
  if (problem.precomputed && problem.incoming_stride == 0 && *problem.incoming == 1.0f) return;
  const bool warp = job.plan.warp;  // a row belongs to some lanes of a warp; otherwise, to all threads of a cluster
  const int size = threads(), cluster = job.plan.cluster;
  const int lane = warp ? thread() & ((1 << job.lanes_log2) - 1) : (cluster > 1 ? cluster_rank() * size : 0) + thread();

  for (int i = thread(); i < kMaxGroups; i += size)
    for (double& total : shared.totals[i]) total = 0.0;
  if (thread() == 0) shared.counted = 0;
  cluster > 1 ? sync_cluster() : sync_block();  // a block may write into another only after that one has started
  if (problem.spec.options.reduction == Reduction::mean) count_rows(job, shared, size);
  if (thread() == 0) {
    const float counted = static_cast<float>(shared.counted);
    shared.weight = problem.spec.options.reduction != Reduction::mean ? 1.0f : counted > 0.0f ? 1.0f / counted : 0.0f;
  }
  sync_block();

  bool second_slots = false;  // successive rows alternate between two sets of slots
  Pack<T> zs[K], qs[K];
  for (int k = 0; k < K; ++k) qs[k].zero();  // stays zero if there is no prior
  // The lanes of a warp shuffle, so they go through the loop together (row_limit). Lanes beyond the last row repeat its
  // sums and write nothing.
  const int first_row = warp ? (block() * size + thread()) >> job.lanes_log2 : block() / cluster;
  for (int r = first_row; r < job.row_limit; r += job.row_step) {
    const bool active = r < problem.rows;
    RowState<Divergence> state;
    state.clear();
    int label = -1, round;
    bool counts = active;
    float label_logit = 0.0f, alpha;
    {  // ---- sum ----
      const View<T> view(job, active ? r : static_cast<int>(problem.rows) - 1, lane);
      round = view.rounds() - 1;
      const int64_t given_label = problem.spec.labels ? problem.spec.labels[view.row] : 0;
      alpha = problem.spec.alpha ? problem.spec.alpha[view.row * problem.spec.alpha_stride] : problem.spec.alpha_value;
      view.load(job, round, zs, qs);
      if (problem.spec.labels) {
        counts = active && given_label != problem.spec.options.ignore_index;
        if (counts && given_label >= 0 && given_label < problem.classes) label = static_cast<int>(given_label);
        if (counts) label_logit = label >= 0 ? view.z.load(label) : NAN;
      }
      if (V > 1 && view.edge >= 0) {
        const float z[1] = {view.z.load(view.edge)}, q[1] = {problem.prior.data ? view.q.load(view.edge) : 0.0f};
        state.raise_max(fmaxf(z[0], kMasked));
        add(job, state, view.row, view.edge, z, q);
      }
      while (true) {
        float next = state.max;
#pragma unroll
        for (int k = 0; k < K; ++k) {
          if (view.element(round, k) >= view.end) break;
          next = fmaxf(next, zs[k].max());
        }
        state.raise_max(next);
#pragma unroll
        for (int k = 0; k < K; ++k) {
          if (view.element(round, k) >= view.end) break;
#pragma unroll
          for (int i = 0; i < V; i += U) {
            float z[U], q[U];
#pragma unroll
            for (int j = 0; j < U; ++j) z[j] = zs[k].get(i + j), q[j] = qs[k].get(i + j);
            add(job, state, view.row, view.element(round, k) + i, z, q);
          }
        }
        if (round == 0) break;
        view.load(job, --round, zs, qs);
      }
    }
    // ---- merge ----
    if (warp) {
      state.merge_lanes(1 << job.lanes_log2);
      sync_warp();  // every lane must have read z[label] before dlogits may overwrite it
    } else {
      state.merge_cluster(slots + (second_slots ? (1 + state.N) * (size >> 5) * cluster : 0), cluster);
      second_slots = !second_slots;
    }
    const bool invalid_label = problem.spec.labels && counts && label < 0;
    const DeviceRow row{job,
                        alpha,
                        job.constants.smoothing,
                        label_logit,
                        problem.prior.data != nullptr,
                        problem.spec.labels != nullptr};
    RowResult result = state.part.finish(row, state.max);
    if (invalid_label) result.loss = result.fidelity = result.consistency = NAN;
    if (!active) continue;
    if (lane == 0) {
      const float values[3] = {counts ? result.loss : 0.0f, counts ? result.fidelity : 0.0f,
                               counts ? result.consistency : 0.0f};
      if (problem.spec.options.reduction == Reduction::none) {
        problem.loss[r] = values[0], problem.fidelity[r] = values[1], problem.consistency[r] = values[2];
      } else {
        double* total = shared.totals[warp ? thread() >> job.lanes_log2 : 0];
        for (int i = 0; i < 3; ++i) total[i] += values[i];
      }
    }
    if (!problem.belief.data && !problem.dlogits.data) continue;
    {  // ---- write ----
      const View<T> view(job, opaque(r), lane);
      const Row<T> p(problem.belief.data, problem.belief.stride, problem.belief.dtype, view.row);
      const Row<T> dz(problem.dlogits.data, problem.dlogits.stride, problem.dlogits.dtype, view.row);
      const float base = reference(state.max);
      float scale = invalid_label ? NAN : shared.weight;
      if (problem.incoming) scale *= problem.incoming[view.row * problem.incoming_stride];
      const float log2_sum = result.log_sum * kLog2e;
      auto belief_of = [&](float t) { return fast_exp2(fmaf(t, kLog2e, -log2_sum)); };
      GradientCoefficients coefficients = Divergence<float>::gradient_coefficients(row, result, scale);
      if (!problem.prior.data) Divergence<float>::fold_prior(coefficients, row.uniform(), row.log_uniform());
      if (problem.spec.labels) Divergence<float>::fold_target(coefficients, row.off_label(), row.log_off_label());
      // Start these loads early; their values are used after the packs.
      const bool corrects_label = problem.dlogits.data && label >= 0 && view.owns(label);
      const bool has_edge = V > 1 && view.edge >= 0;
      const float q_label = corrects_label && problem.prior.data ? view.q.load(label) : 0.0f;
      const float z_edge = has_edge ? view.z.load(view.edge) : 0.0f;
      const float q_edge = has_edge && problem.prior.data ? view.q.load(view.edge) : 0.0f;
      while (true) {
#pragma unroll
        for (int k = 0; k < K; ++k) {
          const int element = view.element(round, k);
          if (element >= view.end) break;
          Pack<T> belief_pack, g_pack;
#pragma unroll
          for (int i = 0; i < V; i += U) {
            float belief[U + U % 2], g[U + U % 2];
#pragma unroll
            for (int j = 0; j < U; ++j) {
              const float t = zs[k].get(i + j) - base;
              belief[j] = belief_of(t);
              g[j] = Divergence<float>::gradient(coefficients, t, belief[j], qs[k].get(i + j));
            }
            if (problem.spec.soft.data && problem.dlogits.data) {
              float y[U];
              targets(job, view.row, element + i, y);
#pragma unroll
              for (int j = 0; j < U; ++j)
                g[j] += Divergence<float>::target_gradient(coefficients, belief[j], y[j], log_probability(y[j]));
            }
#pragma unroll
            for (int j = 0; j < U; j += 2)
              belief_pack.set(i + j, belief[j], belief[j + 1]), g_pack.set(i + j, g[j], g[j + 1]);
          }
          if (problem.belief.data) p.store(element, belief_pack);
          if (!counts) g_pack.zero();  // an ignored row, even if its logits are NaN
          if (problem.dlogits.data) dz.store(element, g_pack);
        }
        if (++round >= view.rounds()) break;
        view.load(job, round, zs, qs);
      }
      if (has_edge) {
        const float t = z_edge - base, belief = belief_of(t);
        float g = Divergence<float>::gradient(coefficients, t, belief, q_edge);
        if (problem.spec.soft.data) {
          float y[1];
          targets(job, view.row, view.edge, y);
          g += Divergence<float>::target_gradient(coefficients, belief, y[0], log_probability(y[0]));
        }
        if (problem.belief.data) p.store(view.edge, belief);
        if (problem.dlogits.data) dz.store(view.edge, counts ? g : 0.0f);
      }
      // The loop above treated the label like any other class. The thread that wrote that element corrects it.
      if (corrects_label) {
        const Constants& c = job.constants;
        const float t = label_logit - base, belief = belief_of(t);
        dz.store(label,
                 Divergence<float>::gradient(coefficients, t, belief, q_label) +
                     Divergence<float>::target_gradient(coefficients, belief, c.on - c.off, c.log_on - c.log_off));
      }
    }
  }

  // ---- reduce: the block that finishes last adds the sums of all blocks, in a fixed order ------------
  if (problem.spec.options.reduction == Reduction::none) return;
  sync_block();
  double sum[3] = {};
  if (thread() < kMaxGroups)
    for (int i = 0; i < 3; ++i) sum[i] = shared.totals[thread()][i];
  sum_block(sum, shared.scratch, size >> 5);
  if (thread() == 0) {
    for (int i = 0; i < 3; ++i) job.workspace->partial[block()][i] = sum[i];
    fence();
    shared.is_last = atomic_add(&job.workspace->ticket, 1u) == static_cast<unsigned>(blocks() - 1);
  }
  sync_block();
  if (!shared.is_last) return;
  fence();
  for (int i = 0; i < 3; ++i) sum[i] = 0.0;
  for (int b = thread(); b < blocks(); b += size)
    for (int i = 0; i < 3; ++i) sum[i] += load_shared_by_blocks(&job.workspace->partial[b][i]);
  sum_block(sum, shared.scratch, size >> 5);
  if (thread() == 0) {
    const double divisor = problem.spec.options.reduction == Reduction::mean && shared.counted ? shared.counted : 1.0;
    *problem.loss = static_cast<float>(sum[0] / divisor);
    *problem.fidelity = static_cast<float>(sum[1] / divisor);
    *problem.consistency = static_cast<float>(sum[2] / divisor);
    job.workspace->ticket = 0;
  }
}

template <class T, template <class> class Divergence> const char* enqueue_as(const Job& job, void* stream) {
  const LaunchPlan& plan = job.plan;
  const Grid grid{plan.blocks, plan.threads, plan.cluster, shared_bytes(plan, Divergence<float>::N)};
  return launch(local_loss<T, Divergence>, grid, stream, job);
}
template <class T> const char* enqueue_as(const Job& job, void* stream) {
  return job.problem.spec.options.reverse ? enqueue_as<T, Reverse>(job, stream) : enqueue_as<T, Forward>(job, stream);
}

}  // namespace
}  // namespace sid
