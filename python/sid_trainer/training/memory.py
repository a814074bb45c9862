"""What a step and a process hold."""

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class SavedBytes:
    """Within it, `peak` becomes the most bytes autograd held for backward at any one time; each memory counts once,
    `parameters` not at all."""

    def __init__(self, parameters: Iterable[Tensor] = ()):
        local = [parameter.to_local() if hasattr(parameter, "to_local") else parameter for parameter in parameters]
        memories = [parameter.untyped_storage() for parameter in local]
        self.ignored = {memory.data_ptr(): memory for memory in memories}  # kept, lest an activation gets a moved one's
        self.alive, self.peak, self.holders = 0, 0, Counter()

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def pack(self, tensor: Tensor) -> "Held":
        memory = tensor.untyped_storage()
        key, size = memory.data_ptr(), memory.nbytes()
        held = Held(tensor.detach())
        if key not in self.ignored:
            self.alive += 0 if self.holders[key] else size
            self.holders[key] += 1
            self.peak = max(self.peak, self.alive)
            weakref.finalize(held, self.release, key, size)
        return held

    def release(self, key: int, size: int) -> None:
        self.holders[key] -= 1
        self.alive -= 0 if self.holders[key] else size


class Held:
    """A tensor that autograd holds; it lets go of this when the graph is freed."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def allocated_peak(call: Callable[[], Any], device: str = "cpu", warm: bool = True) -> int:
    """The most bytes of PyTorch's allocator that are alive during a call beyond those at its start, result included.

    What a library or a kernel takes for itself (a product's packed panels, a thread's tile) is not seen.
    warm: call it once before, unmeasured, for what is set up once.
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
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        kept = call()
    held = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    del kept
    assert most > 0, "the profiler saw no allocation"
    return most


def forget_peak(device: torch.device) -> None:
    """From here on `peak_memory` counts anew, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the process's high-water mark, proc(5)
    except OSError:
        pass


def peak_memory(device: torch.device) -> int:
    """The most bytes held at once: of PyTorch's allocator on a GPU, else of the whole process in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
