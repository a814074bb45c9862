// A cascade of equal belief stages as plain data: the input of its kernel (arXiv 2510.03273, "shared" layout).
// It depends neither on Python nor on PyTorch.
#pragma once
#include "local_loss.h"

namespace sid {

// Inputs and outputs of a cascade. Stage i reads the features f and the belief of the previous stage:
//   h_i = relu(hidden_weight[i] (p_{i-1}, f) + hidden_bias[i])
//   z_i = logits_weight[i] h_i + logits_bias[i],  p_i = softmax(z_i)
// Its loss is the local loss of z_i with prior p_{i-1}. All arrays are float32, except soft targets and labels.
struct CascadeProblem {
  int64_t stages = 0, rows = 0, classes = 0, hidden_dim = 0;  // L, B, C, H

  const float* hidden_weight = nullptr;  // (L, H, hidden_weight_stride); the first C columns multiply the belief
  int64_t hidden_weight_stride = 0;      // C + D
  const float* hidden_bias = nullptr;    // (L, H)
  const float* logits_weight = nullptr;  // (L, C, H)
  const float* logits_bias = nullptr;    // (L, C)

  Rows prior;     // p_0 (B, C), float32; no data: uniform
  LossSpec spec;  // labels (B), soft targets (B, C), alpha (L)

  float* hidden = nullptr;                // (L, H, B): in: the features' part of the first layer; out: h_i
  float* losses = nullptr;                // (3, L): reduced loss, fidelity and consistency
  float* beliefs = nullptr;               // (L, B, C)
  float* logits = nullptr;                // (B, C): logits of the last stage
  float* dlogits = nullptr;               // (L, B, C); needed if dhidden is given
  float* dhidden = nullptr;               // (L, H, B): gradient before the ReLU; null: compute no gradients
  float* hidden_bias_gradient = nullptr;  // (L, H); needed if dhidden is given
  float* logits_bias_gradient = nullptr;  // (L, C); needed if dhidden is given
};

}  // namespace sid
