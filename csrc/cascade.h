// A cascade of equal belief stages as plain data: what its kernel is told (method: arXiv 2510.03273, "shared" layout).
// It knows no Python and no PyTorch.
#pragma once
#include "local_loss.h"

namespace sid {

// Stage i reads features f and the belief of the stage before it:
//   h_i = relu(hidden_weight[i] (p_{i-1}, f) + hidden_bias[i])
//   z_i = logits_weight[i] h_i + logits_bias[i],  p_i = softmax(z_i)
// and learns from the local loss of z_i with prior p_{i-1}. Everything is float32; columns are adjacent.
struct CascadeProblem {
  int64_t stages = 0, rows = 0, classes = 0, hidden_dim = 0;  // L, B, C, H

  const float* hidden_weight = nullptr;  // (L, H, hidden_weight_stride); the first C columns act on the belief
  int64_t hidden_weight_stride = 0;      // C + D
  const float* hidden_bias = nullptr;    // (L, H)
  const float* logits_weight = nullptr;  // (L, C, H)
  const float* logits_bias = nullptr;    // (L, C)

  Rows prior;                       // p_0 (B, C), float32; no data: uniform
  const int64_t* labels = nullptr;  // (B) hard labels, or
  Rows soft;                        // (B, C) class probabilities
  const float* alpha = nullptr;     // (L); null: alpha_value for every stage
  float alpha_value = 0.5f;
  float label_smoothing = 0.0f;
  int64_t ignore_index = -100;
  bool reverse = false;
  bool mean = true;  // losses and gradients are divided by the number of rows that count

  float* hidden = nullptr;                // (L, H, B): the features' part of the first layer comes in, h_i goes out
  float* dhidden = nullptr;               // (L, H, B): gradient before the ReLU; null: no gradients are wanted
  float* beliefs = nullptr;               // (L, B, C)
  float* dlogits = nullptr;               // (L, B, C), where dhidden is wanted
  float* logits = nullptr;                // (B, C) of the last stage
  float* losses = nullptr;                // (3, L): loss, fidelity and consistency, reduced
  float* hidden_bias_gradient = nullptr;  // (L, H), where gradients are wanted
  float* logits_bias_gradient = nullptr;  // (L, C)
};

}  // namespace sid
