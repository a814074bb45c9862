// A small matrix product for tiles whose rows are SIMD lanes: out (M x lanes) = A (M x K) B (K x lanes).
// A is a matrix of scalars, such as weights in their own layout. Each row of the panel B is V vectors. No operand is
// repacked.
#pragma once
#include "cpu/simd.h"

namespace sid {
namespace {  // internal linkage: each instruction set has its own copy

// Rows of `out` held in registers, V vectors each. AVX-512: 24 sums, 4 vectors of B and a scalar fit 32 registers.
// AVX2: 12 sums, 2 vectors of B and a scalar fit 16.
constexpr int kHeldRows = 6;
constexpr int64_t kLine = 16;  // floats in a cache line
constexpr int kMaxVectors = SID_WIDTH == 16 ? 4 : 2;

// The matrix A: element (m, k) is a[m * row + k * column].
struct Scalars {
  const float* a;
  int64_t row, column;
};

template <int M, int V, class Emit>
inline __attribute__((always_inline)) void product_rows(const Scalars& s, int64_t first, int64_t depth,
                                                        const float* panel, Emit emit) {
  Vec sum[M][V] = {};
  const float* a = s.a + first * s.row;
  for (int64_t start = 0; start < depth; start += kLine) {
    // Rows of A are short and far apart, so the hardware does not prefetch the next ones.
    if (s.column == 1)
      for (int m = 0; m < M; ++m) __builtin_prefetch(a + (m + M) * s.row + start);
    const int64_t end = start + kLine < depth ? start + kLine : depth;
    for (int64_t k = start; k < end; ++k) {
      Vec b[V];
      for (int v = 0; v < V; ++v) b[v] = load(panel + (k * V + v) * kWidth);
      for (int m = 0; m < M; ++m) {
        const float x = a[m * s.row + k * s.column];
        for (int v = 0; v < V; ++v) sum[m][v] += b[v] * x;
      }
    }
  }
  for (int m = 0; m < M; ++m) emit(first + m, sum[m]);
}

// Multiply A (rows x depth) by the panel (depth x V vectors) and call emit(m, Vec sums[V]) for each row m.
template <int V, class Emit>
inline void product(const Scalars& s, int64_t rows, int64_t depth, const float* panel, Emit emit) {
  int64_t m = 0;
  for (; m + kHeldRows <= rows; m += kHeldRows) product_rows<kHeldRows, V>(s, m, depth, panel, emit);
  switch (rows - m) {
    case 5: return product_rows<5, V>(s, m, depth, panel, emit);
    case 4: return product_rows<4, V>(s, m, depth, panel, emit);
    case 3: return product_rows<3, V>(s, m, depth, panel, emit);
    case 2: return product_rows<2, V>(s, m, depth, panel, emit);
    case 1: return product_rows<1, V>(s, m, depth, panel, emit);
  }
}

}  // namespace
}  // namespace sid
