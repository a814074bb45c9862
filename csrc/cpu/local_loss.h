// The CPU's fused local loss: one entry for the binding, one symbol per instruction set behind it.
#pragma once
#include "../local_loss.h"

namespace sid {

// Row and label of the first label that is neither ignore_index nor in [0, classes); row = -1: there is none.
struct BadLabel {
  int64_t row = -1, label = 0;
};

// The first bad label, if there is one; otherwise the number of rows that are not ignored (all, without labels).
BadLabel count_labels(const int64_t* labels, int64_t rows, int64_t classes, int64_t ignore_index, int64_t* counted);

// Runs the whole operation on at most `threads` threads. Labels are checked before anything is written;
// with a bad one nothing is. Equal bits for any number of threads.
BadLabel local_loss_cpu(const LocalLoss& args, int threads);

// The instruction set in use: "avx512", "avx2" or "baseline" (SID_KERNELS_CPU in the environment lowers it).
const char* cpu_instruction_set();

#define SID_DECLARE(isa)                                                                                           \
  namespace isa {                                                                                                  \
  void local_loss_rows(const LocalLoss&, int64_t begin, int64_t end, float scale, bool streaming, float* fidelity, \
                       float* consistency, float* loss);                                                           \
  }
SID_DECLARE(baseline)
SID_DECLARE(avx2)
SID_DECLARE(avx512)
#undef SID_DECLARE

}  // namespace sid
