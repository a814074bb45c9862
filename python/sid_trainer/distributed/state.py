"""What the ranks of a run hold, put together to what one process would, and taken apart again."""

import json
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

PIPELINE = "pipeline.json"  # how the ranks of a run spent its last epoch, `shares`


def by_replica(every: list[dict], stages: int) -> list[list[dict]]:
    """What all ranks told, a list of the stages' for each replica."""
    return [every[i : i + stages] for i in range(0, len(every), stages)]


def found_together(pipelines: list[list[dict]]) -> dict:
    """What an epoch has shown: stages side by side, images of all replicas."""
    tallies = {}
    for name in pipelines[0][0]["tallies"]:
        sums = sum(torch.cat([found["tallies"][name][0] for found in line], dim=1) for line in pipelines)
        tallies[name] = sums, sum(line[0]["tallies"][name][1] for line in pipelines)
    peak = max(found["peak"] for line in pipelines for found in line)
    return {"sums": sums_together(pipelines), "tallies": tallies, "peak": peak}


def sums_together(pipelines: list[list[dict]]) -> dict:
    every = [[told["sums"] for told in line] for line in pipelines]
    if not every[0][0]:  # nothing was added up yet
        return {}
    losses = [[loss for sums in line for loss in sums["loss"]] for line in every]
    return every[0][-1] | {
        "loss": [sum(column[1:], column[0]) for column in zip(*losses, strict=True)],
        "right": sum(line[-1]["right"] for line in every),
    }


def states_together(own: dict, pipelines: list[list[dict]]) -> dict:
    """The recorder's `own` state with the stages of all ranks: a checkpoint as one process writes it."""
    first = pipelines[0]
    network = {name: tensor for part in first for name, tensor in part["network"].items()}
    optimizers = zip(*(part["optimizers"] for part in first), strict=True)
    held = max(told["activation_bytes"] for line in pipelines for told in line)
    return {name: value for name, value in own.items() if name != "names"} | {
        "network": {name: network[name] for name in own["names"]},
        "optimizers": [next((one for one in each if one is not None), None) for each in optimizers],
        "schedulers": [state for part in first for state in part["schedulers"]],
        "sums": sums_together(pipelines),
        "metrics": json.dumps([json.loads(own["metrics"])[0], held]),
    }


def part_of(
    state: dict, network: dict[str, Tensor], optimizers: Sequence[Optimizer | None], stages: range,
) -> dict:  # fmt: skip
    """Of a whole checkpoint, what a rank holds that has these stages; `network` is its own state, of which others'
    tensors have no memory."""
    saved = zip(optimizers, state["optimizers"], strict=True)
    return state | {
        "network": {name: t if t.is_meta else state["network"][name] for name, t in network.items()},
        "optimizers": [one if own else None for own, one in saved],
        "schedulers": [state["schedulers"][i] for i in stages],
        "sums": state["sums"] and state["sums"] | {"loss": [state["sums"]["loss"][i] for i in stages]},
    }


def shares(ranks: list[dict], stages: int) -> dict:
    """How the ranks spent the time from the first one's first batch to the last one's last: `bubble` is the share in
    which they were idle. `predicted_bubble` is that of a pipeline of equal stages, (S - 1) / (N + S - 1) over N
    batches, and `imbalance` what unequal loads add, 1 - mean / largest. Times become seconds from the first begin."""
    start, batches = min(rank["begun"] for rank in ranks), ranks[0]["trained"]
    for rank in ranks:
        rank["begun"], rank["ended"] = rank["begun"] - start, rank["ended"] - start
        rank["batches"] = [(a - start, b - start) for a, b in rank["batches"]]
    span = max(rank["ended"] for rank in ranks)
    busy = [rank["busy"] for rank in ranks]
    mean = sum(busy) / len(busy)
    return {
        "span": span,
        "bubble": 1 - mean / span,
        # none are left where an epoch is resumed at its end
        "predicted_bubble": (stages - 1) / (batches + stages - 1) if batches else 0.0,
        "imbalance": 1 - mean / max(busy),
        "ranks": ranks,
    }
