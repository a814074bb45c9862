"""Measure the memory that a step holds for its backward pass, and the peak of the process."""

import sys
import weakref
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """A context that measures the bytes held for the backward pass: `alive` now, and at most `peak`.

    Each storage counts once, as a whole. The storages of `parameters` do not count.
    """

    def __init__(self, parameters: Iterable[Tensor] = ()):
        super().__init__(self.pack, lambda saved: saved.tensor)
        local = [parameter.to_local() if hasattr(parameter, "to_local") else parameter for parameter in parameters]
        storages = [parameter.untyped_storage() for parameter in local]
        # Keep them alive: an activation must not get the address of a parameter that moved.
        self.ignored = {storage.data_ptr(): storage for storage in storages}
        self.alive, self.peak = 0, 0
        self.holders: Counter[int] = Counter()

    def __enter__(self) -> "SavedBytes":  # type: ignore[override]  # the base class returns None
        super().__enter__()
        return self

    def pack(self, tensor: Tensor) -> "SavedTensor":
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        saved = SavedTensor(tensor.detach())
        if address not in self.ignored:
            self.alive += 0 if self.holders[address] else size
            self.holders[address] += 1
            self.peak = max(self.peak, self.alive)
            weakref.finalize(saved, self.release, address, size)
        return saved

    def release(self, address: int, size: int) -> None:
        self.holders[address] -= 1
        self.alive -= 0 if self.holders[address] else size


class SavedTensor:
    """A tensor held for the backward pass. Autograd deletes this object when it frees the graph."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def reset_peak_memory(device: torch.device) -> None:
    """Reset `peak_memory` to what is held now, if the system supports it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the process's high-water mark, proc(5)
    except OSError:
        pass


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of PyTorch's allocator on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
