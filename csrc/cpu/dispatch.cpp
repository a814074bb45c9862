// The CPU entry points: choose the instruction set, check labels, split rows among threads, reduce the losses.
#include <pthread.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu/cascade.h"

namespace sid {
namespace {

int instruction_level() {
  int level = 0;
#ifdef SID_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) level = 1;
  if (level && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
    level = 2;
#endif
  if (const char* wanted = std::getenv("SID_KERNELS_CPU"))
    level = std::min(level, !std::strcmp(wanted, "avx512") ? 2 : !std::strcmp(wanted, "avx2") ? 1 : 0);
  return level;
}
const int kLevel = instruction_level();

using RowsKernel = decltype(&baseline::local_loss_rows);
RowsKernel rows_kernel() {
#ifdef SID_X86
  if (kLevel == 2) return &avx512::local_loss_rows;
  if (kLevel == 1) return &avx2::local_loss_rows;
#endif
  return &baseline::local_loss_rows;
}

struct CascadeKernel {
  decltype(&baseline::cascade_rows) rows;
  decltype(&baseline::row_lanes) lanes;
};
CascadeKernel cascade_kernel() {
#ifdef SID_X86
  if (kLevel == 2) return {&avx512::cascade_rows, &avx512::row_lanes};
  if (kLevel == 1) return {&avx2::cascade_rows, &avx2::row_lanes};
#endif
  return {&baseline::cascade_rows, &baseline::row_lanes};
}

// A forked child does not inherit the parent's OpenMP threads, and libgomp would wait for them forever.
bool forked = false;
const int kRegistered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// Below this number of elements a second thread costs more than it saves (measured on a 2-core AVX-512 machine).
constexpr int64_t kSerialElements = 32768;
// From this number of output bytes on, stores bypass the caches: half of a typical last-level cache.
constexpr int64_t kStreamingBytes = int64_t{16} << 20;

}  // namespace

const char* cpu_instruction_set() { return kLevel == 2 ? "avx512" : kLevel == 1 ? "avx2" : "baseline"; }

BadLabel count_labels(const LossSpec& spec, int64_t rows, int64_t classes, int64_t* counted) {
  *counted = rows;
  if (!spec.labels) return {};
  *counted = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t label = spec.labels[r];
    if (label == spec.options.ignore_index) continue;
    if (label < 0 || label >= classes) return {r, label};
    ++*counted;
  }
  return {};
}

BadLabel local_loss_cpu(const LocalLossProblem& problem, int threads) {
  int64_t counted;
  const BadLabel bad = count_labels(problem.spec, problem.rows, problem.classes, &counted);
  if (bad.row >= 0) return bad;
  const Reduction reduction = problem.spec.options.reduction;
  const bool per_row = reduction == Reduction::none, mean = reduction == Reduction::mean;
  const float scale = mean ? 1.0f / static_cast<float>(std::max<int64_t>(counted, 1)) : 1.0f;

  static thread_local std::vector<float> buffer;  // loss, fidelity and consistency of each row
  RowLosses losses{problem.loss, problem.fidelity, problem.consistency};
  if (!per_row) {
    if (static_cast<int64_t>(buffer.size()) < 3 * problem.rows) buffer.resize(3 * problem.rows);
    losses = {buffer.data(), buffer.data() + problem.rows, buffer.data() + 2 * problem.rows};
  }
  const int64_t elements = problem.rows * problem.classes;
  const auto bytes = [](const MutableRows& out) { return out.data ? size_of(out.dtype) : 0; };
  const int64_t written = elements * (bytes(problem.belief) + bytes(problem.dlogits));
  const bool streaming = written >= kStreamingBytes && problem.dlogits.data != problem.logits.data;
  const RowsKernel kernel = rows_kernel();
  if (forked || elements < kSerialElements) threads = 1;
  threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, problem.rows)));
  if (threads == 1) {
    kernel(problem, 0, problem.rows, scale, streaming, losses);
  } else {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; ++t)
      kernel(problem, problem.rows * t / threads, problem.rows * (t + 1) / threads, scale, streaming, losses);
  }
  if (!per_row) {
    double loss = 0.0, fidelity = 0.0, consistency = 0.0;
    for (int64_t r = 0; r < problem.rows; ++r) {
      loss += losses.loss[r];
      fidelity += losses.fidelity[r];
      consistency += losses.consistency[r];
    }
    const double factor = mean ? 1.0 / std::max<int64_t>(counted, 1) : 1.0;
    *problem.loss = static_cast<float>(loss * factor);
    *problem.fidelity = static_cast<float>(fidelity * factor);
    *problem.consistency = static_cast<float>(consistency * factor);
  }
  return {};
}

BadLabel cascade_cpu(const CascadeProblem& problem, int threads) {
  const int64_t rows = problem.rows, classes = problem.classes, hidden_dim = problem.hidden_dim;
  int64_t counted;
  const BadLabel bad = count_labels(problem.spec, rows, classes, &counted);
  if (bad.row >= 0) return bad;
  const bool mean = problem.spec.options.reduction == Reduction::mean;
  const float scale = mean ? 1.0f / static_cast<float>(std::max<int64_t>(counted, 1)) : 1.0f;
  const CascadeKernel kernel = cascade_kernel();
  if (forked) threads = 1;
  // Use the widest tiles that still give every thread one: wide tiles read the weights least often.
  const int64_t lanes = kernel.lanes();
  int vectors = 4;
  while (vectors > 1 && (rows + vectors * lanes - 1) / (vectors * lanes) < threads) vectors /= 2;
  const int64_t tile = vectors * lanes, tiles = (rows + tile - 1) / tile;
  threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, tiles)));

  const int64_t biases = hidden_dim + classes;    // of a stage
  static thread_local std::vector<float> buffer;  // row losses (3, L, B), then each thread's bias sums (L, H + C)
  buffer.assign((3 * rows + threads * biases) * problem.stages, 0.0f);
  float *const losses = buffer.data(), *const sums = losses + 3 * problem.stages * rows;
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int t = 0; t < threads; ++t) {
    const int64_t begin = std::min(rows, tiles * t / threads * tile);
    const int64_t end = std::min(rows, tiles * (t + 1) / threads * tile);
    kernel.rows(problem, begin, end, vectors, scale, losses, sums + t * problem.stages * biases);
  }
  for (int64_t i = 0; i < 3 * problem.stages; ++i) {
    double total = 0.0;
    for (int64_t r = 0; r < rows; ++r) total += losses[i * rows + r];
    problem.losses[i] = static_cast<float>(mean ? total / std::max<int64_t>(counted, 1) : total);
  }
  if (!problem.dhidden) return {};
  for (int64_t i = 0; i < problem.stages; ++i)
    for (int64_t j = 0; j < biases; ++j) {
      float total = 0.0f;
      for (int t = 0; t < threads; ++t) total += sums[(t * problem.stages + i) * biases + j];
      if (j < hidden_dim) problem.hidden_bias_gradient[i * hidden_dim + j] = total;
      else problem.logits_bias_gradient[i * classes + j - hidden_dim] = total;
    }
  return {};
}

}  // namespace sid
