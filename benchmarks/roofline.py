"""The least work of a call at the rates that vendors publish: ``python -m benchmarks.roofline``."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks import floors
from benchmarks.workloads import Case


class Chip(NamedTuple):
    """What the vendor publishes: memory bytes, dense bfloat16 flops with float32 sums, and exponentials a second.

    An exponential takes one slot of the special function units: 16 a clock on each multiprocessor.
    """

    bytes: float
    flops: float
    exponentials: float


CHIPS = {
    "B200": Chip(8e12, 2250e12, 16 * 148 * 1.86e9),
    "H200 SXM": Chip(4.8e12, 989e12, 16 * 132 * 1.83e9),
    "H100 SXM": Chip(3.35e12, 989e12, 16 * 132 * 1.83e9),
    "A100 SXM 80 GB": Chip(2.04e12, 312e12, 16 * 108 * 1.41e9),
    "RTX 4090": Chip(1.008e12, 165e12, 16 * 128 * 2.52e9),
}
HEADLINE = Case(128, 9, 14, 14, 48, "bfloat16")


class Estimate(NamedTuple):
    """Microseconds of each kind of work of one call, if nothing else took time."""

    memory: float
    matmul: float
    exponential: float

    @property
    def least(self) -> float:
        """All three at once, perfectly overlapped."""
        return max(self)

    @property
    def most(self) -> float:
        """One after the other, each at full speed."""
        return sum(self)


def roofline(case: Case, direction: str, chip: Chip) -> Estimate:
    """How long the least work of a case takes at a chip's published rates: an estimate, no measurement."""
    work = floors.attention_work(case, direction)
    return Estimate(*(1e6 * amount / rate for amount, rate in zip(work, chip, strict=True)))


def table() -> str:
    """The estimates as markdown."""
    lines = [
        f"**An estimate, not a measurement**: the least work of {HEADLINE} at the vendor's published rates, in µs. "
        "No kernel reaches published rates; between *overlapped* and *in turn* is where a good one can be.",
        "",
        "| | | memory | matrix products | exponentials | overlapped | in turn |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, chip in CHIPS.items():
        for direction in ("forward", "backward"):
            estimate = roofline(HEADLINE, direction, chip)
            values = (*estimate, estimate.least, estimate.most)
            lines.append("| " + " | ".join([name, direction, *(f"{value:.0f}" for value in values)]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table())
