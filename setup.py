"""CMake + Ninja build of sid_kernels._C and sid_kernels._cuda. Torch is not needed to build.

SID_KERNELS_BUILD       require (default) | auto: warn and go on without | skip: Triton and PyTorch only
SID_KERNELS_CUDA        auto (default) | on | off
SID_KERNELS_CUDA_ARCHS  e.g. "90-real" or "native"   (default "80-real;90-real;100")
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT, ENV = Path(__file__).resolve().parent, os.environ
HELP = """
*** sid_kernels: the native extensions did not build (the reason stands in the output above).
*** They need a C++17 compiler (Debian/Ubuntu: apt install g++; conda: cxx-compiler).
*** CPU only:          SID_KERNELS_CUDA=off   pip install -e .
*** no compiled code:  SID_KERNELS_BUILD=skip pip install -e .   (Triton and PyTorch backends)
"""


def setting(name, default, allowed):
    value = ENV.get(name, default).lower()
    if value not in allowed:
        raise SystemExit(f"{name}={ENV[name]!r}: it must be one of {', '.join(allowed)}")
    return value


MODE = setting("SID_KERNELS_BUILD", "require", ("require", "auto", "skip"))
CUDA = setting("SID_KERNELS_CUDA", "auto", ("auto", "on", "off"))


def find_nvcc():
    homes = [f"{ENV[v]}/bin/nvcc" for v in ("CUDA_HOME", "CUDA_PATH") if ENV.get(v)]
    for candidate in (ENV.get("CUDACXX"), *homes, shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if candidate and Path(candidate).exists():
            return str(candidate)


class CMakeBuild(build_ext):
    def run(self):  # one CMake project for all modules; setuptools' own copying knows registered extensions only
        destination = ROOT if self.inplace else Path(self.build_lib).resolve()
        try:
            self.cmake(destination)
        except (subprocess.CalledProcessError, OSError) as error:
            if MODE != "auto":
                raise SystemExit(HELP) from error
            print(HELP, file=sys.stderr)

    def cmake(self, destination):
        import pybind11

        env = dict(ENV)
        if CUDA != "off" and (nvcc := find_nvcc()):
            env["CUDACXX"] = nvcc  # not -DCMAKE_CUDA_COMPILER: that would skip check_language()'s test
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"  # kept: the next build is incremental
        headers = build.parent / f"pybind11-{pybind11.__version__}"  # pip's isolated environment moves, this does not
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

        def call(command):
            subprocess.run([str(part) for part in command], check=True, env=env)

        try:
            call(configure)
        except subprocess.CalledProcessError:  # a stale cache: moved checkout, other generator, new nvcc
            shutil.rmtree(build, ignore_errors=True)
            call(configure)
        call(["cmake", "--build", build, "--parallel"])
        for old in (destination / "sid_kernels").glob("_c*.so"):
            old.unlink()  # no stale _cuda after a build without CUDA
        call(["cmake", "--install", build, "--prefix", destination, "--strip"])


setup(
    packages=find_packages(include=["sid_kernels*"]) + find_packages("python"),
    package_dir={"sid_kernels": "sid_kernels", "sid_trainer": "python/sid_trainer"},
    package_data={"sid_trainer.report": ["report.html.jinja"]},
    zip_safe=False,
    cmdclass={"build_ext": CMakeBuild},
    ext_modules=[] if MODE == "skip" else [Extension("sid_kernels._C", [])],
)
