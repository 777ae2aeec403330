"""Measures, and adds what it measured to the results' file of this machine and day.

python -m benchmarks               everything, most telling first
python -m benchmarks --quick       a few minutes on two CPU cores
python -m benchmarks --describe    what this machine is; the last line, in JSON, is how a run of it begins
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch

from benchmarks import dispatch, measure, models, results, timing
from benchmarks.workloads import PROFILES, Profile, Rates, attention_workloads, model_workloads
from gpsa_kernels import BACKENDS, info

SECTIONS = ("operator", "accuracy", "models", "tokens", "batch", "layer", "dispatch", "compiled", "tuned")


Place = dict[str, str]  # what the rows have in common that are measured at a stretch and written at once
Measure = Callable[[], Iterable[results.Row]]


def units(section: str, device: str, profile: Profile, lost: Mapping[str, str]) -> Iterator[tuple[Place, Measure]]:
    """What a section consists of; ``lost`` are peers that are left out, and why."""
    effort = timing.EFFORTS[profile]

    @functools.cache
    def rates(dtype: str) -> Rates | None:
        if device == "cpu" and dtype != "float32":
            return None  # torch's large products in 16 bits are slower there than the small ones that they should bound
        return timing.measure_rates(device, dtype, small=profile == "dry")

    def place(workload: object, **more: str) -> Place:
        return {"section": section, "workload": str(workload), **more}

    if section == "models":
        for model in model_workloads(device, profile):
            rows = partial(models.workload_rows, model, device, effort, rates)
            yield place(model, direction=model.direction), rows
    elif section == "accuracy":
        for case in measure.accuracy_cases(device, profile):
            yield place(case), partial(measure.accuracy_rows, case, device, lost)
    elif section == "dispatch":
        yield place("no work"), partial(dispatch.rows, effort)
    else:
        for workload in attention_workloads(section, device, profile):
            run = measure.Run(workload, device, lost)
            for direction in workload.directions:
                where = place(workload, direction=direction, temperature=workload.temperature)
                yield where, partial(run.rows, direction, effort, rates)
            run.release()


def main(arguments: list[str] | None = None) -> int:
    """Runs the sections asked for; returns 1 where gpsa_kernels has faults in them, 0 otherwise.

    What becomes of the other peers, or of a backend that this machine cannot run, is a result and no reason to fail.
    """
    parser = results.command_line("benchmarks", __doc__)
    parser.add_argument("--profile", choices=PROFILES, default="full", help="dry rehearses, and measures nothing")
    parser.add_argument("--quick", dest="profile", action="store_const", const="quick", help="the quick profile")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--workloads", default="", metavar="REGEX", help="only those whose name it finds")
    parser.add_argument("--without", nargs="+", choices=BACKENDS, default=[], metavar="BACKEND", help="to leave out")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--describe", action="store_true", help="measure nothing, and tell what this machine is")
    parser.add_argument("--output", type=Path, help="the file to add to; benchmarks/results/<machine>-<day>.jsonl")
    parser.add_argument("--resume", action="store_true", help="go on with the file's last run, leaving out what it has")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device was found")
    run = results.describe(options.device, options.profile)
    if options.describe:
        capability = torch.cuda.get_device_capability() if options.device == "cuda" else (9, 0)
        print(info.report(), json.dumps({"run": run, "capability": "{}.{}".format(*capability)}), sep="\n")
        return 0

    output = options.output or results.FOLDER / results.file_name(run)
    begun = results.last(output, run) if options.resume else None  # another machine's run gets one beside it
    there = begun["rows"] if begun is not None else []  # what the run's file has
    run["started"] = begun["started"] if begun is not None else run["started"]
    for name in options.without:
        BACKENDS[name] = dataclasses.replace(BACKENDS[name], unavailable=lambda: "it was left out (--without)")
    began = time.perf_counter()
    with measure.own_stream(options.device):
        for section in options.sections:
            results.append(output, run, results.clocks(options.device, section, "before"))
            ended = (row for row in there if row["section"] == section and row["status"] == "failed")
            lost = {row["peer"]: row["reason"] for row in ended if row["reason"].startswith(measure.LOST)}
            for place, measured in units(section, options.device, options.profile, lost):
                known = {row["peer"] for row in there if place.items() <= row.items()}
                if known - set(lost) or not re.search(options.workloads, place["workload"]):
                    continue
                start = time.perf_counter()
                try:
                    rows = [row for row in measured() if row["peer"] not in known]
                except measure.ContextLost as error:
                    results.append(output, run, error.args)
                    _tell(place, error.args, time.perf_counter() - start)
                    # a new process, in place of this one and with a new context, leaves that peer out
                    again = ("-m", "benchmarks", *arguments, "--resume", "--output", str(output))
                    os.execv(sys.executable, (sys.executable, *again))
                results.append(output, run, rows)
                there += rows
                _tell(place, rows, time.perf_counter() - start)
            results.append(output, run, results.clocks(options.device, section, "after"))
    able = {f"gpsa_kernels {name}" for name, backend in BACKENDS.items() if backend.unavailable() is None}
    found = results.faults({**run, "rows": [row for row in there if row["section"] in options.sections]})
    wrong = sum(row["status"] != "unavailable" or row["peer"] in able for row in found)
    print(f"written to {output}, after {(time.perf_counter() - began) / 60:.0f} minutes", end="")
    print(f"; {wrong} rows of gpsa_kernels are wrong, failed or missing" if wrong else "")
    return 1 if wrong else 0


def _tell(place: Place, rows: Iterable[results.Row], seconds: float) -> None:
    """Prints what was measured in short."""
    print(f"{' '.join(place.values())} ({seconds:.0f} s)", flush=True)
    for row in rows:
        if row["status"] != "ok":
            value = f"{row['status']}: {row['reason']}"
        elif "median_us" in row:
            value = f"{row['median_us']:.1f} us"
        else:
            value = "errors " + ", ".join(f"{error:.1e}" for error in row["max_error"])
        print(f"  {row['peer']:<34}{row.get('direction', ''):<18}{value}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
