// The functions the bindings call, in plain C++ without CUDA types. A returned string is an error message, or null.
#pragma once
#include <cstddef>

#include "local_loss.h"

namespace sid {

// Return the size in bytes of the device memory that a launch needs. It must be zero before the first launch, and each
// launch leaves it ready for the next. Launches that may overlap in time need separate workspaces.
size_t workspace_bytes();

// Launch the fused local loss on `stream` (a cudaStream_t) of the current device, whose index is `device`.
const char* local_loss_cuda(const LocalLossProblem& problem, void* workspace, void* stream, int device);

// out = in * scale by row: row r is multiplied by scale[r * scale_stride]. A scale_stride of 0 means one scale for all.
// If out is in, rows with scale 1 are neither read nor written.
struct Scale {
  int64_t rows = 0, classes = 0;
  Rows in;
  MutableRows out;  // has the dtype of `in`
  const float* scale = nullptr;
  int64_t scale_stride = 0;
};
// Launch the multiplication on `stream`. Return null, or an error message.
const char* scale_cuda(const Scale& problem, void* stream, int device);

}  // namespace sid
