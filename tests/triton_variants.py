"""Every kernel variant the Triton backend can launch, and how to compile one ahead of time without a GPU.

Variants are enumerated from the tables that `run` uses. A compiled variant is judged by its binary: registers,
and spills and stack, which must be zero. Needs a process in which triton does not interpret.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import tempfile
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sid_kernels import triton_kernels, triton_rows

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = ("fp32", "bf16", "fp16")
SMALL = {"rows", "classes", "scan_rows", "ignore_index", "alpha_stride", "scale_stride", "parts"}
FLAGS = ("HAS_PRIOR", "HARD", "REVERSE", "REDUCE", "NEED_GRAD")


class Variant(NamedTuple):
    kernel: str
    constants: tuple[tuple[str, int], ...]
    pointers: tuple[tuple[str, str], ...]  # argument, element type
    warps: int
    aligned: bool  # pointers, strides and C divisible by 16, as for most sizes; False: C = 50257, say


class Compiled(NamedTuple):
    variant: Variant
    target: str
    registers: int
    spills: int  # bytes on NVIDIA, registers on AMD
    stack: int  # bytes
    vector_accesses: int  # 128-bit global loads and stores


def local_loss_variants(logits: str, prior: str, soft: str, aligned: bool) -> list[Variant]:
    """All plans times all flags, for one choice of element types."""
    variants = []
    for hard in (True, False):
        for plan in triton_kernels.plans(soft=not hard):
            for has_prior, reverse, reduce, need_grad in itertools.product((True, False), repeat=4):
                constants = dict(
                    zip(FLAGS, (has_prior, hard, reverse, reduce, need_grad), strict=True),
                    ROWS=plan.rows,
                    BLOCK_C=plan.block,
                    COUNT_BLOCK=triton_kernels.COUNT_BLOCK,
                )
                target = "i64" if hard else soft
                pointers = {
                    "logits": logits,
                    "prior": prior if has_prior else logits,
                    "target": target,
                    "alpha": "fp32",
                    "counted": target,
                    "belief": prior if has_prior else logits,
                    "dlogits": logits if need_grad else prior if has_prior else logits,
                    "loss": "fp32",
                    "fidelity": "fp32",
                    "consistency": "fp32",
                }
                kernel = "local_loss_loop" if plan.looped else "local_loss_tile"
                variants.append(
                    Variant(kernel, tuple(constants.items()), tuple(pointers.items()), plan.warps, aligned)
                )
    return variants


def other_variants() -> list[Variant]:
    """The small kernels: counting, the last sum, scaling."""
    count = Variant(
        "count_rows",
        (("BLOCK", triton_kernels.COUNT_GRID_BLOCK),),
        (("target", "i64"), ("counted", "i64")),
        triton_kernels.COUNT_WARPS,
        True,
    )
    floats = tuple((name, "fp32") for name in ("partial", "loss", "fidelity", "consistency"))
    variants = [count, Variant("sum_parts", (("BLOCK", triton_kernels.SUM_BLOCK),), floats, triton_kernels.SUM_WARPS, True)]
    for dtype, aligned, (rows, block) in itertools.product(DTYPES, (True, False), triton_kernels.scale_tiles()):
        variants.append(
            Variant(
                "scale_rows",
                (("ROWS", rows), ("BLOCK_C", block)),
                (("grad", dtype), ("scale", "fp32")),
                triton_kernels.SCALE_WARPS,
                aligned,
            )
        )
    return variants


def compile_variant(job: tuple[Variant, str]) -> Compiled:
    variant, target = job
    function = getattr(triton_rows, variant.kernel)
    pointers, constants = dict(variant.pointers), dict(variant.constants)
    signature, attrs = {}, {}
    for place, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = f"*{pointers[name]}"
        else:
            signature[name] = "i32" if name in SMALL or name.endswith("_stride") else "fp32"
        specialised = name in pointers or (name in ("classes",) or name.endswith("_stride") and name not in SMALL)
        if specialised and (variant.aligned or name in pointers):
            attrs[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, {k: v for k, v in constants.items()}, attrs)
    compiled = triton.compile(source, target=TARGETS[target], options={"num_warps": variant.warps})
    return Compiled(variant, target, *(_amd if target.startswith("gfx") else _nvidia)(compiled, target))


def _nvidia(compiled, target: str) -> tuple[int, int, int, int]:
    ptx = compiled.asm["ptx"]
    arch = re.search(r"\.target (sm_\w+)", ptx).group(1)
    folder = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    blackwell = os.path.join(folder, "ptxas-blackwell")
    ptxas = blackwell if target == "sm_100" and os.path.exists(blackwell) else os.path.join(folder, "ptxas")
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [ptxas, "-v", f"--gpu-name={arch}", file.name, "-o", os.devnull]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    stack, stores, loads = (
        sum(int(n) for n in re.findall(rf"(\d+) bytes {what}", log)) for what in ("stack frame", "spill stores", "spill loads")
    )
    registers = int(re.search(r"Used (\d+) registers", log).group(1))
    return registers, stores + loads, stack, len(re.findall(r"(?:ld|st)\.global\S*\.v4\.b32", ptx))


def _amd(compiled, target: str) -> tuple[int, int, int, int]:
    assembly = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly).group(1))

    spills = field("vgpr_spill_count") + field("sgpr_spill_count")
    wide = len(re.findall(r"(?:global|buffer)_(?:load|store)_dwordx4", assembly))
    return field("vgpr_count"), spills, field("private_segment_fixed_size"), wide
