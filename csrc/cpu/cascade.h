// The cascade on the CPU: the function the binding calls, and the kernels of each instruction set.
#pragma once
#include "../cascade.h"
#include "cpu/local_loss.h"

namespace sid {

// Run all stages on at most `threads` threads. If a label is out of range, return it and write nothing.
// Results have equal bits for any number of threads, except the bias gradients, which are summed by thread.
BadLabel cascade_cpu(const CascadeProblem& problem, int threads);

#define SID_DECLARE(isa)                                                                                        \
  namespace isa {                                                                                               \
  /* Run rows [begin, end) through every stage, in tiles of `vectors` SIMD vectors of rows. */                  \
  /* `losses` (3, L, B) receives the unscaled losses of each row. */                                            \
  /* The gradients of both biases are added to `sums` (L, H + C). */                                            \
  void cascade_rows(const CascadeProblem&, int64_t begin, int64_t end, int vectors, float scale, float* losses, \
                    float* sums);                                                                               \
  /* Return the number of floats in a SIMD vector. */                                                           \
  int row_lanes();                                                                                              \
  }
SID_DECLARE(baseline)
SID_DECLARE(avx2)
SID_DECLARE(avx512)
#undef SID_DECLARE

}  // namespace sid
