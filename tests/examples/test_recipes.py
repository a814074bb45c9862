"""Check that every script of examples/recipes learns; only the one for several processes has its own processes."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.processes import PATIENCE
from helpers.ranks import finish, start

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
DDP = "ddp_torchrun"
NEEDS = {
    "timm_models": ["timm"],
    "gpt2_language_model": ["transformers"],
    "bert_classifier": ["transformers", "accelerate"],
    "lightning_module": ["lightning"],
    "accelerate_loop": ["accelerate"],
}
CASES = [  # recipe, arguments of its main, results that it must reach
    ("timm_models", ("resnet18",), 0.6),  # accuracies; chance: 10%
    pytest.param("timm_models", ("convnext_atto",), 0.6, marks=pytest.mark.slow),
    pytest.param("timm_models", ("vit_tiny_patch16_224",), 0.3, marks=pytest.mark.slow),
    ("torchvision_finetuning", (), 0.6),
    ("unet_pixels", (), 0.65),  # chance: 33%; 58% if every pixel of a square is given the upper square's class
    ("gpt2_language_model", (), 0.8),  # characters of a continuation
    ("bert_classifier", (), 0.9),  # chance: 33%
    ("lightning_module", (), 0.85),
    ("accelerate_loop", (), 0.85),
]


def load(recipe: str):
    spec = importlib.util.spec_from_file_location(recipe, RECIPES / f"{recipe}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_recipe_is_run():
    assert {path.stem for path in RECIPES.glob("*.py")} == {DDP, *(getattr(case, "values", case)[0] for case in CASES)}


@pytest.mark.parametrize("recipe, arguments, least", CASES, ids=lambda value: str(value).strip("(),'"))
def test_recipe(recipe, arguments, least, capsys):
    for package in NEEDS.get(recipe, ()):
        pytest.importorskip(package, reason=f"needs {package}: pip install -e '.[recipes]'")
    assert load(recipe).main(*arguments) >= least, capsys.readouterr().out[-2000:]


def train_as_a_rank(least: float) -> None:
    assert load(DDP).main() >= least


@pytest.mark.processes
def test_ddp_recipe():
    assert finish(start([(train_as_a_rank, (0.85,))] * 2)) == [0, 0]


@pytest.mark.slow
@pytest.mark.processes
def test_ddp_recipe_by_torchrun(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(RECIPES / f"{DDP}.py")], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.partition("test accuracy") for line in done.stdout.splitlines() if line.startswith("rank")]
    assert len(lines) == 2 and lines[0][2] == lines[1][2], done.stdout  # accuracy and weights
    assert float(lines[0][2].split("%")[0]) > 85, lines
