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

// A tile of V vectors of rows.
template <int V> struct Tile {
  static constexpr int64_t kLanes = V * kWidth;
  const Cascade& a;
  int64_t first, rows;  // the tile's first row, and its number of rows
  float scale;
  float *losses, *sums;
  float *hidden, *belief, *slope, *logits;  // (H, lanes), (C, lanes), (C, lanes), (rows, C)

  Tile(const Cascade& cascade, int64_t begin, int64_t end, float s, float* loss_rows, float* bias_sums,
       std::vector<float>& memory)
      : a(cascade), first(begin), rows(std::min(kLanes, end - begin)), scale(s), losses(loss_rows), sums(bias_sums) {
    // Align to cache lines: a vector that straddles two lines costs two reads.
    const size_t needed = (a.width + 2 * a.classes) * kLanes + kLanes * a.classes + sizeof(Vec) / sizeof(float);
    if (memory.size() < needed) memory.resize(needed);
    hidden = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + sizeof(Vec) - 1) / sizeof(Vec) *
                                      sizeof(Vec));
    belief = hidden + a.width * kLanes;
    slope = belief + a.classes * kLanes;
    logits = slope + a.classes * kLanes;
  }

  void start() {
    std::fill(belief, belief + 2 * a.classes * kLanes, 0.0f);  // keep the lanes beyond the last row finite
    const float* prior = static_cast<const float*>(a.prior.data);
    for (int64_t c = 0; c < a.classes; ++c)
      for (int64_t r = 0; r < rows; ++r)
        belief[c * kLanes + r] = prior ? prior[(first + r) * a.prior.stride + c] : 1.0f / static_cast<float>(a.classes);
  }

  void stage(int64_t i) {
    const float* w1 = a.hidden_weight + i * a.width * a.hidden_weight_stride;
    const float* w2 = a.logits_weight + i * a.classes * a.width;
    const float *b1 = a.hidden_bias + i * a.width, *b2 = a.logits_bias + i * a.classes;
    float* h_out = a.hidden + i * a.width * a.rows + first;

    product<V>({w1, a.hidden_weight_stride, 1}, a.width, a.classes, belief, [&](int64_t j, const Vec* sum) {
      for (int v = 0; v < V; ++v) {
        const int64_t left = rows - v * kWidth;
        const Vec x = sum[v] + load_part(h_out + j * a.rows + v * kWidth, left) + b1[j];
        const Vec h = x < Vec{} ? Vec{} : x;  // keeps NaN
        store(hidden + j * kLanes + v * kWidth, h);
        store_part(h_out + j * a.rows + v * kWidth, h, left);
      }
    });
    product<V>({w2, a.width, 1}, a.classes, a.width, hidden, [&](int64_t c, const Vec* sum) {
      for (int v = 0; v < V; ++v) store(slope + c * kLanes + v * kWidth, sum[v] + b2[c]);
    });
    float* z = i + 1 == a.stages ? a.logits + first * a.classes : logits;
    transpose(slope, kLanes, a.classes, rows, z, a.classes);
    loss(i, z);
    const int64_t at = (i * a.rows + first) * a.classes;
    if (i + 1 < a.stages) transpose(a.beliefs + at, a.classes, rows, a.classes, belief, kLanes);
    if (!a.dhidden) return;
    if (rows < kLanes)
      std::fill(slope, slope + a.classes * kLanes, 0.0f);  // lanes beyond the last row contribute nothing
    transpose(a.dlogits + at, a.classes, rows, a.classes, slope, kLanes);
    float* bias_sums = sums + i * (a.width + a.classes);
    float* dh_out = a.dhidden + i * a.width * a.rows + first;
    product<V>({w2, 1, a.width}, a.width, a.classes, slope, [&](int64_t j, const Vec* sum) {
      Vec total{};
      for (int v = 0; v < V; ++v) {
        const Vec h = load(hidden + j * kLanes + v * kWidth), dh = h <= Vec{} ? Vec{} : sum[v];
        store_part(dh_out + j * a.rows + v * kWidth, dh, rows - v * kWidth);
        total += dh;
      }
      bias_sums[j] += sum_lanes(total);
    });
    for (int64_t c = 0; c < a.classes; ++c) {
      Vec total{};
      for (int v = 0; v < V; ++v) total += load(slope + c * kLanes + v * kWidth);
      bias_sums[a.width + c] += sum_lanes(total);
    }
  }

  void loss(int64_t i, const float* z) const {
    LocalLoss problem;
    const int64_t row = i * a.rows + first;
    problem.rows = rows;
    problem.classes = a.classes;
    problem.logits = {z, a.classes, DType::f32};
    if (i) problem.prior = {a.beliefs + (row - a.rows) * a.classes, a.classes, DType::f32};
    else if (a.prior.data)
      problem.prior = {static_cast<const float*>(a.prior.data) + first * a.prior.stride, a.prior.stride, DType::f32};
    if (a.labels) problem.labels = a.labels + first;
    if (a.soft.data)
      problem.soft = {static_cast<const char*>(a.soft.data) + first * a.soft.stride * size_of(a.soft.dtype),
                      a.soft.stride, a.soft.dtype};
    problem.alpha_value = a.alpha ? a.alpha[i] : a.alpha_value;
    problem.label_smoothing = a.label_smoothing;
    problem.ignore_index = a.ignore_index;
    problem.reverse = a.reverse;
    problem.belief = {a.beliefs + row * a.classes, a.classes, DType::f32};
    if (a.dhidden) problem.dlogits = {a.dlogits + row * a.classes, a.classes, DType::f32};
    float* loss = losses + row;
    float *fidelity = loss + a.stages * a.rows, *consistency = fidelity + a.stages * a.rows;
    local_loss_rows(problem, 0, rows, scale, false, fidelity, consistency, loss);
  }
};

template <int V> void run(const Cascade& a, int64_t begin, int64_t end, float scale, float* losses, float* sums) {
  static thread_local std::vector<float> memory;
  for (int64_t first = begin; first < end; first += Tile<V>::kLanes) {
    Tile<V> tile(a, first, end, scale, losses, sums, memory);
    tile.start();
    for (int64_t i = 0; i < a.stages; ++i) tile.stage(i);
  }
}

}  // namespace

int row_lanes() { return kWidth; }

void cascade_rows(const Cascade& a, int64_t begin, int64_t end, int vectors, float scale, float* losses, float* sums) {
  if (vectors >= 4 && kMostVectors >= 4) run<kMostVectors>(a, begin, end, scale, losses, sums);
  else if (vectors >= 2) run<2>(a, begin, end, scale, losses, sums);
  else run<1>(a, begin, end, scale, losses, sums);
}

}  // namespace SID_ISA
}  // namespace sid
