# The Triton kernel that scales a gradient in place.
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "scale_stride"])
def scale_rows(grad, scale, grad_stride, scale_stride, rows, classes, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Multiply grad (N, C) in place by scale, () or (N,); skip a tile whose scales are all 1."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    factor = tl.load(scale + row * scale_stride, mask=row < rows, other=1.0)
    if tl.max((factor != 1.0).to(tl.int32), 0) != 0:
        inside = (row < rows)[:, None] & (cols < classes)
        place = grad + row[:, None] * grad_stride + cols
        g = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        tl.store(place, g * factor[:, None], mask=inside)
