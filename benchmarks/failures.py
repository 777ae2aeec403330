"""A plugin of pytest that tells a failure when it happens: whoever ends the run early loses none.

python -m pytest -p benchmarks.failures
"""

from __future__ import annotations

import os

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\nFAILED {report.nodeid}\n{report.longreprtext}", flush=True)
