# The Triton kernel of a belief head: logits, local loss and gradients of a tile of rows, over triton_math.
#
# The logits of a tile are accumulated in registers, in float32, and never stored.
import triton
import triton.language as tl

from ..core.triton_math import MASKED, settle, settled_gradient, whole_rows
from ..local_loss.triton_kernels import gradient_scale, prior_and_target

# Arguments that change between calls and do not affect the width of accesses: no kernel is compiled for their values.
PER_CALL = ["rows", "alpha_stride", "scan_rows", "ignore_index", "alpha", "losses"]


@triton.jit(do_not_specialize=PER_CALL)
def head_tile(
    hidden, weight, bias,  # (N, H), (C, H) contiguous, (C,)
    prior, target, alpha, counted,  # (N, C), (N,) or (N, C), 0-d or (N,), 0-d
    losses, belief, dlogits, dhidden,  # (3, N), (N, C), (N, C), (N, H)
    hidden_stride, prior_stride, target_stride, alpha_stride,
    rows, scan_rows, ignore_index,
    alpha_value, smoothing, uniform, log_classes, scale,
    HAS_BIAS: tl.constexpr, HAS_PRIOR: tl.constexpr, HARD: tl.constexpr, REVERSE: tl.constexpr,
    NEED_BELIEF: tl.constexpr, NEED_GRAD: tl.constexpr, NEED_HIDDEN_GRAD: tl.constexpr,
    CLASSES: tl.constexpr, HIDDEN_DIM: tl.constexpr,  # C, H: constants as in cascade/triton_kernels.py
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, COUNT_BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute ROWS rows: one sweep over hidden for the logits, and one over its units for its gradient."""
    first = tl.program_id(0).to(tl.int64) * ROWS  # 64 bits: N times a stride passes 2**31
    last = tl.minimum(rows - first, ROWS) - 1
    row = first + tl.minimum(tl.arange(0, ROWS), last)  # lanes beyond the end repeat the last row
    cols = tl.arange(0, BLOCK_C)
    lane = tl.arange(0, BLOCK_H)
    inside = tl.broadcast_to((cols < CLASSES)[None, :], (ROWS, BLOCK_C))
    # Padding needs no mask on weights: it reads the last class, and meets dz = 0 or logits of -inf.
    in_weight = tl.minimum(cols, CLASSES - 1)[:, None] * HIDDEN_DIM + lane[None, :]  # (C, BLOCK_H)

    z = tl.where(cols < CLASSES, 0.0, MASKED)
    if HAS_BIAS:
        z = tl.load(bias + cols, mask=cols < CLASSES, other=MASKED).to(tl.float32)
    z = tl.broadcast_to(z[None, :], (ROWS, BLOCK_C))
    in_hidden = row[:, None] * hidden_stride + lane[None, :]
    for start in range(0, HIDDEN_DIM, BLOCK_H):
        here = (start + lane < HIDDEN_DIM)[None, :]
        x = tl.load(hidden + start + in_hidden, mask=here, other=0.0)
        w = tl.load(weight + start + in_weight, mask=here, other=0.0)
        z = tl.dot(x, tl.trans(w), acc=z, input_precision="ieee")

    # Loaded only now: while the logits are accumulated, they need the registers.
    q, y = z, z
    if HAS_PRIOR:
        q = tl.load(prior + row[:, None] * prior_stride + cols[None, :], mask=inside, other=0.0)
    label = row  # placeholder without labels
    factor = scale
    if HARD:
        label = tl.load(target + row)
        factor = gradient_scale(target, scale, counted, scan_rows, ignore_index, COUNT_BLOCK)
    else:
        y = tl.load(target + row[:, None] * target_stride + cols[None, :], mask=inside, other=0.0)
    a = tl.load(alpha + row * alpha_stride, mask=(row >= 0) & (alpha_stride >= 0), other=alpha_value)
    q, y = prior_and_target(q, y, cols[None, :], inside, label[:, None], smoothing, uniform, HAS_PRIOR, HARD)
    loss, fidelity, consistency, t, p, log_sum, center = whole_rows(
        z, q, y, cols[None, :], inside, label, a, smoothing, uniform, log_classes, HAS_PRIOR, HARD, REVERSE
    )
    if HARD:
        loss, fidelity, consistency, _, _ = settle(label, ignore_index, CLASSES, loss, fidelity, consistency)
    tl.store(losses + row, loss * factor)
    tl.store(losses + rows + row, fidelity * factor)
    tl.store(losses + 2 * tl.cast(rows, tl.int64) + row, consistency * factor)
    in_classes = row[:, None] * CLASSES + cols[None, :]
    if NEED_BELIEF:
        tl.store(belief + in_classes, p, mask=inside)
    if NEED_GRAD:
        dz = settled_gradient(t, p, q, y, log_sum, center, a, factor, label, ignore_index, CLASSES, HARD, REVERSE)
        dz = dz.to(hidden.dtype.element_ty)
        tl.store(dlogits + in_classes, dz, mask=inside)
    if NEED_HIDDEN_GRAD:
        in_dhidden = row[:, None] * HIDDEN_DIM + lane[None, :]
        for start in range(0, HIDDEN_DIM, BLOCK_H):
            here = (start + lane < HIDDEN_DIM)[None, :]
            w = tl.load(weight + start + in_weight, mask=here, other=0.0)
            tl.store(dhidden + start + in_dhidden, tl.dot(dz, w, input_precision="ieee"), mask=here)
