"""Train GPT-2 small's configuration in stages: the largest tensor, memory and time of a step, and the saved model.

    python bench/training/gpt2_small.py --out bench/results/gpt2-small.json

Needs transformers. The tokens are random. The first step is profiled, to find the largest tensor that PyTorch
allocates. After the last, the model is saved, loaded by `AutoModelForCausalLM`, compared and asked for eight tokens.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))  # for the package `bench`

import torch
from torch import autograd
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from bench.lib import record
from sid_trainer import StageLossOptions, cut_language_model
from sid_trainer.training.memory import peak_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config())
    tokens = torch.randint(0, model.config.vocab_size, (args.rows, args.length))
    network = cut_language_model(model, args.stages, tokens[:1, :8])
    network.loss_options = StageLossOptions(alpha=[1.0] + [0.7] * (args.stages - 1))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-4, fused=True)

    def step() -> list[float]:
        optimizer.zero_grad()
        output = network(tokens, labels=tokens)
        output.loss.backward()
        optimizer.step()
        return output.stage_loss.tolist()

    with autograd.profiler.profile(profile_memory=True, use_kineto=True) as profiled:
        losses = [step()]
    sizes = [event.nbytes() for event in profiled.kineto_results.events() if event.name() == "[memory]"]
    del profiled
    seconds, cpu_seconds = [], []
    for _ in range(args.steps - 1):
        start, cpu_start = time.perf_counter(), time.process_time()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
        print(f"losses of the stages {losses[-1]}, {seconds[-1]:.1f} s, CPU {cpu_seconds[-1]:.1f} s", flush=True)
    peak = peak_memory(torch.device("cpu"))
    parameter_sizes = {p.numel() * p.element_size() for p in network.parameters()}
    other_sizes = set(sizes) - parameter_sizes  # those of a parameter are gradients and the optimizer's state
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    network.eval()
    prompt = tokens[:1, :8]
    with torch.no_grad():
        equal = torch.equal(loaded(prompt).logits, network(prompt))
    text = loaded.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, pad_token_id=0)
    result = {
        "stages": args.stages,
        "tokens": tokens.numel(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "logits_of_all_tokens_bytes": 4 * tokens.numel() * model.config.vocab_size,
        "largest_parameter_bytes": max(parameter_sizes),
        "largest_allocations_bytes": sorted(set(sizes), reverse=True)[:5],
        "largest_allocation_but_of_a_parameter_bytes": max(other_sizes),
        "peak_bytes_of_the_process": peak,
        "threads": torch.get_num_threads(),
        "seconds_per_step": statistics.median(seconds) if seconds else None,
        "cpu_seconds_per_step": statistics.median(cpu_seconds) if seconds else None,
        "stage_losses": losses,
        "loaded_logits_equal": equal,
        "generated_tokens": text[0, 8:].tolist(),
    }
    record.write_json(args.out, record.header("GPT-2 small's configuration in stages") | result)
    for name, value in result.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
