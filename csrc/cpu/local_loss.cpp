// The fused local loss on a CPU, compiled once per instruction set (SID_ISA). A row is read from memory
// once, in blocks that stay in the first-level cache; its logits and prior are then still in the second
// level when the belief and the gradient are written, past the caches where they would only evict.
#include "cpu/local_loss.h"

#include <algorithm>
#include <vector>

#include "cpu/simd.h"
#include "row_math.h"

namespace sid {
namespace SID_ISA {
namespace {

constexpr int64_t kBlock = 1024;  // columns: z, q, p and dz of a block are 16 KiB, half a usual L1

// float32 views of the block [start, start + n) of a row: the row itself, or a widened copy.
struct Reader {
  Rows rows;
  float* scratch = nullptr;  // `classes` floats, where rows are not float32

  const float* row(int64_t r) const { return static_cast<const float*>(rows.data) + r * rows.stride; }
  const float* widen(int64_t r, int64_t start, int64_t n) const {
    if (rows.dtype == DType::f32) return row(r) + start;
    const uint16_t* from = static_cast<const uint16_t*>(rows.data) + r * rows.stride + start;
    rows.dtype == DType::bf16 ? widen_row<true>(from, scratch + start, n) : widen_row<false>(from, scratch + start, n);
    return scratch + start;
  }
  float element(int64_t r, int64_t c) const {
    if (rows.dtype == DType::f32) return row(r)[c];
    const uint16_t h = static_cast<const uint16_t*>(rows.data)[r * rows.stride + c];
    return rows.dtype == DType::bf16 ? bits_as<float>(uint32_t{h} << 16) : widen_f16(h);
  }
  // Once every block of row r went through `widen`.
  const float* again(int64_t r, int64_t start) const { return (rows.dtype == DType::f32 ? row(r) : scratch) + start; }
};

struct Writer {
  MutableRows rows;
  float* scratch = nullptr;  // kBlock floats

  float* row32(int64_t r) const { return static_cast<float*>(rows.data) + r * rows.stride; }
  float* block(int64_t r, int64_t start) const { return rows.dtype == DType::f32 ? row32(r) + start : scratch; }
  void flush(int64_t r, int64_t start, int64_t n) const {
    if (rows.dtype == DType::f32 || !rows.data) return;
    uint16_t* to = static_cast<uint16_t*>(rows.data) + r * rows.stride + start;
    rows.dtype == DType::bf16 ? narrow_row<true>(scratch, to, n) : narrow_row<false>(scratch, to, n);
  }
};

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % sizeof(Vec) == 0; }

template <template <class> class Divergence, bool Prior, bool Soft, bool LogitSum> struct Kernel {
  const LocalLoss& a;
  Reader z, q, y;
  Writer p, dz;
  bool streaming;

  // Sums of one block, relative to `base`.
  static void add_block(Divergence<Vec>& block, const RowTarget& row, float base, const float* zb, const float* qb,
                        const float* yb, int64_t n) {
    const Vec off = broadcast(row.off_label());
    const float keep = 1.0f - row.smoothing;
    auto add = [&](Vec zi, Vec qi, Vec yi, Vec one) __attribute__((always_inline)) {
      const Vec t = zi - base, e = exp_(t);
      block.add(t, e);
      if (LogitSum) block.add_logit(one == broadcast(0.0f) ? one : t, one);
      if (Prior) block.add_prior(t, e, qi);
      if (Soft) block.add_target(t, e, yi);
    };
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth)
      add(load(zb + i), Prior ? load(qb + i) : Vec{}, Soft ? load(yb + i) * keep + off : Vec{}, broadcast(1.0f));
    if (i < n) {
      const int m = static_cast<int>(n - i);
      // Lanes beyond the row are masked classes of no prior and no target.
      const Vec one = load_first(kOnes, m, 0.0f);
      add(load_first(zb + i, m, kMasked), Prior ? load_first(qb + i, m, 0.0f) : Vec{},
          Soft ? (load_first(yb + i, m, 0.0f) * keep + off) * one : Vec{}, one);
    }
  }

  static float max_block(const float* zb, int64_t n) {
    Vec m0 = broadcast(kMasked), m1 = m0;
    int64_t i = 0;
    for (; i + 2 * kWidth <= n; i += 2 * kWidth) m0 = larger(m0, load(zb + i)), m1 = larger(m1, load(zb + i + kWidth));
    for (; i < n; i += kWidth)
      m1 = larger(m1, n - i < kWidth ? load_first(zb + i, static_cast<int>(n - i), kMasked) : load(zb + i));
    return max_lanes(larger(m0, m1));
  }

  RowResult sweep(RowTarget& row, int64_t r, float& max) const {
    Divergence<Vec> total, block;
    max = kMasked;
    for (int64_t start = 0; start < a.classes; start += kBlock) {
      const int64_t n = std::min(kBlock, a.classes - start);
      const float* zb = z.widen(r, start, n);
      const float* qb = Prior ? q.widen(r, start, n) : nullptr;
      const float* yb = Soft ? y.widen(r, start, n) : nullptr;
      const float next = std::max(max, max_block(zb, n));
      block.clear();  // a block is summed by itself: fewer roundings in a long row
      add_block(block, row, reference(next), zb, qb, yb, n);
      if (start == 0) {
        total = block;
      } else {
        total.rescale(max, next);
        total.sums.merge(block.sums);
      }
      max = next;
    }
    Divergence<float> scalar;
    for (int i = 0; i < Divergence<Vec>::N; ++i)
      scalar.sums.v[i] = Divergence<Vec>::uses(i, Prior, LogitSum, Soft) ? sum_lanes(total.sums.v[i]) : 0.0f;
    return scalar.finish(row, max);
  }

  void emit(const RowTarget& row, const RowResult& result, int64_t r, float max, int64_t label, float scale) const {
    const float base = reference(max), log_sum = result.log_sum, keep = 1.0f - row.smoothing;
    const Vec off = broadcast(row.off_label()), uniform = broadcast(1.0f / row.classes);
    const bool gradient = dz.rows.data != nullptr;
    for (int64_t start = 0; start < a.classes; start += kBlock) {
      const int64_t n = std::min(kBlock, a.classes - start);
      const float* zb = z.again(r, start);
      const float* qb = Prior ? q.again(r, start) : nullptr;
      const float* yb = Soft ? y.again(r, start) : nullptr;
      float* pb = p.block(r, start);
      float* db = gradient ? dz.block(r, start) : nullptr;
      auto write = [&](int64_t i, int m, bool past_caches) __attribute__((always_inline)) {
        const bool full = m == kWidth;
        const Vec t = (full ? load(zb + i) : load_first(zb + i, m, kMasked)) - base;
        const Vec belief = exp_(t - log_sum);
        const Vec qi = !Prior ? uniform : full ? load(qb + i) : load_first(qb + i, m, 0.0f);
        const Vec yi = !Soft ? off : (full ? load(yb + i) : load_first(yb + i, m, 0.0f)) * keep + off;
        if (past_caches) stream(pb + i, belief);
        else if (full) store(pb + i, belief);
        else store_first(pb + i, belief, m);
        if (!gradient) return;
        // scale = 0 is a row that does not count: its gradient is 0 whatever the logits are
        const Vec g = scale == 0.0f ? Vec{} : scale * Divergence<Vec>::gradient(row, result, t, belief, qi, yi);
        if (past_caches) stream(db + i, g);
        else if (full) store(db + i, g);
        else store_first(db + i, g, m);
      };
      int64_t i = 0;
      if (streaming && (!gradient || reinterpret_cast<uintptr_t>(pb) % sizeof(Vec) == reinterpret_cast<uintptr_t>(db) % sizeof(Vec))) {
        const int64_t head = (sizeof(Vec) - reinterpret_cast<uintptr_t>(pb) % sizeof(Vec)) % sizeof(Vec) / sizeof(float);
        if (head && head < n) write(0, static_cast<int>(head), false), i = head;
        if (aligned(pb + i))
          for (; i + kWidth <= n; i += kWidth) write(i, kWidth, true);
      }
      for (; i + kWidth <= n; i += kWidth) write(i, kWidth, false);
      if (i < n) write(i, static_cast<int>(n - i), false);
      if (gradient && scale != 0.0f && label >= start && label < start + n) {  // y was off_label() everywhere so far
        const int64_t l = label - start;
        const float ql = Prior ? qb[l] : 1.0f / row.classes;
        db[l] = scale * Divergence<float>::gradient(row, result, row.label_logit - base, pb[l], ql, row.on_label());
      }
      p.flush(r, start, n);
      if (gradient) dz.flush(r, start, n);
    }
  }

  void run(int64_t r, float scale, float* fidelity, float* consistency, float* loss) const {
    const int64_t label = Soft ? -1 : a.labels[r];
    const bool counts = Soft || label != a.ignore_index;
    RowTarget row{static_cast<float>(a.classes), a.alpha ? a.alpha[r * a.alpha_stride] : a.alpha_value, a.label_smoothing,
                  Prior, !Soft, 0.0f};
    if (!Soft && counts) row.label_logit = z.element(r, label);
    float max;
    const RowResult result = sweep(row, r, max);
    emit(row, result, r, max, counts ? label : -1, counts ? scale : 0.0f);
    *fidelity = counts ? result.fidelity : 0.0f;
    *consistency = counts ? result.consistency : 0.0f;
    *loss = counts ? result.loss : 0.0f;
  }

  alignas(64) static constexpr float kOnes[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
};

struct Scratch {
  std::vector<float> z, q, y, p, dz;
  static float* of(std::vector<float>& v, DType dtype, int64_t n) {
    if (dtype == DType::f32) return nullptr;
    if (static_cast<int64_t>(v.size()) < n) v.resize(n);
    return v.data();
  }
};

template <template <class> class Divergence, bool Prior, bool Soft, bool LogitSum>
void run_rows(const LocalLoss& a, int64_t begin, int64_t end, float scale, bool streaming, float* fidelity, float* consistency,
              float* loss) {
  static thread_local Scratch s;
  const Kernel<Divergence, Prior, Soft, LogitSum> kernel{
      a,
      {a.logits, Scratch::of(s.z, a.logits.dtype, a.classes)},
      {a.prior, Prior ? Scratch::of(s.q, a.prior.dtype, a.classes) : nullptr},
      {a.soft, Soft ? Scratch::of(s.y, a.soft.dtype, a.classes) : nullptr},
      {a.belief, Scratch::of(s.p, a.belief.dtype, kBlock)},
      {a.dlogits, Scratch::of(s.dz, a.dlogits.dtype, kBlock)},
      streaming};
  for (int64_t r = begin; r < end; ++r) kernel.run(r, scale, fidelity + r, consistency + r, loss + r);
  if (streaming) stream_fence();
}

template <template <class> class Divergence, bool MayNeedLogitSum, class... Args> void choose(const LocalLoss& a, Args... args) {
  const bool prior = a.prior.data, soft = a.soft.data;
  const bool logit_sum = MayNeedLogitSum && (!prior || (!soft && a.label_smoothing > 0.0f));
  auto pick = [&](auto f_hard, auto f_soft) { soft ? f_soft(a, args...) : f_hard(a, args...); };
  if (!prior) pick(run_rows<Divergence, false, false, MayNeedLogitSum>, run_rows<Divergence, false, true, MayNeedLogitSum>);
  else if (logit_sum) pick(run_rows<Divergence, true, false, MayNeedLogitSum>, run_rows<Divergence, true, true, MayNeedLogitSum>);
  else pick(run_rows<Divergence, true, false, false>, run_rows<Divergence, true, true, false>);
}

}  // namespace

void local_loss_rows(const LocalLoss& a, int64_t begin, int64_t end, float scale, bool streaming, float* fidelity,
                     float* consistency, float* loss) {
  if (a.reverse) choose<Reverse, false>(a, begin, end, scale, streaming, fidelity, consistency, loss);
  else choose<Forward, true>(a, begin, end, scale, streaming, fidelity, consistency, loss);
}

}  // namespace SID_ISA
}  // namespace sid
