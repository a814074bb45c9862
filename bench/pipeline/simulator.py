"""Simulate pipelines event by event: each rank runs a list of operations in order, and links carry messages.

There are no random numbers and no time steps: an operation starts when its rank is free and its message has arrived.
The schedule `sid` is the trainer's pipeline (`--parallel stage`). `gpipe`, `1f1b` and `zb` are pipelines of
backpropagation: they cut a batch into microbatches, and drain at the end of the batch, before the update.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from bench.pipeline.costs import StageCost

SCHEDULES = ("sid", "gpipe", "1f1b", "zb")


@dataclass(frozen=True)
class NetworkLink:
    """The links between neighboring ranks, one in each direction. A link carries one message at a time.

    seconds_per_byte_on_rank: time per byte for which a message keeps its sender, and its receiver, from other work
    (gloo copies on the core of the rank).
    """

    latency_seconds: float = 0.0
    bytes_per_second: float = float("inf")
    seconds_per_byte_on_rank: float = 0.0

    def __post_init__(self):
        if not self.bytes_per_second > 0:
            raise ValueError(f"bytes_per_second must be above 0, not {self.bytes_per_second}")
        for name in ("latency_seconds", "seconds_per_byte_on_rank"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")


class Event(NamedTuple):
    """What a rank did from `start` to `end` (seconds)."""

    rank: int
    batch: int
    kind: str  # load, receive, forward, send, backward, weights (the second part of zb's backward), update, other
    start: float
    end: float


class Operation(NamedTuple):
    """One entry of a rank's list of work."""

    batch: int
    kind: str
    seconds: float
    neighbor: int = 0  # of send and receive: -1 or +1
    num_bytes: int = 0  # of send
    held_change: int = 0  # bytes of activations added at its start, or freed (negative) at its end


@dataclass(frozen=True)
class Simulation:
    """The result of `simulate`.

    busy: seconds of work by rank. held: the most bytes of activations alive at once by rank, messages not counted.
    """

    schedule: str
    batches: int
    microbatches: int
    seconds: float
    busy: list[float]
    held: list[int]
    events: list[Event]

    @property
    def ranks(self) -> int:
        return len(self.busy)

    @property
    def idle_share(self) -> float:
        """The share of all ranks' time that was spent waiting."""
        return 1 - sum(self.busy) / (self.ranks * self.seconds)

    @property
    def ideal_idle_share(self) -> float:
        """(S - 1) / (N + S - 1) for S equal ranks with free messages and N batches between two drains.

        `sid` and `zb` can idle less: the next rank starts before the backward pass of this rank.
        """
        n = self.batches if self.schedule == "sid" else self.microbatches
        return (self.ranks - 1) / (n + self.ranks - 1)

    @property
    def imbalance(self) -> float:
        """The share of time that ranks wait for the busiest one, however long the pipeline runs."""
        return 1 - sum(self.busy) / (self.ranks * max(self.busy))

    def images_per_second(self, batch_size: int) -> float:
        """Return the throughput for batches of this size."""
        return self.batches * batch_size / self.seconds


def simulate(
    costs: Sequence[StageCost], parts: Sequence[range], schedule: str = "sid", batches: int = 100, *,
    microbatches: int = 1, link: NetworkLink | None = None, in_flight: int = 2, overhead: float = 0.0,
) -> Simulation:  # fmt: skip
    """Simulate `batches` batches on ranks that own the stages `parts[rank]` of `costs`.

    For `sid`, costs are those of a batch. At most `in_flight` batches are on their way to a rank, and its sender holds
    as many more. For the other schedules, costs are those of one of the `microbatches` of a batch, and senders never
    wait. `zb` is ZB-H1 of Qi et al. 2023 (arXiv 2401.10241).

    overhead: seconds that every rank spends on a batch besides its stages.

    Raises ValueError for arguments that describe no pipeline.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, not {schedule!r}")
    for name, value in (("batches", batches), ("microbatches", microbatches), ("in_flight", in_flight)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if [stage for part in parts for stage in part] != list(range(len(costs))) or not all(parts):
        raise ValueError(f"parts must cut {len(costs)} stages into consecutive ranges, not {list(parts)}")
    link = link or NetworkLink()
    microbatches = 1 if schedule == "sid" else microbatches
    orders = []
    for rank, part in enumerate(parts):
        stages = [costs[i] for i in part]
        bytes_in = costs[part.start - 1].sent if rank else None  # None at the two ends of the pipeline
        bytes_out = stages[-1].sent if rank < len(parts) - 1 else None
        if schedule == "sid":
            work = local_work(stages, bytes_in, bytes_out)
        else:
            order = microbatch_order(schedule, rank, len(parts), microbatches)
            work = microbatch_work(order, stages, bytes_in, bytes_out, split_backward=schedule == "zb")
        load = [("load", costs[0].load)] * (rank == 0)
        orders.append([
            Operation(batch, *rest)
            for batch in range(batches)
            for rest in (*load, *work, ("other", overhead))
        ])  # fmt: skip
    events = run(orders, link, in_flight if schedule == "sid" else None)
    busy = [0.0] * len(parts)
    for event in events:
        busy[event.rank] += event.end - event.start
    held = [max(accumulate(operation.held_change for operation in order)) for order in orders]
    return Simulation(schedule, batches, microbatches, max(event.end for event in events), busy, held, events)


# ---------------------------------------------------------------- the work of a rank for one batch


def local_work(stages: Sequence[StageCost], bytes_in: int | None, bytes_out: int | None) -> list[tuple]:
    """List the operations of SID: each stage trains on its own loss; the last sends its features before it trains."""
    work: list[tuple] = [] if bytes_in is None else [("receive", 0.0, -1)]
    for i, cost in enumerate(stages, 1):
        work.append(("forward", cost.forward, 0, 0, cost.held))
        if i == len(stages) and bytes_out is not None:
            work.append(("send", 0.0, 1, bytes_out))
        work += [("backward", cost.backward, 0, 0, -cost.held), ("update", cost.update)]
    return work


def microbatch_work(
    order: str, stages: Sequence[StageCost], bytes_in: int | None, bytes_out: int | None, split_backward: bool
) -> list[tuple]:
    """List the operations of backpropagation in `order`, as `microbatch_order` gives it, then the update."""
    held, of_input = sum(cost.held for cost in stages), sum(cost.of_input for cost in stages)
    backward = sum(cost.backward for cost in stages)
    steps = {
        "F": [("receive", 0.0, -1)] * (bytes_in is not None)
        + [("forward", sum(cost.forward for cost in stages), 0, 0, held)]
        + [("send", 0.0, 1, bytes_out)] * (bytes_out is not None),
        "B": [("receive", 0.0, 1)] * (bytes_out is not None)
        + [("backward", of_input if split_backward else backward, 0, 0, 0 if split_backward else -held)]
        + [("send", 0.0, -1, bytes_in)] * (bytes_in is not None),
        "W": [("weights", backward - of_input, 0, 0, -held)],
    }
    work = [operation for letter in order for operation in steps[letter]]
    return [*work, ("update", sum(cost.update for cost in stages))]


def microbatch_order(schedule: str, rank: int, ranks: int, m: int) -> str:
    """Return a rank's order of work for m microbatches as letters.

    F is a forward pass and B a backward pass. For `zb`, B gives the input's gradient and W the weights' gradients.
    """
    if schedule == "gpipe":
        return "F" * m + "B" * m
    ahead = min(ranks - rank - 1, m)
    if schedule == "1f1b":
        return "F" * ahead + "FB" * (m - ahead) + "B" * ahead
    # ZB-H1 is 1F1B with W delayed until a rank holds as many microbatches as the first rank.
    late = min(rank, m)
    order = "F" * ahead + "".join("FB" if k < late else "FBW" for k in range(m - ahead)) + "BW" * ahead
    return order + "W" * (m - order.count("W"))


# ---------------------------------------------------------------- time


class Channel:
    """The messages in one direction between two neighbors, with the times at which each was posted, sent and so on."""

    def __init__(self, link: NetworkLink, in_flight: int | None):
        self.link, self.in_flight = link, in_flight
        self.num_bytes: list[int] = []
        self.posted: list[float] = []  # the sender has handed it over
        self.sent: list[float] = []  # the last byte has left
        self.arrived: list[float] = []
        self.received: list[float] = []  # the receiver starts to use it

    def send_time(self) -> float | None:
        """Return the time from which one more message may be posted, or None if it is not known yet."""
        index = -1 if self.in_flight is None else len(self.posted) - self.in_flight
        return 0.0 if index < 0 else self.sent[index] if index < len(self.sent) else None

    def advance(self) -> None:
        """Move every posted message for which the receiver has a free buffer."""
        while (n := len(self.sent)) < len(self.posted):
            index = -1 if self.in_flight is None else n - self.in_flight
            if index >= len(self.received):
                return
            start = max(self.posted[n], self.sent[-1] if n else 0.0, self.received[index] if index >= 0 else 0.0)
            self.sent.append(start + self.num_bytes[n] / self.link.bytes_per_second)
            self.arrived.append(self.sent[n] + self.link.latency_seconds)


def run(orders: Sequence[Sequence[Operation]], link: NetworkLink, in_flight: int | None) -> list[Event]:
    """Run the operations of all ranks and return an event for each that takes time, in order within each rank."""
    channels = {(rank, to): Channel(link, in_flight) for rank in range(len(orders)) for to in (-1, 1)}
    position, clock, events = [0] * len(orders), [0.0] * len(orders), []
    progress = True
    while progress:
        progress = False
        for rank, order in enumerate(orders):
            while position[rank] < len(order):
                batch, kind, seconds, neighbor, num_bytes, _ = order[position[rank]]
                start = clock[rank]
                if kind == "receive":
                    channel = channels[rank + neighbor, -neighbor]
                    channel.advance()
                    n = len(channel.received)
                    if n >= len(channel.arrived):
                        break
                    start = max(start, channel.arrived[n])
                    channel.received.append(start)
                    seconds = channel.num_bytes[n] * link.seconds_per_byte_on_rank
                elif kind == "send":
                    channel = channels[rank, neighbor]
                    channel.advance()
                    if (send_time := channel.send_time()) is None:
                        break
                    start = max(start, send_time)
                    seconds = num_bytes * link.seconds_per_byte_on_rank
                    channel.num_bytes.append(num_bytes)
                    channel.posted.append(start + seconds)
                clock[rank] = start + seconds
                if seconds > 0:
                    events.append(Event(rank, batch, kind, start, clock[rank]))
                position[rank] += 1
                progress = True
    assert all(index == len(order) for index, order in zip(position, orders, strict=True)), "the schedule deadlocks"
    return events
