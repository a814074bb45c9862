"""Build sid_kernels._C and sid_kernels._cuda with CMake. The build does not need PyTorch.

Environment variables:
  SID_KERNELS_BUILD          require (default) | auto: warn and continue without | skip: Triton and PyTorch only
  SID_KERNELS_CUDA           auto (default): if a CUDA compiler works | on: fail without one | off
  SID_KERNELS_CUDA_ARCHS     CMake's list of architectures, for example "90-real" or "native"
  MAX_JOBS, CMAKE_BUILD_PARALLEL_LEVEL    the most compilers to run at once (default: the number of processors)
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT, ENV = Path(__file__).resolve().parent, os.environ
HELP = """
*** sid_kernels: the native extensions did not build. The output above shows the reason.
*** They need a C++17 compiler (Debian/Ubuntu: apt install g++; conda: cxx-compiler).
*** Without CUDA:           SID_KERNELS_CUDA=off   pip install -e .
*** Without compiled code:  SID_KERNELS_BUILD=skip pip install -e .   (Triton and PyTorch backends)
"""


def setting(name: str, default: str, allowed: tuple[str, ...]) -> str:
    """Return the value of an environment variable. Exit with a message if it is not one of `allowed`."""
    value = ENV.get(name, default).lower()
    if value not in allowed:
        raise SystemExit(f"{name} is {ENV[name]!r}; it must be one of {', '.join(allowed)}")
    return value


MODE = setting("SID_KERNELS_BUILD", "require", ("require", "auto", "skip"))
CUDA = setting("SID_KERNELS_CUDA", "auto", ("auto", "on", "off"))


def parallel_jobs() -> int:
    """Return how many compilers may run at once: the smallest limit that is set, or the number of processors."""
    limits = []
    for name in ("MAX_JOBS", "CMAKE_BUILD_PARALLEL_LEVEL"):
        value = ENV.get(name, "").strip()
        if value and not (value.isdecimal() and int(value) > 0):
            raise SystemExit(f"{name} is {value!r}; it must be a positive integer")
        if value:
            limits.append(int(value))
    return min(limits, default=os.cpu_count() or 1)


def find_nvcc() -> str | None:
    """Return the path of the CUDA compiler, or None."""
    homes = [f"{ENV[v]}/bin/nvcc" for v in ("CUDA_HOME", "CUDA_PATH") if ENV.get(v)]
    candidates = [ENV.get("CUDACXX"), *homes, shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((str(c) for c in candidates if c and Path(c).exists()), None)


class CleanBuildPy(build_py):
    """Copy the Python files into an empty folder: an earlier build may have left modules that have since moved."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Build all compiled modules as one CMake project and install them beside the Python files."""

    def run(self) -> None:
        destination = ROOT if self.inplace else Path(self.build_lib).resolve()
        try:
            self.build_with_cmake(destination)
        except (subprocess.CalledProcessError, OSError) as error:
            if MODE != "auto":
                raise SystemExit(HELP) from error
            print(HELP, file=sys.stderr)

    def build_with_cmake(self, destination: Path) -> None:
        import pybind11

        env = dict(ENV)
        if CUDA != "off" and (nvcc := find_nvcc()):
            env["CUDACXX"] = nvcc  # with -DCMAKE_CUDA_COMPILER, check_language() would not test the compiler
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"  # kept, so that the next build is incremental
        # pip's isolated environment has a new path in every build, so CMake gets a copy at a constant path.
        headers = build.parent / f"pybind11-{pybind11.__version__}"
        if not headers.exists():
            partial = headers.with_name(f"{headers.name}.{os.getpid()}")
            shutil.copytree(Path(pybind11.__file__).parent, partial)
            partial.rename(headers)
        configure = ["cmake", "-S", ROOT, "-B", build, "-DCMAKE_BUILD_TYPE=Release", f"-DSID_CUDA={CUDA.upper()}"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={headers}/share/cmake/pybind11"]
        archs = ENV.get("SID_KERNELS_CUDA_ARCHS")
        configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={archs}" if archs else "-UCMAKE_CUDA_ARCHITECTURES")
        if ninja := shutil.which("ninja"):
            configure += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]

        def call(command: list[str | Path]) -> None:
            subprocess.run([str(part) for part in command], check=True, env=env)

        try:
            call(configure)
        except subprocess.CalledProcessError:  # a stale cache: the checkout, the generator or nvcc has changed
            shutil.rmtree(build, ignore_errors=True)
            call(configure)
        call(["cmake", "--build", build, "--parallel", str(parallel_jobs())])
        for old in (destination / "sid_kernels").glob("_c*.so"):
            old.unlink()  # a build without CUDA must not leave an old _cuda behind
        call(["cmake", "--install", build, "--prefix", destination, "--strip"])


setup(
    packages=find_packages(include=["sid_kernels*"]) + find_packages("python"),
    package_dir={"sid_kernels": "sid_kernels", "sid_trainer": "python/sid_trainer"},
    package_data={"": ["py.typed"], "sid_trainer.report": ["*.jinja"]},
    zip_safe=False,
    cmdclass={"build_py": CleanBuildPy, "build_ext": CMakeBuild},
    ext_modules=[] if MODE == "skip" else [Extension("sid_kernels._C", [])],
)
