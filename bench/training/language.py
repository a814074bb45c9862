"""Measure the perplexity of language models trained stage by stage against backpropagation, over seeds.

    python bench/training/language.py --data FILE --out bench/results/language.json
    python bench/training/language.py --out bench/results/language.json --table   # prints the table of this file
    python bench/training/language.py --memory   # prints the memory of a step

Every variant trains on the same windows of the same text in the same order. If the file exists, the runs in it are not
repeated. Perplexities are measured on the held-out tenth of the text after the last epoch, for each stage; ratios are
those of the last stage.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))  # for the package `bench`

import torch
from torch import Tensor

from bench.lib import record
from bench.lib.footprint import allocated_peak
from sid_kernels import fused_belief_head
from sid_trainer import build_language_model
from sid_trainer.methods.common import StepOptions
from sid_trainer.methods.factory import make_optimizers, make_step
from sid_trainer.methods.updates import Optimizers, clear_gradients, update
from sid_trainer.network.language import LanguageModel
from sid_trainer.runs.build import make_trainer
from sid_trainer.training.config import run_config
from sid_trainer.training.memory import SavedBytes

MODEL = {"tokens": "characters", "layers": 6, "width": 96, "attention_heads": 6, "context": 64, "batch_size": 32}
CLASSES, CONTEXT = 32768, 256  # of the measurement of memory
MEMORY = ("sid", "sid, all logits", "bp", "bp, fused head", "bp-checkpoint")


def variants() -> dict[str, dict]:
    """Return the settings of each row of the table, in the order of training."""
    rows: dict[str, dict] = {"backpropagation": {"method": "bp"}}
    for depth in (2, 3, 6):
        for readout, blocks in (("private", 0), ("shared", 0), ("private", 1), ("shared", 1)):
            for method in ("greedy", "sid"):
                name = f"{method}, K = {depth}, {readout} readouts, {blocks} blocks"
                alpha = {"alpha": [1.0] + [0.7] * (depth - 1)} if method == "sid" else {}  # 1: ignore the uniform prior
                rows[name] = {"method": method, "depth": depth, "readout": readout, "tail": blocks} | alpha
            graded = ",".join(str(0.5 ** (1 + i)) for i in range(depth))
            settings = {"method": "greedy", "depth": depth, "readout": readout, "tail": blocks}
            rows[f"graded labels, K = {depth}, {readout} readouts, {blocks} blocks"] = settings | {
                "label_smoothing": graded
            }
    return rows


def train(settings: dict) -> dict:
    """Train one model and return its perplexities by stage, its certificate and its seconds."""
    run = run_config(dataset="text", **settings)
    start = time.perf_counter()
    row = make_trainer(run, quiet=True).fit()[-1]
    return {
        "seed": settings["seed"],
        "perplexity": [math.exp(kl) for kl in row["stage_kl"]],
        "accuracy": row["stage_accuracy"],
        "certificate": row["certificate"],
        "seconds": time.perf_counter() - start,
    }


def fused_bp_step(network: LanguageModel, inputs: Tensor, targets: Tensor, optimizers: Optimizers) -> None:
    """Train a network of one stage by backpropagation with `fused_belief_head`: the control that holds no logits."""
    clear_gradients(optimizers)
    (stage,) = network.stages
    _, hidden = stage(network.extractor(inputs), None)
    fused_belief_head(hidden, stage.head.weight, None, None, targets, 1.0, return_belief=False).loss.backward()
    update(optimizers)


def memory_step(name: str, tokens: int, layers: int, depth: int) -> tuple[LanguageModel, Callable[[], object]]:
    """Return a network with V = CLASSES, and its step on random tokens, for a name of MEMORY."""
    method = name.partition(",")[0]
    inputs, targets = torch.randint(CLASSES, (tokens // CONTEXT, CONTEXT)), torch.randint(CLASSES, (tokens,))
    network = build_language_model(
        CLASSES, CONTEXT, depth, layers=layers, width=64, attention_heads=4, plain=method != "sid", readout="shared"
    )
    optimizers = make_optimizers(network, method)
    if name == "bp, fused head":
        return network, functools.partial(fused_bp_step, network, inputs, targets, optimizers)
    step = make_step(method, network, optimizers, StepOptions(0.7, fused="all logits" not in name))
    return network, functools.partial(step, inputs, targets)


def print_memory() -> None:
    """Print the peak memory of a step with a large vocabulary, and the bytes held for the backward pass by depth."""
    for tokens in (4096, 16384):
        for name in MEMORY:
            _, step = memory_step(name, tokens, layers=8, depth=4)
            print(f"{tokens} tokens, V = {CLASSES}, {name}: {allocated_peak(step) / 2**20:.0f} MiB", flush=True)
    for depth in (4, 8, 16, 32):
        for name in ("sid", "bp, fused head"):
            network, step = memory_step(name, 4096, layers=depth, depth=depth)
            with SavedBytes([*network.parameters(), *network.buffers()]) as saved:
                step()
            print(f"4096 tokens, {depth} layers, {name}: {saved.peak / 2**20:.0f} MiB held for backward", flush=True)


def print_table(runs: dict[str, list[dict]]) -> None:
    """Print for each variant its perplexity by stage, and that of the last stage divided by backpropagation's."""
    base = statistics.mean(run["perplexity"][-1] for run in runs["backpropagation"])
    for name, repeats in runs.items():
        last = [run["perplexity"][-1] for run in repeats]
        stages = " ".join(
            f"{statistics.mean(values):.2f}" for values in zip(*(run["perplexity"] for run in repeats), strict=True)
        )
        deviation = statistics.stdev(last) if len(last) > 1 else math.nan
        mean = statistics.mean(last)
        print(f"{name:45s} n={len(last)}  {mean:6.3f} ± {deviation:.3f}  x{mean / base:.3f}   stages {stages}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="text file")
    parser.add_argument("--out", type=Path, help="JSON file, continued if it exists")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--tokens", default=MODEL["tokens"], choices=("characters", "bytes", "bpe"))
    parser.add_argument("--vocabulary", type=int, default=4096, help="number of tokens of bpe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="+", default=[""], help="train only variants with one of these in their names")
    parser.add_argument("--table", action="store_true", help="print the table of --out and train nothing")
    parser.add_argument("--memory", action="store_true", help="print the memory of a step and train nothing")
    args = parser.parse_args()
    if args.memory:
        print_memory()
        return
    if args.out is None:
        parser.error("--out must be given")
    if args.table:
        print_table(json.loads(args.out.read_text())["runs"])
        return
    if args.data is None or not args.data.is_file():
        parser.error(f"--data must be a text file, not {args.data}")
    filed = json.loads(args.out.read_text()) if args.out.exists() else record.header("perplexity of language models")
    model = MODEL | {"tokens": args.tokens} | ({"vocabulary": args.vocabulary} if args.tokens == "bpe" else {})
    filed |= {"text": args.data.name, "epochs": args.epochs, "model": model}
    runs = filed.setdefault("runs", {})
    for seed in args.seeds:
        common = model | {"data": str(args.data), "epochs": args.epochs, "seed": seed}
        for name, settings in variants().items():
            if not any(part in name for part in (*args.only, "backpropagation")):
                continue
            if any(run["seed"] == seed for run in runs.get(name, [])):
                continue
            runs.setdefault(name, []).append(train(common | settings))
            record.write_json(args.out, filed)
            print(f"{name}, seed {seed}: {runs[name][-1]['perplexity'][-1]:.3f}", flush=True)
    print_table(runs)


if __name__ == "__main__":
    main()
