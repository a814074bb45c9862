"""Check registers, stack and local memory of the CUDA kernels in the compiled module, for each architecture in it."""

import importlib.machinery
import os
import re
import shutil
import subprocess
import sysconfig
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
MODULE = ROOT / f"sid_kernels/_cuda{importlib.machinery.EXTENSION_SUFFIXES[0]}"


def cuobjdump() -> str | None:
    """Return the path of cuobjdump from PATH, a toolkit, or the triton package."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    folders = [Path(h) / "bin" for h in homes if h]
    folders.append(Path(sysconfig.get_paths()["purelib"]) / "triton/backends/nvidia/bin")
    found = (str(f / "cuobjdump") for f in folders if (f / "cuobjdump").is_file())
    return shutil.which("cuobjdump") or next(found, None)


def why_not() -> str | None:
    """Return why the compiled kernels cannot be read here, or None."""
    if not MODULE.is_file():
        return f"{MODULE.name} is not built; it needs nvcc"
    return None if cuobjdump() else "cuobjdump not found"


def test_every_source_is_counted():
    assert sorted(p.stem for p in (ROOT / "csrc/cuda").glob("*.cu")) == sorted(KERNELS)


@pytest.mark.skipif(why_not() is not None, reason=f"CUDA kernels: {why_not()}")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_spills(architecture):
    """Check that the module has the expected kernels, without stack or local memory (no spills), with few registers."""
    done = subprocess.run([cuobjdump(), "-res-usage", str(MODULE)], capture_output=True, text=True, check=True)
    binaries = re.findall(r"Fatbin elf code:(.*?)(?=Fatbin|\Z)", done.stdout, re.DOTALL)
    usage = "".join(b for b in binaries if f"arch = sm_{architecture}\n" in b)
    if not usage:
        pytest.skip(f"{MODULE.name} was built without sm_{architecture}")
    kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert len(kernels) == sum(KERNELS.values()), usage
    for kernel, registers, stack, _shared, local in kernels:
        assert int(stack) == 0 and int(local) == 0, usage
        assert int(registers) <= MOST_REGISTERS, usage
        what = re.search(r"Forward|Reverse|count_labels|scale_rowsI\w+?E", kernel)
        print(f"sm_{architecture} {what[0] if what else kernel:32s} {registers:>4s} registers")
