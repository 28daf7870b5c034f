"""A pytest plugin: a row of JSON for each test that has ended, in the file that TEST_ROWS names.

A kernel that reads past its memory leaves the process unable to use the GPU, and all tests after it would fail for its sake.
So a process of pytest-xdist in which that happened ends itself, and another takes the tests that are left.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from bench.gpu.health import device_answers
from bench.gpu.json_lines import append

ROWS = Path(os.environ["TEST_ROWS"])
LONGEST = 2500


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What this machine alone can test comes first: other backends have been tested without it."""
    items.sort(key=lambda item: params(item).get("backend") in ("torch", "cpu"))


def params(item: pytest.Item) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" or not report.passed:
        row = {"test": item.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.skipped:
            row["why"] = str(call.excinfo.value)[:200] if call.excinfo else ""
        if report.failed:
            row["why"] = report.longreprtext[-LONGEST:]
        append(ROWS, row)
    if report.failed and hasattr(item.config, "workerinput") and not device_answers():
        os._exit(1)
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "???":  # what pytest-xdist says of a process that died
        append(ROWS, {"test": report.nodeid, "outcome": "crashed", "why": report.longreprtext})
