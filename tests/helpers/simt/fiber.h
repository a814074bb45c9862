// Switch between stacks. On x86-64 this avoids the system calls of ucontext; elsewhere it uses ucontext.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
namespace simt {
struct Context {
  void* stack_pointer = nullptr;
};
extern "C" void simt_switch(void** from, void* to);

inline void switch_to(Context& from, Context& to) { simt_switch(&from.stack_pointer, to.stack_pointer); }
// Make the next switch to `context` call `entry` on the given stack. `entry` must not return.
inline void prepare(Context& context, char* stack, size_t size, void (*entry)()) {
  uintptr_t top = reinterpret_cast<uintptr_t>(stack + size) & ~uintptr_t{15};
  void** frame = reinterpret_cast<void**>(top) - 8;  // six saved registers, the entry point, its return address
  for (int i = 0; i < 8; ++i) frame[i] = nullptr;
  frame[6] = reinterpret_cast<void*>(entry);
  context.stack_pointer = frame;
}
}  // namespace simt
#else
#include <ucontext.h>
namespace simt {
using Context = ucontext_t;
inline void switch_to(Context& from, Context& to) { swapcontext(&from, &to); }
inline void prepare(Context& context, char* stack, size_t size, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = size;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
}  // namespace simt
#endif
