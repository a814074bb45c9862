"""Test the comparison of the loop with `sid_step`: its command, and the memory of the loop."""

import json

from bench.training.loop import main


def test_the_loop_holds_no_more_than_the_step_and_the_gradients(tmp_path, capsys):
    main(["--archs", "mlp", "--rounds", "3", "--seconds", "1", "--out", str(tmp_path / "loop.json")])
    (row,) = json.loads((tmp_path / "loop.json").read_text())["rows"]
    assert row["peak_bytes"]["loop"] <= row["peak_bytes"]["sid_step"] + row["gradient_bytes"]
    assert 0.3 < row["ratio"]["median_of_rounds"] < 3  # measured: 1.0; other processes may run at the same time
    assert "mlp" in capsys.readouterr().out
