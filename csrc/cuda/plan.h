// How a problem is laid out on a GPU, as data: a pure function of the problem and the device, so it can be
// read, printed and tested without one.
#pragma once
#include "local_loss.h"

namespace sid {

// Storage type of a kernel: one of DType's (16-byte accesses) or, where types or alignments differ, any.
enum class Kind : int32_t { f32 = 0, bf16 = 1, f16 = 2, any = 3 };

struct Plan {
  Kind kind = Kind::any;
  int32_t warp = 0;         // 1: a row belongs to some lanes of one warp; 0: to all threads of a cluster
  int32_t lanes = 32;       // threads a row within one block; a power of two
  int32_t threads = 128;    // threads a block; a power of two
  int32_t cluster = 1;      // blocks a row; a power of two
  int32_t blocks = 1;       // blocks of the grid: rows are dealt to them in turn
  int32_t count_first = 0;  // 1: a launch of its own counts the rows that are not ignored
};

constexpr int kWarpThreads = 128;       // threads a block where a row is some lanes of a warp
constexpr int kBlockThreads = 512;      // the most threads a block otherwise
constexpr int kResidentThreads = 512;   // threads a multiprocessor holds at a time, at 128 registers each
constexpr int kMaxCluster = 8;          // the most blocks a cluster may have on every device with clusters
constexpr int kMaxBlocks = 4096;        // the most blocks a grid has
constexpr int kCountBlocks = 64;        // blocks of the launch that counts
constexpr int64_t kCountItself = 4096;  // up to so many labels each block counts for itself

constexpr int pack_size(Kind kind) { return kind == Kind::f32 ? 4 : kind == Kind::any ? 1 : 8; }
// Packs of z and of q a thread holds in registers while its row is summed: 8 of 16 bytes, or 16 elements.
constexpr int held_packs(Kind kind) { return kind == Kind::any ? 16 : 8; }

Plan plan_local_loss(const LocalLoss& problem, int multiprocessors, bool clusters);

}  // namespace sid
