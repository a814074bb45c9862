// The local-loss kernel for mixed dtypes and any alignment.
#include "local_loss.cuh"

namespace sid {
const char* enqueue_any(const Job& job, void* stream) { return enqueue_as<Any>(job, stream); }
}  // namespace sid
