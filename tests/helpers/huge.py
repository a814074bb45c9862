"""A matrix whose rows lie gigabytes apart, for index arithmetic beyond 2^31 without gigabytes of memory."""

import mmap
from contextlib import contextmanager

import torch

MAP_NORESERVE = 0x4000  # Linux; Python names it from 3.13 on


@contextmanager
def lazily_reserved(rows, classes, stride, dtype):
    """Return zeros (rows, classes) with this row stride, on address space that is backed only where it is touched."""
    assert (rows - 1) * stride > 2**31
    elements = (rows - 1) * stride + classes
    memory = mmap.mmap(-1, elements * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    try:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    except (OSError, AttributeError):
        pass  # a kernel without large pages has none to avoid
    yield torch.frombuffer(memory, dtype=dtype).as_strided((rows, classes), (stride, 1))
    # unmapped when the last tensor on it goes
