"""Share fixtures among the tests of the command line."""

import pytest


@pytest.fixture(scope="module")
def blank_pictures():
    """Write a picture's signature instead of drawing runs and reports, which takes longer than to train these.

    `test_cli` draws some of its runs; tests/trainer/report draws runs and reports of every kind.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in ("report.figures.draw_run", "report.page.draw_report"):
            patch.setattr(f"sid_trainer.{name}", lambda results: b"\x89PNG")
        yield
