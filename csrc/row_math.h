// The mathematics of one row of the local loss, shared by the CPU and CUDA kernels (arXiv 2510.03273).
//
// Symbols: logits z, belief p = softmax(z), prior q, target y, each over C classes.
// F is `float` in a CUDA thread and a SIMD vector of floats on a CPU.
//
// A kernel processes a row in pieces:
//   add, add_logit, add_prior, add_target   add one element to sums relative to the largest logit so far
//   rescale                                 adjust the sums when a larger logit appears
//   sums.merge                              combine the sums of two lanes
//   finish                                  turn the sums of the whole row into its losses
//   gradient                                return dL/dz of one element
// Nothing here accesses memory.
//
// Forward and Reverse have the same interface, so each kernel is written once and instantiated with both.
// The including file must define exp_(F) for arguments <= 0, and log_(F) for F and for float.
#pragma once

#if defined(__CUDACC__)
#define SID_HD __device__ __forceinline__
#else
#define SID_HD inline __attribute__((always_inline))
#endif

namespace sid {
namespace {  // internal linkage: the linker must not use AVX-512 code in the baseline build

// Logarithms of probabilities are taken at no less than float32's smallest normal number. This makes 0 log 0 = 0,
// and an underflowed half-precision prior gives a large loss instead of an infinite one. NaN passes through.
constexpr float kTiny = 1.17549435e-38f;
constexpr float kMasked = -__builtin_huge_valf();  // the logit of a masked class

template <class F> SID_HD F splat(float x) { return F{} + x; }

template <class F> SID_HD F log_probability(F q) {
  const F tiny = splat<F>(kTiny);
  const F floored = q < tiny ? tiny : q;
  return log_(floored);
}

// Return a * b, or 0 if a = 0 even for b = -inf: a class of weight 0 contributes nothing, masked or not.
template <class F> SID_HD F times(F a, F b) {
  const F zero = splat<F>(0.0f);
  const F product = a * b;
  return a == zero ? zero : product;
}

// Return sum + a * b, or sum if a = 0.
template <class F> SID_HD F add_times(F sum, F a, F b) {
  const F next = sum + a * b;
  return a == splat<F>(0.0f) ? sum : next;
}

// Logits are summed as t = z - reference(max). While every logit is masked the reference is 0, so t is not NaN.
SID_HD float reference(float max) { return max == kMasked ? 0.0f : max; }

// What the mathematics needs to know about a row besides its elements. A kernel can pass its own type with these
// members, for example one that holds precomputed constants.
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

// Coefficients of a row's gradient. Terms that are equal for all elements can be folded into `constant`: a uniform
// prior, and the target probability of the classes other than the label.
struct GradientCoefficients {
  float belief, prior, target, constant;
};

struct RowResult {
  float loss, fidelity, consistency;
  float log_sum;  // the belief of an element is exp(t - log_sum)
  float scale;    // it is also exp(t) * scale
  float center;   // Forward: alpha sum(y) + (1 - alpha) sum(q); Reverse: the loss
};

// Combine fidelity and consistency into the loss.
SID_HD RowResult combine_losses(float alpha, float fidelity, float consistency, float log_sum, float scale) {
  const float loss = times(alpha, fidelity) + times(1.0f - alpha, consistency);
  return {loss, fidelity, consistency, log_sum, scale, loss};
}

template <class F, int N> struct Sums {
  F v[N];
  SID_HD void clear() {
    for (int i = 0; i < N; ++i) v[i] = splat<F>(0.0f);
  }
  SID_HD void merge(const Sums& other) {  // both must be relative to the same maximum
    for (int i = 0; i < N; ++i) v[i] += other.v[i];
  }
};

// Return exp(old_max - next_max), or 1 if nothing but masked logits has been summed so far.
SID_HD float rescale_factor(float old_max, float next_max) {
  return old_max == next_max || old_max == kMasked ? 1.0f : exp_(old_max - next_max);
}

// The forward divergence:
// L = alpha CE(y, p) + (1 - alpha) KL(q || p)
//   = alpha (Y lse - y.z) + (1 - alpha) (sum q log q - q.z + S lse)
// dL/dz = (alpha Y + (1 - alpha) S) p - alpha y - (1 - alpha) q
// with lse = logsumexp(z), Y = sum(y) and S = sum(q).
template <class F> struct Forward {
  // Sums of e = exp(t), q, q (log q - t), t, 1, y and y t.
  enum { SUM, PRIOR_MASS, PRIOR_CROSS, LOGIT_SUM, COUNT, TARGET_MASS, TARGET_DOT, N };
  Sums<F, N> sums;

  // Return whether sum i is used. The others stay 0 and need no reduction.
  static constexpr SID_HD bool uses(int i, bool prior, bool logit_sum, bool soft) {
    return i == SUM || (i <= PRIOR_CROSS ? prior : i <= COUNT ? logit_sum : soft);
  }
  SID_HD void clear() { sums.clear(); }
  SID_HD void add(F, F e) { sums.v[SUM] += e; }
  // Lanes beyond the end of the row must pass t = 0 and one = 0 here, and t = -inf and q = y = 0 elsewhere.
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
  // Requires F = float: the sums cover the whole row.
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
    RowResult r = combine_losses(row.alpha, target_mass * log_sum - target_dot, prior_cross + prior_mass * log_sum,
                                 log_sum, 1.0f / v[SUM]);
    r.center = row.alpha * target_mass + (1.0f - row.alpha) * prior_mass;
    return r;
  }
  template <class Row>
  static SID_HD GradientCoefficients gradient_coefficients(const Row& row, const RowResult& r, float scale) {
    return {r.center * scale, (1.0f - row.alpha) * scale, row.alpha * scale, 0.0f};
  }
  static SID_HD void fold_prior(GradientCoefficients& k, float q, float) { k.constant -= k.prior * q, k.prior = 0.0f; }
  static SID_HD void fold_target(GradientCoefficients& k, float y, float) { k.constant -= k.target * y; }
  // dL/dz of one element is gradient + target_gradient. If fold_target was called with the element's own y, the second
  // term is 0. If it was called with another y, pass the differences of y and log y.
  static SID_HD F gradient(const GradientCoefficients& k, F, F p, F q) {
    return k.belief * p + k.constant - k.prior * q;
  }
  static SID_HD F target_gradient(const GradientCoefficients& k, F, F y, F) { return -k.target * y; }
  // dL/dz of one element without folding, for a row of weight 1.
  template <class Row> static SID_HD F gradient(const Row& row, const RowResult& r, F, F p, F q, F y) {
    return r.center * p - row.alpha * y - (1.0f - row.alpha) * q;
  }
};

// The reverse divergence:
// L = alpha KL(p || y) + (1 - alpha) KL(p || q)
// dL/dz = p (u - sum(p u)) with u = log p - alpha log y - (1 - alpha) log q.
template <class F> struct Reverse {
  enum { SUM, SELF, PRIOR, TARGET, N };  // sums of e = exp(t), e t, e log q and e log y
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
    return combine_losses(row.alpha, self - target, self - prior, log_sum, scale);
  }
  template <class Row>
  static SID_HD GradientCoefficients gradient_coefficients(const Row& row, const RowResult& r, float scale) {
    return {scale, 1.0f - row.alpha, row.alpha, -r.log_sum - r.center};
  }
  static SID_HD void fold_prior(GradientCoefficients& k, float, float log_q) {
    k.constant -= k.prior * log_q, k.prior = 0.0f;
  }
  static SID_HD void fold_target(GradientCoefficients& k, float, float log_y) { k.constant -= k.target * log_y; }
  static SID_HD F gradient(const GradientCoefficients& k, F t, F p, F q) {
    return times(k.belief * p, t + k.constant - k.prior * log_probability(q));
  }
  static SID_HD F target_gradient(const GradientCoefficients& k, F p, F, F log_y) {
    return -k.target * k.belief * p * log_y;
  }
  template <class Row> static SID_HD F gradient(const Row& row, const RowResult& r, F t, F p, F q, F y) {
    const F u = t - r.log_sum - row.alpha * log_probability(y) - (1.0f - row.alpha) * log_probability(q);
    return times(p, u - r.center);
  }
};

}  // namespace
}  // namespace sid
