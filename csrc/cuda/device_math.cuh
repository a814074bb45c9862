// The exponential and the logarithm that row_math.h needs, for a float in a GPU thread.
#pragma once
#include "device.cuh"

namespace sid {
namespace {  // internal linkage: the logarithm differs between translation units

// float32 data gets the accurate logarithm. Half-precision data (SID_FAST_LOG) gets the hardware's: its kernels move
// half the bytes, so the accurate one would not be hidden by memory accesses.
constexpr float kLog2e = 1.44269504f;
SID_DEVICE float exp_(float x) { return device::fast_exp2(x * kLog2e); }
#if defined(SID_FAST_LOG)
SID_DEVICE float log_(float x) { return device::fast_log2(x) * 0.69314718f; }
#else
SID_DEVICE float log_(float x) { return logf(x); }
#endif
// The same as log_probability in row_math.h, in fewer instructions.
SID_DEVICE float log_probability(float q) { return log_(device::max_or_nan(q, 1.17549435e-38f)); }

}  // namespace
}  // namespace sid
#include "row_math.h"
