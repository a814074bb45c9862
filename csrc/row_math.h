// The mathematics of one row, written once for the CPU and for CUDA (method: arXiv 2510.03273).
//
// F is `float` in a CUDA thread and a SIMD vector of floats on a CPU. A row is swept in pieces: each
// element is `add`ed to sums that are relative to the largest logit so far, sums are `rescale`d when a
// larger logit comes and `merge`d across lanes, and `finish` turns them into the row's loss and the
// constants from which `gradient` gives dL/dz of one element. Nothing here touches memory.
//
// Forward and Reverse share one interface, so a kernel is written once and instantiated with either.
// The including file provides exp_(F) for arguments <= 0 and log_(F) for F and for float.
#pragma once

#if defined(__CUDACC__)
#define SID_HD __device__ __forceinline__
#else
#define SID_HD inline __attribute__((always_inline))
#endif

namespace sid {
namespace {  // one copy per translation unit: AVX-512 code must not be linked into the baseline

// The least argument a logarithm of a probability is taken at: float32's smallest normal number. So
// 0 log 0 = 0 comes out by itself and an underflowed half-precision prior gives a large loss, not an
// infinite one. A NaN passes through.
constexpr float kTiny = 1.17549435e-38f;
constexpr float kMasked = -__builtin_huge_valf();

template <class F> SID_HD F splat(float x) { return F{} + x; }

template <class F> SID_HD F log_probability(F q) {
  const F tiny = splat<F>(kTiny);
  const F floored = q < tiny ? tiny : q;
  return log_(floored);
}

// a b, where a = 0 wins even over b = -inf: a class of no weight counts nothing, masked or not.
template <class F> SID_HD F times(F a, F b) {
  const F zero = splat<F>(0.0f);
  const F product = a * b;
  return a == zero ? zero : product;
}

// sum + a b, likewise.
template <class F> SID_HD F add_times(F sum, F a, F b) {
  const F next = sum + a * b;
  return a == splat<F>(0.0f) ? sum : next;
}

// Logits enter as t = z - reference(max); the reference is 0 while every logit so far is masked.
SID_HD float reference(float max) { return max == kMasked ? 0.0f : max; }

// What is known of a row beside its elements. A kernel may pass a type of its own with these members, its
// constants computed beforehand.
struct RowTarget {
  float classes;  // C
  float alpha;
  float smoothing;    // y <- (1 - smoothing) y + smoothing / C
  bool has_prior;     // false: q = 1 / C
  bool hard;          // y is one label; false: a row of probabilities
  float label_logit;  // z[label], hard labels only
  SID_HD float off_label() const { return smoothing / classes; }
  SID_HD float on_label() const { return 1.0f - smoothing + smoothing / classes; }
  SID_HD float uniform() const { return 1.0f / classes; }
  SID_HD float log_uniform() const { return -log_(classes); }
  SID_HD float log_off_label() const { return log_probability(off_label()); }
  SID_HD float log_on_label() const { return log_probability(on_label()); }
  SID_HD bool needs_logit_sum() const { return !has_prior || (hard && smoothing > 0.0f); }
};

// Constants of a row's gradient. What is the same for all its elements, as a uniform prior or the target of
// classes that are not the label, may be folded into `constant`.
struct Slope {
  float belief, prior, target, constant;
};

struct RowResult {
  float fidelity, consistency, loss;
  float log_sum;  // belief of an element: exp(t - log_sum),
  float scale;    // or exp(t) * scale
  float center;   // Forward: alpha sum(y) + (1 - alpha) sum(q); Reverse: the loss
};

SID_HD RowResult weighted(float alpha, float fidelity, float consistency, float log_sum, float scale) {
  const float loss = times(alpha, fidelity) + times(1.0f - alpha, consistency);
  return {fidelity, consistency, loss, log_sum, scale, loss};
}

template <class F, int N> struct Sums {
  F v[N];
  SID_HD void clear() {
    for (int i = 0; i < N; ++i) v[i] = splat<F>(0.0f);
  }
  SID_HD void merge(const Sums& other) {  // both relative to the same maximum
    for (int i = 0; i < N; ++i) v[i] += other.v[i];
  }
};

// exp(old - next) for a maximum that moves up; nothing has been summed while all was masked.
SID_HD float rescale_factor(float old_max, float next_max) {
  return old_max == next_max || old_max == kMasked ? 1.0f : exp_(old_max - next_max);
}

// L = alpha CE(y, p) + (1 - alpha) KL(q || p)
//   = alpha (Y lse - y.z) + (1 - alpha) (sum q log q - q.z + S lse)
// dL/dz = (alpha Y + (1 - alpha) S) p - alpha y - (1 - alpha) q
template <class F> struct Forward {
  // PRIOR_CROSS: sum of q (log q - t)
  enum { SUM, PRIOR_MASS, PRIOR_CROSS, LOGIT_SUM, COUNT, TARGET_MASS, TARGET_DOT, N };
  Sums<F, N> sums;

  // Whether sum i is ever added to (the others stay 0 and need no reduction).
  static constexpr SID_HD bool uses(int i, bool prior, bool logit_sum, bool soft) {
    return i == SUM || (i <= PRIOR_CROSS ? prior : i <= COUNT ? logit_sum : soft);
  }
  SID_HD void clear() { sums.clear(); }
  SID_HD void add(F, F e) { sums.v[SUM] += e; }
  // A lane beyond the row's end enters as t = -inf with q = y = 0, and `one` = 0 with t = 0 here:
  SID_HD void add_logit(F t, F one) { sums.v[LOGIT_SUM] += t, sums.v[COUNT] += one; }
  SID_HD void add_prior(F t, F, F q) {
    sums.v[PRIOR_MASS] += q;
    sums.v[PRIOR_CROSS] = add_times(sums.v[PRIOR_CROSS], q, log_probability(q) - t);
  }
  SID_HD void add_target(F t, F, F y) {
    sums.v[TARGET_MASS] += y;
    sums.v[TARGET_DOT] = add_times(sums.v[TARGET_DOT], y, t);
  }
  SID_HD void rescale(float old_max, float next_max) {
    const float factor = rescale_factor(old_max, next_max), shift = reference(next_max) - reference(old_max);
    sums.v[SUM] *= factor;
    sums.v[PRIOR_CROSS] += sums.v[PRIOR_MASS] * shift;
    sums.v[LOGIT_SUM] -= sums.v[COUNT] * shift;
    sums.v[TARGET_DOT] -= sums.v[TARGET_MASS] * shift;
  }
  // F = float here: the sums of the whole row.
  template <class Row> SID_HD RowResult finish(const Row& row, float max) const {
    const auto* v = sums.v;
    const float log_sum = log_(v[SUM]);
    const float prior_mass = row.has_prior ? v[PRIOR_MASS] : 1.0f;
    const float prior_cross = row.has_prior ? v[PRIOR_CROSS] : row.log_uniform() - v[LOGIT_SUM] * row.uniform();
    float target_mass = v[TARGET_MASS], target_dot = v[TARGET_DOT];
    if (row.hard) {
      target_mass = 1.0f;
      target_dot = times(1.0f - row.smoothing, row.label_logit - reference(max)) + times(row.off_label(), v[LOGIT_SUM]);
    }
    RowResult r = weighted(row.alpha, target_mass * log_sum - target_dot, prior_cross + prior_mass * log_sum, log_sum,
                           1.0f / v[SUM]);
    r.center = row.alpha * target_mass + (1.0f - row.alpha) * prior_mass;
    return r;
  }
  template <class Row> static SID_HD Slope slope(const Row& row, const RowResult& r, float scale) {
    return {r.center * scale, (1.0f - row.alpha) * scale, row.alpha * scale, 0.0f};
  }
  static SID_HD void fold_prior(Slope& s, float q, float) { s.constant -= s.prior * q, s.prior = 0.0f; }
  static SID_HD void fold_target(Slope& s, float y, float) { s.constant -= s.target * y; }
  // dL/dz of one element is the sum of these two; of the second, nothing is left where all of y was folded, and
  // the differences of y and log y where a part was.
  static SID_HD F gradient(const Slope& s, F, F p, F q) { return s.belief * p + s.constant - s.prior * q; }
  static SID_HD F target_gradient(const Slope& s, F, F y, F) { return -s.target * y; }
  template <class Row> static SID_HD F gradient(const Row& row, const RowResult& r, F, F p, F q, F y) {
    return r.center * p - row.alpha * y - (1.0f - row.alpha) * q;
  }
};

// L = alpha KL(p || y) + (1 - alpha) KL(p || q)
// dL/dz = p (u - sum p u),   u = log p - alpha log y - (1 - alpha) log q
template <class F> struct Reverse {
  enum { SUM, SELF, PRIOR, TARGET, N };  // sums of e, e t, e log q, e log y
  Sums<F, N> sums;

  static constexpr SID_HD bool uses(int i, bool prior, bool, bool soft) {
    return i <= SELF || (i == PRIOR ? prior : soft);
  }
  SID_HD void clear() { sums.clear(); }
  SID_HD void add(F t, F e) {
    sums.v[SUM] += e;
    sums.v[SELF] = add_times(sums.v[SELF], e, t);
  }
  SID_HD void add_logit(F, F) {}
  SID_HD void add_prior(F, F e, F q) { sums.v[PRIOR] += e * log_probability(q); }
  SID_HD void add_target(F, F e, F y) { sums.v[TARGET] += e * log_probability(y); }
  SID_HD void rescale(float old_max, float next_max) {
    const float factor = rescale_factor(old_max, next_max), shift = reference(next_max) - reference(old_max);
    // The shift may overflow if the factor is 0.
    sums.v[SELF] = times(splat<F>(factor), sums.v[SELF] - sums.v[SUM] * shift);
    sums.v[SUM] *= factor;
    sums.v[PRIOR] *= factor;
    sums.v[TARGET] *= factor;
  }
  template <class Row> SID_HD RowResult finish(const Row& row, float max) const {
    const auto* v = sums.v;
    const float log_sum = log_(v[SUM]), scale = 1.0f / v[SUM];
    const float self = v[SELF] * scale - log_sum;
    const float prior = row.has_prior ? v[PRIOR] * scale : row.log_uniform();
    float target = v[TARGET] * scale;
    if (row.hard) {
      const float off = row.log_off_label(), on = row.log_on_label();
      target = off + (on - off) * exp_(row.label_logit - reference(max) - log_sum);
    }
    return weighted(row.alpha, self - target, self - prior, log_sum, scale);
  }
  template <class Row> static SID_HD Slope slope(const Row& row, const RowResult& r, float scale) {
    return {scale, 1.0f - row.alpha, row.alpha, -r.log_sum - r.center};
  }
  static SID_HD void fold_prior(Slope& s, float, float log_q) { s.constant -= s.prior * log_q, s.prior = 0.0f; }
  static SID_HD void fold_target(Slope& s, float, float log_y) { s.constant -= s.target * log_y; }
  static SID_HD F gradient(const Slope& s, F t, F p, F q) {
    return times(s.belief * p, t + s.constant - s.prior * log_probability(q));
  }
  static SID_HD F target_gradient(const Slope& s, F p, F, F log_y) { return -s.target * s.belief * p * log_y; }
  template <class Row> static SID_HD F gradient(const Row& row, const RowResult& r, F t, F p, F q, F y) {
    const F u = t - r.log_sum - row.alpha * log_probability(y) - (1.0f - row.alpha) * log_probability(q);
    return times(p, u - r.center);
  }
};

}  // namespace
}  // namespace sid
