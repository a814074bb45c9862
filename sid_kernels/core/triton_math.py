# The mathematics of a row for the Triton kernels: that of csrc/row_math.h, on tiles of whole rows.
#
# A tile is (ROWS, columns). Logits enter the sums as t = z - max(z), so nothing overflows. A lane beyond a row's end
# has t = -inf and q = y = 0, so it contributes nothing. Nothing here accesses memory.
import triton
import triton.language as tl

# Logarithms of probabilities are taken at no less than float32's smallest normal number.
TINY = tl.constexpr(2.0**-126)
MASKED = tl.constexpr(float("-inf"))
# NaN has no name here: Triton compares the globals of the kernels it compiles, and NaN differs from itself.


@triton.jit
def log_probability(q):
    """Return log q, of at least TINY."""
    return tl.log(tl.where(q < TINY, TINY, q))  # a NaN passes through


@triton.jit
def times(a, b):
    """Return a b, where a = 0 gives 0 even if b = -inf: a class of weight 0 contributes nothing, masked or not."""
    return tl.where(a == 0, 0.0, a * b)


@triton.jit
def reference(top):
    """Return what is subtracted from logits: the largest so far, or 0 while every logit so far is masked."""
    return tl.where(top == MASKED, 0.0, top)


@triton.jit
def row_sums(t, e, q, y, inside, zero, HAS_PRIOR: tl.constexpr, HARD: tl.constexpr, REVERSE: tl.constexpr):
    """Return the seven sums over a tile's columns, (ROWS,) each; those that a variant does not need are `zero`.

    Forward: of e, t, q, q t, q log q, y, y t.   Reverse: of e, e t, 0, e log q, 0, 0, e log y.
    """
    total = tl.sum(e, 1)
    logit_sum, prior_mass, prior_dot, entropy, target_mass, target_dot = zero, zero, zero, zero, zero, zero
    if REVERSE:
        logit_sum = tl.sum(times(e, t), 1)
        if HAS_PRIOR:
            prior_dot = tl.sum(e * log_probability(q), 1)
        if not HARD:
            target_dot = tl.sum(e * log_probability(y), 1)
    else:
        if HAS_PRIOR:
            prior_mass = tl.sum(q, 1)
            prior_dot = tl.sum(times(q, t), 1)
            entropy = tl.sum(q * log_probability(q), 1)
        if HARD or not HAS_PRIOR:
            logit_sum = tl.sum(tl.where(inside, t, 0.0), 1)
        if not HARD:
            target_mass = tl.sum(y, 1)
            target_dot = tl.sum(times(y, t), 1)
    return total, logit_sum, prior_mass, prior_dot, entropy, target_mass, target_dot


@triton.jit
def finish(
    total, logit_sum, prior_mass, prior_dot, entropy, target_mass, target_dot,  # (ROWS,) each
    label_t, alpha, smoothing, uniform, log_classes,
    HAS_PRIOR: tl.constexpr, HARD: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Return loss, fidelity, consistency, log_sum and the gradient's center of every row, from its sums."""
    log_sum = tl.log(total)
    off = smoothing * uniform
    if REVERSE:
        scale = 1.0 / total
        own = logit_sum * scale - log_sum  # sum of p log p
        if HAS_PRIOR:
            prior = prior_dot * scale
        else:
            prior = -log_classes
        if HARD:
            log_off, log_on = log_probability(off), log_probability(1.0 - smoothing + off)
            target = log_off + (log_on - log_off) * tl.exp(label_t - log_sum)
        else:
            target = target_dot * scale
        fidelity, consistency = own - target, own - prior
    else:
        if HARD:
            target_mass = 1.0
            target_dot = times(1.0 - smoothing, label_t) + times(off, logit_sum)
        if not HAS_PRIOR:
            prior_mass = 1.0
            prior_dot = logit_sum * uniform
            entropy = -log_classes
        fidelity = target_mass * log_sum - target_dot
        consistency = entropy - prior_dot + prior_mass * log_sum
    loss = times(alpha, fidelity) + times(1.0 - alpha, consistency)
    if REVERSE:
        center = loss
    else:
        center = alpha * target_mass + (1.0 - alpha) * prior_mass
    return loss, fidelity, consistency, log_sum, center


@triton.jit
def gradient(t, p, q, y, log_sum, center, alpha, REVERSE: tl.constexpr):
    """Return dL/dz of a tile; log_sum, center and alpha are (ROWS, 1)."""
    if REVERSE:
        u = t - log_sum - alpha * log_probability(y) - (1.0 - alpha) * log_probability(q)
        return times(p, u - center)
    return center * p - alpha * y - (1.0 - alpha) * q


@triton.jit
def settle(label, ignore_index, classes, loss, fidelity, consistency):
    """Return the losses, 0 in ignored rows and NaN if the label is out of range, and which rows these are."""
    ignored = label == ignore_index
    bad = ((label < 0) | (label >= classes)) & (label != ignore_index)
    loss = tl.where(ignored, 0.0, tl.where(bad, float("nan"), loss))
    fidelity = tl.where(ignored, 0.0, tl.where(bad, float("nan"), fidelity))
    consistency = tl.where(ignored, 0.0, tl.where(bad, float("nan"), consistency))
    return loss, fidelity, consistency, ignored, bad


@triton.jit
def whole_rows(
    z, q, y, cols, inside, label, alpha,  # (ROWS, C) of float32, z = -inf and q = y = 0 beyond a row's end; (ROWS,)
    smoothing, uniform, log_classes,
    HAS_PRIOR: tl.constexpr, HARD: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Return loss, fidelity and consistency of whole rows, and t, belief, log_sum and center for the gradient."""
    t = z - reference(tl.max(z, 1))[:, None]
    e = tl.exp(t)
    zero = tl.zeros_like(alpha)
    total, logit_sum, prior_mass, prior_dot, entropy, target_mass, target_dot = row_sums(
        t, e, q, y, inside, zero, HAS_PRIOR, HARD, REVERSE
    )
    label_t = zero
    if HARD:
        label_t = tl.sum(tl.where(cols == label[:, None], t, 0.0), 1)
    loss, fidelity, consistency, log_sum, center = finish(
        total, logit_sum, prior_mass, prior_dot, entropy, target_mass, target_dot,
        label_t, alpha, smoothing, uniform, log_classes, HAS_PRIOR, HARD, REVERSE,
    )  # fmt: skip
    return loss, fidelity, consistency, t, e * (1.0 / total)[:, None], log_sum, center


@triton.jit
def settled_gradient(
    t, p, q, y, log_sum, center, alpha, factor, label, ignore_index, classes, HARD: tl.constexpr, REVERSE: tl.constexpr
):  # fmt: skip
    """Return dL/dz times `factor`: 0 in ignored rows, NaN if the label is out of range."""
    dz = gradient(t, p, q, y, log_sum[:, None], center[:, None], alpha[:, None], REVERSE) * factor
    if HARD:
        _, _, _, ignored, bad = settle(label, ignore_index, classes, log_sum, log_sum, log_sum)
        dz = tl.where(ignored[:, None], 0.0, tl.where(bad[:, None], float("nan"), dz))
    return dz
