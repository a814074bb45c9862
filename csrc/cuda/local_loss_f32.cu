// The local-loss kernel for float32.
#include "local_loss.cuh"

namespace sid {
const char* enqueue_f32(const Job& job, void* stream) { return enqueue_as<float>(job, stream); }
}  // namespace sid
