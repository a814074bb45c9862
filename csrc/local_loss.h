// The fused local loss as plain data: what a launcher is told, the same for the CPU and for CUDA.
// It knows no Python, no PyTorch and no CUDA type.
#pragma once
#include <cstdint>

namespace sid {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };
enum class Reduction : int32_t { none = 0, mean = 1, sum = 2 };

inline int64_t size_of(DType t) { return t == DType::f32 ? 4 : 2; }

// A matrix of `rows` x `classes`; columns are adjacent, rows are `stride` elements apart (any stride).
struct Rows {
  const void* data = nullptr;
  int64_t stride = 0;
  DType dtype = DType::f32;
};
struct MutableRows {
  void* data = nullptr;
  int64_t stride = 0;
  DType dtype = DType::f32;
};

struct LocalLossProblem {
  int64_t rows = 0, classes = 0;

  Rows logits;                      // z
  Rows prior;                       // q; no data: uniform, nothing is read
  const int64_t* labels = nullptr;  // (rows) hard labels, or
  Rows soft;                        // (rows, classes) class probabilities
  const float* alpha = nullptr;     // element of row r at alpha[r * alpha_stride]; null: alpha_value
  int64_t alpha_stride = 0;         // 0: one alpha for every row, 1: one a row
  float alpha_value = 0.5f;
  float label_smoothing = 0.0f;  // y <- (1 - s) y + s / classes
  int64_t ignore_index = -100;   // rows with this label have loss 0 and gradient 0
  bool reverse = false;          // false: alpha CE(y,p) + (1-alpha) KL(q||p); true: alpha KL(p||y) + (1-alpha) KL(p||q)
  Reduction reduction = Reduction::mean;

  MutableRows belief;     // p = softmax(z), written for every row; no data: not wanted
  MutableRows dlogits;    // gradient of the reduced loss; no data: not wanted. May alias logits exactly.
  float* loss = nullptr;  // reduction none: (rows) values each; otherwise one value each
  float* fidelity = nullptr;
  float* consistency = nullptr;
};

}  // namespace sid
