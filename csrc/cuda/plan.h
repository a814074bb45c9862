// The launch plan: how the rows of a problem are assigned to threads. It is plain data, computed from the problem and
// the properties of the device, so it can be tested without a GPU.
#pragma once
#include "local_loss.h"

namespace sid {

// The storage type of a kernel: a DType with 16-byte accesses, or `any` if dtypes or alignments differ.
enum class Kind : int32_t { f32 = 0, bf16 = 1, f16 = 2, any = 3 };

struct LaunchPlan {
  Kind kind = Kind::any;
  int32_t warp = 0;         // 1: a row belongs to some lanes of a warp; 0: to all threads of a cluster
  int32_t lanes = 32;       // threads per row within a block; a power of two
  int32_t threads = 128;    // threads per block; a power of two
  int32_t cluster = 1;      // blocks per row; a power of two
  int32_t blocks = 1;       // blocks in the grid; rows are assigned round robin
  int32_t count_first = 0;  // 1: a separate kernel counts the rows that are not ignored
};

constexpr int kWarpThreads = 128;                  // threads per block if a row belongs to some lanes of a warp
constexpr int kBlockThreads = 512;                 // the most threads per block otherwise
constexpr int kResidentThreads = 512;              // resident threads per multiprocessor, at 128 registers each
constexpr int kMaxCluster = 8;                     // the largest cluster that every device with clusters supports
constexpr int kMaxBlocks = 4096;                   // the most blocks in a grid
constexpr int kCountBlocks = 64;                   // blocks of the counting kernel
constexpr int64_t kMaxRowsCountedPerBlock = 4096;  // up to this many rows, each block counts the labels itself

constexpr int pack_size(Kind kind) { return kind == Kind::f32 ? 4 : kind == Kind::any ? 1 : 8; }
// Packs of z and of q that a thread holds in registers: 8 packs of 16 bytes, or 16 single elements.
constexpr int held_packs(Kind kind) { return kind == Kind::any ? 16 : 8; }

LaunchPlan plan_local_loss(const LocalLossProblem& problem, int multiprocessors, bool clusters);

}  // namespace sid
