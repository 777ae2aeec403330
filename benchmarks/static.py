"""What can be said without a GPU: the compiled kernels' resources, what the emulated ones do, and a roofline of it.

python -m benchmarks.static [--output FILE]    compiles the Triton kernels for every architecture (minutes)

The CUDA kernels are taken from the library that is built (``python setup.py build_ext --inplace``), their counts from
the emulation of ``csrc/`` on the host that the tests use.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import floors, machine, machine_code, results
from benchmarks.peers import inputs
from benchmarks.workloads import Case

# no device ran anything
DEVICE, DEVICE_TYPE = "compiled ahead of time", "none"


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
    return at_published_rates(floors.attention_work(case, direction), chip)


def at_published_rates(work: floors.Work, chip: Chip) -> Estimate:
    """How long each kind of work takes."""
    return Estimate(*(1e6 * amount / rate for amount, rate in zip(work, chip, strict=True)))


def roofline_table(run: dict[str, Any] | None) -> str:
    """The estimates as markdown: of the least work, and of what the emulated kernels of ``run`` were counted to do."""
    lines = [
        f"**An estimate, not a measurement**: the least work of {HEADLINE} at the vendor's published rates, in µs. "
        "No kernel reaches published rates; between *overlapped* and *in turn* is where a good one can be.",
        "",
        "| | work | memory | matrix products | exponentials | overlapped | in turn |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, chip in CHIPS.items():
        works = {f"{d}, the least": floors.attention_work(HEADLINE, d) for d in ("forward", "backward")}
        for row in run["rows"] if run else []:
            if row["section"] == "emulated" and row["status"] == "ok":
                share = HEADLINE.batch * HEADLINE.heads // (row["batch"] * row["heads"])
                counted = floors.Work(row["bytes"], row["flops"], row["exponentials"])
                works[f"{row['direction']}, as `{row['peer']}` does it"] = floors.Work(*(share * n for n in counted))
        for label, work in works.items():
            estimate = at_published_rates(work, chip)
            values = (*estimate, estimate.least, estimate.most)
            lines.append("| " + " | ".join([name, label, *(f"{value:.0f}" for value in values)]) + " |")
    return "\n".join(lines) + "\n"


def triton_rows(architectures: tuple[int, ...]) -> Iterator[results.Row]:
    """A row for every Triton kernel and architecture."""
    header = {"section": "static", "peer": "triton"}
    try:
        from gpsa_kernels.backends.triton.compiled import variants
        from gpsa_kernels.backends.triton.report import measure_all
    except ImportError as error:
        yield {**header, "workload": "all", "status": "unavailable", "reason": str(error)}
        return
    chosen = [variant for architecture in architectures for variant in variants(architecture)]
    for variant, usage in measure_all(chosen):
        architecture, _, workload = str(variant).partition(" ")
        yield {**header, "workload": workload, "status": "ok", "architecture": architecture, **usage._asdict()}


def cuda_rows(library: Path = machine_code.LIBRARY) -> Iterator[results.Row]:
    """A row for every kernel and architecture in the built CUDA library."""
    header = {"section": "static", "peer": "cuda"}
    if not library.exists():
        yield {**header, "workload": "all", "status": "unavailable", "reason": "the library has not been built"}
        return
    try:
        codes = machine_code.read(library)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        yield {**header, "workload": "all", "status": "unavailable", "reason": str(error)}
        return
    for (architecture, kernel), code in codes.items():
        yield {**header, "workload": kernel, "status": "ok", "architecture": architecture, **code._asdict()}


def emulated_rows() -> Iterator[results.Row]:
    """What one (batch, head) of the CUDA kernels moves and computes, counted in their emulation on the host."""
    case = replace(HEADLINE, batch=1, heads=1)
    header = {"section": "emulated", "workload": str(case), "peer": "cuda", **vars(case)}
    sys.path.insert(0, str(machine.ROOT / "tests" / "cuda"))
    try:
        import emulation

        tensors = [t.detach() for t in inputs(case, "cpu", 0)]
        settings = (case.grid_size, case.scale)
        forward = emulation.forward(*tensors, *settings, save=True)
        backward = emulation.backward(forward.out, *tensors, forward.logsumexp, *settings)
    except (ImportError, OSError, RuntimeError) as error:
        yield {**header, "direction": "both", "status": "unavailable", "reason": f"{error}".split("\n")[0]}
        return
    for direction, counts in (("forward", forward.counts), ("backward", backward.counts)):
        yield {
            **header,
            "direction": direction,
            "status": "ok",
            "bytes": counts["global_read"] + counts["global_written"],
            "flops": 2 * 16 * 8 * 16 * counts["mma"],  # m16n8k16
            "exponentials": counts["exp2"],
            "bank_conflicts": sum(count for name, count in counts.items() if name.endswith("_conflicts")),
        }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100, 120], help="80 for sm_80, ...")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    run: dict[str, Any] = {**machine.describe("cpu", "full"), "device": DEVICE, "device_type": DEVICE_TYPE}
    output = options.output or results.FOLDER / f"static-{run['started'][:10]}.json"
    rows = [*cuda_rows(), *emulated_rows(), *triton_rows(tuple(options.arch))]
    results.append(output, run, rows)
    print(f"written to {output}")
    print(roofline_table({**run, "rows": rows}))


if __name__ == "__main__":
    main()
