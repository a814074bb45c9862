// The CPU entry points: choose the instruction set, check labels, split rows among threads, reduce the losses.
#include <pthread.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

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

// From 32 MiB on, malloc returns fresh pages, and faulting them in costs as much as writing them. Ask for 2 MiB pages.
// Smaller blocks are reused by malloc; for them the advice cost more than it saved (measured).
constexpr uintptr_t kFreshBytes = uintptr_t{32} << 20;
void advise_huge_pages(const MutableRows& out, int64_t rows, int64_t classes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  if (!out.data || rows < 1 || out.stride < classes) return;
  const uintptr_t start = reinterpret_cast<uintptr_t>(out.data);
  const uintptr_t end = start + ((rows - 1) * out.stride + classes) * size_of(out.dtype);
  const uintptr_t first = (start + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (end - start >= kFreshBytes && first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

const char* cpu_instruction_set() { return kLevel == 2 ? "avx512" : kLevel == 1 ? "avx2" : "baseline"; }

BadLabel count_labels(const int64_t* labels, int64_t rows, int64_t classes, int64_t ignore_index, int64_t* counted) {
  *counted = rows;
  if (!labels) return {};
  *counted = 0;
  for (int64_t r = 0; r < rows; ++r) {
    if (labels[r] == ignore_index) continue;
    if (labels[r] < 0 || labels[r] >= classes) return {r, labels[r]};
    ++*counted;
  }
  return {};
}

BadLabel local_loss_cpu(const LocalLoss& a, int threads) {
  int64_t counted;
  const BadLabel bad = count_labels(a.labels, a.rows, a.classes, a.ignore_index, &counted);
  if (bad.row >= 0) return bad;
  const bool each = a.reduction == Reduction::none, mean = a.reduction == Reduction::mean;
  const float scale = mean ? 1.0f / static_cast<float>(std::max<int64_t>(counted, 1)) : 1.0f;

  static thread_local std::vector<float> buffer;  // fidelity, consistency and loss of each row
  float *fidelity = a.fidelity, *consistency = a.consistency, *loss = a.loss;
  if (!each) {
    if (static_cast<int64_t>(buffer.size()) < 3 * a.rows) buffer.resize(3 * a.rows);
    fidelity = buffer.data(), consistency = fidelity + a.rows, loss = consistency + a.rows;
  }
  const int64_t elements = a.rows * a.classes;
  const auto bytes = [](const MutableRows& out) { return out.data ? size_of(out.dtype) : 0; };
  const int64_t written = elements * (bytes(a.belief) + bytes(a.dlogits));
  const bool streaming = written >= kStreamingBytes && a.dlogits.data != a.logits.data;
  if (written >= static_cast<int64_t>(kFreshBytes))
    advise_huge_pages(a.belief, a.rows, a.classes), advise_huge_pages(a.dlogits, a.rows, a.classes);
  const RowsKernel kernel = rows_kernel();
  if (forked || elements < kSerialElements) threads = 1;
  threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, a.rows)));
  if (threads == 1) {
    kernel(a, 0, a.rows, scale, streaming, fidelity, consistency, loss);
  } else {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; ++t)
      kernel(a, a.rows * t / threads, a.rows * (t + 1) / threads, scale, streaming, fidelity, consistency, loss);
  }
  if (!each) {
    double f = 0.0, c = 0.0, l = 0.0;
    for (int64_t r = 0; r < a.rows; ++r) f += fidelity[r], c += consistency[r], l += loss[r];
    *a.fidelity = static_cast<float>(f * (mean ? 1.0 / std::max<int64_t>(counted, 1) : 1.0));
    *a.consistency = static_cast<float>(c * (mean ? 1.0 / std::max<int64_t>(counted, 1) : 1.0));
    *a.loss = static_cast<float>(l * (mean ? 1.0 / std::max<int64_t>(counted, 1) : 1.0));
  }
  return {};
}

BadLabel cascade_cpu(const Cascade& a, int threads) {
  int64_t counted;
  const BadLabel bad = count_labels(a.labels, a.rows, a.classes, a.ignore_index, &counted);
  if (bad.row >= 0) return bad;
  const float scale = a.mean ? 1.0f / static_cast<float>(std::max<int64_t>(counted, 1)) : 1.0f;
  const CascadeKernel kernel = cascade_kernel();
  if (forked) threads = 1;
  // Use the widest tiles that still give every thread one: wide tiles read the weights least often.
  const int64_t lanes = kernel.lanes();
  int vectors = 4;
  while (vectors > 1 && (a.rows + vectors * lanes - 1) / (vectors * lanes) < threads) vectors /= 2;
  const int64_t tile = vectors * lanes, tiles = (a.rows + tile - 1) / tile;
  threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, tiles)));
  static thread_local std::vector<float> buffer;  // row losses (3, L, B), then each thread's bias sums (L, H + C)
  const int64_t rows = 3 * a.stages * a.rows, sums = a.stages * (a.width + a.classes);
  buffer.assign(rows + threads * sums, 0.0f);
  float* const losses = buffer.data();
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int t = 0; t < threads; ++t)
    kernel.rows(a, std::min(a.rows, tiles * t / threads * tile), std::min(a.rows, tiles * (t + 1) / threads * tile),
                vectors, scale, losses, losses + rows + t * sums);
  for (int64_t i = 0; i < 3 * a.stages; ++i) {
    double total = 0.0;
    for (int64_t r = 0; r < a.rows; ++r) total += losses[i * a.rows + r];
    a.losses[i] = static_cast<float>(a.mean ? total / std::max<int64_t>(counted, 1) : total);
  }
  if (!a.dhidden) return {};
  for (int64_t i = 0; i < a.stages; ++i)
    for (int64_t j = 0; j < a.width + a.classes; ++j) {
      float total = 0.0f;
      for (int t = 0; t < threads; ++t) total += losses[rows + t * sums + i * (a.width + a.classes) + j];
      *(j < a.width ? a.hidden_bias_gradient + i * a.width + j : a.logits_bias_gradient + i * a.classes + j - a.width) =
          total;
    }
  return {};
}

}  // namespace sid
