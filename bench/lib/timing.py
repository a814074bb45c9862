"""How calls are timed against each other: in one process, in rounds that visit every one of them in turn.

A round's measurement of one call repeats it for at least `LEAST` seconds. Times are per call, in seconds: the clock on
CPUs, events on GPUs. On a GPU a call may also be replayed from a captured graph, which leaves its kernels alone.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable

import torch

LEAST = 2e-3  # seconds a measurement repeats a call for: 1000 times the clock's and the events' resolution
MOST_CALLS = 20_000
GRAPH_CALLS = 20  # calls a captured graph holds: the launch of the graph itself weighs a 20th


class Timer:
    """`seconds()` measures one call of `functions`, which do the same on different memory and are called in turn."""

    held = 1  # calls of the operation in one of `functions`

    def __init__(self, functions: list[Callable[[], object]], device: str):
        self.clock = _gpu_seconds if device == "cuda" else _cpu_seconds
        self.turn = itertools.cycle(functions)
        for function in functions[:2]:  # warm: code compiled and loaded, memory in the allocator
            function()
        self.repeats = 1
        while self.repeats < MOST_CALLS and (short := LEAST / max(self._batch(), 1e-7)) > 1.0:
            self.repeats = min(MOST_CALLS, self.repeats + max(1, int(self.repeats * min(9.0, 1.1 * short - 1.0))))
        if self.repeats > 1:  # each memory as often as the others
            self.repeats = -(-self.repeats // len(functions)) * len(functions)

    def _batch(self) -> float:
        return self.clock(list(itertools.islice(self.turn, self.repeats)))

    @property
    def calls(self) -> int:
        return self.repeats * self.held

    def seconds(self) -> float:
        return self._batch() / self.calls


class GraphTimer(Timer):
    """The same, of a captured graph of calls. RuntimeError where the calls cannot be captured."""

    def __init__(self, functions: list[Callable[[], object]]):
        self.held = -(-GRAPH_CALLS // len(functions)) * len(functions)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warm where it will be captured: nothing is compiled or set up in a capture
            for function in functions:
                function()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for function in itertools.islice(itertools.cycle(functions), self.held):
                function()
        super().__init__([graph.replay], "cuda")


def _cpu_seconds(batch: list[Callable]) -> float:
    start = time.perf_counter()
    for function in batch:
        function()
    return time.perf_counter() - start


def _gpu_seconds(batch: list[Callable]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for function in batch:
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def interleave(timers: dict[str, Timer], rounds: int, seconds: float, least: int = 3) -> dict[str, list[float]]:
    """Times of each, by round: `rounds` of them or as many as fit into `seconds`, and at least `least`.

    Every other round goes backwards, so that none always comes after the same one.
    """
    times: dict[str, list[float]] = {name: [] for name in timers}
    began = time.perf_counter()
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for done in range(rounds):
            used = time.perf_counter() - began
            if done >= least and used * (done + 1) / done > seconds:
                break
            for name in list(timers) if done % 2 == 0 else reversed(timers):
                times[name].append(timers[name].seconds())
    finally:
        if enabled:
            gc.enable()
    return times


def quartiles(times: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(times) < 2:
        return times[0], times[0], times[0]
    first, _, third = statistics.quantiles(times, n=4, method="inclusive")
    return first, statistics.median(times), third


def ratios(times: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """How many times longer each of the others takes than `base`."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        name: {
            "of_medians": medians[name] / medians[base],
            "median_of_rounds": statistics.median(a / b for a, b in zip(times[name], times[base], strict=True)),
        }
        for name in times
        if name != base
    }
