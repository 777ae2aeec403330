"""For pytest: the option --quick, and a failure is told when it happens, so that whoever ends the run early loses none.

``-p benchmarks.conftest`` brings the latter to other tests.
"""

from __future__ import annotations

import os

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="of benchmarks/: the quick profile")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\nFAILED {report.nodeid}\n{report.longreprtext}", flush=True)
