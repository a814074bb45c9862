"""What training asks of a CPU's memory and arithmetic, so that a step takes no longer than its work."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Keep freed blocks for the next step. glibc hands every block of more than 32 MiB back to the system at once.

    A CIFAR-10 step at batch 128 allocates several such activations, and faulting their pages in again was 14% of its
    float32 time on 2 CPU cores (337 against 291 ms; in bfloat16 they are smaller and nothing changes). The process
    keeps the memory of its largest step. False, and nothing is changed, where the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def only_training() -> None:
    """For a process that does nothing else: freed memory kept, denormals flushed. To be called before PyTorch's first
    large operation, whose threads flush them as the one does that starts them."""
    keep_freed_memory()
    torch.set_flush_denormal(True)


@contextmanager
def denormals_as_zero() -> Iterator[None]:
    """Within it numbers below 1e-38 count as zero in this thread, where the CPU can do that; in PyTorch's own threads
    only if they start within it.

    Adam's averages of a gradient that has become zero, as at a dead ReLU, shrink until rounding holds them there, and
    arithmetic on such numbers is slow: after 800 steps an MLP of 16 stages took 41 ms a step in place of 27, and
    backpropagation through its backbone 19 in place of 12, on a CPU core, for good. The losses are the same to every
    printed digit.
    """
    smallest = torch.full((1,), torch.finfo(torch.float32).tiny)
    before = bool(smallest / 2 == 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
