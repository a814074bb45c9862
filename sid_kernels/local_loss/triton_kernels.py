# The Triton kernels of the fused local loss, over the mathematics in triton_math.
#
# Loops with a bound known at run time are `while` loops: Triton's interpreter cannot take such a bound in `range` under
# numpy 2.4 and later.
import triton
import triton.language as tl

from ..core.triton_math import (
    MASKED,
    finish,
    gradient,
    reference,
    row_sums,
    settle,
    settled_gradient,
    times,
    whole_rows,
)

# Arguments that change between calls and do not affect the width of accesses: no kernel is compiled for their values.
# C, the row strides and the big arrays stay specialized: divisible by 16 means 16-byte accesses.
PER_CALL = [
    "rows", "alpha_stride", "scan_rows", "ignore_index", "alpha", "loss", "fidelity", "consistency",
]  # fmt: skip


@triton.jit
def load_tiles(logits, prior, target, cols, inside, HAS_PRIOR: tl.constexpr, HARD: tl.constexpr, HINT: tl.constexpr):
    """Load z, q and y of a tile, all before the first is used; absent ones are z."""
    z = tl.load(logits + cols, mask=inside, other=MASKED, eviction_policy=HINT)
    q, y = z, z
    if HAS_PRIOR:
        q = tl.load(prior + cols, mask=inside, other=0.0, eviction_policy=HINT)
    if not HARD:
        y = tl.load(target + cols, mask=inside, other=0.0, eviction_policy=HINT)
    return z, q, y


@triton.jit
def prior_and_target(q, y, cols, inside, label, smoothing, uniform, HAS_PRIOR: tl.constexpr, HARD: tl.constexpr):
    """Return q in float32 and y after smoothing, both 0 beyond the row's end; `label` is (ROWS, 1)."""
    off = smoothing * uniform
    if HAS_PRIOR:
        q = q.to(tl.float32)
    else:
        q = tl.where(inside, uniform, 0.0)
    if HARD:
        y = tl.where(cols == label, 1.0 - smoothing + off, off)
    else:
        y = (1.0 - smoothing) * y.to(tl.float32) + off
    return q, tl.where(inside, y, 0.0)


@triton.jit
def gradient_scale(target, scale, counted, scan_rows, ignore_index, BLOCK: tl.constexpr):
    """Return the factor of a row's gradient: `scale` if scan_rows = 0, else 1 over the number of rows not ignored.

    That number is counted here in the first scan_rows labels, or read from `counted` if scan_rows < 0.
    """
    count = tl.load(counted, mask=scan_rows < 0, other=0)
    start = 0
    while start < scan_rows:
        row = start + tl.arange(0, BLOCK)
        label = tl.load(target + row, mask=row < scan_rows, other=ignore_index)
        count += tl.sum((label != ignore_index).to(tl.int64), 0)
        start += BLOCK
    return tl.where(scan_rows == 0, scale, 1.0 / tl.maximum(count, 1).to(tl.float32))


@triton.jit
def emit_losses(loss_out, fidelity_out, consistency_out, loss, fidelity, consistency, row, valid, scale,
                REDUCE: tl.constexpr):  # fmt: skip
    """Store this program's share of the three losses, or without a reduction those of each row."""
    if REDUCE:
        place = tl.program_id(0)
        tl.store(loss_out + place, tl.sum(tl.where(valid, loss, 0.0), 0) * scale)
        tl.store(fidelity_out + place, tl.sum(tl.where(valid, fidelity, 0.0), 0) * scale)
        tl.store(consistency_out + place, tl.sum(tl.where(valid, consistency, 0.0), 0) * scale)
    else:
        tl.store(loss_out + row, loss, mask=valid)
        tl.store(fidelity_out + row, fidelity, mask=valid)
        tl.store(consistency_out + row, consistency, mask=valid)


@triton.jit(do_not_specialize=PER_CALL)
def local_loss_tile(
    logits, prior, target, alpha, counted,  # (N, C), (N, C), (N,) or (N, C), 0-d or (N,), 0-d
    belief, dlogits, loss, fidelity, consistency,  # (N, C), (N, C), then programs (REDUCE) or (N,) each
    logits_stride, prior_stride, target_stride, dlogits_stride, alpha_stride,
    rows, classes, scan_rows, ignore_index,
    alpha_value, smoothing, uniform, log_classes, scale,
    HAS_PRIOR: tl.constexpr, HARD: tl.constexpr, REVERSE: tl.constexpr, REDUCE: tl.constexpr,
    NEED_GRAD: tl.constexpr, NEED_BELIEF: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, COUNT_BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute ROWS whole rows held on chip: read z and q once, write p and dz once."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # 64 bits: N times C exceeds 2**31
    cols = tl.arange(0, BLOCK_C)[None, :]
    valid = row < rows
    inside = valid[:, None] & (cols < classes)

    z, q, y = load_tiles(
        logits + row[:, None] * logits_stride, prior + row[:, None] * prior_stride,
        target + row[:, None] * target_stride, cols, inside, HAS_PRIOR, HARD, "",
    )  # fmt: skip
    label = row  # placeholder without labels
    if HARD:
        label = tl.load(target + row, mask=valid, other=0)
    a = tl.load(alpha + row * alpha_stride, mask=valid & (alpha_stride >= 0), other=alpha_value)
    factor = scale
    if HARD:
        factor = gradient_scale(target, scale, counted, scan_rows, ignore_index, COUNT_BLOCK)

    z = z.to(tl.float32)
    q, y = prior_and_target(q, y, cols, inside, label[:, None], smoothing, uniform, HAS_PRIOR, HARD)
    row_loss, row_fidelity, row_consistency, t, p, log_sum, center = whole_rows(
        z, q, y, cols, inside, label, a, smoothing, uniform, log_classes, HAS_PRIOR, HARD, REVERSE
    )
    if NEED_BELIEF:
        tl.store(belief + row[:, None] * classes + cols, p, mask=inside)
    if HARD:
        row_loss, row_fidelity, row_consistency, _, _ = settle(
            label, ignore_index, classes, row_loss, row_fidelity, row_consistency
        )
    if NEED_GRAD:
        dz = settled_gradient(t, p, q, y, log_sum, center, a, factor, label, ignore_index, classes, HARD, REVERSE)
        tl.store(dlogits + row[:, None] * dlogits_stride + cols, dz, mask=inside)
    emit_losses(loss, fidelity, consistency, row_loss, row_fidelity, row_consistency, row, valid, factor, REDUCE)


@triton.jit(do_not_specialize=PER_CALL)
def local_loss_loop(
    logits, prior, target, alpha, counted,
    belief, dlogits, loss, fidelity, consistency,
    logits_stride, prior_stride, target_stride, dlogits_stride, alpha_stride,
    rows, classes, scan_rows, ignore_index,
    alpha_value, smoothing, uniform, log_classes, scale,
    HAS_PRIOR: tl.constexpr, HARD: tl.constexpr, REVERSE: tl.constexpr, REDUCE: tl.constexpr,
    NEED_GRAD: tl.constexpr, NEED_BELIEF: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, COUNT_BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute one row per program in chunks of BLOCK_C: sums relative to a running maximum, then a sweep that writes.

    The second sweep goes backwards, so that it begins with what the first one left in the caches. It is skipped if
    neither the belief nor the gradient is wanted.
    """
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, ROWS)  # ROWS = 1
    lane = tl.arange(0, BLOCK_C)[None, :]
    valid = row < rows
    z_row = logits + row[:, None] * logits_stride
    q_row = prior + row[:, None] * prior_stride
    y_row = target + row[:, None] * target_stride
    p_row, dz_row = belief + row[:, None] * classes, dlogits + row[:, None] * dlogits_stride
    a = tl.load(alpha + row * alpha_stride, mask=valid & (alpha_stride >= 0), other=alpha_value)
    factor = scale
    if HARD:
        factor = gradient_scale(target, scale, counted, scan_rows, ignore_index, COUNT_BLOCK)
    zero = tl.full((ROWS,), 0.0, tl.float32)
    label, label_z = row, zero  # placeholders without labels
    if HARD:  # read z[label] before anything is written: dlogits may be the logits' own memory
        label = tl.load(target + row, mask=valid, other=0)
        in_range = valid & (label >= 0) & (label < classes)
        label_z = tl.load(logits + row * logits_stride + label, mask=in_range, other=0.0).to(tl.float32)

    top = tl.full((ROWS,), MASKED, tl.float32)
    total, logit_sum, prior_mass, prior_dot, entropy, target_mass, target_dot = zero, zero, zero, zero, zero, zero, zero
    start = 0
    z_next, q_next, y_next = load_tiles(
        z_row, q_row, y_row, lane, valid[:, None] & (lane < classes), HAS_PRIOR, HARD, "evict_last"
    )
    while start < classes:
        cols = start + lane
        inside = valid[:, None] & (cols < classes)
        z = z_next.to(tl.float32)
        q, y = prior_and_target(q_next, y_next, cols, inside, label[:, None], smoothing, uniform, HAS_PRIOR, HARD)
        ahead = cols + BLOCK_C  # load the next chunk while this one is summed
        z_next, q_next, y_next = load_tiles(
            z_row, q_row, y_row, ahead, valid[:, None] & (ahead < classes), HAS_PRIOR, HARD, "evict_last"
        )

        next_top = tl.maximum(top, tl.max(z, 1))
        shrink = tl.where((next_top == top) | (top == MASKED), 1.0, tl.exp(top - next_top))
        shift = reference(next_top) - reference(top)
        if REVERSE:
            logit_sum = times(shrink, logit_sum - total * shift)  # the shift may overflow if shrink is 0
            prior_dot = prior_dot * shrink
            target_dot = target_dot * shrink
        else:
            logit_sum -= start * shift
            prior_dot -= prior_mass * shift
            target_dot -= target_mass * shift
        total = total * shrink
        top = next_top

        t = z - reference(top)[:, None]
        s0, s1, s2, s3, s4, s5, s6 = row_sums(t, tl.exp(t), q, y, inside, zero, HAS_PRIOR, HARD, REVERSE)
        total += s0
        logit_sum += s1
        prior_mass += s2
        prior_dot += s3
        entropy += s4
        target_mass += s5
        target_dot += s6
        start += BLOCK_C

    row_loss, row_fidelity, row_consistency, log_sum, center = finish(
        total, logit_sum, prior_mass, prior_dot, entropy, target_mass, target_dot,
        label_z - reference(top), a, smoothing, uniform, log_classes, HAS_PRIOR, HARD, REVERSE,
    )  # fmt: skip
    if HARD:
        row_loss, row_fidelity, row_consistency, ignored, bad = settle(
            label, ignore_index, classes, row_loss, row_fidelity, row_consistency
        )
    if NEED_BELIEF or NEED_GRAD:
        inverse = 1.0 / total
        while start > 0:
            start -= BLOCK_C
            cols = start + lane
            inside = valid[:, None] & (cols < classes)
            z, q, y = load_tiles(
                z_row, q_row, y_row, cols, inside, HAS_PRIOR and NEED_GRAD, HARD or not NEED_GRAD, "evict_first"
            )
            t = z.to(tl.float32) - reference(top)[:, None]
            p = tl.exp(t) * inverse[:, None]
            if NEED_BELIEF:
                tl.store(p_row + cols, p, mask=inside, eviction_policy="evict_first")
            if NEED_GRAD:
                q, y = prior_and_target(q, y, cols, inside, label[:, None], smoothing, uniform, HAS_PRIOR, HARD)
                dz = gradient(t, p, q, y, log_sum[:, None], center[:, None], a[:, None], REVERSE) * factor
                if HARD:
                    dz = tl.where(ignored[:, None], 0.0, tl.where(bad[:, None], float("nan"), dz))
                tl.store(dz_row + cols, dz, mask=inside, eviction_policy="evict_first")
    emit_losses(loss, fidelity, consistency, row_loss, row_fidelity, row_consistency, row, valid, factor, REDUCE)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def count_rows(target, counted, rows, ignore_index, BLOCK: tl.constexpr):
    """Add the number of rows that are not ignored to `counted` (0-d int64). Any order gives the same integer."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(target + row, mask=row < rows, other=ignore_index)
    tl.atomic_add(counted, tl.sum((label != ignore_index).to(tl.int64), 0), sem="relaxed")


@triton.jit(do_not_specialize=["parts"])
def sum_parts(partial, loss, fidelity, consistency, parts, BLOCK: tl.constexpr):
    """Sum partial (3, parts) in a fixed order; programs 0, 1 and 2 sum loss, fidelity and consistency."""
    which = tl.program_id(0)
    sums = tl.full((BLOCK,), 0.0, tl.float32)
    lane = tl.arange(0, BLOCK)
    start = 0
    while start < parts:
        sums += tl.load(partial + which.to(tl.int64) * parts + start + lane, mask=start + lane < parts, other=0.0)
        start += BLOCK
    value = tl.sum(sums, 0)
    tl.store(loss, value, mask=which == 0)
    tl.store(fidelity, value, mask=which == 1)
    tl.store(consistency, value, mask=which == 2)
