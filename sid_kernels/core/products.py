"""Matrix products of half-precision tensors with a result in float32, which is rounded only once, later."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_BYTES = 16 << 20  # of a float32 copy of an operand, or of a product before it is added to a sum

_OUT_DTYPE = hasattr(torch.ops.aten.mm, "dtype")  # PyTorch 2.8 and later; on CUDA only


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in float32, (M, K) @ (K, N) or a batch of them (L, M, K) @ (L, K, N), of equal dtypes."""
    if a.dtype is torch.float32:
        return a @ b
    if a.is_cuda and _OUT_DTYPE:
        return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def add_product(total: Tensor, a: Tensor, b: Tensor, start: bool) -> None:
    """Add a @ b to total (M, N) float32, or write it if `start`, by blocks of K on a CPU and of M on a GPU."""
    if a.is_cuda:
        block = max(1, BLOCK_BYTES // (4 * max(b.shape[1], 1)))
        for first in range(0, a.shape[0], block):
            part = total[first : first + block]
            product = multiply(a[first : first + block], b)
            part.copy_(product) if start else part.add_(product)
        return
    block = max(1, BLOCK_BYTES // (4 * max(a.shape[0], b.shape[1], 1)))
    if start and not a.shape[1]:
        total.zero_()
    for first in range(0, a.shape[1], block):
        columns = slice(first, first + block)
        torch.addmm(total, a[:, columns].float(), b[columns].float(), beta=int(first > 0 or not start), out=total)
