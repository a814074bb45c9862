"""What a call costs besides time, on any machine the same: bytes alive at its peak, and operators called or launched.

Memory is what goes through PyTorch's allocator; what a library or a kernel takes for itself (a product's packed
panels, a thread's tile) is not seen, of ours or of others.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, autograd
from torch.profiler import ProfilerActivity, profile

from sid_kernels.core import cpu


def allocated_peak(call: Callable[[], Any], device: str = "cpu", warm: bool = True) -> int:
    """Return the most bytes of PyTorch's allocator alive at once during a call, beyond those before, result included.

    Memory that a library or a kernel takes for itself is not seen. `warm`: first call it once, for what is set up once.
    """
    if warm:
        call()
    if device == "cuda":
        torch.cuda.synchronize()
        start = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = call()
        torch.cuda.synchronize()
        most = torch.cuda.max_memory_allocated() - start
        del kept
        return most
    with autograd.profiler.profile(profile_memory=True, use_kineto=True) as profiled:  # does not parse what it saw
        kept = call()
    held = most = 0
    for event in profiled.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    del kept
    assert most > 0, "the profiler saw no allocation"
    return most


def nbytes(found: Any) -> int:
    """Bytes of all tensors in nested tuples and lists, each memory once."""
    memories = {}

    def visit(x):
        if isinstance(x, Tensor):
            memory = x.untyped_storage()
            memories[memory.data_ptr()] = memory.nbytes()
        elif isinstance(x, (tuple, list)):
            for entry in x:
                visit(entry)

    visit(found)
    return sum(memories.values())


def operators(call: Callable[[], Any]) -> int:
    """Operators that Python or autograd calls on a CPU, not those they call in turn.

    Our kernels are called by address, past PyTorch's dispatcher; each such call counts as one. Code that torch.compile
    generates is not seen.
    """
    native = mock.MagicMock(wraps=cpu.compiled)
    with (
        mock.patch.object(cpu, "compiled", native),
        profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled,
    ):
        call()
    events = [event for event in profiled.events() if event.name.startswith("aten::")]
    return sum(not _within_operator(event) for event in events) + len(native.method_calls)


def _within_operator(event) -> bool:
    parent = event.cpu_parent
    while parent is not None and not parent.name.startswith("aten::"):
        parent = parent.cpu_parent
    return parent is not None


def launches(call: Callable[[], Any]) -> int:
    """Kernels, copies and fills that a GPU runs; RuntimeError where the profiler sees none."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiled:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:  # the exported trace alone tells kernels from annotated spans
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    found = sum(event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") for event in events)
    if not found:
        raise RuntimeError("the profiler saw no kernel")
    return found
