"""Imports point one way: every import between rooms goes down, and there are few of them.

A room is a folder or a file at the top of a package. An arrow is a pair of rooms of which one imports the other.
"""

import re

import pytest

from helpers.sources import PACKAGES, ROOT, arrows, imported_modules, parse, room_of

# Floors from the bottom up: a room imports only rooms of lower floors.
FLOORS = {
    "sid_kernels": [
        {"core"},
        {"local_loss"},
        {"belief_head", "cascade"},
        {"fused_local_loss", "fused_belief_head", "refine_cascade", "info"},
    ],
    "sid_trainer": [
        {"files"},
        {"network", "data"},
        {"methods"},
        {"training"},
        {"distributed"},
        {"report"},
        {"runs"},
        {"options"},
        {"cli"},
        {"__main__"},
    ],
}
MOST_ARROWS = {"sid_kernels": 20, "sid_trainer": 34}


def listed(found: dict[tuple[str, str], set[str]]) -> str:
    return f"{len(found)} arrows:\n" + "\n".join(f"{a} -> {b}  ({', '.join(sorted(f))})" for (a, b), f in found.items())


@pytest.mark.parametrize("package", PACKAGES)
def test_every_room_has_a_floor(package):
    rooms = {room_of(path) for path in parse(package)} - {"__init__"}
    assert rooms == set().union(*FLOORS[package])


@pytest.mark.parametrize("package", PACKAGES)
def test_there_are_few_arrows(package):
    found = arrows(package)
    assert len(found) <= MOST_ARROWS[package], listed(found)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_arrow_points_down(package):
    """Check that every import goes down, so that there are no cycles."""
    floor = {room: i for i, rooms in enumerate(FLOORS[package]) for room in rooms}
    upward = {pair: files for pair, files in arrows(package).items() if floor[pair[0]] <= floor[pair[1]]}
    assert not upward, listed(upward)


@pytest.mark.parametrize("package", PACKAGES)
def test_there_are_no_cycles(package):
    """Check for cycles whatever floors are declared: take away rooms that import nothing until none is left."""
    left = set(arrows(package))
    while leaves := {b for _, b in left} - {a for a, _ in left}:
        left = {(a, b) for a, b in left if b not in leaves}
    assert not left, left


def test_the_kernels_do_not_know_the_trainer():
    """Check that sid_kernels imports nothing of sid_trainer; that core imports no operation is an arrow above."""
    for path, tree in parse("sid_kernels").items():
        modules = set(imported_modules("sid_kernels", path, tree))
        assert not [m for m in modules if m.startswith("sid_trainer")], path


def test_the_kernels_sources_include_nothing_of_python():
    """Check that only the bindings include Python's headers, and nothing includes PyTorch's."""
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.is_file():
            included = re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text())
            foreign = [name for name in included if re.match(r"(Python\.h|pybind11/|torch/|ATen/|c10/)", name)]
            allowed = "pybind11/" if path.parent.name == "bindings" else None
            assert all(allowed and name.startswith(allowed) for name in foreign), f"{path}: {foreign}"
