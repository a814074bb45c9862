"""Compile the CUDA kernels ahead of time for each supported architecture and check registers and spills."""

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
ARCHITECTURES = ("80", "90", "100")
# The number of kernels in each source: two divergences per storage type, the counting kernel, three scale kernels.
KERNELS = {
    "local_loss_f32": 2,
    "local_loss_bf16": 2,
    "local_loss_f16": 2,
    "local_loss_any": 2,
    "local_loss": 1,
    "scale": 3,
}
MOST_REGISTERS = 128  # kResidentThreads in plan.h: 512 threads per multiprocessor


def tool(name: str) -> str | None:
    """Return the path of a CUDA tool from PATH, a toolkit, or the triton package, which ships cuobjdump."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    folders = [Path(h) / "bin" for h in homes if h]
    folders.append(Path(sysconfig.get_paths()["purelib"]) / "triton/backends/nvidia/bin")
    return shutil.which(name) or next((str(f / name) for f in folders if (f / name).is_file()), None)


def why_not() -> str | None:
    """Return why the kernels cannot be compiled here, or None."""
    missing = [name for name in ("nvcc", "cuobjdump") if tool(name) is None]
    return f"{' and '.join(missing)} not found" if missing else None


pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"CUDA kernels cannot be compiled here: {why_not()}")


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


@functools.cache
def compile_all() -> Path:
    """Compile NAME.ARCHITECTURE.cubin and the assembler's report into a folder that is kept until a source changes."""
    key = hashlib.sha256(run(tool("nvcc"), "--version").encode())
    for path in sorted(p for d in ("csrc", "csrc/cuda") for p in (ROOT / d).iterdir() if p.is_file()):
        key.update(path.read_bytes())
    folder = ROOT / "build/aot" / key.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    supported = run(tool("nvcc"), "--list-gpu-code")

    def compile_one(job: tuple[str, str]) -> None:
        name, architecture = job
        output = folder / f"{name}.{architecture}.cubin"
        if output.is_file() or f"sm_{architecture}\n" not in supported + "\n":
            return
        partial = output.with_suffix(f".{os.getpid()}")
        flags = ["-std=c++17", "-O3", f"-arch=sm_{architecture}", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}"]
        said = run(tool("nvcc"), *flags, "-cubin", str(ROOT / f"csrc/cuda/{name}.cu"), "-o", str(partial))
        output.with_suffix(".txt").write_text(said)
        partial.rename(output)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, [(n, a) for n in KERNELS for a in ARCHITECTURES]))
    return folder


def test_every_source_is_counted():
    assert sorted(p.stem for p in (ROOT / "csrc/cuda").glob("*.cu")) == sorted(KERNELS)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_spills(architecture):
    """Each binary has the expected kernels, without spills, local memory or a stack, and few enough registers."""
    table = []
    for name, number in KERNELS.items():
        cubin = compile_all() / f"{name}.{architecture}.cubin"
        if not cubin.is_file():
            pytest.skip(f"this nvcc does not know sm_{architecture}")
        said = cubin.with_suffix(".txt").read_text()
        spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
        assert len(spills) == number, said
        assert all(s == ("0", "0", "0") for s in spills), said
        usage = run(tool("cuobjdump"), "-res-usage", str(cubin))
        kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
        assert len(kernels) == number, usage
        for kernel, registers, stack, _shared, local in kernels:
            assert int(stack) == 0 and int(local) == 0, usage
            assert int(registers) <= MOST_REGISTERS, usage
            what = re.search(r"Forward|Reverse|count_labels|scale_rowsI\w+?E", kernel)
            table.append(f"sm_{architecture} {name:16s} {what[0] if what else kernel:32s} {registers:>4s} registers")
    assert len(table) == sum(KERNELS.values())
    print("\n".join(table))
