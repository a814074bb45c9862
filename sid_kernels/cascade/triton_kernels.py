# The Triton kernel of a cascade: all stages of a tile of rows in one program, over the mathematics in triton_math.
#
# A row's belief goes from stage to stage in registers, in float32. It is rounded to the weights' dtype only where it
# enters a product or is stored.
import triton
import triton.language as tl

from ..core.triton_math import MASKED, settle, settled_gradient, whole_rows
from ..local_loss.triton_kernels import gradient_scale, prior_and_target

# Arguments that change between calls and do not affect the width of accesses: no kernel is compiled for their values.
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
    CLASSES: tl.constexpr, HIDDEN_DIM: tl.constexpr, INPUTS: tl.constexpr,  # C, H, C + D
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, COUNT_BLOCK: tl.constexpr,
):  # fmt: skip
    """Take ROWS rows through all stages; `pre` is the part of each hidden unit from the features and the bias.

    C, H and C + D belong to the model and do not change between calls. As constants, they turn the addresses in a tile
    into one register and immediate offsets. As arguments, they took a register per element, and C = 64 spilled.
    """
    first = tl.program_id(0).to(tl.int64) * ROWS  # 64 bits: B L H passes 2**31; inside a tile 32 bits do
    last = tl.minimum(rows - first, ROWS).to(tl.int32) - 1
    tile = tl.minimum(tl.arange(0, ROWS), last)  # lanes beyond the end repeat the last row
    row = first + tile
    cols = tl.arange(0, BLOCK_C)
    lane = tl.arange(0, BLOCK_H)
    inside = tl.broadcast_to((cols < CLASSES)[None, :], (ROWS, BLOCK_C))
    dtype = hidden_weight.dtype.element_ty

    y_raw = tl.full((ROWS, BLOCK_C), 0.0, tl.float32)  # placeholder without soft targets
    if HAS_PRIOR:
        q = tl.load(prior + row[:, None] * prior_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    else:
        q = tl.where(inside, uniform, 0.0)
    factor = scale
    if HARD:
        factor = gradient_scale(target, scale, counted, scan_rows, ignore_index, COUNT_BLOCK)
    else:
        y_raw = tl.load(target + row[:, None] * target_stride + cols[None, :], mask=inside, other=0.0)

    # Padding needs no mask on weights: it reads the last class, and meets q = dz = 0 or logits of -inf.
    real = tl.minimum(cols, CLASSES - 1)
    in_w1 = lane[:, None] * INPUTS + real[None, :]  # (BLOCK_H, C)
    in_w2 = real[:, None] * HIDDEN_DIM + lane[None, :]  # (C, BLOCK_H)
    in_hidden = tile[:, None] * (stages * HIDDEN_DIM) + lane[None, :]
    in_classes = tile[:, None] * CLASSES + cols[None, :]
    all_rows = tl.cast(rows, tl.int64) * stages
    place, out = first * stages * HIDDEN_DIM, first  # offset of this tile and stage in (B, L, H) and in (L, B)
    stage = 0
    while stage < stages:
        z = tl.load(logits_bias + cols, mask=cols < CLASSES, other=MASKED).to(tl.float32)
        z = tl.broadcast_to(z[None, :], (ROWS, BLOCK_C))
        q_in = q.to(dtype)
        for start in range(0, HIDDEN_DIM, BLOCK_H):
            unit = start + lane
            here = (unit < HIDDEN_DIM)[None, :]
            h = tl.load(pre + place + start + in_hidden, mask=here, other=0.0).to(tl.float32)
            w1 = tl.load(hidden_weight + start * INPUTS + in_w1, mask=(unit < HIDDEN_DIM)[:, None], other=0.0)
            w2 = tl.load(logits_weight + start + in_w2, mask=here, other=0.0)
            h = tl.dot(q_in, tl.trans(w1), acc=h, input_precision="ieee")
            h = tl.where(h < 0.0, 0.0, h).to(dtype)  # a NaN passes through
            if NEED_GRAD:
                tl.store(hidden + place + start + in_hidden, h, mask=here)
            z = tl.dot(h, tl.trans(w2), acc=z, input_precision="ieee")

        label = row  # placeholder without labels
        if HARD:  # loaded in every stage: kept across stages, it would take registers
            label = tl.load(target + row)
        _, y = prior_and_target(q, y_raw, cols[None, :], inside, label[:, None], smoothing, uniform, True, HARD)
        a = tl.load(alpha + stage * alpha_stride, mask=alpha_stride >= 0, other=alpha_value)
        a = tl.full((ROWS,), 0.0, tl.float32) + a
        loss, fidelity, consistency, t, p, log_sum, center = whole_rows(
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
            dz = settled_gradient(t, p, q, y, log_sum, center, a, factor, label, ignore_index, CLASSES, HARD, REVERSE)
            dz = dz.to(dtype)
            tl.store(dlogits + out * CLASSES + in_classes, dz, mask=inside)
            # Other threads than above now read hidden and overwrite pre. The barrier also orders global memory within a
            # program: bar.sync on NVIDIA, a workgroup fence around s_barrier on AMD.
            tl.debug_barrier()
            for start in range(0, HIDDEN_DIM, BLOCK_H):
                here = (start + lane < HIDDEN_DIM)[None, :]
                h = tl.load(hidden + place + start + in_hidden, mask=here, other=0.0).to(tl.float32)
                w2 = tl.load(logits_weight + start + in_w2, mask=here, other=0.0)
                dh = tl.dot(dz, w2, input_precision="ieee")
                tl.store(pre + place + start + in_hidden, tl.where(h <= 0.0, 0.0, dh), mask=here)
        q = p
        place += HIDDEN_DIM
        out += rows
        hidden_weight += HIDDEN_DIM * INPUTS
        logits_weight += HIDDEN_DIM * CLASSES
        logits_bias += CLASSES
        stage += 1
