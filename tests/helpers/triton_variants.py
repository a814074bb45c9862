"""Every kernel variant the Triton backend can launch, and how to compile one ahead of time without a GPU.

Variants are enumerated from the tables that `run` uses. A compiled variant is judged by its binary: registers, and
stack, which must be zero. Needs a process in which Triton does not interpret.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sid_kernels.belief_head import triton_kernels as triton_head_rows
from sid_kernels.belief_head import triton_launch as triton_head
from sid_kernels.cascade import triton_kernels as triton_cascade_rows
from sid_kernels.cascade import triton_launch as triton_cascade
from sid_kernels.core import triton as core_triton
from sid_kernels.core import triton_kernels as core_triton_kernels
from sid_kernels.local_loss import triton_kernels as triton_rows
from sid_kernels.local_loss import triton_launch as triton_kernels

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = ("fp32", "bf16", "fp16")
INTEGERS = {"rows", "stages", "classes", "scan_rows", "ignore_index", "parts"}
FLAGS = ("HAS_PRIOR", "HARD", "REVERSE", "REDUCE", "NEED_GRAD", "NEED_BELIEF")


class Variant(NamedTuple):
    kernel: str
    constants: tuple[tuple[str, int], ...]
    pointers: tuple[tuple[str, str], ...]  # argument, element type
    warps: int
    options: tuple[tuple[str, int], ...]  # of NVIDIA's compiler
    aligned: bool  # pointers, strides and C divisible by 16, as for most sizes; False: C = 50257, say
    prefetch: int = 3  # num_stages, this is triton's own


class Compiled(NamedTuple):
    variant: Variant
    target: str
    registers: int
    stack: int  # bytes of stack and local memory; on AMD also the number of spilled registers
    shared: int  # bytes of a program
    vector_accesses: int  # 128-bit global loads and stores
    truncates: bool  # a conversion to bfloat16 or float16 that does not round to nearest


def local_loss_variant(
    plan: triton_kernels.LossPlan, flags: tuple[bool, ...], logits: str, prior: str, soft: str, aligned: bool
) -> Variant:
    constants = dict(
        zip(FLAGS, flags, strict=True), ROWS=plan.rows, BLOCK_C=plan.block, COUNT_BLOCK=triton_kernels.COUNT_BLOCK
    )
    prior = prior if constants["HAS_PRIOR"] else logits
    target = "i64" if constants["HARD"] else soft
    pointers = {
        "logits": logits, "prior": prior, "target": target, "alpha": "fp32", "counted": target,
        "belief": prior if constants["NEED_BELIEF"] else logits, "dlogits": logits,
        "loss": "fp32", "fidelity": "fp32", "consistency": "fp32",
    }  # fmt: skip
    options = tuple(triton_kernels.register_limit(plan, constants["HARD"], wide=aligned, nvidia=True).items())
    kernel = "local_loss_loop" if plan.looped else "local_loss_tile"
    return Variant(kernel, tuple(constants.items()), tuple(pointers.items()), plan.warps, options, aligned)


def full_product(logits: str, prior: str, soft: str, aligned: bool) -> list[Variant]:
    """Return all plans times all flags, for one choice of element types."""
    flags = itertools.product((True, False), repeat=len(FLAGS))
    return [local_loss_variant(plan, f, logits, prior, soft, aligned) for f in flags for plan in triton_kernels.PLANS]


def covering_set() -> list[Variant]:
    """Return every plan with every dtype, with and without the belief, such that dtypes and plans meet all flags.

    Three quarters carry the gradient and a prior: those are the kernels that need the most registers.
    """
    walk = [
        (True, True, False, True, True), (True, False, True, True, True), (True, True, True, False, True),
        (True, False, False, True, True), (False, True, True, True, True), (True, True, False, False, False),
        (False, False, False, True, True), (True, False, True, False, True),
    ]  # fmt: skip
    variants = []
    for i, plan in enumerate(triton_kernels.PLANS):
        for j, logits in enumerate(DTYPES):
            prior, soft = DTYPES[(j + i // 3) % 3], DTYPES[(j + i // 5) % 3]
            for need_belief, ahead in ((True, 0), (False, 4)):
                flags, aligned = walk[(i + 3 * j + ahead) % len(walk)], (i + j + ahead) % 3 != 0
                variants.append(local_loss_variant(plan, (*flags, need_belief), logits, prior, soft, aligned))
    return variants


def other_variants() -> list[Variant]:
    """Return the small kernels: counting, the last sum, scaling."""
    count = Variant(
        "count_rows",
        (("BLOCK", triton_kernels.COUNT_GRID_BLOCK),),
        (("target", "i64"), ("counted", "i64")),
        triton_kernels.COUNT_WARPS,
        (),
        True,
    )
    floats = tuple((name, "fp32") for name in ("partial", "loss", "fidelity", "consistency"))
    constants = (("BLOCK", triton_kernels.SUM_BLOCK),)
    variants = [count, Variant("sum_parts", constants, floats, triton_kernels.SUM_WARPS, (), True)]
    for dtype, aligned, (rows, block) in itertools.product(DTYPES, (True, False), core_triton.scale_tiles()):
        variants.append(
            Variant(
                "scale_rows",
                (("ROWS", rows), ("BLOCK_C", block)),
                (("grad", dtype), ("scale", "fp32")),
                core_triton.SCALE_WARPS,
                (),
                aligned,
            )
        )
    return variants


# (C, H, D): per row size, one set of round numbers and one that no vector and no chunk divides.
CASCADES = (
    (10, 256, 128), (31, 250, 127), (64, 256, 128), (50, 250, 127), (100, 256, 128), (101, 250, 127),
    (200, 256, 128), (255, 250, 127),
)  # fmt: skip


def cascade_variant(
    sizes: tuple[int, int, int], flags: tuple[bool, ...], weights: str, soft: str, nvidia: bool
) -> Variant:
    plan = triton_cascade.plan_for(sizes[0], weights != "fp32", nvidia)
    constants = dict(zip(("HAS_PRIOR", "HARD", "REVERSE", "NEED_GRAD"), flags, strict=True))
    constants |= triton_cascade.constants(plan, *sizes)
    target = "i64" if constants["HARD"] else soft
    pointers = {
        "pre": weights, "prior": soft if constants["HAS_PRIOR"] else weights, "target": target, "alpha": "fp32",
        "counted": target, "hidden_weight": weights, "logits_weight": weights, "logits_bias": weights, "losses": "fp32",
        "beliefs": weights, "logits": weights, "hidden": weights, "dlogits": weights,
    }  # fmt: skip
    return _variant("cascade_tile", constants, pointers, triton_cascade.launch_options(plan, nvidia), aligned=True)


def _variant(kernel: str, constants: dict, pointers: dict, options: dict[str, int], aligned: bool) -> Variant:
    warps, prefetch = options.pop("num_warps"), options.pop("num_stages")
    constants, pointers, options = (tuple(x.items()) for x in (constants, pointers, options))
    return Variant(kernel, constants, pointers, warps, options, aligned, prefetch)


def cascade_set(nvidia: bool) -> list[Variant]:
    """Return every plan at round and at odd sizes, in float32 and a half dtype, with flags as in `covering_set`."""
    walk = [
        (True, False, True, True), (True, True, False, True), (False, False, False, True), (True, True, True, True),
        (False, True, False, True), (True, False, False, False), (False, False, True, True),
    ]  # fmt: skip
    variants = []
    for i, sizes in enumerate(CASCADES):
        for j, weights in enumerate(("fp32", DTYPES[1 + i // 2 % 2])):
            variants.append(cascade_variant(sizes, walk[(2 * i + j) % len(walk)], weights, DTYPES[(j + i) % 3], nvidia))
    return variants


HEADS = ((10, 512), (31, 509), (64, 512), (50, 509), (100, 512), (101, 509), (200, 512), (255, 509))  # (C, H)
HEAD_FLAGS = ("HAS_BIAS", "HAS_PRIOR", "HARD", "REVERSE", "NEED_BELIEF", "NEED_GRAD", "NEED_HIDDEN_GRAD")


def head_set(nvidia: bool) -> list[Variant]:
    """Return the variants of the belief head, chosen as in `cascade_set`."""
    walk = [
        (True, True, False, True, True, True, True), (True, True, True, False, True, True, True),
        (False, False, True, True, True, True, True), (True, True, False, False, False, True, True),
        (True, False, True, False, True, True, False), (False, True, True, True, True, False, False),
        (True, False, False, True, False, True, True),
    ]  # fmt: skip
    variants = []
    for i, (classes, units) in enumerate(HEADS):
        for j, dtype in enumerate(("fp32", DTYPES[1 + i // 2 % 2])):
            plan, other = triton_head.plan_for(classes, nvidia), DTYPES[(j + i) % 3]
            constants = dict(zip(HEAD_FLAGS, walk[(2 * i + j) % len(walk)], strict=True))
            constants |= triton_head.constants(plan, classes, units)
            target, prior = "i64" if constants["HARD"] else other, other if constants["HAS_PRIOR"] else dtype
            pointers = {
                "hidden": dtype, "weight": dtype, "bias": dtype, "prior": prior, "target": target, "alpha": "fp32",
                "counted": target, "losses": "fp32", "belief": prior, "dlogits": dtype, "dhidden": "fp32",
            }  # fmt: skip
            options = triton_head.launch_options(plan, nvidia)
            variants.append(_variant("head_tile", constants, pointers, options, aligned=units % 16 == 0))
    return variants


def compile_variant(variant: Variant, target: str) -> Compiled:
    """Compile for a target of TARGETS, or read the binary from Triton's cache if nothing it depends on has changed."""
    modules = {"cascade_tile": triton_cascade_rows, "head_tile": triton_head_rows, "scale_rows": core_triton_kernels}
    function = getattr(modules.get(variant.kernel, triton_rows), variant.kernel)
    pointers, constants = dict(variant.pointers), dict(variant.constants)
    signature, attrs = {}, {}
    excluded = {p.num for p in function.params if p.do_not_specialize}
    for place, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = f"*{pointers[name]}"
        else:
            signature[name] = "i32" if name in INTEGERS or name.endswith("_stride") else "fp32"
        sizes = name == "classes" or name.endswith("_stride")
        if (name in pointers or sizes and variant.aligned) and place not in excluded:
            attrs[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, {k: v for k, v in constants.items()}, attrs)
    options = {"num_warps": variant.warps, "num_stages": variant.prefetch}
    options |= dict(variant.options) if TARGETS[target].backend == "cuda" else {}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    registers, stack, *rest = (_amd if target.startswith("gfx") else _nvidia)(compiled)
    return Compiled(variant, target, registers, stack, compiled.metadata.shared, *rest)


def _nvidia(compiled) -> tuple[int, int, int, bool]:
    """Return registers, bytes of stack and local memory, wide accesses, and whether it truncates; spills need stack."""
    ptx = compiled.asm["ptx"]
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    registers, stack, local = map(int, found)
    wide = len(re.findall(r"(?:ld|st)\.global\S*\.v4\.b32", ptx))
    truncates = bool(re.search(r"cvt\.(?!rn)\w+(?:\.\w+)*\.(?:bf16|f16)(?:x2)?\.f32", ptx))
    return registers, stack + local, wide, truncates


def _amd(compiled) -> tuple[int, int, int, bool]:
    """Return what `_nvidia` does; spilled registers count as stack."""
    assembly = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly).group(1))

    spills = field("vgpr_spill_count") + field("sgpr_spill_count")
    wide = len(re.findall(r"(?:global|buffer)_(?:load|store)_dwordx4", assembly))
    return field("vgpr_count"), spills + field("private_segment_fixed_size"), wide, False
