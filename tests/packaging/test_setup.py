"""Check how setup.py reads the environment variables that control the build."""

import os
import runpy
from pathlib import Path

import pytest
import setuptools

SETUP = Path(__file__).parents[2] / "setup.py"


@pytest.fixture
def settings(monkeypatch) -> dict:
    """Run setup.py without building anything, and return its names."""
    for name in ("MAX_JOBS", "CMAKE_BUILD_PARALLEL_LEVEL", "SID_KERNELS_BUILD", "SID_KERNELS_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return runpy.run_path(str(SETUP))


@pytest.mark.parametrize(
    ("max_jobs", "cmake_level", "expected"),
    [("", "", os.cpu_count()), ("3", "", 3), ("", "5", 5), ("3", "5", 3), ("7", "5", 5)],
)
def test_parallel_jobs(settings, monkeypatch, max_jobs, cmake_level, expected):
    monkeypatch.setenv("MAX_JOBS", max_jobs)
    monkeypatch.setenv("CMAKE_BUILD_PARALLEL_LEVEL", cmake_level)
    assert settings["parallel_jobs"]() == expected


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_parallel_jobs_rejects(settings, monkeypatch, value):
    monkeypatch.setenv("MAX_JOBS", value)
    with pytest.raises(SystemExit, match=f"MAX_JOBS is '{value}'; it must be a positive integer"):
        settings["parallel_jobs"]()


def test_build_starts_no_more_compilers(settings, monkeypatch, tmp_path):
    """Check that the limit reaches CMake: a bare --parallel would ignore it."""
    commands = []
    monkeypatch.setenv("MAX_JOBS", "2")
    build = settings["CMakeBuild"](setuptools.Distribution())
    names = build.build_with_cmake.__globals__
    monkeypatch.setitem(names, "ROOT", tmp_path)
    monkeypatch.setattr(names["subprocess"], "run", lambda command, **_: commands.append(command))
    monkeypatch.setattr(names["shutil"], "copytree", lambda _, to: to.mkdir(parents=True))
    pytest.importorskip("pybind11")
    build.build_with_cmake(tmp_path)
    (built,) = [command for command in commands if "--build" in command]
    assert built[-2:] == ["--parallel", "2"]


def test_setting_rejects(settings, monkeypatch):
    monkeypatch.setenv("SID_KERNELS_CUDA", "maybe")
    with pytest.raises(SystemExit, match="SID_KERNELS_CUDA is 'maybe'; it must be one of auto, on, off"):
        settings["setting"]("SID_KERNELS_CUDA", "auto", ("auto", "on", "off"))
