// The CPU's cascade: one entry for the binding, one symbol per instruction set behind it.
#pragma once
#include "../cascade.h"
#include "cpu/local_loss.h"

namespace sid {

// Runs all stages on at most `threads` threads. Labels are checked before anything is written; with a bad one nothing
// is. Equal bits for any number of threads, but in the gradients of the biases, which are summed thread by thread.
BadLabel cascade_cpu(const Cascade& args, int threads);

#define SID_DECLARE(isa)                                                                                               \
  namespace isa {                                                                                                      \
  /* Rows [begin, end) through every stage, in tiles of `vectors` vectors of rows. `losses` (3, L, B) gets             \
     each row's, unscaled; `sums` (L, H + C), zero before, the gradients of both biases. */                            \
  void cascade_rows(const Cascade&, int64_t begin, int64_t end, int vectors, float scale, float* losses, float* sums); \
  int row_lanes();                                                                                                     \
  }
SID_DECLARE(baseline)
SID_DECLARE(avx2)
SID_DECLARE(avx512)
#undef SID_DECLARE

}  // namespace sid
