// Kernels with one mistake each. The shim must report it instead of hanging or continuing.
#include "cuda/device.cuh"

namespace {
using namespace sid::device;

struct Mistake {
  int which;
  float* memory;
};

SID_KERNEL(64, 1) make_mistake(const Mistake job) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  switch (job.which) {
    case 1:  // one warp does not reach the barrier
      if (thread() < 32) sync_block();
      break;
    case 2:  // one lane does not reach the shuffle
      if (thread() != 5) shuffle_xor(1.0f, 1);
      break;
    case 3:  // lanes of a warp call different shuffles
      if (thread() & 1) shuffle_xor(1.0f, 1);
      else shuffle_xor(2.0f, 1);
      break;
    case 4:  // warps reach the barrier at different lines
      if (thread() < 32) sync_block();
      else sync_block();
      break;
    case 5: load16(job.memory + 1); break;
    case 6:  // a cluster of two has no block 2
      *in_block(shared, 2) = 0.0f;
      break;
    case 7:  // one block of the cluster does not reach the barrier
      if (cluster_rank() == 0) sync_cluster();
      break;
    default: sync_block(); job.memory[thread()] = shuffle_xor(static_cast<float>(thread()), 1);
  }
}
}  // namespace

extern "C" const char* simt_mistake(int which, float* memory) {
  const int cluster = which >= 6 ? 2 : 1;
  return launch(make_mistake, Grid{cluster, 64, cluster, 64}, nullptr, Mistake{which, memory});
}
