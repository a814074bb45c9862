// row_math.h with a GPU thread's float: the exponential and the logarithm it asks for.
#pragma once
#include "device.cuh"

namespace sid {
namespace {  // the logarithm differs between translation units

// float32 data is held to float32's accuracy; half-precision data, whose kernels have half the bytes to
// hide their arithmetic behind, takes the hardware's logarithm.
constexpr float kLog2e = 1.44269504f;
SID_DEVICE float exp_(float x) { return device::fast_exp2(x * kLog2e); }
#if defined(SID_FAST_LOG)
SID_DEVICE float log_(float x) { return device::fast_log2(x) * 0.69314718f; }
#else
SID_DEVICE float log_(float x) { return logf(x); }
#endif
// row_math.h's own, in fewer steps.
SID_DEVICE float log_probability(float q) { return log_(device::max_or_nan(q, 1.17549435e-38f)); }

}  // namespace
}  // namespace sid
#include "row_math.h"
