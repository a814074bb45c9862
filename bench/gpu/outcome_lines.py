"""Write each test's outcome to a file as soon as the test ends, so that a run that is stopped keeps them.

    python -m pytest -p bench.gpu.outcome_lines --outcome-lines=FILE

This is a pytest plugin. Each line is a JSON object with the test, its outcome and its seconds. If the test did not
pass, the line also has the reason; if it failed, the end of its traceback.
"""

from __future__ import annotations

import json

from bench.lib import record

WHY, TRACE = 300, 4_000  # characters of the reason and of the traceback that are kept


def pytest_addoption(parser):
    parser.addoption("--outcome-lines", metavar="FILE", help="write each test's outcome to FILE when the test ends")


def pytest_configure(config):
    path = config.getoption("--outcome-lines")
    if path and not hasattr(config, "workerinput"):  # with xdist: only in the process that collects all outcomes
        config.pluginmanager.register(Lines(path))


class Lines:
    """Write a line for each test that ends, as hooks of pytest."""

    def __init__(self, path: str):
        self.file = open(path, "w", buffering=1)  # a line is written when it is complete

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            self._write(report, report.duration)

    def pytest_collectreport(self, report):
        if report.failed:
            self._write(report, 0.0)

    def _write(self, report, seconds: float) -> None:
        line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(seconds, 2)}
        if report.skipped and isinstance(report.longrepr, tuple):
            line["why"] = record.scrub(report.longrepr[2])
        elif not report.passed:
            crash = getattr(report.longrepr, "reprcrash", None)
            text = report.longreprtext
            line["why"] = record.scrub(crash.message if crash else text.strip().rpartition("\n")[2])[:WHY]
            line["trace"] = record.scrub(text[-TRACE:]).splitlines()
        self.file.write(json.dumps(line) + "\n")

    def pytest_unconfigure(self):
        self.file.close()
