// The local-loss kernel for bfloat16.
#define SID_FAST_LOG
#include "local_loss.cuh"

namespace sid {
const char* enqueue_bf16(const Job& job, void* stream) { return enqueue_as<__nv_bfloat16>(job, stream); }
}  // namespace sid
