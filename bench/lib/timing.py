"""Time calls against each other in one process: every round measures each of them once.

A measurement repeats its call for at least `LEAST` seconds. Times are seconds per call, read from the clock on a CPU
and from events on a GPU. On a GPU a call can also be replayed from a captured graph, without the time that Python takes
to launch its kernels.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable

import torch

LEAST = 2e-3  # seconds of a measurement, at least: 1000 times the resolution of the clock and of GPU events
MOST_CALLS = 20_000
GRAPH_CALLS = 20  # calls in a captured graph, at least: each bears a 20th of the time to launch the graph


class Timer:
    """Measure the seconds of one call.

    functions: make the same call on different memory, and are called in turn.
    """

    held = 1  # calls made by one function

    def __init__(self, functions: list[Callable[[], object]], device: str):
        self.clock = _gpu_seconds if device == "cuda" else _cpu_seconds
        self.turn = itertools.cycle(functions)
        for function in functions[:2]:  # warm up: code is compiled and loaded, the allocator has its memory
            function()
        self.repeats = 1
        while self.repeats < MOST_CALLS and (short := LEAST / max(self._batch(), 1e-7)) > 1.0:
            self.repeats = min(MOST_CALLS, self.repeats + max(1, int(self.repeats * min(9.0, 1.1 * short - 1.0))))
        if self.repeats > 1:  # call all functions equally often
            self.repeats = -(-self.repeats // len(functions)) * len(functions)

    def _batch(self) -> float:
        return self.clock(list(itertools.islice(self.turn, self.repeats)))

    @property
    def calls(self) -> int:
        """Return the number of calls in one measurement."""
        return self.repeats * self.held

    def seconds(self) -> float:
        """Make one measurement and return the seconds per call."""
        return self._batch() / self.calls


class GraphTimer(Timer):
    """Measure the seconds of one call replayed from a CUDA graph. Raises RuntimeError if it cannot be captured."""

    def __init__(self, functions: list[Callable[[], object]]):
        self.held = -(-GRAPH_CALLS // len(functions)) * len(functions)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warm up on the stream of the capture, in which nothing may be compiled
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
    """Measure every timer once per round and return the seconds per call of each, by round.

    Makes at most `rounds` rounds, stops before that if `seconds` run out, and makes at least `least`. Every other round
    takes the timers in reverse, so that no timer always follows the same one.
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
    """Return the first quartile, the median and the third quartile."""
    if len(times) < 2:
        return times[0], times[0], times[0]
    first, _, third = statistics.quantiles(times, n=4, method="inclusive")
    return first, statistics.median(times), third


def ratios(times: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Return how many times longer than `base` each other name takes, by medians and by the median over rounds."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        name: {
            "of_medians": medians[name] / medians[base],
            "median_of_rounds": statistics.median(a / b for a, b in zip(times[name], times[base], strict=True)),
        }
        for name in times
        if name != base
    }
