// Multiply rows by a scale in device memory. The forward pass already computes the gradient; the backward pass
// only multiplies it by the incoming gradient. In place, a scale of 1 costs no memory traffic. The host never reads it.
#include "launch.h"
#include "storage.cuh"

#include <algorithm>

namespace sid {
namespace {

using namespace device;

constexpr int kThreads = 256, kPacks = 4;  // threads per block; packs a lane loads at once
constexpr int64_t kPiece = 1 << 13;        // a contiguous matrix with one scale is split into rows of this length

struct ScaleJob {
  Scale problem;
  int64_t last;  // elements in the last row
};

// Each warp processes one row at a time.
template <class T> SID_KERNEL(kThreads, 4) scale_rows(const ScaleJob job) {
  constexpr int V = Pack<T>::V;
  const Scale& problem = job.problem;
  const bool in_place = problem.in.data == problem.out.data;
  if (problem.scale_stride == 0 && in_place && problem.scale[0] == 1.0f) return;
  const int lane = thread() & 31;
  const int64_t step = static_cast<int64_t>(blocks()) * (kThreads / 32);
  for (int64_t r = static_cast<int64_t>(block()) * (kThreads / 32) + (thread() >> 5); r < problem.rows; r += step) {
    const float scale = problem.scale[r * problem.scale_stride];
    if (in_place && scale == 1.0f) continue;
    const Row<T> in(problem.in.data, problem.in.stride, problem.in.dtype, r);
    const Row<T> out(problem.out.data, problem.out.stride, problem.out.dtype, r);
    const int n = static_cast<int>(r == problem.rows - 1 ? job.last : problem.classes);
    const uintptr_t from = reinterpret_cast<uintptr_t>(in.data), to = reinterpret_cast<uintptr_t>(out.data);
    int head = static_cast<int>((0 - from / (16 / V)) & (V - 1));
    if (head > n || (from - to) % 16 != 0) head = n;  // misaligned: element by element
    const int end = head + ((n - head) & ~(V - 1));
    for (int i = lane; i < head; i += 32) out.store(i, in.load(i) * scale);
    for (int first = head + lane * V; first < end; first += 32 * V * kPacks) {
      Pack<T> x[kPacks];
      in.load(x, first, 32 * V, end);
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        if (first + k * 32 * V >= end) break;
#pragma unroll
        for (int i = 0; i < V; i += 2) x[k].set(i, x[k].get(i) * scale, x[k].get(i + 1) * scale);
        out.store(first + k * 32 * V, x[k]);
      }
    }
    for (int i = end + lane; i < n; i += 32) out.store(i, in.load(i) * scale);
  }
}

}  // namespace

const char* scale_cuda(const Scale& request, void* stream, int device) {
  ScaleJob job{request, request.classes};
  Scale& problem = job.problem;
  if (problem.in.dtype != problem.out.dtype) return "the gradient and its scaled copy must have one dtype";
  if (problem.rows <= 0 || problem.classes <= 0) return nullptr;
  if (problem.classes > int64_t{1} << 30) return "the number of classes must be at most 2^30";
  DeviceProperties properties;
  if (const char* error = device_properties(device, &properties)) return error;
  if (problem.scale_stride == 0 &&
      (problem.rows == 1 || (problem.in.stride == problem.classes && problem.out.stride == problem.classes))) {
    const int64_t all = problem.rows * problem.classes;
    problem.rows = (all + kPiece - 1) / kPiece;
    problem.classes = problem.in.stride = problem.out.stride = kPiece;
    job.last = all - (problem.rows - 1) * kPiece;
  }
  const int64_t blocks =
      std::min<int64_t>((problem.rows + kThreads / 32 - 1) / (kThreads / 32), properties.multiprocessors * 4);
  const Grid grid{static_cast<int>(blocks), kThreads, 1, 0};
  switch (problem.in.dtype) {
    case DType::f32: return launch(scale_rows<float>, grid, stream, job);
    case DType::bf16: return launch(scale_rows<__nv_bfloat16>, grid, stream, job);
    default: return launch(scale_rows<__half>, grid, stream, job);
  }
}

}  // namespace sid
