// The local loss on the CPU: the function the binding calls, and the kernels of each instruction set.
#pragma once
#include "../local_loss.h"

namespace sid {

// A label that is neither ignore_index nor in [0, classes), the first in its problem. row = -1: all labels are valid.
struct BadLabel {
  int64_t row = -1, label = 0;
};

// Check the labels and count the rows that are not ignored into `counted`. Without labels, every row counts.
BadLabel count_labels(const LossSpec& spec, int64_t rows, int64_t classes, int64_t* counted);

// The output arrays for the losses of each row: (rows) values each.
struct RowLosses {
  float *loss, *fidelity, *consistency;
};

// Compute the local loss on at most `threads` threads. If a label is out of range, return it and write nothing.
// Results have equal bits for any number of threads.
BadLabel local_loss_cpu(const LocalLossProblem& problem, int threads);

// Return the instruction set in use: "avx512", "avx2" or "baseline". The environment variable SID_KERNELS_CPU can
// select a lower one than the processor supports.
const char* cpu_instruction_set();

#define SID_DECLARE(isa)                                                                                 \
  namespace isa {                                                                                        \
  /* Compute rows [begin, end). `scale` multiplies dlogits; `streaming` stores bypass the caches. */     \
  void local_loss_rows(const LocalLossProblem&, int64_t begin, int64_t end, float scale, bool streaming, \
                       const RowLosses&);                                                                \
  }
SID_DECLARE(baseline)
SID_DECLARE(avx2)
SID_DECLARE(avx512)
#undef SID_DECLARE

}  // namespace sid
