// The cascade on the CPU, compiled once per instruction set (SID_ISA).
//
// A thread takes a tile of rows through all stages, without synchronizing with other threads. One SIMD lane holds one
// row, so the weights are read in their own layout. Softmax, loss and dlogits come from the local-loss row kernel.
#include "cpu/cascade.h"

#include <algorithm>
#include <vector>

#include "cpu/tile_product.h"

namespace sid {
namespace SID_ISA {
namespace {

void transpose4(const float* from, int64_t stride, float* to, int64_t to_stride) {
#if defined(__x86_64__)
  __m128 a = _mm_loadu_ps(from), b = _mm_loadu_ps(from + stride), c = _mm_loadu_ps(from + 2 * stride),
         d = _mm_loadu_ps(from + 3 * stride);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(to, a), _mm_storeu_ps(to + to_stride, b), _mm_storeu_ps(to + 2 * to_stride, c);
  _mm_storeu_ps(to + 3 * to_stride, d);
#else
  for (int r = 0; r < 4; ++r)
    for (int c = 0; c < 4; ++c) to[c * to_stride + r] = from[r * stride + c];
#endif
}

// Set to[c * to_stride + r] = from[r * stride + c].
void transpose(const float* from, int64_t stride, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  constexpr int64_t kBlock = 16;  // rows and columns of a block: two blocks fit the L1 cache
  for (int64_t c0 = 0; c0 < columns; c0 += kBlock)
    for (int64_t r0 = 0; r0 < rows; r0 += kBlock) {
      const int64_t c1 = std::min(columns, c0 + kBlock), r1 = std::min(rows, r0 + kBlock);
      int64_t r = r0;
      for (; r + 4 <= r1; r += 4) {
        int64_t c = c0;
        for (; c + 4 <= c1; c += 4) transpose4(from + r * stride + c, stride, to + c * to_stride + r, to_stride);
        for (; c < c1; ++c)
          for (int64_t k = r; k < r + 4; ++k) to[c * to_stride + k] = from[k * stride + c];
      }
      for (; r < r1; ++r)
        for (int64_t c = c0; c < c1; ++c) to[c * to_stride + r] = from[r * stride + c];
    }
}

// Load or store at most `count` floats of a vector. `count` may be negative or larger than a vector.
Vec load_part(const float* p, int64_t count) {
  return count >= kWidth ? load(p) : count <= 0 ? Vec{} : load_first(p, static_cast<int>(count % kWidth), 0.0f);
}
void store_part(float* p, Vec v, int64_t count) {
  if (count >= kWidth) store(p, v);
  else if (count > 0) store_first(p, v, static_cast<int>(count % kWidth));
}

// A tile of V vectors of rows, and its buffers.
template <int V> struct Tile {
  static constexpr int64_t kLanes = V * kWidth;
  const CascadeProblem& problem;
  const int64_t hidden_dim = problem.hidden_dim, classes = problem.classes;  // H, C
  int64_t first, rows;         // the tile's first row, and its number of rows
  float scale;                 // factor of dlogits
  float *losses, *bias_sums;   // outputs, see cascade_rows
  float *hidden, *belief;      // (H, lanes), (C, lanes)
  float *transposed, *logits;  // (C, lanes): logits, then dlogits; (rows, C)

  Tile(const CascadeProblem& cascade, int64_t begin, int64_t end, float dlogits_scale, float* row_losses, float* sums,
       std::vector<float>& memory)
      : problem(cascade),
        first(begin),
        rows(std::min(kLanes, end - begin)),
        scale(dlogits_scale),
        losses(row_losses),
        bias_sums(sums) {
    const size_t needed = (hidden_dim + 3 * classes) * kLanes + kWidth;
    if (memory.size() < needed) memory.resize(needed);
    // Align to cache lines: a vector that straddles two lines costs two reads.
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory.data());
    hidden = reinterpret_cast<float*>((address + sizeof(Vec) - 1) / sizeof(Vec) * sizeof(Vec));
    belief = hidden + hidden_dim * kLanes;
    transposed = belief + classes * kLanes;
    logits = transposed + classes * kLanes;
  }

  // Set the belief to the prior of the first stage.
  void start() {
    std::fill(belief, belief + 2 * classes * kLanes, 0.0f);  // keep the lanes beyond the last row finite
    const float* prior = static_cast<const float*>(problem.prior.data);
    const float uniform = 1.0f / static_cast<float>(classes);
    for (int64_t c = 0; c < classes; ++c)
      for (int64_t r = 0; r < rows; ++r)
        belief[c * kLanes + r] = prior ? prior[(first + r) * problem.prior.stride + c] : uniform;
  }

  void run_stage(int64_t i) {
    const float* w1 = problem.hidden_weight + i * hidden_dim * problem.hidden_weight_stride;
    const float* w2 = problem.logits_weight + i * classes * hidden_dim;
    const float *b1 = problem.hidden_bias + i * hidden_dim, *b2 = problem.logits_bias + i * classes;
    float* h_out = problem.hidden + i * hidden_dim * problem.rows + first;

    auto write_hidden = [&](int64_t j, const Vec* sum) {
      for (int v = 0; v < V; ++v) {
        const int64_t left = rows - v * kWidth;
        const Vec x = sum[v] + load_part(h_out + j * problem.rows + v * kWidth, left) + b1[j];
        const Vec h = x < Vec{} ? Vec{} : x;  // keeps NaN
        store(hidden + j * kLanes + v * kWidth, h);
        store_part(h_out + j * problem.rows + v * kWidth, h, left);
      }
    };
    auto write_logits = [&](int64_t c, const Vec* sum) {
      for (int v = 0; v < V; ++v) store(transposed + c * kLanes + v * kWidth, sum[v] + b2[c]);
    };
    product<V>({w1, problem.hidden_weight_stride, 1}, hidden_dim, classes, belief, write_hidden);
    product<V>({w2, hidden_dim, 1}, classes, hidden_dim, hidden, write_logits);
    float* z = i + 1 == problem.stages ? problem.logits + first * classes : logits;
    transpose(transposed, kLanes, classes, rows, z, classes);
    compute_loss(i, z);
    const int64_t offset = (i * problem.rows + first) * classes;
    if (i + 1 < problem.stages) transpose(problem.beliefs + offset, classes, rows, classes, belief, kLanes);
    if (problem.dhidden) run_backward(i, w2, problem.dlogits + offset);
  }

  // Compute dhidden and the bias gradients of stage i from dlogits (rows, C).
  void run_backward(int64_t i, const float* w2, const float* dlogits) {
    // Lanes beyond the last row contribute nothing.
    if (rows < kLanes) std::fill(transposed, transposed + classes * kLanes, 0.0f);
    transpose(dlogits, classes, rows, classes, transposed, kLanes);
    float* sums = bias_sums + i * (hidden_dim + classes);
    float* dh_out = problem.dhidden + i * hidden_dim * problem.rows + first;
    auto write_dhidden = [&](int64_t j, const Vec* sum) {
      Vec total{};
      for (int v = 0; v < V; ++v) {
        const Vec h = load(hidden + j * kLanes + v * kWidth), dh = h <= Vec{} ? Vec{} : sum[v];
        store_part(dh_out + j * problem.rows + v * kWidth, dh, rows - v * kWidth);
        total += dh;
      }
      sums[j] += sum_lanes(total);
    };
    product<V>({w2, 1, hidden_dim}, hidden_dim, classes, transposed, write_dhidden);
    for (int64_t c = 0; c < classes; ++c) {
      Vec total{};
      for (int v = 0; v < V; ++v) total += load(transposed + c * kLanes + v * kWidth);
      sums[hidden_dim + c] += sum_lanes(total);
    }
  }

  // Compute belief, losses and dlogits of stage i from its logits z (rows, C).
  void compute_loss(int64_t i, const float* z) const {
    const int64_t row = i * problem.rows + first;  // in the arrays (L, B, ...)
    const Rows& prior = problem.prior;
    LocalLossProblem stage;
    stage.rows = rows;
    stage.classes = classes;
    stage.logits = {z, classes, DType::f32};
    if (i) stage.prior = {problem.beliefs + (row - problem.rows) * classes, classes, DType::f32};
    else if (prior.data)
      stage.prior = {static_cast<const float*>(prior.data) + first * prior.stride, prior.stride, DType::f32};
    LossSpec& spec = stage.spec = problem.spec;
    Rows& soft = spec.soft;
    if (spec.labels) spec.labels += first;
    if (soft.data) soft.data = static_cast<const char*>(soft.data) + first * soft.stride * size_of(soft.dtype);
    if (spec.alpha) spec.alpha_value = spec.alpha[i * spec.alpha_stride];
    spec.alpha = nullptr;
    stage.belief = {problem.beliefs + row * classes, classes, DType::f32};
    if (problem.dhidden) stage.dlogits = {problem.dlogits + row * classes, classes, DType::f32};
    float* loss = losses + row;
    const int64_t all_rows = problem.stages * problem.rows;
    local_loss_rows(stage, 0, rows, scale, false, {loss, loss + all_rows, loss + 2 * all_rows});
  }
};

template <int V>
void run(const CascadeProblem& problem, int64_t begin, int64_t end, float scale, float* losses, float* sums) {
  static thread_local std::vector<float> memory;
  for (int64_t first = begin; first < end; first += Tile<V>::kLanes) {
    Tile<V> tile(problem, first, end, scale, losses, sums, memory);
    tile.start();
    for (int64_t i = 0; i < problem.stages; ++i) tile.run_stage(i);
  }
}

}  // namespace

int row_lanes() { return kWidth; }

void cascade_rows(const CascadeProblem& problem, int64_t begin, int64_t end, int vectors, float scale, float* losses,
                  float* sums) {
  if (vectors >= 4 && kMaxVectors >= 4) run<kMaxVectors>(problem, begin, end, scale, losses, sums);
  else if (vectors >= 2) run<2>(problem, begin, end, scale, losses, sums);
  else run<1>(problem, begin, end, scale, losses, sums);
}

}  // namespace SID_ISA
}  // namespace sid
