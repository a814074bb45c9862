// Which elements of a row a thread processes.
//
// A row is divided into aligned packs of V elements (16 bytes). Pack j belongs to lane j modulo the number of lanes. A
// lane processes K packs at a time, which is a round. If a row does not start or end at a multiple of 16 bytes, up to
// V - 1 elements before the first pack and after the last remain. Each of these edge elements belongs to one lane.
#pragma once
#include "job.h"
#include "storage.cuh"

namespace sid {
namespace {

using namespace device;

// A row in memory, and this thread's share of it.
template <class T> struct View {
  static constexpr int V = Pack<T>::V, K = held_packs(V == 4 ? Kind::f32 : V == 1 ? Kind::any : Kind::bf16);
  static constexpr int kSpan = V * K == 16 ? 4 : V * K == 32 ? 5 : 6;
  static_assert(1 << kSpan == V * K, "");
  int row, lanes_log2, lane;
  Row<T> z, q;
  int head, end;  // the packs lie in [head, end)
  int edge;       // this thread's edge element, or -1

  SID_DEVICE View(const Job& job, int r, int this_lane)
      : row(r),
        lanes_log2(job.lanes_log2),
        lane(this_lane),
        z(job.problem.logits.data, job.problem.logits.stride, job.problem.logits.dtype, r),
        q(job.problem.prior.data, job.problem.prior.stride, job.problem.prior.dtype, r) {
    const int classes = static_cast<int>(job.problem.classes);
    head = V == 1 ? 0 : static_cast<int>((0 - reinterpret_cast<uintptr_t>(z.data) / (16 / V)) & (V - 1));
    if (head > classes) head = classes;
    end = head + ((classes - head) & ~(V - 1));
    edge = lane < head ? lane : lane - head < classes - end ? lane - head + end : -1;
  }
  // Return the number of rounds, which is the same for all lanes.
  SID_DEVICE int rounds() const {
    const int span = (V * K) << lanes_log2;  // a power of two
    return end - head <= span ? 1 : ((end - head - 1) >> (lanes_log2 + kSpan)) + 1;
  }
  // Return the element at which this thread's pack k of a round starts. If it is not below `end`, there is no pack.
  SID_DEVICE int element(int round, int k) const { return head + (((round * K + k) << lanes_log2) + lane) * V; }
  SID_DEVICE void load(const Job& job, int round, Pack<T> (&zs)[K], Pack<T> (&qs)[K]) const {
    z.load(zs, element(round, 0), V << lanes_log2, end);
    if (job.problem.prior.data) q.load(qs, element(round, 0), V << lanes_log2, end);
  }
  // Return whether this thread processes the element.
  SID_DEVICE bool owns(int element) const {
    if (element < head || element >= end) return element == edge;
    return ((element - head) / V & ((1 << lanes_log2) - 1)) == lane;
  }
};

}  // namespace
}  // namespace sid
