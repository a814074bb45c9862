"""Test the table of bytes held by a training step: which methods' bytes grow with depth, and its command."""

import functools
import json

import pytest

from bench.training import memory
from bench.training.memory import COLUMNS, UNFUSED, main, measure
from sid_trainer import build_network
from sid_trainer.methods.common import StepOptions
from sid_trainer.methods.factory import METHODS, cascade_bytes

FLOAT = 4  # bytes


def by_depth(rows, layout, arch, method, column):
    chosen = [row for row in rows if (row["layout"], row["arch"], row["method"]) == (layout, arch, method)]
    return [row[column] for row in sorted(chosen, key=lambda row: row["depth"])]


@functools.cache
def measured(arch):
    """Return the rows of the networks of an architecture: of `mlp`, shared and stagewise; of `simple_cnn`, shared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "NETWORKS", [network for network in memory.NETWORKS if network[1] == arch])
        return measure(METHODS, [4, 32], [16], quiet=True)


SLOW_CASES = [("shared", "simple_cnn", UNFUSED), ("stagewise", "mlp", "greedy")]


@pytest.mark.parametrize(("layout", "arch", "method"), [
    ("shared", "mlp", UNFUSED), ("stagewise", "mlp", "sid"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES),
])  # fmt: skip
def test_sid_holds_one_stage_at_any_depth(layout, arch, method):
    few, many = by_depth(measured(arch), layout, arch, method, "saved_bytes")
    assert 0 < many <= 1.1 * few


def test_what_the_fused_cascade_holds_is_counted_and_at_most_16_mib():
    few, more, many = (
        cascade_bytes(build_network("mlp", in_channels=1, image_size=(2, 2), depth=depth), "sid", 512, StepOptions())
        for depth in (4, 64, 128)
    )
    assert 0 < few < more and many == more <= 16 * 2**20
    rows = measure(["sid"], [4, 8], [16], quiet=True)
    fused, unfused = (by_depth(rows, "shared", "mlp", name, "saved_bytes") for name in ("sid", UNFUSED))
    extractor = 16 * (3072 + 4 * 256) * FLOAT
    for depth, held in zip((4, 8), fused, strict=True):
        cascade = cascade_bytes(build_network("mlp", depth=depth), "sid", 16, StepOptions())
        assert 0 < cascade <= held - extractor < cascade + unfused[0]


@pytest.mark.parametrize("method", ["deep-supervision", "bp"])
@pytest.mark.parametrize("layout", ["shared", "stagewise"])
def test_what_backpropagates_holds_every_stage(layout, method):
    """Compare the bytes held without the images (3072 numbers each), which every method holds once."""
    few, many = (held - 16 * 3072 * FLOAT for held in by_depth(measured("mlp"), layout, "mlp", method, "saved_bytes"))
    if layout == "shared":  # nor what its extractor holds
        few, many = (held - 16 * 4 * 256 * FLOAT for held in (few, many))
    assert many >= 4 * few > 0


@pytest.mark.parametrize(("arch", "layouts"), [("mlp", 2), pytest.param("simple_cnn", 1, marks=pytest.mark.slow)])
def test_every_cell_is_measured(arch, layouts):
    assert len(measured(arch)) == 2 * (layouts * len(METHODS) + 1)
    assert all(row["peak_bytes"] > 0 < row["saved_bytes"] for row in measured(arch))


def test_the_table_has_every_cell_and_reads_as_one(tmp_path, capsys):
    file = tmp_path / "memory.json"
    words = "--methods sid bp --depths 1 2 --batch-sizes 3 --out".split()
    main([*words, str(file)])
    printed, rows = capsys.readouterr().out, json.loads(file.read_text())["rows"]
    assert len(rows) == 2 * (3 * 2 + 2)
    for column, what in COLUMNS.items():
        assert f"stagewise mlp, batch 3, MiB {what}" in printed
        assert all(f"{row[column] / 2**20:10.2f}" in printed for row in rows)
    with pytest.raises(SystemExit) as end:
        main(["--depths", "0", "--out", str(tmp_path / "no.json")])
    assert end.value.code == 2 and not (tmp_path / "no.json").exists()
    assert capsys.readouterr().err == "memory.py: error: depths must be 1 or more, not 0\n"
