"""Run the CUDA kernels on the host: compile them with the shim in tests/helpers/simt and call them on CPU tensors."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, Structure, byref, c_char_p, c_float, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from helpers.oracle import Case

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent / "simt"
ADDRESS_SANITIZER = os.environ.get("SID_SIMT_ASAN") == "1"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
KINDS = ("f32", "bf16", "f16", "any")
KIND_DTYPES = dict(zip(KINDS, (torch.float32, torch.bfloat16, torch.float16, torch.bfloat16), strict=True))
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


class Output(NamedTuple):
    """The outputs of a launch."""

    loss: Tensor
    belief: Tensor | None
    fidelity: Tensor
    consistency: Tensor
    dlogits: Tensor | None


class Rows(Structure):
    _fields_ = [("data", c_void_p), ("stride", c_int64), ("dtype", c_int32)]


class LossOptions(Structure):  # csrc/local_loss.h
    _fields_ = [
        ("reverse", ctypes.c_bool),
        ("label_smoothing", c_float),
        ("ignore_index", c_int64),
        ("reduction", c_int32),
    ]


class LossSpec(Structure):
    _fields_ = [
        ("labels", c_void_p),
        ("soft", Rows),
        ("alpha", c_void_p),
        ("alpha_stride", c_int64),
        ("alpha_value", c_float),
        ("options", LossOptions),
    ]


class LocalLossProblem(Structure):
    _fields_ = [
        ("rows", c_int64),
        ("classes", c_int64),
        ("logits", Rows),
        ("prior", Rows),
        ("spec", LossSpec),
        ("loss", c_void_p),
        ("belief", Rows),
        ("fidelity", c_void_p),
        ("consistency", c_void_p),
        ("dlogits", Rows),
        ("incoming", c_void_p),
        ("incoming_stride", c_int64),
        ("precomputed", ctypes.c_bool),
    ]


class LaunchPlan(Structure):  # csrc/cuda/plan.h
    _fields_ = [(name, c_int32) for name in ("kind", "warp", "lanes", "threads", "cluster", "blocks", "count_first")]


class Scale(Structure):  # csrc/cuda/launch.h
    _fields_ = [
        ("rows", c_int64),
        ("classes", c_int64),
        ("source", Rows),
        ("out", Rows),
        ("scale", c_void_p),
        ("scale_stride", c_int64),
    ]


@functools.cache
def find_headers() -> Path | None:
    """Return the folder of CUDA's headers, from a toolkit or a pip package, or None."""
    packages = Path(sysconfig.get_paths()["purelib"])
    toolkit = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if nvcc := shutil.which("nvcc"):  # nvcc may be a wrapper; ask it for the toolkit's path
        said = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
        toolkit += [Path(top) for top in re.findall(r"^#\$ TOP=(.*)$", said, re.M)]
    folders = [t / "include" for t in toolkit] + sorted(packages.glob("nvidia/*/include"))
    folders.append(packages / "triton/backends/nvidia/include")
    needed = ("cuda_bf16.h", "cuda_fp16.h", "vector_types.h", "crt/host_defines.h")
    return next((f for f in folders if all((f / name).is_file() for name in needed)), None)


def why_not() -> str | None:
    """Return why the kernels cannot be compiled here, or None."""
    if shutil.which("g++") is None:
        return "no g++"
    return None if find_headers() else "no CUDA headers (cuda_bf16.h) in a toolkit or a pip package"


def build(sanitize: bool) -> Path:
    """Compile the kernels and the shim into a library. It is kept in build/simt until a source changes."""
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu")) + sorted(HERE.glob("*.cpp"))
    read = sorted(p for d in ("csrc", "csrc/cuda", "tests/helpers/simt") for p in (ROOT / d).iterdir() if p.is_file())
    flags = ["-std=c++17", "-O1", "-g1", "-fPIC", "-DSID_SIMT", "-Wall"]
    flags += ["-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]
    flags += ["-fsanitize=address", "-fno-omit-frame-pointer"] if sanitize else []
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
    key = hashlib.sha256(repr((flags, version, str(find_headers()))).encode())
    for path in read:
        key.update(path.read_bytes())
    folder = ROOT / "build/simt" / key.hexdigest()[:16]
    library = folder / "simt.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    includes = [
        f"-I{ROOT / 'csrc'}",
        f"-I{HERE}",
        "-isystem",
        str(find_headers()),
        "-idirafter",
        str(HERE / "fallback"),
    ]

    def compile_one(source: Path) -> Path:
        object_file = folder / f"{source.stem}.{os.getpid()}.o"
        command = ["g++", *flags, *includes, "-x", "c++", "-c", str(source), "-o", str(object_file)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:4000]
        return object_file

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    partial = folder / f"simt.{os.getpid()}.so"
    subprocess.run(["g++", *flags, "-shared", *map(str, objects), "-o", str(partial)], check=True)
    partial.rename(library)
    for path in objects:
        path.unlink()
    return library


@functools.cache
def load() -> ctypes.CDLL:
    """Compile the library if needed, load it, and check the structures' sizes."""
    library = ctypes.CDLL(str(build(ADDRESS_SANITIZER)))
    for name in ("simt_local_loss", "simt_scale", "simt_mistake"):
        getattr(library, name).restype = c_char_p
    library.simt_workspace_bytes.restype = library.simt_sizes.restype = c_size_t
    library.simt_local_loss.argtypes = [POINTER(LocalLossProblem), POINTER(LaunchPlan), c_void_p]
    library.simt_mistake.argtypes = [c_int32, c_void_p]
    for i, structure in enumerate((LocalLossProblem, LaunchPlan, Scale)):
        assert library.simt_sizes(i) == ctypes.sizeof(structure), structure
    return library


def rows_of(x: Tensor | None) -> Rows:
    return Rows() if x is None else Rows(x.data_ptr(), x.stride(0), DTYPES[x.dtype])


def like(x: Tensor, dtype: torch.dtype, shift: int) -> Tensor:
    """Return a contiguous matrix of NaN, shaped like x, that starts `shift` elements after an aligned address."""
    return torch.full((x.numel() + shift,), torch.nan, dtype=dtype)[shift:].view(x.shape)


def copy_shifted(x: Tensor, shift: int) -> Tensor:
    """Copy x to memory that starts `shift` elements after an aligned address."""
    return like(x, x.dtype, shift).copy_(x)


def problem_of(
    case: Case, out: Tensor | None, need_grad: bool, shift: int, need_belief: bool = True
) -> tuple[LocalLossProblem, Output]:
    """Return the launcher's argument, and the outputs that the launch will write."""
    z, q, target, alpha = case.logits, case.prior, case.target, case.alpha
    o = dict(divergence="forward", label_smoothing=0.0, ignore_index=-100, reduction="mean") | case.options
    soft = target.dtype.is_floating_point
    belief = like(z, z.dtype if q is None else q.dtype, shift) if need_belief else None
    dlogits = (like(z, z.dtype, shift) if out is None else out) if need_grad else None
    shape = (z.shape[0],) if o["reduction"] == "none" else ()
    loss, fidelity, consistency = (torch.full(shape, torch.nan) for _ in range(3))
    tensor = isinstance(alpha, Tensor)
    spec = LossSpec(
        None if soft else target.data_ptr(),
        rows_of(target) if soft else Rows(),
        alpha.data_ptr() if tensor else None,
        alpha.dim() if tensor else 0,
        0.0 if tensor else alpha,
        LossOptions(o["divergence"] == "reverse", o["label_smoothing"], o["ignore_index"], REDUCTIONS[o["reduction"]]),
    )
    a = LocalLossProblem(
        z.shape[0],
        z.shape[1],
        rows_of(z),
        rows_of(q),
        spec,
        loss.data_ptr(),
        rows_of(belief),
        fidelity.data_ptr(),
        consistency.data_ptr(),
        rows_of(dlogits),
    )
    return a, Output(loss, belief, fidelity, consistency, dlogits)


def run(
    case: Case,
    plan: LaunchPlan | None = None,
    *,
    alias=False,
    need_grad=True,
    need_belief=True,
    shift=0,
    multiprocessors=2,
    clusters=True,
    incoming: Tensor | None = None,
    precomputed=False,
) -> Output:
    """Run the local loss twice, with threads and blocks in opposite orders, and check that the bits are equal.

    plan: how to launch; None: as the launcher chooses for `multiprocessors` and `clusters`. alias: dlogits overwrite
    the logits. shift: see `like`. incoming: (), or (rows,).
    """
    library = load()
    workspace = torch.zeros(library.simt_workspace_bytes(), dtype=torch.uint8)
    results = []
    for backwards in (0, 1):
        now = Case(case.logits.clone() if alias else case.logits, case.prior, case.target, case.alpha, case.options)
        if alias:
            now.logits = copy_shifted(case.logits, shift)
        a, result = problem_of(now, now.logits if alias else None, need_grad, shift, need_belief)
        if incoming is not None:
            a.incoming, a.incoming_stride, a.precomputed = incoming.data_ptr(), incoming.dim(), precomputed
        library.simt_configure(multiprocessors, int(clusters), backwards)
        error = library.simt_local_loss(byref(a), None if plan is None else byref(plan), workspace.data_ptr())
        assert error is None, error.decode()
        results.append(result)
    for name, first in results[0]._asdict().items():
        second = getattr(results[1], name)
        if first is not None:
            assert bits(first).equal(bits(second)), f"{name} depends on the order in which threads run"
    assert not workspace[:4].any(), "the ticket was not reset"
    return results[0]


def bits(x: Tensor) -> Tensor:
    """Return the bits of x as integers, so that NaN equals NaN."""
    return x.contiguous().view(torch.int32 if x.dtype is torch.float32 else torch.int16)


def scale(x: Tensor, factor: Tensor, out: Tensor) -> None:
    """Write x * factor to `out`. factor: () or (rows)."""
    library = load()
    a = Scale(x.shape[0], x.shape[1], rows_of(x), rows_of(out), factor.data_ptr(), factor.dim())
    library.simt_configure(2, 1, 0)
    error = library.simt_scale(byref(a))
    assert error is None, error.decode()


def plan(kind, lanes, *, threads=None, cluster=1, blocks=2, count_first=0):
    """Return a plan in which a row belongs to `lanes` lanes of a warp or, if `threads` is given, to a cluster."""
    warp = threads is None
    threads = 128 if warp else threads
    lanes = lanes if warp else threads
    return LaunchPlan(KINDS.index(kind), int(warp), lanes, threads, cluster, blocks * cluster, count_first)


def choose_plan(problem, multiprocessors=132, clusters=1) -> LaunchPlan:
    """Return the plan that the launcher chooses for a problem."""
    result = LaunchPlan()
    load().simt_plan(byref(problem), multiprocessors, clusters, byref(result))
    return result
