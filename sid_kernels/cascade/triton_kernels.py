# The Triton kernel of a cascade: all stages of a tile of rows in one program, over the mathematics in triton_math.
#
# Nothing crosses tiles: a row's belief goes from stage to stage in registers, in float32, and is rounded to the
# weights' dtype only where it enters a product or is stored. It imports triton and is imported by triton_cascade alone.
import triton
import triton.language as tl

from ..core.triton_math import MASKED, settle, settled_gradient, whole_rows
from ..local_loss.triton_kernels import gradient_scale, prior_and_target

# Arguments that change from call to call and say nothing about wide accesses: compiling again for them would be waste.
PER_CALL = ["rows", "stages", "alpha_stride", "scan_rows", "ignore_index", "alpha", "losses"]


@triton.jit(do_not_specialize=PER_CALL)
def cascade_tile(
    pre, prior, target, alpha, counted,  # (B, L, H), (B, C), (B,) or (B, C), (L,), 0-d
    hidden_weight, logits_weight, logits_bias,  # (L, H, C + D), (L, C, H), (L, C)
    losses, beliefs, logits,  # (3, L, B), (L, B, C), (B, C)
    hidden, dlogits,  # (B, L, H), (L, B, C); the gradient of pre goes to where pre is
    prior_stride, target_stride, alpha_stride,
    rows, stages, scan_rows, ignore_index,  # B, L
    alpha_value, smoothing, uniform, scale,
    HAS_PRIOR: tl.constexpr, HARD: tl.constexpr, REVERSE: tl.constexpr, NEED_GRAD: tl.constexpr,
    CLASSES: tl.constexpr, UNITS: tl.constexpr, INPUTS: tl.constexpr,  # C, H, C + D
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, COUNT_BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows through all stages; `pre` is what the features and the bias give each hidden unit.

    C, H and C + D are of the model and do not change from call to call. As constants they turn the addresses in a tile
    into one register and immediate offsets: as arguments they cost a register an element, and C = 64 spilled.
    """
    first = tl.program_id(0).to(tl.int64) * ROWS  # 64 bits: B L H passes 2**31; inside a tile 32 bits do
    last = tl.minimum(rows - first, ROWS).to(tl.int32) - 1
    tile = tl.minimum(tl.arange(0, ROWS), last)  # beyond the end the last row again: equal values to the same place
    row = first + tile
    cols = tl.arange(0, BLOCK_C)
    lane = tl.arange(0, BLOCK_H)
    inside = tl.broadcast_to((cols < CLASSES)[None, :], (ROWS, BLOCK_C))
    dtype = hidden_weight.dtype.element_ty

    y_raw = tl.full((ROWS, BLOCK_C), 0.0, tl.float32)  # stands in where there are no soft targets
    if HAS_PRIOR:
        q = tl.load(prior + row[:, None] * prior_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    else:
        q = tl.where(inside, uniform, 0.0)
    factor = scale
    if HARD:
        factor = gradient_scale(target, scale, counted, scan_rows, ignore_index, COUNT_BLOCK)
    else:
        y_raw = tl.load(target + row[:, None] * target_stride + cols[None, :], mask=inside, other=0.0)

    # Padding needs no mask on weights: the last class stands in, and meets q = dz = 0 or logits of -inf.
    real = tl.minimum(cols, CLASSES - 1)
    in_w1 = lane[:, None] * INPUTS + real[None, :]  # (BLOCK_H, C)
    in_w2 = real[:, None] * UNITS + lane[None, :]  # (C, BLOCK_H)
    in_hidden = tile[:, None] * (stages * UNITS) + lane[None, :]
    in_classes = tile[:, None] * CLASSES + cols[None, :]
    all_rows = tl.cast(rows, tl.int64) * stages
    place, out = first * stages * UNITS, first  # of this tile and stage in (B, L, H) and in (L, B)
    stage = 0
    while stage < stages:
        z = tl.load(logits_bias + cols, mask=cols < CLASSES, other=MASKED).to(tl.float32)
        z = tl.broadcast_to(z[None, :], (ROWS, BLOCK_C))
        q_in = q.to(dtype)
        for start in range(0, UNITS, BLOCK_H):
            unit = start + lane
            here = (unit < UNITS)[None, :]
            h = tl.load(pre + place + start + in_hidden, mask=here, other=0.0).to(tl.float32)
            w1 = tl.load(hidden_weight + start * INPUTS + in_w1, mask=(unit < UNITS)[:, None], other=0.0)
            w2 = tl.load(logits_weight + start + in_w2, mask=here, other=0.0)
            h = tl.dot(q_in, tl.trans(w1), acc=h, input_precision="ieee")
            h = tl.where(h < 0.0, 0.0, h).to(dtype)  # a NaN passes through
            if NEED_GRAD:
                tl.store(hidden + place + start + in_hidden, h, mask=here)
            z = tl.dot(h, tl.trans(w2), acc=z, input_precision="ieee")

        label = row  # stands in where there are no labels
        if HARD:  # once a stage: what follows from it would otherwise stay in registers across the stages
            label = tl.load(target + row)
        _, y = prior_and_target(q, y_raw, cols[None, :], inside, label[:, None], smoothing, uniform, True, HARD)
        a = tl.load(alpha + stage * alpha_stride, mask=alpha_stride >= 0, other=alpha_value)
        a = tl.full((ROWS,), 0.0, tl.float32) + a
        loss, fidelity, consistency, t, p, log_sum, centre = whole_rows(
            z, q, y, cols[None, :], inside, label, a, smoothing, uniform, 0.0, True, HARD, REVERSE
        )
        if HARD:
            loss, fidelity, consistency, _, _ = settle(label, ignore_index, CLASSES, loss, fidelity, consistency)
        tl.store(losses + out + tile, loss * factor)
        tl.store(losses + all_rows + out + tile, fidelity * factor)
        tl.store(losses + 2 * all_rows + out + tile, consistency * factor)
        tl.store(beliefs + out * CLASSES + in_classes, p, mask=inside)
        if stage == stages - 1:
            tl.store(logits + first * CLASSES + in_classes, z, mask=inside)

        if NEED_GRAD:
            dz = settled_gradient(t, p, q, y, log_sum, centre, a, factor, label, ignore_index, CLASSES, HARD, REVERSE)
            dz = dz.to(dtype)
            tl.store(dlogits + out * CLASSES + in_classes, dz, mask=inside)
            # Below, hidden is read and pre overwritten by other threads than had them above. The barrier orders global
            # memory within a program too: bar.sync on NVIDIA, a workgroup fence around s_barrier on AMD.
            tl.debug_barrier()
            for start in range(0, UNITS, BLOCK_H):
                here = (start + lane < UNITS)[None, :]
                h = tl.load(hidden + place + start + in_hidden, mask=here, other=0.0).to(tl.float32)
                w2 = tl.load(logits_weight + start + in_w2, mask=here, other=0.0)
                dh = tl.dot(dz, w2, input_precision="ieee")
                tl.store(pre + place + start + in_hidden, tl.where(h <= 0.0, 0.0, dh), mask=here)
        q = p
        place += UNITS
        out += rows
        hidden_weight += UNITS * INPUTS
        logits_weight += UNITS * CLASSES
        logits_bias += CLASSES
        stage += 1
