// The fused local loss on the CPU, compiled once per instruction set (SID_ISA).
//
// `sum_row` reads a row from memory once, in blocks that fit the L1 cache, and computes its sums. `write_row` then
// writes the belief and dlogits while the row's logits and prior are still in the L2 cache. Large outputs bypass the
// caches.
#include "cpu/local_loss.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/simd.h"
#include "row_math.h"

namespace sid {
namespace SID_ISA {
namespace {

// Columns of a block. Each lane adds 64 values before the block's sums are merged into the row's, for any vector width.
// z, q, p and dz of a block take at most 16 KiB, half of a typical L1 cache.
constexpr int64_t kBlock = 64 * kWidth;
// Longest row, in blocks, whose exponentials are kept for `write_row`. In longer rows, and with AVX-512 in all rows of
// more than one block, computing them again takes no longer (measured).
constexpr int64_t kKept = kWidth == 16 ? 1 : 16384 / kBlock;

// A matrix to read from, as float32: its rows themselves, or copies that are widened block by block.
struct Reader {
  Rows rows;
  float* scratch = nullptr;  // `classes` floats if the rows are not float32

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
  // Return the block that starts at `start`, after `widen` was called for every block of row r.
  const float* reread(int64_t r, int64_t start) const { return (rows.dtype == DType::f32 ? row(r) : scratch) + start; }
};

// A matrix to write to. If it is not float32, a block is written to scratch memory and `flush` narrows it. If the
// output is not wanted, the block stays in the scratch memory: a branch around every store was slower at (128, 100)
// (measured).
struct Writer {
  MutableRows rows;
  float* scratch = nullptr;  // kBlock floats if the rows are not float32 or not wanted

  float* row32(int64_t r) const { return static_cast<float*>(rows.data) + r * rows.stride; }
  float* block(int64_t r, int64_t start) const { return scratch ? scratch : row32(r) + start; }
  void flush(int64_t r, int64_t start, int64_t n) const {
    if (!scratch || !rows.data) return;
    uint16_t* to = static_cast<uint16_t*>(rows.data) + r * rows.stride + start;
    rows.dtype == DType::bf16 ? narrow_row<true>(scratch, to, n) : narrow_row<false>(scratch, to, n);
  }
};

// Return the distance in bytes from the last vector-aligned address.
size_t misalignment(const void* p) { return reinterpret_cast<uintptr_t>(p) % sizeof(Vec); }

void set_losses(const RowLosses& losses, int64_t r, const RowResult& result, bool counts) {
  losses.loss[r] = counts ? result.loss : 0.0f;
  losses.fidelity[r] = counts ? result.fidelity : 0.0f;
  losses.consistency[r] = counts ? result.consistency : 0.0f;
}

template <template <class> class Divergence, bool Prior, bool Soft, bool LogitSum> struct Kernel {
  const LocalLossProblem& problem;
  Reader z, q, y;
  Writer p, dz;
  bool streaming;
  float* exponentials;  // kKept blocks: exp(t) of each, relative to the largest logit up to its end

  // The result of `sum_row`, the input of `write_row`.
  struct SummedRow {
    RowTarget row;
    RowResult result;
    float base;     // t = z - base
    int64_t label;  // -1: the target is soft, or the row is ignored
    bool counts;
    float max;            // the largest logit
    float maxima[kKept];  // the largest up to the end of each block of `exponentials`
  };

  // Add n elements of a block to its sums, relative to `base`.
  void add_block(Divergence<Vec>& block, const RowTarget& row, float base, const float* zb, const float* qb,
                 const float* yb, float* eb, int64_t n) const {
    const Vec off = broadcast(row.off_label());
    const float keep = 1.0f - row.smoothing;
    const int64_t whole = n - n % kWidth;
    auto add = [&](Vec zi, Vec qi, Vec yi, Vec one) __attribute__((always_inline)) {
      const Vec t = zi - base, e = exp_(t);
      store(eb, e), eb += kWidth;
      block.add(t, e);
      if (LogitSum) block.add_logit(one == broadcast(0.0f) ? one : t, one);
      if (Prior) block.add_prior(t, e, qi);
      if (Soft) block.add_target(t, e, yi);
    };
    int64_t i = 0;
    for (; i < whole; i += kWidth)
      add(load(zb + i), Prior ? load(qb + i) : Vec{}, Soft ? load(yb + i) * keep + off : Vec{}, broadcast(1.0f));
    if (i < n) {
      const int m = static_cast<int>(n - i);
      // Lanes beyond the row are masked classes with prior and target 0.
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

  SummedRow sum_row(int64_t r) const {
    const int64_t label = Soft ? -1 : problem.spec.labels[r];
    const bool counts = Soft || label != problem.spec.options.ignore_index;
    RowTarget row{static_cast<float>(problem.classes),
                  problem.spec.alpha ? problem.spec.alpha[r * problem.spec.alpha_stride] : problem.spec.alpha_value,
                  problem.spec.options.label_smoothing,
                  Prior,
                  !Soft,
                  0.0f};
    if (!Soft && counts) row.label_logit = z.element(r, label);
    Divergence<Vec> total, block;
    SummedRow summed;
    float max = kMasked;
    for (int64_t start = 0; start < problem.classes; start += kBlock) {
      const int64_t n = std::min(kBlock, problem.classes - start);
      const float* zb = z.widen(r, start, n);
      const float* qb = Prior ? q.widen(r, start, n) : nullptr;
      const float* yb = Soft ? y.widen(r, start, n) : nullptr;
      const float next = std::max(max, max_block(zb, n));
      block.clear();  // each block is summed separately: less rounding error in long rows
      const int64_t kept = std::min(start / kBlock, kKept - 1);
      summed.maxima[kept] = next;
      add_block(block, row, reference(next), zb, qb, yb, exponentials + kept * kBlock, n);
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
    summed.row = row, summed.result = scalar.finish(row, max), summed.base = reference(max);
    summed.label = counts ? label : -1, summed.counts = counts, summed.max = max;
    return summed;
  }

  void write_row(const SummedRow& s, int64_t r, float scale) const {
    const RowTarget row = s.row;
    const RowResult result = s.result;
    const float base = s.base, log_sum = result.log_sum, keep = 1.0f - row.smoothing;
    const int64_t label = s.label;
    const Vec off = broadcast(row.off_label()), on = broadcast(row.on_label()), uniform = broadcast(1.0f / row.classes);
    const bool need_belief = p.rows.data != nullptr, gradient = dz.rows.data != nullptr;
    if (!need_belief && !gradient) return;
    for (int64_t start = 0; start < problem.classes; start += kBlock) {
      const int64_t n = std::min(kBlock, problem.classes - start);
      const float* zb = z.reread(r, start);
      const float* qb = Prior ? q.reread(r, start) : nullptr;
      const float* yb = Soft ? y.reread(r, start) : nullptr;
      float* pb = p.block(r, start);
      float* db = gradient ? dz.block(r, start) : nullptr;
      const int64_t kept = std::min(start / kBlock, kKept - 1);
      const float* eb = exponentials + kept * kBlock;
      const float belief_of = rescale_factor(s.maxima[kept], s.max) * result.scale;
      auto write = [&](int64_t i, int m, auto past_caches, auto has_exponentials) __attribute__((always_inline)) {
        const bool full = m == kWidth;
        // In a contiguous matrix, `sum_row` next reads what follows this block. Prefetch it during the writes.
        __builtin_prefetch(zb + i + n);
        if (Prior) __builtin_prefetch(qb + i + n);
        const Vec t = (full ? load(zb + i) : load_first(zb + i, m, kMasked)) - base;
        const Vec belief = has_exponentials ? load(eb + i) * belief_of : exp_(t - log_sum);
        const Vec qi = !Prior ? uniform : full ? load(qb + i) : load_first(qb + i, m, 0.0f);
        Vec yi = !Soft ? off : (full ? load(yb + i) : load_first(yb + i, m, 0.0f)) * keep + off;
        if (!Soft && label - start - i >= 0 &&
            label - start - i < m)  // true once per row: cheaper than a select per vector
          yi = lanes() == static_cast<int32_t>(label - start - i) ? on : off;
        if (past_caches && need_belief) stream(pb + i, belief);
        else if (full) store(pb + i, belief);
        else store_first(pb + i, belief, m);
        if (!gradient) return;
        // The gradient of an ignored row is 0 even if its logits are NaN.
        const Vec g = s.counts ? scale * Divergence<Vec>::gradient(row, result, t, belief, qi, yi) : Vec{};
        if (past_caches) stream(db + i, g);
        else if (full) store(db + i, g);
        else store_first(db + i, g, m);
      };
      auto write_block = [&](auto has_exponentials) __attribute__((always_inline)) {
        constexpr std::true_type yes{};
        constexpr std::false_type no{};
        int64_t i = 0;
        const float* out = need_belief ? pb : db;
        if (streaming && (!gradient || misalignment(out) == misalignment(db))) {
          const int64_t head = (sizeof(Vec) - misalignment(out)) % sizeof(Vec) / sizeof(float);
          if (head && head < n) write(0, static_cast<int>(head), no, has_exponentials), i = head;
          if (misalignment(out + i) == 0)
            for (; i + kWidth <= n; i += kWidth) write(i, kWidth, yes, has_exponentials);
        }
        for (; i + kWidth <= n; i += kWidth) write(i, kWidth, no, has_exponentials);
        if (i < n) write(i, static_cast<int>(n - i), no, has_exponentials);
      };
      problem.classes <= kKept* kBlock ? write_block(std::true_type{}) : write_block(std::false_type{});
      p.flush(r, start, n);
      if (gradient) dz.flush(r, start, n);
    }
  }

  // Compute a float32 row of V vectors, the last of which may be partial: read it once, compute in registers, write it
  // once. Ten classes are a common case, for which the general path is mostly bookkeeping.
  template <int V, bool Belief>
  void in_registers(RowTarget& row, int64_t r, Vec on, Vec off, float scale, const RowLosses& losses) const {
    const int last = static_cast<int>(problem.classes) - (V - 1) * kWidth;  // elements of the last vector
    auto read = [&](const float* x, int v, float fill) __attribute__((always_inline)) {
      return v < V - 1 ? load(x + v * kWidth) : load_first(x + v * kWidth, last, fill);
    };
    auto write = [&](float* x, int v, Vec value) __attribute__((always_inline)) {
      v < V - 1 ? store(x + v * kWidth, value) : store_first(x + v * kWidth, value, last);
    };
    const float* zr = z.row(r);
    const int64_t label = Soft ? -1 : problem.spec.labels[r];
    const bool counts = Soft || label != problem.spec.options.ignore_index;
    if (problem.spec.alpha) row.alpha = problem.spec.alpha[r * problem.spec.alpha_stride];
    if (!Soft) row.label_logit = counts ? zr[label] : 0.0f;
    Vec zs[V], ts[V], es[V], qs[V], ys[V], highest = broadcast(kMasked);
    for (int v = 0; v < V; ++v) zs[v] = read(zr, v, kMasked), highest = larger(highest, zs[v]);
    const float max = max_lanes(highest);
    Divergence<Vec> sums;
    sums.clear();
    for (int v = 0; v < V; ++v) {
      const Vec one = v < V - 1 ? broadcast(1.0f) : load_first(kOnes, last, 0.0f);  // 0 in lanes beyond the row
      const Vec t = ts[v] = zs[v] - reference(max), e = es[v] = exp_(t);
      qs[v] = Prior ? read(q.row(r), v, 0.0f) : broadcast(row.uniform());
      if (Soft) ys[v] = (read(y.row(r), v, 0.0f) * (1.0f - row.smoothing) + off) * one;
      else ys[v] = lanes() == static_cast<int32_t>(label - v * kWidth) ? on : off;
      sums.add(t, e);
      if (LogitSum) sums.add_logit(one == broadcast(0.0f) ? one : t, one);
      if (Prior) sums.add_prior(t, e, qs[v]);
      if (Soft) sums.add_target(t, e, ys[v]);
    }
    Divergence<float> total;
    for (int i = 0; i < Divergence<Vec>::N; ++i)
      total.sums.v[i] = Divergence<Vec>::uses(i, Prior, LogitSum, Soft) ? sum_lanes(sums.sums.v[i]) : 0.0f;
    const RowResult result = total.finish(row, max);
    for (int v = 0; v < V; ++v) {
      const Vec belief = es[v] * result.scale;
      if (Belief) write(p.row32(r), v, belief);
      if (!dz.rows.data) continue;
      const Vec g = scale * Divergence<Vec>::gradient(row, result, ts[v], belief, qs[v], ys[v]);
      write(dz.row32(r), v, counts ? g : Vec{});
    }
    set_losses(losses, r, result, counts);
  }

  template <int V>
  void run_in_registers(RowTarget row, int64_t begin, int64_t end, float scale, const RowLosses& losses) const {
    const Vec on = broadcast(row.on_label()), off = broadcast(row.off_label());
    auto each_row = [&](auto belief) {  // a branch in every row costs 1% at (128, 10) (measured)
      for (int64_t r = begin; r < end; ++r) in_registers<V, belief>(row, r, on, off, scale, losses);
    };
    problem.belief.data ? each_row(std::true_type{}) : each_row(std::false_type{});
  }

  void run(int64_t begin, int64_t end, float scale, const RowLosses& losses) const {
    const auto float32 = [](DType t, const void* data) { return !data || t == DType::f32; };
    if (problem.classes <= 2 * kWidth && !problem.incoming && float32(problem.logits.dtype, this) &&
        float32(problem.prior.dtype, problem.prior.data) && float32(problem.spec.soft.dtype, problem.spec.soft.data) &&
        float32(problem.belief.dtype, problem.belief.data)) {
      const RowTarget row{static_cast<float>(problem.classes),
                          problem.spec.alpha_value,
                          problem.spec.options.label_smoothing,
                          Prior,
                          !Soft,
                          0.0f};
      return problem.classes <= kWidth ? run_in_registers<1>(row, begin, end, scale, losses)
                                       : run_in_registers<2>(row, begin, end, scale, losses);
    }
    for (int64_t r = begin; r < end; ++r) {
      const SummedRow s = sum_row(r);
      write_row(s, r, problem.incoming ? scale * problem.incoming[r * problem.incoming_stride] : scale);
      set_losses(losses, r, s.result, s.counts);
    }
  }

  alignas(64) static constexpr float kOnes[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
};

// Memory for blocks that are widened or narrowed, kept by each thread between calls.
struct Scratch {
  std::vector<float> z, q, y, p, dz, exponentials = std::vector<float>(kKept * kBlock);
  template <class Matrix> static float* of(std::vector<float>& v, const Matrix& m, int64_t n) {
    if (m.data && m.dtype == DType::f32) return nullptr;
    if (static_cast<int64_t>(v.size()) < n) v.resize(n);
    return v.data();
  }
};

template <template <class> class Divergence, bool Prior, bool Soft, bool LogitSum>
void run_rows(const LocalLossProblem& problem, int64_t begin, int64_t end, float scale, bool streaming,
              const RowLosses& losses) {
  static thread_local Scratch s;
  const Kernel<Divergence, Prior, Soft, LogitSum> kernel{
      problem,
      {problem.logits, Scratch::of(s.z, problem.logits, problem.classes)},
      {problem.prior, Prior ? Scratch::of(s.q, problem.prior, problem.classes) : nullptr},
      {problem.spec.soft, Soft ? Scratch::of(s.y, problem.spec.soft, problem.classes) : nullptr},
      {problem.belief, Scratch::of(s.p, problem.belief, kBlock)},
      {problem.dlogits, Scratch::of(s.dz, problem.dlogits, kBlock)},
      streaming,
      s.exponentials.data()};
  kernel.run(begin, end, scale, losses);
  if (streaming) stream_fence();
}

template <template <class> class Divergence, bool MayNeedLogitSum, class... Args>
void choose(const LocalLossProblem& problem, Args... args) {
  const bool prior = problem.prior.data, soft = problem.spec.soft.data;
  const bool logit_sum = MayNeedLogitSum && (!prior || (!soft && problem.spec.options.label_smoothing > 0.0f));
  auto pick = [&](auto f_hard, auto f_soft) { soft ? f_soft(problem, args...) : f_hard(problem, args...); };
  if (!prior)
    pick(run_rows<Divergence, false, false, MayNeedLogitSum>, run_rows<Divergence, false, true, MayNeedLogitSum>);
  else if (logit_sum)
    pick(run_rows<Divergence, true, false, MayNeedLogitSum>, run_rows<Divergence, true, true, MayNeedLogitSum>);
  else pick(run_rows<Divergence, true, false, false>, run_rows<Divergence, true, true, false>);
}

}  // namespace

void local_loss_rows(const LocalLossProblem& problem, int64_t begin, int64_t end, float scale, bool streaming,
                     const RowLosses& losses) {
  if (problem.spec.options.reverse) choose<Reverse, false>(problem, begin, end, scale, streaming, losses);
  else choose<Forward, true>(problem, begin, end, scale, streaming, losses);
}

}  // namespace SID_ISA
}  // namespace sid
