"""Measures, and adds what it measured to the results' file of this machine and day.

python -m benchmarks             everything, most telling first
python -m benchmarks --quick     under three minutes on two CPU cores
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import accuracy, dispatch, floors, machine, measure, models, results
from benchmarks.workloads import PROFILES, Profile, attention_workloads, model_workloads
from gpsa_kernels import BACKENDS

SECTIONS = ("operator", "accuracy", "models", "tokens", "batch", "layer", "dispatch", "compiled")


class Unit(NamedTuple):
    """What is measured at a stretch and written at once."""

    section: str
    workload: str
    direction: str  # of a model, or ""
    rows: Callable[[], Iterable[results.Row]]


def units(section: str, device: str, profile: Profile) -> Iterator[Unit]:
    """What a section consists of."""
    effort = measure.EFFORTS[profile]
    known: dict[str, floors.Rates] = {}

    def rates(dtype: str) -> floors.Rates:
        if dtype not in known:
            known[dtype] = floors.measure_rates(device, dtype, small=profile == "dry")
        return known[dtype]

    if section == "models":
        for model in model_workloads(device, profile):
            yield Unit(
                section,
                str(model),
                model.direction,
                lambda model=model: models.workload_rows(model, device, effort, rates(model.dtype)),
            )
    elif section == "accuracy":
        for case in accuracy.cases(device, profile):
            yield Unit(section, str(case), "", lambda case=case: accuracy.case_rows(case, device))
    elif section == "dispatch":
        yield Unit(section, "no work", "", lambda: dispatch.rows(effort))
    else:
        for workload in attention_workloads(section, device, profile):
            yield Unit(
                section,
                str(workload),
                "",
                lambda workload=workload: measure.workload_rows(workload, device, effort, rates(workload.case.dtype)),
            )


def missing(unit: Unit, run: dict[str, Any] | None) -> bool:
    """Whether the run that is gone on with has no row of this unit yet."""
    found = run["rows"] if run else []
    return not any(
        row["section"] == unit.section
        and row["workload"] == unit.workload
        and unit.direction in ("", row.get("direction"))
        for row in found
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the sections asked for; returns 1 where gpsa_kernels was wrong or failed, 0 otherwise.

    What becomes of the other peers is a result, and no reason to fail.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", choices=PROFILES, default="full", help="dry rehearses, and measures nothing")
    parser.add_argument("--quick", dest="profile", action="store_const", const="quick", help="the quick profile")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--workloads", default="", metavar="REGEX", help="only those whose name it finds")
    parser.add_argument("--without", nargs="+", choices=BACKENDS, default=[], metavar="BACKEND", help="to leave out")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=None, help="torch's threads on the CPU")
    parser.add_argument("--output", type=Path, help="the file to add to; benchmarks/results/<machine>-<day>.json")
    parser.add_argument("--resume", action="store_true", help="go on with the file's last run, leaving out what it has")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    if options.threads is not None:
        torch.set_num_threads(options.threads)

    run = machine.describe(options.device, options.profile)
    name = results.file_name(run["device"], run["device_type"], run["started"][:10])
    output = options.output or results.FOLDER / name
    begun = results.last(output, run) if options.resume else None  # another machine's run gets one beside it
    if begun is not None:
        run["started"] = begun["started"]
    for name in options.without:
        BACKENDS[name] = dataclasses.replace(BACKENDS[name], unavailable=lambda: "it was left out (--without)")
    wrong = 0
    with measure.own_stream(options.device):
        for section in options.sections:
            for row in machine.clocks(options.device, section, "before"):
                results.append(output, run, [row])
            for unit in units(section, options.device, options.profile):
                if not (missing(unit, begun) and re.search(options.workloads, unit.workload)):
                    continue
                start = time.perf_counter()
                rows = list(unit.rows())
                results.append(output, run, rows)
                wrong += _tell(unit, rows, time.perf_counter() - start)
            for row in machine.clocks(options.device, section, "after"):
                results.append(output, run, [row])
    print(f"written to {output}" + (f"; {wrong} rows of gpsa_kernels are wrong or failed" if wrong else ""))
    return 1 if wrong else 0


def _tell(unit: Unit, rows: list[results.Row], seconds: float) -> int:
    """Prints a unit's rows in short; returns how many of gpsa_kernels' own are wrong or failed."""
    print(f"{unit.section}: {unit.workload} {unit.direction} ({seconds:.0f} s)", flush=True)
    for row in rows:
        about = " ".join(str(row[key]) for key in ("direction", "temperature", "tensor") if key in row)
        if row["status"] != "ok":
            value = f"{row['status']}: {row['reason']}"
        elif "median_us" in row:
            share = f", {row['floor_share']:.0%} of the floor's speed" if "floor_share" in row else ""
            value = f"{row['median_us']:.1f} us{share}"
        else:
            value = f"error {row['max_error']:.1e}, eager's {row['eager_max_error']:.1e}"
        print(f"  {row['peer']:<34}{about:<18}{value}", flush=True)
    return sum(row["status"] in ("wrong", "failed") and row["peer"].startswith("gpsa_kernels") for row in rows)


if __name__ == "__main__":
    raise SystemExit(main())
