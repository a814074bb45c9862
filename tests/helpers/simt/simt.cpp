// The functions the tests call through ctypes. They run the CUDA kernels on the host.
#include "cuda/job.h"
#include "cuda/launch.h"
#include "simt_device.h"

#include <cstddef>

#if defined(__x86_64__)
asm(R"(
.text
.globl simt_switch
.hidden simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
#endif

namespace simt {
Machine& machine() {
  static Machine m;
  return m;
}
}  // namespace simt

extern "C" {

void simt_configure(int multiprocessors, int clusters, int backwards) {
  simt::Machine& m = simt::machine();
  m.multiprocessors = multiprocessors, m.clusters = clusters, m.backwards = backwards;
}
int simt_launches() { return simt::machine().launches; }
size_t simt_workspace_bytes() { return sid::workspace_bytes(); }
// Return the size of a structure, to check the declarations in Python.
size_t simt_sizes(int what) {
  return what == 0 ? sizeof(sid::LocalLossProblem) : what == 1 ? sizeof(sid::LaunchPlan) : sizeof(sid::Scale);
}

void simt_plan(const sid::LocalLossProblem* problem, int multiprocessors, int clusters, sid::LaunchPlan* plan) {
  *plan = sid::plan_local_loss(*problem, multiprocessors, clusters);
}
// Run the local loss with the given plan. If it is null, the launcher computes one.
const char* simt_local_loss(const sid::LocalLossProblem* problem, const sid::LaunchPlan* plan, void* workspace) {
  if (plan) return sid::enqueue(*problem, *plan, workspace, nullptr);
  return sid::local_loss_cuda(*problem, workspace, nullptr, 0);
}
const char* simt_scale(const sid::Scale* problem) { return sid::scale_cuda(*problem, nullptr, 0); }

}  // extern "C"
