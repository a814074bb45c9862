// The fused local loss as plain data: the input of the CPU and CUDA kernels (arXiv 2510.03273).
// It depends neither on Python nor on PyTorch or CUDA.
#pragma once
#include <cstdint>

namespace sid {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };
enum class Reduction : int32_t { none = 0, mean = 1, sum = 2 };

// Return the size of an element in bytes.
inline int64_t size_of(DType t) { return t == DType::f32 ? 4 : 2; }

// A matrix (rows, classes) to read. Columns are adjacent, and rows are `stride` elements apart. Any stride is allowed.
struct Rows {
  const void* data = nullptr;
  int64_t stride = 0;
  DType dtype = DType::f32;
};
// A matrix (rows, classes) to write.
struct MutableRows {
  void* data = nullptr;
  int64_t stride = 0;
  DType dtype = DType::f32;
};

// The options of every operation. sid_kernels/core/options.py defines the same in Python.
struct LossOptions {
  bool reverse = false;          // false: alpha CE(y,p) + (1-alpha) KL(q||p); true: alpha KL(p||y) + (1-alpha) KL(p||q)
  float label_smoothing = 0.0f;  // s: the target becomes (1 - s) y + s / classes
  int64_t ignore_index = -100;   // rows with this label are ignored: loss 0 and gradient 0
  Reduction reduction = Reduction::mean;  // mean: divide by the number of rows that are not ignored
};

// What a loss is measured against: target y, alpha and options.
struct LossSpec {
  const int64_t* labels = nullptr;  // (rows) hard labels; null: soft targets
  Rows soft;                        // (rows, classes) class probabilities; no data: hard labels
  const float* alpha = nullptr;     // row r (cascade: stage r) has alpha[r * alpha_stride]; null: all have alpha_value
  int64_t alpha_stride = 0;         // 0: one alpha for all, 1: one for each
  float alpha_value = 0.5f;
  LossOptions options;
};

// Inputs and outputs of the local loss of a stage, for rows of logits z with belief p = softmax(z).
struct LocalLossProblem {
  int64_t rows = 0, classes = 0;

  Rows logits;  // z
  Rows prior;   // q; no data: uniform, without memory traffic
  LossSpec spec;

  float* loss = nullptr;  // loss, fidelity, consistency: (rows) values each for reduction none, otherwise one
  MutableRows belief;     // p, written for every row, even ignored ones; no data: not wanted
  float* fidelity = nullptr;
  float* consistency = nullptr;
  MutableRows dlogits;  // gradient of the reduced loss; no data: not wanted; may be the logits' memory

  // The incoming gradient, which multiplies dlogits before they are rounded: row r has incoming[r * incoming_stride];
  // null: 1. An incoming_stride of 0 means one number for all rows.
  const float* incoming = nullptr;
  int64_t incoming_stride = 0;
  bool precomputed = false;  // dlogits holds the gradient for incoming = 1; CUDA then writes nothing if it is 1
};

}  // namespace sid
