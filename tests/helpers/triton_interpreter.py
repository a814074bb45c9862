"""Mends Triton's interpreter where it treats bfloat16 unlike a GPU. Importing it is enough; under TRITON_INTERPRET=1."""

import numpy as np
import torch
from triton import language as tl
from triton.runtime import interpreter

_cast = interpreter.InterpreterBuilder.cast_impl
_dot = interpreter.InterpreterBuilder.create_dot


def _round_to_bfloat16(self, src, dst_type):
    """The interpreter cuts float32 off where GPUs round it to bfloat16 (cvt.rn, see test_triton_aot.py)."""
    if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
        rounded = torch.from_numpy(np.array(src.data, dtype=np.float32)).to(torch.bfloat16)
        return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
    return _cast(self, src, dst_type)


def _dot_of_values(self, a, b, d, *precision):
    """The interpreter multiplies the bit patterns of bfloat16 as integers."""
    if a.dtype.scalar == tl.bfloat16:
        a, b = (_cast(self, x, tl.block_type(tl.float32, list(x.data.shape))) for x in (a, b))
    return _dot(self, a, b, d, *precision)


interpreter.InterpreterBuilder.cast_impl = _round_to_bfloat16
interpreter.InterpreterBuilder.create_dot = _dot_of_values
