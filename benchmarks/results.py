"""Runs: what each was made on, and the files that they are kept in, to which lines are added and none replaced.

{"started": ..., "device": ..., ...}                                       a run begins
{"section": ..., "peers": ["timm", ...], "median_us": [35120, ...], ...}   a measurement

A list has a value for each of the peers, null for none; what is no list is true of all of them. ``wrong``, ``failed``
and ``unavailable`` say why peers have no time. But for those and for FIGURES a line leaves out what the line above
says, and takes it back by null. Figures from a thousand on are whole, below they have four significant digits, errors
three.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.workloads import headline

Row = dict[str, Any]  # of one peer in one measurement
Run = dict[str, Any]
ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks" / "results"
PLACE = ("section", "workload", "direction", "temperature")
READINGS = {"sm_mhz": "clocks.sm", "memory_mhz": "clocks.mem", "celsius": "temperature.gpu", "watts": "power.draw"}
ERRORS = ("deviation", "max_error", "rms_error")
FIGURES = ("median_us", "p20_us", "p80_us", "memory_mb", *ERRORS, *READINGS)
EXCUSES = ("wrong", "failed", "unavailable")

# ---- what a run is made on ------------------------------------------------------------------------------------------


def describe(device: str, profile: str) -> Run:
    """The header of a run that starts now."""
    import torch  # only here: whoever reads results needs none

    import gpsa_kernels

    versions = {found.name: found.version for found in importlib.metadata.distributions()}
    info = Path("/proc/cpuinfo")
    cpus = re.findall(r"model name\s*: (.*)", info.read_text() if info.exists() else "") or [platform.processor()]
    cpu = f"{cpus[0]} ({torch.backends.cpu.get_cpu_capability()})"
    header = {
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "device_type": device,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": versions.get("triton"),
        "timm": versions.get("timm"),
        "gpsa_kernels": gpsa_kernels.__version__,
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"),
        "sources": sources(),
        "profile": profile,
    }
    return {name: value for name, value in header.items() if value is not None}


def sources(root: Path = ROOT) -> str:
    """A hash of what is measured: the files of gpsa_kernels/ and csrc/ that are not built."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in ("gpsa_kernels", "csrc") for path in (root / folder).rglob("*")):
        if path.suffix in (".py", ".cu", ".cuh", ".h", ".cpp"):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def clocks(device: str, section: str, moment: str) -> list[Row]:
    """A row with the GPU's clocks, temperature and power at a moment, "before" or "after"; none where none are told."""
    query = f"--query-gpu={','.join(READINGS.values())}"
    told = device == "cuda" and _output("nvidia-smi", query, "--format=csv,noheader,nounits", "--id=0")
    if not told:
        return []
    values = zip(READINGS, told.split(","), strict=True)
    known = {name: float(value) for name, value in values if value.strip()[:1].isdigit()}
    return [{"section": "clocks", "workload": section, "peer": moment, "status": "ok", **known}]


def _output(*command: str) -> str | None:
    """What a command prints, or None where it does not exist or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


# ---- files ----------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[Run]:
    """A file's runs, each with its ``rows``: a peer's part in a measurement.

    Raises:
        ValueError: it is damaged, or no results file.
    """
    return _parsed(path)[0]


def _parsed(path: Path) -> tuple[list[Run], Row]:
    """The runs, and what a line added to the last one may leave out."""
    runs: list[Run] = []
    above: Row = {}
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            found = json.loads(text)
            if "started" in found:
                runs.append({**found, "rows": []})
                above = {}
                continue
            line = {name: value for name, value in {**above, **found}.items() if value is not None}
            runs[-1]["rows"] += _rows(line)
            above = _lasting(line)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: {type(error).__name__}: {error}") from error
    return runs, above


def _rows(line: Row) -> list[Row]:
    lists = {name: value for name, value in line.items() if isinstance(value, list) and name != "peers"}
    common = {name: value for name, value in line.items() if name not in (*lists, *EXCUSES, "peers")}
    rows: dict[str, Row] = {}
    for peer, *values in zip(line["peers"], *lists.values(), strict=True):
        own = {name: value for name, value in zip(lists, values, strict=True) if value is not None}
        if own:
            rows[peer] = {**common, "peer": peer, "status": "ok", **own}
    for status in EXCUSES:
        for peer, reason in line.get(status, {}).items():
            rows[peer] = {**common, "peer": peer, **rows.get(peer, {}), "status": status, "reason": reason}
    return list(rows.values())


def _line(rows: list[Row], known: list[str]) -> Row:
    """The rows of one measurement; its peers are those ``known`` from the line above, if all are among them."""
    measured = {row["peer"]: row for row in rows if row.keys() & {*FIGURES}}
    line: Row = {"peers": known if measured.keys() <= {*known} else [*measured]}
    for name in dict.fromkeys(name for row in rows for name in row if name not in ("peer", "status", "reason")):
        first, *others = (row[name] for row in rows if name in row)
        alike = name not in FIGURES and all(other == first for other in others)
        line[name] = first if alike else [measured.get(peer, {}).get(name) for peer in line["peers"]]
    for row in rows:
        if row["status"] != "ok":
            line.setdefault(row["status"], {})[row["peer"]] = row["reason"]
    return line


def _lasting(line: Row) -> Row:
    """What of a line holds for the next one."""
    return {name: value for name, value in line.items() if name not in (*FIGURES, *EXCUSES)}


def append(path: Path, run: Run, rows: Iterable[Row]) -> None:
    """Adds ``rows`` to the file's last run, or begins one where that did not start when ``run`` did.

    A run tells each reason for which a peer is unavailable once.

    Raises:
        ValueError: the file is there and damaged; it is left alone.
    """
    runs, above = _parsed(path) if path.exists() else ([], {})
    lines: list[Row] = []
    if not runs or runs[-1]["started"] != run["started"]:
        runs.append({"rows": []})
        lines, above = [{name: value for name, value in run.items() if name != "rows"}], {}
    told = {(row["peer"], row["reason"]) for row in runs[-1]["rows"] if row["status"] == "unavailable"}
    fresh = [_rounded(row) for row in rows if (row["peer"], row.get("reason")) not in told]
    for _, group in groupby(fresh, lambda row: [row.get(name) for name in PLACE]):
        line = _line(list(group), above.get("peers", []))
        lines.append({name: line.get(name) for name in {**line, **above} if line.get(name) != above.get(name)})
        above = _lasting(line)
    text = "".join(f"{json.dumps(line, separators=(',', ':'))}\n" for line in lines)
    write(path, (path.read_text() if path.exists() else "") + text)


def _rounded(row: Row) -> Row:
    """A row with as many digits as a file keeps."""

    def kept(value: Any, digits: int) -> Any:
        if isinstance(value, list):
            return [kept(one, digits) for one in value]
        if not isinstance(value, float):
            return value
        value = float(round(value) if value >= 1000 else f"{value:.{digits}g}")
        return int(value) if value.is_integer() else value

    return {name: kept(value, 3 if name in ERRORS else 4) for name, value in row.items()}


def write(path: Path, text: str) -> None:
    """Replaces a file as a whole: whoever is interrupted leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.unfinished")
    new.write_text(text)
    os.replace(new, path)


def last(path: Path, run: Run) -> Run | None:
    """The file's last run, if there is one and it was made on what ``run`` is made on, with the same versions.

    Raises:
        ValueError: the file is there and damaged.
    """
    runs = read(path) if path.exists() else []
    differing = {name for name in {*run, *runs[-1]} if run.get(name) != runs[-1].get(name)} if runs else set()
    return runs[-1] if runs and differing <= {"started", "rows", "commit"} else None


def file_name(run: Run) -> str:
    """Of a machine's results of a day."""
    slug = re.sub(r"[^a-z0-9]+", "-", run["device"].lower()).strip("-")
    return f"{run['device_type']}-{slug}-{run['started'][:10]}.jsonl"


def newest(folder: Path = FOLDER) -> dict[str, Run]:
    """The run to show of every device type: the newest of the full profile, or of another if there is none.

    Rehearsals are never shown.
    """
    found = [run for path in sorted(folder.glob("*.jsonl")) for run in read(path) if run["profile"] != "dry"]
    return {run["device_type"]: run for run in sorted(found, key=lambda r: (r["profile"] == "full", r["started"]))}


def faults(run: Run) -> list[Row]:
    """Rows of gpsa_kernels that are wrong, or failed, or on a GPU not there where all depends on them.

    All depends on the models and on the headline of the operator.
    """
    first = ("operator", str(headline(run["device_type"], run["profile"])))

    def needed(row: Row) -> bool:
        there = row["section"] == "models" or (row["section"], row["workload"]) == first
        return there and run["device_type"] == "cuda"

    ours = [row for row in run["rows"] if row["peer"].startswith("gpsa_kernels") and row["status"] != "ok"]
    return [row for row in ours if row["status"] != "unavailable" or needed(row)]


def command_line(module: str, text: str | None) -> argparse.ArgumentParser:
    """A parser whose help is a module's docstring as it stands."""
    shown = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"python -m {module}", description=text, formatter_class=shown)
