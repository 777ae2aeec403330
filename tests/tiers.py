"""Two tiers: ``make test`` runs what is not marked ``proof``, ``make proof`` runs everything.

Of the families below, which take minutes, the everyday tier runs a share, another one each day.
"""

from __future__ import annotations

import datetime
import re
import zlib
from collections import Counter

import pytest

# the first pattern that a test's name fits -> the share of it that runs every day
EVERYDAY_SHARES = {
    r"planted_bugs\.py::test_a_planted_bug": 0.06,
    r"sanitizers\.py": 0,
    r"tests/test_fuzz\.py": 0.2,
    r"kernels/.*triton": 0.15,
    r"kernels/.*emulated": 0.3,
    r"test_serving\.py::test_a_package": 0,
    r"test_demo\.py::test_one_epoch": 0.2,
}


def everyday(name: str, day: int) -> bool:
    """Whether a test runs every day, or on this one."""
    share = next((share for pattern, share in EVERYDAY_SHARES.items() if re.search(pattern, name)), 1)
    return zlib.crc32(f"{name} {day}".encode()) < share * 2**32


@pytest.hookimpl(tryfirst=True)  # before pytest looks for what to deselect
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    day = datetime.date.today().toordinal()
    for item in items:
        if not everyday(item.nodeid, day):
            item.add_marker(pytest.mark.proof)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    deselected = Counter(item.nodeid.partition("::")[0] for item in terminalreporter.stats.get("deselected", ()))
    if deselected:
        left = ", ".join(f"{count} of {file}" for file, count in deselected.most_common())
        terminalreporter.write_line(f"deselected (make proof runs everything): {left}")
