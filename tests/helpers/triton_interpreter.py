"""Corrections to Triton's interpreter; importing this module under TRITON_INTERPRET=1 applies them.

Two make bfloat16 behave as on a GPU. The third saves time only: the interpreter patches `triton.language` again at every
call of a device function, which takes 40% of a run; once per launch is enough.
"""

import numpy as np
import torch
from triton import language as tl
from triton.runtime import interpreter

_cast = interpreter.InterpreterBuilder.cast_impl
_dot = interpreter.InterpreterBuilder.create_dot
_launch = interpreter.GridExecutor.__call__
_patch_lang = interpreter._patch_lang
_patched: set[int] = set()  # ids of the globals of functions for which triton.language is patched in this launch


def _round_to_bfloat16(self, src, dst_type):
    """Round float32 to the nearest bfloat16 as GPUs do (cvt.rn, see test_triton_aot.py); the interpreter truncates."""
    if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
        rounded = torch.from_numpy(np.array(src.data, dtype=np.float32)).to(torch.bfloat16)
        return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
    return _cast(self, src, dst_type)


def _dot_of_values(self, a, b, d, *precision):
    """Multiply the values of bfloat16 tensors; the interpreter multiplies their bit patterns as integers."""
    if a.dtype.scalar == tl.bfloat16:
        a, b = (_cast(self, x, tl.block_type(tl.float32, list(x.data.shape))) for x in (a, b))
    return _dot(self, a, b, d, *precision)


def _launch_once_patched(self, *args, **kwargs):
    _patched.clear()
    return _launch(self, *args, **kwargs)


def _patch_lang_once(fn):
    if id(fn.__globals__) in _patched:
        return interpreter._LangPatchScope()
    _patched.add(id(fn.__globals__))
    return _patch_lang(fn)


interpreter.InterpreterBuilder.cast_impl = _round_to_bfloat16
interpreter.InterpreterBuilder.create_dot = _dot_of_values
interpreter.GridExecutor.__call__ = _launch_once_patched
interpreter._patch_lang = _patch_lang_once
