"""Memory for large outputs on a CPU, used again after it was freed.

The C library returns large freed blocks to the system, which must then zero and map every page again for the next
output: at (2048, 32000) that took three times as long as the kernel that fills it (measured).
"""

from __future__ import annotations

import itertools
import mmap
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

MOST_BLOCKS = 64  # blocks that are known, in use or free
MOST_IDLE = 64  # a block that this many requests did not use goes back to the system
PAGE, HUGE_PAGE = 4096, 2 << 20  # bytes
LEAST_BYTES = 1 << 20  # smaller outputs come from PyTorch's allocator, which seldom returns their memory to the system
if os.environ.get("SID_KERNELS_KEEP_MEMORY") == "0" or not hasattr(mmap, "MAP_ANONYMOUS"):
    LEAST_BYTES = sys.maxsize

_blocks: dict[int, mmap.mmap] = {}  # by the number of the request that used it last
_requests = itertools.count()
_new = torch.empty_strided  # half the overhead of torch.empty


def empty_matrix(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a contiguous tensor (rows, classes) without values; a large one on a CPU may use freed memory.

    A tensor refers to its block of memory as long as its storage lives. A block to which no storage refers is free.
    """
    rows, classes = shape
    nbytes = rows * classes * dtype.itemsize
    if nbytes < LEAST_BYTES or device.type != "cpu":
        return _new((rows, classes), (classes, 1), dtype=dtype, device=device)
    block, offset = _take(nbytes)
    flat = torch.frombuffer(block, dtype=dtype, count=rows * classes, offset=offset)
    return flat.resize_(rows, classes)  # not a view, which would be a second tensor


def release_memory() -> None:
    """Return the memory of large outputs that were freed to the system.

    On a CPU, an output of at least 1 MiB uses memory of an earlier one that was freed. Memory that none of 64 such
    outputs used is returned by itself, the rest by this function. SID_KERNELS_KEEP_MEMORY=0 in the environment keeps
    none.
    """
    for number in list(_blocks):
        _remove_if_free(number)


def _take(nbytes: int) -> tuple[mmap.mmap, int]:
    """Return a free block of `nbytes` to about twice as many, or a new one, and where to start in it.

    Every other output starts half a page later. A kernel that writes two outputs whose addresses agree modulo 4096
    takes 1.15 times as long at (4096, 1000) (measured).

    Threads may call this at the same time: every access to `_blocks` is atomic, and a block belongs to the thread that
    removed it.
    """
    now = next(_requests)
    block = None
    for number in sorted(_blocks, reverse=True):  # the latest first: it may be in a cache
        if block is None and nbytes + PAGE <= _size(number) <= 2 * nbytes + PAGE:
            block = _remove_if_free(number)
        elif now - number > MOST_IDLE:
            _remove_if_free(number)
    if block is None:
        block = _map(nbytes + PAGE)
    if len(_blocks) < MOST_BLOCKS:
        _blocks[now] = block
    return block, now % 2 * PAGE // 2


def _map(nbytes: int) -> mmap.mmap:
    """Return new memory, in pages of 2 MiB if the system has enough of them free.

    Filling it then takes 0.4 of the time at (2048, 32000). If memory is fragmented, the system would first move other
    pages together, which takes longer than ordinary pages (measured).
    """
    block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE") and 2 * nbytes <= free_in_large_pages():
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def free_in_large_pages() -> int:
    """Return the bytes of free memory in ranges of at least 2 MiB, or 0 if the system does not say, proc(5)."""
    try:
        zones = Path("/proc/buddyinfo").read_text().splitlines()
    except OSError:
        return 0
    return sum(
        int(count) * PAGE << order
        for zone in zones
        for order, count in enumerate(zone.partition("zone")[2].split()[1:])
        if PAGE << order >= HUGE_PAGE
    )


def _size(number: int) -> int:
    """Return the bytes of a block, or 0 if another thread removed it."""
    return len(_blocks.get(number, b""))


def _remove_if_free(number: int) -> mmap.mmap | None:
    """Remove and return a block, or return None if a storage refers to it or another thread removed it."""
    if sys.getrefcount(_blocks.get(number)) > 2:  # `_blocks` and the argument
        return None
    block = _blocks.pop(number, None)
    if sys.getrefcount(block) > 2 and block is not None:  # `block` and the argument: another thread had it meanwhile
        _blocks[number] = block
        return None
    return block
