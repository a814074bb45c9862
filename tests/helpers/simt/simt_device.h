// A host implementation of the device layer (csrc/cuda/device.cuh). Each thread of a cluster is a fiber, which runs
// until it must wait for other threads. Clusters run one after another.
//
// Errors that hang, fault or have undefined results on a GPU end the launch with a message:
//   a barrier or a shuffle that some threads do not reach, or reach at another line;
//   a misaligned 16-byte access;
//   an access to another block's shared memory that is out of range.
// Only one launch may run at a time.
#pragma once
#include <vector_types.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "fiber.h"

#define SID_KERNEL(threads, blocks_per_sm) void
#define SID_DEVICE inline

namespace simt {

constexpr size_t kStack = 64 << 10;

struct Machine;
Machine& machine();

// A barrier for `size` threads. `line` is where the first thread reached it.
struct Barrier {
  int size = 0, arrived = 0, line = 0;
  uint64_t generation = 0;
};

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack;
  int thread = 0, rank = 0;  // index in the block; index of the block in the cluster
  bool done = false;
  const Barrier* waits_for = nullptr;
  uint64_t generation = 0;  // the barrier's generation when the wait began
  const char* what = "";    // the name of the barrier, for error messages
  unsigned shuffles = 0;
};

// Values of the last two shuffles of each lane, with the line and the mask of the calls.
struct Warp {
  Barrier barrier;
  double value[2][32];
  int line[2][32], mask[2][32];
};

struct Block {  // of the cluster that is running
  std::unique_ptr<char[]> shared;
  Barrier barrier;
  std::vector<Warp> warps;
};

// The simulated GPU.
struct Machine {
  // Settings of the tests, and the number of launches so far.
  int multiprocessors = 2;
  bool clusters = true;
  bool backwards = false;  // run blocks, and threads between barriers, in reverse order
  int launches = 0;

  std::vector<Fiber> fibers;
  std::vector<Block> blocks;
  Barrier cluster_barrier;
  Context scheduler;
  Fiber* self = nullptr;
  int threads = 0, first_block = 0, grid_blocks = 0;
  size_t shared_bytes = 0;
  std::string error;
  void (*entry)(void*) = nullptr;
  void* argument = nullptr;

  // Record an error and stop the current fiber.
  void fail(const std::string& message) {
    const std::string block = std::to_string(first_block + self->rank);
    if (error.empty()) error = message + " (thread " + std::to_string(self->thread) + " of block " + block + ")";
    while (true) yield();  // the scheduler does not resume it
  }
  void yield() { switch_to(self->context, scheduler); }
  // Block the current fiber until all threads have reached the barrier.
  void wait(Barrier& barrier, int line, const char* what) {
    if (barrier.arrived == 0) barrier.line = line;
    if (barrier.line != line)
      fail(std::string("simt: ") + what + " at line " + std::to_string(line) + ", by others at line " +
           std::to_string(barrier.line));
    if (++barrier.arrived == barrier.size) {
      barrier.arrived = 0;
      ++barrier.generation;
      return;
    }
    self->waits_for = &barrier;
    self->generation = barrier.generation;
    self->what = what;
    yield();
    self->waits_for = nullptr;
  }
  Block& block() { return blocks[self->rank]; }

  static void start();

  // Run a warp as far as it can go, so that only barriers keep it from getting ahead of other warps.
  bool run_warp(int warp, bool* left) {
    bool any = false, progress = true, unfinished = false;
    while (progress && error.empty()) {
      progress = unfinished = false;
      for (int i = 0; i < 32 && error.empty(); ++i) {
        Fiber& f = fibers[warp * 32 + (backwards ? 31 - i : i)];
        unfinished |= !f.done;
        if (f.done || (f.waits_for && f.waits_for->generation == f.generation)) continue;
        self = &f;
        any = progress = true;
        switch_to(scheduler, f.context);
      }
    }
    *left |= unfinished;
    return any;
  }

  void run_cluster(int cluster) {
    fibers.resize(static_cast<size_t>(cluster) * threads);
    blocks.clear();
    blocks.resize(cluster);
    for (Block& b : blocks) {
      b.shared.reset(new char[shared_bytes + 1]);
      std::memset(b.shared.get(), 0xff, shared_bytes);  // NaN, so that reads of unwritten memory show up
      b.barrier.size = threads;
      b.warps.resize(threads / 32);
      for (Warp& w : b.warps) w.barrier.size = 32;
    }
    cluster_barrier = {};
    cluster_barrier.size = cluster * threads;
    for (size_t i = 0; i < fibers.size(); ++i) {
      Fiber& f = fibers[i];
      if (!f.stack) f.stack.reset(new char[kStack]);
      f.thread = static_cast<int>(i) % threads;
      f.rank = static_cast<int>(i) / threads;
      f.done = false;
      f.waits_for = nullptr;
      f.shuffles = 0;
      prepare(f.context, f.stack.get(), kStack, &start);
    }
    const int warps = static_cast<int>(fibers.size()) / 32;
    bool left = true;
    while (left && error.empty()) {
      bool progress = false;
      left = false;
      for (int w = 0; w < warps; ++w) progress |= run_warp(backwards ? warps - 1 - w : w, &left);
      if (left && !progress && error.empty())
        for (Fiber& f : fibers)
          if (!f.done) {
            const Barrier& b = *f.waits_for;
            error = std::string("simt: ") + f.what + " at line " + std::to_string(b.line) + " was reached by " +
                    std::to_string(b.arrived) + " of " + std::to_string(b.size) + " threads (block " +
                    std::to_string(first_block + f.rank) + ")";
            break;
          }
    }
  }

  const char* run(int grid, int block_threads, int cluster, size_t shared, void (*kernel)(void*), void* job) {
    ++launches;
    error.clear();
    threads = block_threads, grid_blocks = grid, shared_bytes = shared, entry = kernel, argument = job;
    const bool block = threads >= 32 && threads % 32 == 0 && threads <= 1024;
    if (!block || cluster < 1 || cluster > 8 || grid < 1 || grid % cluster || shared > (48 << 10))
      error = "simt: a launch a GPU would refuse";
    for (int c = 0; c < grid / cluster && error.empty(); ++c) {
      first_block = (backwards ? grid / cluster - 1 - c : c) * cluster;
      run_cluster(cluster);
    }
    return error.empty() ? nullptr : error.c_str();
  }
};

inline void Machine::start() {
  Machine& m = machine();
  m.entry(m.argument);
  m.self->done = true;
  m.yield();
}

// Return a pseudorandom number in [-1, 1] that depends only on x. It models the error of the hardware's approximations.
inline float error_fraction(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits *= 2654435761u;
  return static_cast<float>(bits >> 8) / 8388608.0f - 1.0f;
}
constexpr float kMaxError = 2.4e-7f;  // 2^-22, the largest documented error

}  // namespace simt

namespace sid {
namespace device {

inline simt::Machine& host() { return simt::machine(); }
inline int thread() { return host().self->thread; }
inline int threads() { return host().threads; }
inline int block() { return host().first_block + host().self->rank; }
inline int blocks() { return host().grid_blocks; }
inline int cluster_rank() { return host().self->rank; }
inline int cluster_size() { return static_cast<int>(host().blocks.size()); }

inline void sync_warp(int line = __builtin_LINE()) {
  host().wait(host().block().warps[thread() / 32].barrier, line, "a warp's barrier");
}
inline void sync_block(int line = __builtin_LINE()) { host().wait(host().block().barrier, line, "a block's barrier"); }
inline void sync_cluster(int line = __builtin_LINE()) {
  host().wait(host().cluster_barrier, line, "a cluster's barrier");
}

template <class T> T shuffle_xor(T value, int mask, int line = __builtin_LINE()) {
  simt::Machine& m = host();
  simt::Warp& warp = m.block().warps[thread() / 32];
  const int parity = m.self->shuffles++ & 1;  // lanes are at most one shuffle apart
  const int lane = thread() % 32, from = lane ^ mask;
  if (from < 0 || from > 31) m.fail("simt: a shuffle from a lane that is not there");
  warp.value[parity][lane] = value, warp.line[parity][lane] = line, warp.mask[parity][lane] = mask;
  m.wait(warp.barrier, line, "a shuffle");
  if (warp.line[parity][from] != line || warp.mask[parity][from] != mask)
    m.fail("simt: lanes of one warp are in different shuffles");
  return static_cast<T>(warp.value[parity][from]);
}

inline char* shared_memory() { return host().block().shared.get(); }
template <class T> T* in_block(T* shared, int rank) {
  const ptrdiff_t offset = reinterpret_cast<char*>(shared) - shared_memory();
  if (offset < 0 || offset + sizeof(T) > host().shared_bytes || rank < 0 || rank >= cluster_size())
    host().fail("simt: no such shared memory in the cluster");
  return reinterpret_cast<T*>(host().blocks[rank].shared.get() + offset);
}

inline void check_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16) host().fail("simt: a misaligned 16-byte access");
}
inline uint4 load16(const void* p) {
  check_aligned(p);
  return *static_cast<const uint4*>(p);
}
inline void store16(void* p, uint4 x) {
  check_aligned(p);
  *static_cast<uint4*>(p) = x;
}
template <class T> T load_shared_by_blocks(const T* p) { return *p; }
inline unsigned atomic_add(unsigned* p, unsigned x) {
  const unsigned old = *p;
  *p += x;
  return old;
}
inline void fence() {}
inline int opaque(int x) { return x; }
inline float max_or_nan(float x, float y) { return x < y ? y : x; }
inline float fast_exp2(float x) {  // relative error; exact if the result is a power of two
  const float y = exp2f(x);
  return y < 1.17549435e-38f ? 0.0f : x == floorf(x) ? y : y + y * simt::error_fraction(x) * simt::kMaxError;
}
inline float fast_log2(float x) {  // absolute error between 1/2 and 2, relative elsewhere; exact at 1
  const float y = log2f(x), size = x > 0.5f && x < 2.0f ? 1.0f : y;
  return x == 1.0f || !std::isfinite(y) ? y : y + size * simt::error_fraction(x) * simt::kMaxError;
}

struct DeviceProperties {
  int multiprocessors = 0;
  bool clusters = false;
};
inline const char* device_properties(int, DeviceProperties* out) {
  *out = {host().multiprocessors, host().clusters};
  return nullptr;
}
struct Grid {
  int blocks, threads, cluster;
  size_t shared;
};
template <class Job> const char* launch(void (*kernel)(Job), const Grid& grid, void*, const Job& job) {
  struct Call {
    void (*kernel)(Job);
    Job job;
  } call{kernel, job};
  auto enter = [](void* p) { static_cast<Call*>(p)->kernel(static_cast<Call*>(p)->job); };
  return host().run(grid.blocks, grid.threads, grid.cluster, grid.shared, enter, &call);
}

}  // namespace device
}  // namespace sid
