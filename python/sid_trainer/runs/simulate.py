"""A pipeline on paper: ranks that each do a list of operations in order, and links that carry what they send.

Nothing is drawn at random and nothing is rounded to ticks: an operation starts when its rank is free and its message is
there. `sid` is what `pipeline.py` does; `gpipe`, `1f1b` and `zb` are pipelines of backpropagation, which cut a batch
into microbatches and run empty at its end, for the update.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from ..distributed.balance import StageCost

SCHEDULES = ("sid", "gpipe", "1f1b", "zb")


@dataclass(frozen=True)
class Link:
    """Between neighbours, one each way; it carries one message at a time.

    seconds_per_byte_on_rank: what a message costs the ranks themselves, sender and receiver each (gloo's copies run on
    a rank's own core).
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
    rank: int
    batch: int
    kind: str  # load, receive, forward, send, backward, weights (zero-bubble's part of backward), update, other
    start: float  # seconds
    end: float


class Operation(NamedTuple):
    batch: int
    kind: str
    seconds: float
    toward: int = 0  # of send and receive: the neighbour, -1 or +1
    size: int = 0  # of send: bytes
    held: int = 0  # by how much the activations held grow; where they shrink, at its end


@dataclass(frozen=True)
class Simulated:
    """What came out. By rank: `busy` seconds, and the most bytes of activations `held` at once (without messages)."""

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
    def bubble(self) -> float:
        """The share of all ranks' time in which they had nothing to do."""
        return 1 - sum(self.busy) / (self.ranks * self.seconds)

    @property
    def formula(self) -> float:
        """The share that equal ranks and free messages would leave: (S - 1) / (N + S - 1), N being the batches that
        follow one another without the pipeline running empty. At most that for `sid`, whose next rank begins after a
        forward already, and for `zb`."""
        n = self.batches if self.schedule == "sid" else self.microbatches
        return (self.ranks - 1) / (n + self.ranks - 1)

    @property
    def imbalance(self) -> float:
        """The share that ranks wait for the one with most to do, however long the pipeline runs."""
        return 1 - sum(self.busy) / (self.ranks * max(self.busy))

    def images_per_second(self, batch_size: int) -> float:
        return self.batches * batch_size / self.seconds


def simulate(
    costs: Sequence[StageCost], parts: Sequence[range], schedule: str = "sid", batches: int = 100, *,
    microbatches: int = 1, link: Link | None = None, in_flight: int = 2, overhead: float = 0.0,
) -> Simulated:  # fmt: skip
    """Run `batches` batches through ranks that own the stages `parts[rank]` of `costs`.

    `sid`: costs are of a batch, and at most `in_flight` of them are on their way to a rank and as many kept by its
    sender. The others: costs are of one of the `microbatches` of a batch, and a rank may send as far ahead as its
    schedule goes. `zb` is ZB-H1 of Qi et al. 2023 (arXiv 2401.10241).

    overhead: seconds that every rank spends on a batch beside its stages.

    Raises ValueError, in one line, for what is no pipeline.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, not {schedule!r}")
    for name, value in (("batches", batches), ("microbatches", microbatches), ("in_flight", in_flight)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if [stage for part in parts for stage in part] != list(range(len(costs))) or not all(parts):
        raise ValueError(f"parts must cut {len(costs)} stages into consecutive ranges, not {list(parts)}")
    link = link or Link()
    microbatches = 1 if schedule == "sid" else microbatches
    orders = []
    for rank, part in enumerate(parts):
        own = [costs[i] for i in part]
        came = costs[part.start - 1].sent if rank else None  # bytes; None at the ends
        goes = own[-1].sent if rank < len(parts) - 1 else None
        if schedule == "sid":
            work = local_work(own, came, goes)
        else:
            work = flushed_work(schedule, rank, len(parts), own, came, goes, microbatches)
        before = [("load", costs[0].load)] * (rank == 0)
        orders.append([
            Operation(batch, *rest)
            for batch in range(batches)
            for rest in (*before, *work, ("other", overhead))
        ])  # fmt: skip
    events = run(orders, link, in_flight if schedule == "sid" else None)
    busy = [0.0] * len(parts)
    for event in events:
        busy[event.rank] += event.end - event.start
    held = [max(accumulate(operation.held for operation in order)) for order in orders]
    return Simulated(schedule, batches, microbatches, max(event.end for event in events), busy, held, events)


# ---------------------------------------------------------------- what a rank does in a batch, without the batch


def local_work(own: Sequence[StageCost], came: int | None, goes: int | None) -> list[tuple]:
    """Each stage learns from its own loss; the last one's features go on before it does."""
    work = [] if came is None else [("receive", 0.0, -1)]
    for i, cost in enumerate(own, 1):
        work.append(("forward", cost.forward, 0, 0, cost.held))
        if i == len(own) and goes is not None:
            work.append(("send", 0.0, 1, goes))
        work += [("backward", cost.backward, 0, 0, -cost.held), ("update", cost.update)]
    return work


def flushed_work(
    schedule: str, rank: int, ranks: int, own: Sequence[StageCost], came: int | None, goes: int | None, m: int
) -> list[tuple]:
    held, of_input = sum(cost.held for cost in own), sum(cost.of_input for cost in own)
    whole = sum(cost.backward for cost in own)
    parted = schedule == "zb"
    steps = {
        "F": [("receive", 0.0, -1)] * (came is not None)
        + [("forward", sum(cost.forward for cost in own), 0, 0, held)]
        + [("send", 0.0, 1, goes)] * (goes is not None),
        "B": [("receive", 0.0, 1)] * (goes is not None)
        + [("backward", of_input if parted else whole, 0, 0, 0 if parted else -held)]
        + [("send", 0.0, -1, came)] * (came is not None),
        "W": [("weights", whole - of_input, 0, 0, -held)],
    }
    work = [operation for letter in letters(schedule, rank, ranks, m) for operation in steps[letter]]
    return [*work, ("update", sum(cost.update for cost in own))]


def letters(schedule: str, rank: int, ranks: int, m: int) -> str:
    """The order of a rank's forwards, backwards (zb: of the input) and, zb alone, backwards of the weights."""
    if schedule == "gpipe":
        return "F" * m + "B" * m
    ahead = min(ranks - rank - 1, m)
    if schedule == "1f1b":
        return "F" * ahead + "FB" * (m - ahead) + "B" * ahead
    # As 1f1b, but the weights' part waits: for so many microbatches that every rank holds as many as the first one
    late = min(rank, m)
    order = "F" * ahead + "".join("FB" if k < late else "FBW" for k in range(m - ahead)) + "BW" * ahead
    return order + "W" * (m - order.count("W"))


# ---------------------------------------------------------------- time


class Line:
    """One direction between two neighbours: when its messages were handed over, had left, arrived and were taken."""

    def __init__(self, link: Link, in_flight: int | None):
        self.link, self.in_flight = link, in_flight
        self.sizes: list[int] = []
        self.handed: list[float] = []
        self.left: list[float] = []
        self.arrived: list[float] = []
        self.taken: list[float] = []

    def room(self) -> float | None:
        """From when on one more may be handed over; None while that is not known."""
        waited_for = -1 if self.in_flight is None else len(self.handed) - self.in_flight
        return 0.0 if waited_for < 0 else self.left[waited_for] if waited_for < len(self.left) else None

    def move(self) -> None:
        """What has been handed over travels, as soon as the receiver has a place for it."""
        while (n := len(self.left)) < len(self.handed):
            waited_for = -1 if self.in_flight is None else n - self.in_flight
            if waited_for >= len(self.taken):
                return
            start = max(
                self.handed[n], self.left[-1] if n else 0.0, self.taken[waited_for] if waited_for >= 0 else 0.0
            )  # fmt: skip
            self.left.append(start + self.sizes[n] / self.link.bytes_per_second)
            self.arrived.append(self.left[n] + self.link.latency_seconds)


def run(orders: Sequence[Sequence[Operation]], link: Link, in_flight: int | None) -> list[Event]:
    """The times of all operations that take time, each rank's in order."""
    lines = {(rank, toward): Line(link, in_flight) for rank in range(len(orders)) for toward in (-1, 1)}
    place, clock, events = [0] * len(orders), [0.0] * len(orders), []
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(orders):
            while place[rank] < len(order):
                batch, kind, seconds, toward, size, _ = order[place[rank]]
                start = clock[rank]
                if kind == "receive":
                    line = lines[rank + toward, -toward]
                    line.move()
                    n = len(line.taken)
                    if n >= len(line.arrived):
                        break
                    start = max(start, line.arrived[n])
                    line.taken.append(start)
                    seconds = line.sizes[n] * link.seconds_per_byte_on_rank
                elif kind == "send":
                    line = lines[rank, toward]
                    line.move()
                    if (room := line.room()) is None:
                        break
                    start = max(start, room)
                    seconds = size * link.seconds_per_byte_on_rank
                    line.sizes.append(size)
                    line.handed.append(start + seconds)
                clock[rank] = start + seconds
                if seconds > 0:
                    events.append(Event(rank, batch, kind, start, clock[rank]))
                place[rank] += 1
                moved = True
    assert all(at == len(order) for at, order in zip(place, orders, strict=True)), "the schedule waits for itself"
    return events
