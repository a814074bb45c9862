"""Measure stage pipelines on 2 ranks of one thread each: SID against one rank and against backpropagation.

    python bench/pipeline/pipeline.py --data PATH --out bench/results/pipeline.json
    python bench/pipeline/pipeline.py --text FILE --networks gpt gpt_shared --out bench/results/pipeline-text.json

Every round launches all contenders one after the other. Each rank is a process pinned to a core of its own. It reads
CIFAR-10 as the trainer does, and runs an epoch to warm up and an epoch that is timed. Results are medians over rounds.
"Held" is what autograd keeps for the backward pass, without messages on their way. GPipe and 1F1B are those of
`torch.distributed.pipelining`, with several numbers of microbatches, on the plain backbone with its classifier, which
is cut so that measured costs balance. All contenders have the same images, batch size and optimizer. Evaluation is not
timed. Language models count tokens where this says images.

The result on images is also compared with the simulator (`simulate.py`). Its stage costs are measured on as many ranks
at once as it simulates, because cores slow each other down. The cost of a message is measured between two ranks that
compute meanwhile.

Expected before the first run, for 16 equal MLP stages: 1.85 to 1.95 times one rank (messages of 131 KB against about
14 ms of work) with a bubble of 2 to 4%; GPipe and 1F1B with 4 microbatches 1.5 to 1.7 times their own single rank.
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

NETWORKS = {  # settings of `sid train` by name of the network
    "mlp": {"arch": "mlp", "depth": 16, "train_images": 12800, "batch_size": 128},
    "mlp_linear_heads": {"arch": "mlp", "depth": 16, "head_depth": 0, "train_images": 12800, "batch_size": 128},
    "vit_tiny": {"arch": "vit_tiny", "depth": 12, "train_images": 640, "batch_size": 16},
}
GPT = {"tokens": "characters", "context": 64, "layers": 8, "width": 128, "attention_heads": 4, "depth": 4,
       "batch_size": 16}  # fmt: skip
TEXT_NETWORKS = {
    "gpt": GPT,
    "gpt_shared": GPT | {"readout": "shared", "readout_refresh": 20, "tail": 1},
    "gpt_shared_each_step": GPT | {"readout": "shared", "readout_refresh": 1, "tail": 1},
}
NETWORKS |= {name: {"arch": "gpt", "dataset": "text"} | network for name, network in TEXT_NETWORKS.items()}
RANKS = 2
LIMIT = 300  # seconds a launch may take


def contenders(microbatches: list[int]) -> dict[str, tuple[int, list[str]]]:
    """Return by contender its number of ranks, and the words after `--work` that start them."""
    listed = {"sid, 1 rank": (1, ["sid"]), "sid, 2 ranks": (RANKS, ["sid"]), "bp, 1 rank": (1, ["bp"])}
    for schedule in ("gpipe", "1f1b"):
        listed |= {f"{schedule}, 2 ranks, {m} microbatches": (RANKS, [schedule, str(m)]) for m in microbatches}
    return listed


# ---------------------------------------------------------------- in a rank's process


def settings(args, method: str = "sid", **more):
    from sid_trainer.training.config import run_config

    images = {"dataset": "cifar10", "data": args.data, "cache": args.cache}
    data = {"data": args.text} if args.network in TEXT_NETWORKS else images
    return run_config(
        layout="stagewise", method=method, device="cpu", epochs=100, optimizer="adam", lr=1e-3, weight_decay=0.0,
        lr_schedule="constant", **data | NETWORKS[args.network] | more,
    )  # fmt: skip


def by_trainer(args, method: str) -> tuple[Callable[[], dict], dict]:
    """Return a function that trains an epoch as `sid train` does and returns its figures, and an empty dict."""
    from sid_trainer.runs.build import make_trainer

    ranks = int(os.environ["WORLD_SIZE"])
    more = {"parallel": "stage"} if ranks > 1 else {}
    run = settings(args, method, **more)
    if ranks == 1:
        del os.environ["WORLD_SIZE"]
    trainer = make_trainer(run, quiet=True)
    strategy = trainer.strategy

    def epoch() -> dict:
        start = time.time()
        trainer.train_epoch()
        trainer.epoch, trainer.step, trainer.sums = trainer.epoch + 1, 0, {}
        counts = {"examples": strategy.batches["train"].count, "steps": trainer.steps_per_epoch}
        figures = counts | {"begun": start, "ended": time.time(), "held": strategy.activation_bytes}
        if ranks > 1:
            strategy.link.wait_for_room()
            del strategy.times["batches"]
            figures |= strategy.times
        return figures

    return epoch, {}


def by_pipelining(args, schedule: str, microbatches: int) -> tuple[Callable[[], dict], dict]:
    """Return a function that trains an epoch by backpropagation in a PyTorch pipeline, and the rank's blocks."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

    from bench.pipeline.costs import Classifier, measure_blocks
    from sid_trainer.data.batches import Batches, Labels, pixel_statistics
    from sid_trainer.data.text import TextBatches, TextData
    from sid_trainer.distributed.balance import balance_stages
    from sid_trainer.methods.factory import OPTIMIZERS
    from sid_trainer.runs.build import make_data, make_network
    from sid_trainer.training.memory import SavedBytes

    run = settings(args, "bp")
    dist.init_process_group("gloo")
    rank, device = dist.get_rank(), torch.device("cpu")
    data = make_data(run)
    torch.manual_seed(run.seed)
    network = make_network(run, len(data.classes), data.in_channels, data.image_size)
    network = network.to(memory_format=torch.channels_last)
    if text := isinstance(data, TextData):
        batches = TextBatches(data.train, run.batch_size, device)
    else:
        batches = Batches(data.train, run.batch_size, device, *pixel_statistics(data.train.images))
    inputs, targets = next(batches.shuffle(0, 0, 0, False))
    size = run.batch_size // microbatches
    costs = measure_blocks(network, inputs[:size], targets[: size * batches.context], rounds=5)
    seconds = [[cost.seconds for cost in costs]]
    dist.broadcast_object_list(seconds, 0)
    part = balance_stages(seconds[0], RANKS)[rank]

    class Contiguous(torch.autograd.Function):
        """Make features and their gradients contiguous: PyTorch's pipelines send only contiguous tensors."""

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
    with torch.no_grad():  # examples of what the ranks send
        example = inputs[:size] if rank == 0 else nn.Sequential(*blocks[: part.start])(inputs[:size])
        example = example.contiguous()
        example_output = module(example)
    stage = PipelineStage(module, rank, RANKS, device, input_args=(example,), output_args=(example_output,))
    kind = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[schedule]
    pipeline = kind(stage, microbatches, loss_fn=nn.CrossEntropyLoss())
    rank_batches = batches if rank == 0 or text else Labels(data.train, run.batch_size, device)
    number = held = 0

    def epoch() -> dict:
        nonlocal number, held
        number += 1
        start = time.time()
        for i, (x, y) in enumerate(rank_batches.shuffle(run.seed, number, data.crop, data.flip)):
            if len(y) < run.batch_size * batches.context:
                continue  # PyTorch's pipelines take one shape
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
        full = sum(size_ == run.batch_size * batches.context for size_ in batches.sizes())
        counts = {"examples": full * run.batch_size * batches.context, "steps": full}
        return counts | {"begun": start, "ended": time.time(), "held": held}

    return epoch, {"blocks": [i + 1 for i in part]}


def costs_of(args) -> tuple[Callable[[], dict], dict]:
    """Return a function that measures the stage costs and the overhead of a step on this rank, and an empty dict."""
    from dataclasses import asdict

    from bench.pipeline.costs import measure_stages
    from sid_trainer.runs.build import make_trainer

    os.environ.pop("WORLD_SIZE")
    trainer = make_trainer(settings(args), quiet=True)
    batches, step = trainer.strategy.batches["train"], trainer.strategy.run_step
    inputs, targets = next(batches.shuffle(0, 0, 4, True))
    shuffled, number = batches.shuffle, len(batches)

    def measure_rank() -> dict:
        feed = shuffled(0, 1, trainer.data.crop, trainer.data.flip)
        rounds = number - 2  # measure_stages adds 2 rounds to warm up
        costs = measure_stages(trainer.network, inputs, targets, rounds=rounds, feed=feed)
        result = step(inputs, targets)
        batches.shuffle = lambda *_: ((inputs, targets) for _ in range(number))
        trainer.strategy.run_step = lambda inputs, targets: result  # leaves the loop without loading and stages
        start = time.perf_counter()
        trainer.train_epoch()
        trainer.step, trainer.sums = 0, {}
        overhead = (time.perf_counter() - start) / number
        return {"overhead": overhead, "costs": [asdict(cost) for cost in costs]}

    return measure_rank, {}


def link_of(args) -> tuple[Callable[[], dict], dict]:
    """Return a function that measures the seconds by which a message delays this rank's own work, and an empty dict."""
    import torch
    import torch.distributed as dist

    from sid_trainer.distributed.pipeline import StageLink, activation_layouts
    from sid_trainer.distributed.rendezvous import Communicator
    from sid_trainer.distributed.topology import Topology
    from sid_trainer.runs.build import make_network
    from sid_trainer.training.config import DTYPES

    run = settings(args)
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

    def seconds(pass_message: Callable[[], object]) -> float:
        """Return the seconds of work and messages in turn, without waiting. Gloo's threads share the rank's core."""
        link.reset_counters()
        start = time.perf_counter()
        for _ in range(messages):
            for _ in range(10):
                weights @ weights
            pass_message()
        return time.perf_counter() - start - link.receiving - link.sending

    def exchange() -> dict:
        alone = seconds(lambda: None)
        link.expect([run.batch_size] * messages)
        with_messages = seconds(link.recv if rank else lambda: link.send(features, belief))
        link.wait_for_room()
        return {"on_rank": max(0.0, with_messages - alone) / messages, "bytes": features.nbytes + belief.nbytes + 4}

    return exchange, {}


def work(args) -> None:
    """Do the work of one rank: run an epoch to warm up and one that is timed, and write its figures as JSON."""
    rank = int(os.environ["RANK"])
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    import torch
    import torch.distributed as dist

    from sid_trainer.training.memory import peak_memory

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    kind, *rest = args.work
    if kind in ("sid", "bp"):
        epoch, figures = by_trainer(args, kind)
    elif kind in ("costs", "link"):
        epoch, figures = {"costs": costs_of, "link": link_of}[kind](args)
    else:
        epoch, figures = by_pipelining(args, kind, int(rest[0]))
    before = Path("/proc/self/statm").read_text().split()[1]
    epoch()
    if dist.is_initialized():
        dist.barrier()
    figures |= epoch()
    figures["resident_growth_bytes"] = peak_memory(torch.device("cpu")) - int(before) * os.sysconf("SC_PAGE_SIZE")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    args.found.joinpath(f"{rank}.json").write_text(json.dumps(figures))


# ---------------------------------------------------------------- launching ranks, and their results


def launch(args, network: str, ranks: int, words: list[str]) -> list[dict]:
    """Run the ranks of a contender and return the figures of each. Raises RuntimeError if one fails or is too slow."""
    with tempfile.TemporaryDirectory() as folder:
        script = [__file__, "--network", network, "--found", folder]
        for name in ("data", "text", "cache"):
            script += [f"--{name}", value] if (value := getattr(args, name)) else []
        script += ["--work", *words]
        run = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        try:
            process = subprocess.run([sys.executable, *run, *script], capture_output=True, text=True, env=environment,
                                     timeout=LIMIT)  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"not done within {LIMIT} s") from error
        files = sorted(Path(folder).iterdir())
        if process.returncode or len(files) != ranks:
            lines = [line for line in process.stderr.splitlines() if "Error" in line and "ChildFailed" not in line]
            raise RuntimeError((lines or [f"status {process.returncode}"])[0])
        return [json.loads(file.read_text()) for file in files]


def measure(args, network: str) -> dict:
    """Measure all contenders on one network, and return their results and the simulator's."""
    results: dict[str, dict] = {name: {"rounds": []} for name in contenders(args.microbatches)}
    measured: dict[int, list[dict]] = {1: [], RANKS: []}
    links: list[dict] = []
    for round_ in range(args.rounds):
        for name, (ranks, words) in contenders(args.microbatches).items():
            if "failed" in results[name]:
                continue
            try:
                rank_figures = launch(args, network, ranks, words)
            except RuntimeError as error:
                results[name]["failed"] = record.scrub(str(error))
                print(f"{network}: {name}: {error}", flush=True)
                continue
            seconds = max(rank["ended"] for rank in rank_figures) - min(rank["begun"] for rank in rank_figures)
            speed = rank_figures[0]["examples"] / seconds
            results[name]["rounds"].append({"images_per_second": speed, "seconds": seconds, "ranks": rank_figures})
            unit = "tokens" if network in TEXT_NETWORKS else "images"
            print(f"{network}, round {round_ + 1}: {name:34s} {speed:9.1f} {unit}/s", flush=True)
        if network in TEXT_NETWORKS:
            continue
        for ranks in measured:
            measured[ranks] += launch(args, network, ranks, ["costs"])
        links += launch(args, network, RANKS, ["link"])
    base = [result["images_per_second"] for result in results["sid, 1 rank"]["rounds"]]
    for row in results.values():
        speeds = [result["images_per_second"] for result in row["rounds"]]
        if speeds:
            ratios = [a / b for a, b in zip(speeds, base, strict=False)]
            middle = sorted(row["rounds"], key=lambda result: result["images_per_second"])[len(speeds) // 2]
            row |= {
                "images_per_second": statistics.median(speeds),
                "times_sid_1_rank": statistics.median(ratios),
                "times_sid_1_rank_by_round": ratios,
                "held_bytes": max(rank["held"] for rank in middle["ranks"]),
                "resident_growth_bytes": max(rank["resident_growth_bytes"] for rank in middle["ranks"]),
                "ranks": middle["ranks"],
            }
            if "busy" in middle["ranks"][0]:
                row |= bubble(middle, middle["ranks"][0]["steps"])
        del row["rounds"]
    predictions = {} if network in TEXT_NETWORKS else simulated(network, results, measured, links)
    return {"settings": NETWORKS[network], "contenders": results, "simulator": predictions}


def bubble(middle: dict, batches: int) -> dict:
    """Return the share of time that ranks idle in the median round, and the share that the stage costs predict."""
    busy = [rank["busy"] for rank in middle["ranks"]]
    mean = sum(busy) / len(busy)
    filling, imbalance = (RANKS - 1) / (batches + RANKS - 1), 1 - mean / max(busy)
    return {"bubble": 1 - mean / middle["seconds"], "predicted_bubble": filling, "imbalance": imbalance,
            "bubble_against_prediction": (1 - mean / middle["seconds"]) / (filling + imbalance)}  # fmt: skip


def simulated(network: str, results: dict[str, dict], measured: dict[int, list[dict]], links: list[dict]) -> dict:
    """Return the simulator's images/s at 1 and 2 ranks, and their ratios to the measured ones."""
    from bench.pipeline.costs import StageCost
    from bench.pipeline.simulator import NetworkLink, simulate

    link = NetworkLink(seconds_per_byte_on_rank=statistics.median(end["on_rank"] / end["bytes"] for end in links))
    size, images, predictions = NETWORKS[network]["batch_size"], NETWORKS[network]["train_images"], {}
    for name, measurements in zip(("sid, 1 rank", "sid, 2 ranks"), measured.values(), strict=True):
        ranks = results[name].get("ranks")
        if ranks is None:
            continue
        overhead = statistics.median(measurement["overhead"] for measurement in measurements)
        costs = [
            StageCost(
                **{key: statistics.median(row[key] for row in rows) for key in rows[0] if rows[0][key] is not None}
            )
            for rows in zip(*(measurement["costs"] for measurement in measurements), strict=True)
        ]
        parts = [range(len(costs))]
        if len(ranks) > 1:
            parts = [range(rank["stages"][0] - 1, rank["stages"][-1]) for rank in ranks]
        speed = simulate(costs, parts, batches=images // size, overhead=overhead, link=link).images_per_second(size)
        predictions[name] = {
            "images_per_second": speed, "times_measured": speed / results[name]["images_per_second"],
            "loading_seconds": costs[0].load, "overhead_seconds": overhead,
            "seconds_per_byte_on_rank": link.seconds_per_byte_on_rank,
            "stage_seconds": [cost.seconds - cost.load for cost in costs],
        }  # fmt: skip
    return predictions


def table(results: dict) -> str:
    """Return the results on one network as text."""
    heads = f"{'images/s':>9s} {'x sid, 1 rank':>14s} {'held MiB':>9s} {'grown MiB':>10s}"
    lines = [f"{'':34s} {heads} {'bubble':>7s} {'predicted':>10s}"]
    for name, row in results["contenders"].items():
        if "failed" in row:
            lines.append(f"{name:34s} {row['failed']}")
            continue
        line = f"{name:34s} {row['images_per_second']:9.1f} {row['times_sid_1_rank']:14.2f}"
        line += f" {row['held_bytes'] / 2**20:9.2f} {row['resident_growth_bytes'] / 2**20:10.1f}"
        if "bubble" in row:
            line += f" {row['bubble']:7.1%} {row['predicted_bubble'] + row['imbalance']:10.1%}"
        lines.append(line)
    for name in ("sid, 1 rank", "sid, 2 ranks"):
        if name in results["simulator"]:
            lines.append(f"simulated, {name:23s} {results['simulator'][name]['images_per_second']:9.1f}"
                         f"   {results['simulator'][name]['times_measured']:.3f} of the measured")  # fmt: skip
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", help="CIFAR-10: an image folder, or the root of cifar-10-batches-py")
    add("--text", help="a text file for language models, of which an epoch should take some seconds")
    add("--cache", help="folder for the decoded images")
    images = [name for name in NETWORKS if name not in TEXT_NETWORKS]
    add("--networks", nargs="+", choices=NETWORKS, default=images, help="(default: those on images)")
    add("--microbatches", nargs="+", type=int, default=[4, 8], help="parts of a batch, to try in turn (default: 4 8)")
    add("--rounds", type=int, default=3, help="launches of each contender (default: %(default)s)")
    add("--out", type=Path, help="the JSON file to write")
    add("--work", nargs="+", help=argparse.SUPPRESS)
    add("--network", help=argparse.SUPPRESS)
    add("--found", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args)
        return 0
    if args.out is None or args.rounds < 1:
        parser.error("--out must be given" if args.out is None else f"--rounds must be at least 1, not {args.rounds}")
    for name in args.networks:
        flag = "text" if name in TEXT_NETWORKS else "data"
        if getattr(args, flag) is None:
            parser.error(f"--{flag} must be given for {name}")
    if len(os.sched_getaffinity(0)) < RANKS:
        parser.error(f"{RANKS} ranks need a core each; this process may use {len(os.sched_getaffinity(0))}")
    results = {network: measure(args, network) for network in args.networks}
    for network, result in results.items():
        print(f"\n{network}\n{table(result)}")
    filed = record.header("images/s of stage pipelines on 2 ranks of one thread, pinned to a core each")
    record.write_json(args.out, filed | {"rounds": args.rounds, "networks": results})
    print(f"\nwritten: {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
