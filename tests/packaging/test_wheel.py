"""Build a wheel from the checkout, check its files, and use it in an environment of its own.

`pip install -e .` has already compiled the modules in build/cmake-*, so building the wheel takes seconds unless a source
file in csrc/ has changed.
"""

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"sid_kernels": ROOT / "sid_kernels", "sid_trainer": ROOT / "python/sid_trainer"}
COMPILED = sorted(path.name for path in PACKAGES["sid_kernels"].glob("_[Cc]*.so"))  # _C, and _cuda if nvcc was found
EXAMPLES = ROOT / "examples"


def why_not() -> str | None:
    if not COMPILED:
        return "the checkout has no compiled modules"
    if not list((ROOT / "build").glob("cmake-*/CMakeCache.txt")) and os.environ.get("SID_TEST_EXHAUSTIVE") != "1":
        return "build/cmake-* does not exist, so building takes minutes; set SID_TEST_EXHAUSTIVE=1"
    if int(version("setuptools").split(".")[0]) < 77 or importlib.util.find_spec("pybind11") is None:
        return "needs setuptools >= 77 and pybind11: pip install -e '.[test]'"
    if shutil.which("cmake", path=build_path()) is None:
        return "needs cmake: pip install -e '.[test]'"
    return None


def build_path() -> str:
    """Return PATH with the scripts of this environment first, so that its cmake and ninja are used."""
    return os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])


def run(command: list[str | Path], folder: Path, **variables: str) -> str:
    """Run a command in `folder`, without the checkout on Python's path, and return its output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | variables
    arguments = [str(part) for part in command]
    done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, f"{arguments}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build the wheel from the checkout, in which only build/ changes."""
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("wheel")
    settings = folder / "distutils.cfg"
    settings.write_text(f"[build]\nbuild_base = {folder / 'build'}\n\n[egg_info]\negg_base = {folder}\n")
    cuda = "on" if any(name.startswith("_cuda") for name in COMPILED) else "off"
    command = [sys.executable, "-m", "pip", "wheel", ROOT, "--no-deps", "--no-build-isolation", "--no-index"]
    with open(ROOT / "build/wheel.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process at a time builds in build/cmake-*
        variables = {"DIST_EXTRA_CONFIG": str(settings), "SID_KERNELS_CUDA": cuda, "PATH": build_path()}
        run([*command, "--wheel-dir", folder], folder, **variables)
    (built,) = folder.glob("*.whl")
    return built


def test_files(wheel):
    """Check that the wheel holds the Python files, compiled modules, type markers and templates, and nothing else."""
    expected = {f"sid_kernels/{name}" for name in COMPILED}
    for package, folder in PACKAGES.items():
        expected |= {
            f"{package}/{path.relative_to(folder).as_posix()}"
            for pattern in ("*.py", "py.typed", "*.jinja")
            for path in folder.rglob(pattern)
        }
    assert {"sid_kernels/py.typed", "sid_trainer/py.typed", "sid_trainer/report/report.html.jinja"} < expected
    actual = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert actual == expected


def test_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    names = {name.split(".dist-info/")[1]: name for name in archive.namelist() if ".dist-info/" in name}
    assert "licenses/LICENSE" in names
    assert "sid = sid_trainer.cli:main" in archive.read(names["entry_points.txt"]).decode()
    metadata = archive.read(names["METADATA"]).decode().splitlines()
    assert "Name: sid_kernels" in metadata and "License-Expression: Apache-2.0" in metadata


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """Install the wheel in a new environment that borrows the other packages of this one."""
    folder = tmp_path_factory.mktemp("installed")
    run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], folder)
    interpreter = folder / "venv/bin/python"
    site = run([interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip()
    # Entries of a .pth file come after the environment's own packages, and their .pth files are not read, so neither
    # an installed nor an editable sid_kernels of this environment can hide the wheel.
    borrowed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    Path(site, "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", interpreter, "install", "--no-deps", "--no-index", "--quiet"]
    run([*pip, wheel], folder)
    return interpreter


IMPORTS = """
import sid_kernels, sid_trainer, sid_kernels._C, torch
from sid_kernels.core import backends
from sid_trainer import TrainConfig, Trainer, build_network, cut, sid_step
assert backends.unavailable("cpu") is None
print(sid_kernels.__file__, sid_trainer.__file__, sid_kernels._C.__file__, sep="\\n")
logits = torch.randn(4, 10, requires_grad=True)
sid_kernels.fused_local_loss(logits, torch.full((4, 10), 0.1), torch.arange(4), backend="cpu").loss.backward()
assert logits.grad.isfinite().all()
"""


def test_imports(python, tmp_path):
    files = run([python, "-I", "-c", IMPORTS], tmp_path).split()
    assert len(files) == 3
    for file in files:
        assert Path(file).is_relative_to(python.parents[1]), file
    assert "backend cpu          usable" in run([python, "-I", "-m", "sid_kernels.info"], tmp_path)


def test_training(python, tmp_path):
    command = [python.parent / "sid", "train", "--dataset", "digits", "--epochs", "1", "--out", tmp_path / "run"]
    assert "accuracy" in run(command, tmp_path, OMP_NUM_THREADS="1")
    assert (tmp_path / "run").is_dir()


@pytest.mark.slow
def test_examples(python, tmp_path):
    """Run the tests of examples/ with the installed packages; the files are copied away from the checkout."""
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    shutil.copy(ROOT / "tests/examples/test_examples.py", tmp_path)
    shutil.copytree(ROOT / "tests/helpers", tmp_path / "helpers")
    command = [python, "-I", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tmp_path]
    command += [tmp_path / "test_examples.py"]
    output = run(command, tmp_path, SID_EXAMPLES=str(tmp_path / "examples"), OMP_NUM_THREADS="1")
    assert "passed" in output and "skipped" not in output, output
