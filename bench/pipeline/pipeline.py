"""Stage pipelines on 2 ranks of one thread each: SID's against one rank, and against backpropagation's pipelines.

    python bench/pipeline/pipeline.py --data PATH --out bench/results/pipeline.json

Contenders are launched in turn, one after the other and round by round: each rank is a process pinned to a core of its
own, reads CIFAR-10 through the trainer's own batches, runs an epoch to warm up and one that counts. A figure is the
median over rounds. "Held" is what autograd keeps for backward, without messages on their way. GPipe and 1F1B are
`torch.distributed.pipelining`'s, on the plain backbone with its classifier, cut where its measured costs balance, with
several numbers of microbatches. Every contender has the same images, batch size and optimizer. Evaluation is not timed.

The simulator (`simulate.py`) is held against the same epochs: its costs are measured by as many ranks at once as it
tells of, so that each core is as slowed down by the other as in the pipeline; what a message costs the ranks themselves
is measured with two that work meanwhile.

What we expected before the first run, for 16 equal MLP stages: 1.85 to 1.95 times one rank (messages of 131 KB against
some 14 ms of work), bubble 2 to 4%; GPipe and 1F1B at 4 microbatches 1.5 to 1.7 times their own one rank.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))  # for the package `bench`

from bench.lib import record

NETWORKS = {  # the settings of `sid train` that say what is trained
    "mlp": {"arch": "mlp", "depth": 16, "train_images": 12800, "batch_size": 128},
    "mlp_linear_heads": {"arch": "mlp", "depth": 16, "head_depth": 0, "train_images": 12800, "batch_size": 128},
    "vit_tiny": {"arch": "vit_tiny", "depth": 12, "train_images": 640, "batch_size": 16},
}
RANKS = 2
LIMIT = 300  # seconds a launch may take


def contenders(microbatches: list[int]) -> dict[str, tuple[int, list[str]]]:
    """Ranks of each, and what its processes are asked for."""
    found = {"sid, 1 rank": (1, ["sid"]), "sid, 2 ranks": (RANKS, ["sid"]), "bp, 1 rank": (1, ["bp"])}
    for schedule in ("gpipe", "1f1b"):
        found |= {f"{schedule}, 2 ranks, {m} microbatches": (RANKS, [schedule, str(m)]) for m in microbatches}
    return found


# ---------------------------------------------------------------- in a rank's process


def settings(network: str, data: str, cache: str | None, method: str = "sid", **more):
    from sid_trainer.training.config import run_config

    return run_config(
        dataset="cifar10", data=data, cache=cache, layout="stagewise", method=method, device="cpu", epochs=100,
        optimizer="adam", lr=1e-3, weight_decay=0.0, lr_schedule="constant", **NETWORKS[network] | more,
    )  # fmt: skip


def by_trainer(args, method: str) -> tuple[Callable[[], dict], dict]:
    """An epoch as the command runs it, and what is known before."""
    from sid_trainer.runs.build import make_trainer

    ranks = int(os.environ["WORLD_SIZE"])
    more = {"parallel": "stage"} if ranks > 1 else {}
    run = settings(args.network, args.data, args.cache, method, **more)
    if ranks == 1:
        del os.environ["WORLD_SIZE"]
    trainer = make_trainer(run, quiet=True)
    strategy = trainer.strategy

    def epoch() -> dict:
        begun = time.time()
        trainer.train_epoch()
        trainer.epoch, trainer.step, trainer.sums = trainer.epoch + 1, 0, {}
        found = {"begun": begun, "ended": time.time(), "held": strategy.activation_bytes}
        if ranks > 1:
            strategy.link.wait_for_room()
            del strategy.times["batches"]
            found |= strategy.times
        return found

    return epoch, {}


def by_pipelining(args, schedule: str, microbatches: int) -> tuple[Callable[[], dict], dict]:
    """The same of the plain backbone, backpropagated by PyTorch's pipelines."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

    from bench.pipeline.costs import Classifier, measure_blocks
    from sid_trainer.data.batches import Batches, Labels, pixel_statistics
    from sid_trainer.distributed.balance import balance_stages
    from sid_trainer.methods.factory import OPTIMIZERS
    from sid_trainer.runs.build import make_data, make_network
    from sid_trainer.training.memory import SavedBytes

    run = settings(args.network, args.data, args.cache, "bp")
    dist.init_process_group("gloo")
    rank, device = dist.get_rank(), torch.device("cpu")
    data = make_data(run)
    torch.manual_seed(run.seed)
    network = make_network(run, len(data.classes), data.in_channels, data.image_size)
    network = network.to(memory_format=torch.channels_last)
    statistics_ = pixel_statistics(data.train.images)
    batches = Batches(data.train, run.batch_size, device, *statistics_)
    inputs, targets = next(batches.shuffle(0, 0, 0, False))
    size = run.batch_size // microbatches
    costs = measure_blocks(network, inputs[:size], targets[:size], rounds=5)
    seconds = [[cost.seconds for cost in costs]]
    dist.broadcast_object_list(seconds, 0)
    part = balance_stages(seconds[0], RANKS)[rank]

    class Contiguous(torch.autograd.Function):
        """What passes between ranks, both ways: PyTorch's pipelines send nothing else."""

        @staticmethod
        def forward(ctx, features):
            return features.contiguous()

        @staticmethod
        def backward(ctx, gradient):
            return gradient.contiguous()

    class Block(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, features):
            return Contiguous.apply(self.block(Contiguous.apply(features)))

    blocks = [*network.extractor, Classifier(network.stages[0].head, network.num_classes)]
    last = rank == RANKS - 1
    module = Block(nn.Sequential(*blocks[part.start : part.stop + last]))
    optimizer = OPTIMIZERS[run.optimizer](module.parameters(), lr=run.lr, fused=True)
    with torch.no_grad():  # what passes between the two
        example = inputs[:size] if rank == 0 else nn.Sequential(*blocks[: part.start])(inputs[:size])
        example = example.contiguous()
        made = module(example)
    stage = PipelineStage(module, rank, RANKS, device, input_args=(example,), output_args=(made,))
    kind = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[schedule]
    pipeline = kind(stage, microbatches, loss_fn=nn.CrossEntropyLoss())
    fed = batches if rank == 0 else Labels(data.train, run.batch_size, device)
    number = held = 0

    def epoch() -> dict:
        nonlocal number, held
        number += 1
        begun = time.time()
        for i, (x, y) in enumerate(fed.shuffle(run.seed, number, data.crop, data.flip)):
            optimizer.zero_grad(set_to_none=True)
            first = (number, i) == (1, 0)
            with SavedBytes(module.parameters()) if first else nullcontext() as saved:
                if rank == 0:
                    pipeline.step(x.contiguous())
                else:
                    losses: list[torch.Tensor] = []
                    pipeline.step(target=y, losses=losses, return_outputs=False)
                    float(torch.stack(losses).mean())
            held = saved.peak if first else held
            optimizer.step()
        return {"begun": begun, "ended": time.time(), "held": held}

    return epoch, {"blocks": [i + 1 for i in part]}


def costs_of(args) -> tuple[Callable[[], dict], dict]:
    """What the simulator takes, measured by as many ranks at once."""
    from dataclasses import asdict

    from bench.pipeline.costs import measure_stages
    from sid_trainer.runs.build import make_trainer

    os.environ.pop("WORLD_SIZE")
    trainer = make_trainer(settings(args.network, args.data, args.cache), quiet=True)
    batches, step = trainer.strategy.batches["train"], trainer.strategy.run_step
    inputs, targets = next(batches.shuffle(0, 0, 4, True))
    shuffled, number = batches.shuffle, len(batches)

    def measured() -> dict:
        feed = shuffled(0, 1, trainer.data.crop, trainer.data.flip)
        rounds = number - 2  # that do not count
        costs = measure_stages(trainer.network, inputs, targets, rounds=rounds, feed=feed)
        result = step(inputs, targets)
        batches.shuffle = lambda *_: ((inputs, targets) for _ in range(number))
        trainer.strategy.run_step = lambda inputs, targets: result  # what is left is the loop around loading and stages
        begun = time.perf_counter()
        trainer.train_epoch()
        trainer.step, trainer.sums = 0, {}
        overhead = (time.perf_counter() - begun) / number
        return {"overhead": overhead, "costs": [asdict(cost) for cost in costs]}

    return measured, {}


def link_of(args) -> tuple[Callable[[], dict], dict]:
    """What a message costs the ranks themselves, in seconds: sender and receiver each, while both have work to do."""
    import torch
    import torch.distributed as dist

    from sid_trainer.distributed.pipeline import StageLink, activation_layouts
    from sid_trainer.distributed.rendezvous import Communicator
    from sid_trainer.distributed.topology import Topology
    from sid_trainer.runs.build import make_network
    from sid_trainer.training.config import DTYPES

    run = settings(args.network, args.data, args.cache)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    network = make_network(run, 10, 3, (32, 32))
    between = activation_layouts(network, torch.zeros(2, 32, 32, 3).permute(0, 3, 1, 2), DTYPES[run.dtype])[
        len(network.stages) // 2
    ]
    ends = [None, between][rank], [between, None][rank]
    link = StageLink(Communicator(Topology(rank, RANKS)), 1, 10, *ends)
    features, belief = between.empty(run.batch_size).zero_(), torch.zeros(run.batch_size, 10)
    messages, weights = 100, torch.zeros(512, 512)

    def seconds(passing: Callable[[], object]) -> float:
        """Of the work between messages and of them, without waiting; gloo's own threads share the rank's core."""
        link.reset_counters()
        start = time.perf_counter()
        for _ in range(messages):
            for _ in range(10):
                weights @ weights
            passing()
        return time.perf_counter() - start - link.receiving - link.sending

    def exchange() -> dict:
        alone = seconds(lambda: None)
        link.expect([run.batch_size] * messages)
        both = seconds(link.recv if rank else lambda: link.send(features, belief))
        link.wait_for_room()
        return {"on_rank": max(0.0, both - alone) / messages, "bytes": features.nbytes + belief.nbytes + 4}

    return exchange, {}


def work(args) -> None:
    """What a rank does: prints a JSON line of what its last epoch has shown."""
    rank = int(os.environ["RANK"])
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    import torch
    import torch.distributed as dist

    from sid_trainer.training.memory import peak_memory

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    what, *rest = args.work
    if what in ("sid", "bp"):
        epoch, about = by_trainer(args, what)
    elif what in ("costs", "link"):
        epoch, about = {"costs": costs_of, "link": link_of}[what](args)
    else:
        epoch, about = by_pipelining(args, what, int(rest[0]))
    before = Path("/proc/self/statm").read_text().split()[1]
    epoch()
    if dist.is_initialized():
        dist.barrier()
    found = epoch()
    found["resident_growth_bytes"] = peak_memory(torch.device("cpu")) - int(before) * os.sysconf("SC_PAGE_SIZE")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    args.found.joinpath(f"{rank}.json").write_text(json.dumps(about | found))


# ---------------------------------------------------------------- launching and telling


def launch(args, network: str, ranks: int, words: list[str]) -> list[dict]:
    """What each rank found. Raises RuntimeError with the last line of what went wrong, or where time ran out."""
    with tempfile.TemporaryDirectory() as folder:
        own = [__file__, "--data", args.data, "--network", network, "--found", folder, "--work", *words]
        own += ["--cache", args.cache] if args.cache else []
        run = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run([sys.executable, *run, *own], capture_output=True, text=True, env=environment,
                                  timeout=LIMIT)  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"not done within {LIMIT} s") from error
        files = sorted(Path(folder).iterdir())
        if done.returncode or len(files) != ranks:
            lines = [line for line in done.stderr.splitlines() if "Error" in line and "ChildFailed" not in line]
            raise RuntimeError((lines or [f"status {done.returncode}"])[0])
        return [json.loads(file.read_text()) for file in files]


def measure(args, network: str) -> dict:
    images = NETWORKS[network]["train_images"]
    found: dict[str, dict] = {name: {"rounds": []} for name in contenders(args.microbatches)}
    measured: dict[int, list[dict]] = {1: [], RANKS: []}
    links: list[dict] = []
    for round_ in range(args.rounds):
        for name, (ranks, words) in contenders(args.microbatches).items():
            if "failed" in found[name]:
                continue
            try:
                every = launch(args, network, ranks, words)
            except RuntimeError as error:
                found[name]["failed"] = record.scrub(str(error))
                print(f"{network}: {name}: {error}", flush=True)
                continue
            seconds = max(one["ended"] for one in every) - min(one["begun"] for one in every)
            found[name]["rounds"].append({"images_per_second": images / seconds, "seconds": seconds, "ranks": every})
            print(f"{network}, round {round_ + 1}: {name:34s} {images / seconds:9.1f} images/s", flush=True)
        for ranks in measured:
            measured[ranks] += launch(args, network, ranks, ["costs"])
        links += launch(args, network, RANKS, ["link"])
    base = [one["images_per_second"] for one in found["sid, 1 rank"]["rounds"]]
    for row in found.values():
        speeds = [one["images_per_second"] for one in row["rounds"]]
        if speeds:
            ratios = [a / b for a, b in zip(speeds, base, strict=False)]
            middle = sorted(row["rounds"], key=lambda one: one["images_per_second"])[len(speeds) // 2]
            row |= {
                "images_per_second": statistics.median(speeds),
                "times_sid_1_rank": statistics.median(ratios),
                "times_sid_1_rank_by_round": ratios,
                "held_bytes": max(one["held"] for one in middle["ranks"]),
                "resident_growth_bytes": max(one["resident_growth_bytes"] for one in middle["ranks"]),
                "ranks": middle["ranks"],
            }
            if "busy" in middle["ranks"][0]:
                row |= bubble(middle, images // NETWORKS[network]["batch_size"])
        del row["rounds"]
    return {"settings": NETWORKS[network], "contenders": found, "simulator": simulated(network, found, measured, links)}


def bubble(middle: dict, batches: int) -> dict:
    busy = [one["busy"] for one in middle["ranks"]]
    mean = sum(busy) / len(busy)
    least, imbalance = (RANKS - 1) / (batches + RANKS - 1), 1 - mean / max(busy)
    return {"bubble": 1 - mean / middle["seconds"], "predicted_bubble": least, "imbalance": imbalance,
            "bubble_against_prediction": (1 - mean / middle["seconds"]) / (least + imbalance)}  # fmt: skip


def simulated(network: str, found: dict[str, dict], measured: dict[int, list[dict]], links: list[dict]) -> dict:
    """The simulator's images/s at 1 and 2 ranks beside the measured ones."""
    from bench.pipeline.costs import StageCost
    from bench.pipeline.simulator import NetworkLink, simulate

    link = NetworkLink(seconds_per_byte_on_rank=statistics.median(one["on_rank"] / one["bytes"] for one in links))
    size, images, told = NETWORKS[network]["batch_size"], NETWORKS[network]["train_images"], {}
    for name, every in zip(("sid, 1 rank", "sid, 2 ranks"), measured.values(), strict=True):
        ranks = found[name].get("ranks")
        if ranks is None:
            continue
        overhead = statistics.median(one["overhead"] for one in every)
        costs = [
            StageCost(
                **{key: statistics.median(row[key] for row in rows) for key in rows[0] if rows[0][key] is not None}
            )
            for rows in zip(*(one["costs"] for one in every), strict=True)
        ]
        parts = [range(len(costs))]
        if len(ranks) > 1:
            parts = [range(one["stages"][0] - 1, one["stages"][-1]) for one in ranks]
        speed = simulate(costs, parts, batches=images // size, overhead=overhead, link=link).images_per_second(size)
        told[name] = {
            "images_per_second": speed, "times_measured": speed / found[name]["images_per_second"],
            "loading_seconds": costs[0].load, "overhead_seconds": overhead,
            "seconds_per_byte_on_rank": link.seconds_per_byte_on_rank,
            "stage_seconds": [cost.seconds - cost.load for cost in costs],
        }  # fmt: skip
    return told


def table(found: dict) -> str:
    heads = f"{'images/s':>9s} {'x sid, 1 rank':>14s} {'held MiB':>9s} {'grown MiB':>10s}"
    lines = [f"{'':34s} {heads} {'bubble':>7s} {'predicted':>10s}"]
    for name, row in found["contenders"].items():
        if "failed" in row:
            lines.append(f"{name:34s} {row['failed']}")
            continue
        line = f"{name:34s} {row['images_per_second']:9.1f} {row['times_sid_1_rank']:14.2f}"
        line += f" {row['held_bytes'] / 2**20:9.2f} {row['resident_growth_bytes'] / 2**20:10.1f}"
        if "bubble" in row:
            line += f" {row['bubble']:7.1%} {row['predicted_bubble'] + row['imbalance']:10.1%}"
        lines.append(line)
    for name in ("sid, 1 rank", "sid, 2 ranks"):
        if name in found["simulator"]:
            lines.append(f"simulated, {name:23s} {found['simulator'][name]['images_per_second']:9.1f}"
                         f"   {found['simulator'][name]['times_measured']:.3f} of the measured")  # fmt: skip
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="CIFAR-10: an image folder, or the root of cifar-10-batches-py")
    add("--cache", help="folder for the decoded images")
    add("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="(default: all)")
    add("--microbatches", nargs="+", type=int, default=[4, 8], help="of a batch (default: 4 8)")
    add("--rounds", type=int, default=3, help="(default: %(default)s)")
    add("--out", type=Path, help="the JSON to write")
    add("--work", nargs="+", help=argparse.SUPPRESS)
    add("--network", help=argparse.SUPPRESS)
    add("--found", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args)
        return 0
    if args.out is None or args.rounds < 1:
        parser.error("--out must be given" if args.out is None else f"--rounds must be at least 1, not {args.rounds}")
    if len(os.sched_getaffinity(0)) < RANKS:
        parser.error(f"{RANKS} ranks need a core each; this process may use {len(os.sched_getaffinity(0))}")
    found = {network: measure(args, network) for network in args.networks}
    for network, one in found.items():
        print(f"\n{network}\n{table(one)}")
    filed = record.header("images/s of stage pipelines on 2 ranks of one thread, pinned to a core each")
    record.write_json(args.out, filed | {"rounds": args.rounds, "networks": found})
    print(f"\nwritten: {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
