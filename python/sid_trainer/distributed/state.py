"""Combine the states and results of all ranks into those of one process, and split a checkpoint among ranks."""

import json
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer


def group_by_replica(ranks: list[dict], stage_ranks: int) -> list[list[dict]]:
    """Group the entries of all ranks into one list per replica, with an entry for each of its stage ranks."""
    return [ranks[i : i + stage_ranks] for i in range(0, len(ranks), stage_ranks)]


def combine_results(ranks: list[dict], stage_ranks: int) -> dict:
    """Combine the results of an epoch: concatenate those of all stages and add up the images of all replicas."""
    replicas = group_by_replica(ranks, stage_ranks)
    metrics = {}
    for name in ranks[0]["metrics"]:
        sums = [torch.cat([rank["metrics"][name][0] for rank in replica], dim=1) for replica in replicas]
        metrics[name] = torch.stack(sums).sum(dim=0), sum(replica[0]["metrics"][name][1] for replica in replicas)
    largest = {name: max(rank[name] for rank in ranks) for name in ("memory", "activation_bytes")}
    return {"sums": combine_sums(replicas), "metrics": metrics, **largest}


def combine_sums(replicas: list[list[dict]]) -> dict:
    """Combine the sums of the epoch so far over all stages and images; empty before the first step."""
    sums = [[rank["sums"] for rank in replica] for replica in replicas]
    if not sums[0][0]:
        return {}
    losses = [[loss for rank in replica for loss in rank["loss"]] for replica in sums]
    return sums[0][-1] | {
        "loss": [sum(column[1:], column[0]) for column in zip(*losses, strict=True)],
        "right": sum(replica[-1]["right"] for replica in sums),
    }


def combine_states(own: dict, ranks: list[dict], stage_ranks: int) -> dict:
    """Combine the logging rank's state and the parts that all ranks sent into one checkpoint."""
    replicas = group_by_replica(ranks, stage_ranks)
    network = {name: tensor for rank in replicas[0] for name, tensor in rank["network"].items()}
    optimizers = zip(*(rank["optimizers"] for rank in replicas[0]), strict=True)
    activation_bytes = max(rank["activation_bytes"] for rank in ranks)
    return own | {
        "network": {name: network[name] for name in own["network"]},
        "optimizers": [next((state for state in states if state is not None), None) for states in optimizers],
        "schedulers": [state for rank in replicas[0] for state in rank["schedulers"]],
        "sums": combine_sums(replicas),
        "metrics": json.dumps([json.loads(own["metrics"])[0], activation_bytes]),
    }


def local_state(state: dict, network: dict[str, Tensor], optimizers: Sequence[Optimizer | None], stages: range) -> dict:
    """Return the part of a checkpoint that the rank with these `stages` loads.

    `network` is the rank's own state dict, in which the tensors of other ranks are on the meta device.
    """
    saved = zip(optimizers, state["optimizers"], strict=True)
    return state | {
        "network": {name: t if t.is_meta else state["network"][name] for name, t in network.items()},
        "optimizers": [of_stage if own else None for own, of_stage in saved],
        "schedulers": [state["schedulers"][i] for i in stages],
        "sums": state["sums"] and state["sums"] | {"loss": [state["sums"]["loss"][i] for i in stages]},
    }


def summarize_times(ranks: list[dict], stage_ranks: int) -> dict:
    """Summarize how the ranks spent an epoch, with times in seconds since the first rank started.

    `bubble` is the share of the epoch in which ranks were idle, on average. `predicted_bubble` is that of a pipeline of
    S equal stages, (S - 1) / (N + S - 1) over N batches. `imbalance` is the part due to unequal loads, 1 - mean busy
    time / largest busy time.
    """
    start, batches = min(rank["begun"] for rank in ranks), ranks[0]["trained"]
    ranks = [
        rank | {
            "begun": rank["begun"] - start,
            "ended": rank["ended"] - start,
            "batches": [(a - start, b - start) for a, b in rank["batches"]],
        }
        for rank in ranks
    ]  # fmt: skip
    span = max(rank["ended"] for rank in ranks)
    busy = [rank["busy"] for rank in ranks]
    mean = sum(busy) / len(busy)
    return {
        "span": span,
        "bubble": 1 - mean / span,
        # A run resumed at the end of an epoch has no batches left in it.
        "predicted_bubble": (stage_ranks - 1) / (batches + stage_ranks - 1) if batches else 0.0,
        "imbalance": 1 - mean / max(busy),
        "ranks": ranks,
    }
