// What the bindings call: plain C++, no CUDA type. Every function returns null, or what went wrong.
#pragma once
#include <cstddef>

#include "local_loss.h"

namespace sid {

// Bytes of device memory a launch may use. They must be zero before their first use; each launch leaves
// them fit for the next one. Launches that may overlap in time need workspaces of their own.
size_t workspace_bytes();

// Enqueues the fused local loss on `stream` (a cudaStream_t) of the current device, `device`.
const char* local_loss_cuda(const LocalLoss& problem, void* workspace, void* stream, int device);

// out = in * scale, row by row; scale[r * scale_stride] belongs to row r (scale_stride 0: one for all).
// Where out is in, rows of scale 1 are not touched.
struct Scale {
  int64_t rows = 0, classes = 0;
  Rows in;
  MutableRows out;  // of in's dtype
  const float* scale = nullptr;
  int64_t scale_stride = 0;
};
const char* scale_cuda(const Scale& problem, void* stream, int device);

}  // namespace sid
