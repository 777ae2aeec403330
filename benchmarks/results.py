"""Runs: what each was made on, and the files that they are kept in, to which lines are added and none replaced.

{"started": ..., "device": ..., ...}                                       a run begins
{"section": ..., "peers": ["timm", ...], "median_us": [35120, ...], ...}   a measurement

A list has a value for each of the peers, null for none, and ends with the last one. What is no list holds for all
peers of this line and of the lines below, as ``peers`` does, until one says something else, or null. ``wrong``,
``failed`` and ``unavailable`` say of peers why they have no time. Figures from a thousand on are whole, below they have
four significant digits, errors three; what follows from them (shapes, floors) is added when they are read.
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
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any

from benchmarks.workloads import derived, headline

Row = dict[str, Any]
Run = dict[str, Any]
ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks" / "results"
EXCUSES = ("wrong", "failed", "unavailable")
PLACE = ("section", "workload", "direction", "temperature")
SHARED = (*PLACE, "timer", "rounds", "copy_gb_s", "matmul_tflop_s", "dim", "auto")
ERRORS = ("deviation", "max_error", "rms_error")
READINGS = {"sm_mhz": "clocks.sm", "memory_mhz": "clocks.mem", "celsius": "temperature.gpu", "watts": "power.draw"}

# ---- what a run is made on ------------------------------------------------------------------------------------------


def describe(device: str, profile: str) -> Run:
    """The header of a run that starts now."""
    import torch  # only here: whoever reads results needs none

    import gpsa_kernels

    header = {
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu(torch.backends.cpu.get_cpu_capability()),
        "device_type": device,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "timm": _version("timm"),
        "gpsa_kernels": gpsa_kernels.__version__,
        "commit": _commit() or f"none, sources {sources()}",
        "profile": profile,
    }
    return {name: value for name, value in header.items() if value is not None}


def _cpu(capability: str) -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    return f"{names[0] if names else platform.processor()} ({capability})"


def _commit() -> str | None:
    git = ("git", "-C", str(ROOT))
    commit = _output(*git, "rev-parse", "--short=12", "HEAD")
    changed = _output(*git, "status", "--porcelain", "--untracked-files=no", "--", "gpsa_kernels", "csrc")
    return f"{commit}, changed" if commit and changed else commit


def sources(root: Path = ROOT) -> str:
    """A hash of what is measured, where no commit names it: the files of gpsa_kernels/ and csrc/ that are not built."""
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


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


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
    shared: Row = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            found = json.loads(line)
            if "started" in found:
                runs.append({**found, "rows": []})
                shared = {}
                continue
            excuses = {
                peer: {"status": status, "reason": reason}
                for status in EXCUSES
                for peer, reason in found.pop(status, {}).items()
            }
            lists = {name: found.pop(name) for name in [*found] if isinstance(found[name], list) and name != "peers"}
            held = {**shared, **found}
            shared = {name: value for name, value in held.items() if value is not None and name not in lists}
            common = {name: value for name, value in shared.items() if name != "peers"}
            rows: dict[str, Row] = {}
            for peer, *values in zip_longest(shared["peers"], *lists.values()):
                figures = {name: value for name, value in zip(lists, values, strict=True) if value is not None}
                if figures:
                    rows[peer] = {**common, "peer": peer, "status": "ok", **figures}
            for peer, excuse in excuses.items():
                rows[peer] = {**common, "peer": peer, **rows.get(peer, {}), **excuse}
            runs[-1]["rows"] += bounded([derived(_checked(row)) for row in rows.values()])
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: {type(error).__name__}: {error}") from error
    return runs, shared


def bounded(rows: list[Row]) -> list[Row]:
    """The rows of a measurement, without their floor where somebody went below it: it was none."""
    if all(row.get("floor_share", 0) <= 1 for row in rows):
        return rows
    return [{name: value for name, value in row.items() if not name.startswith("floor")} for row in rows]


def _checked(row: Row) -> Row:
    """Raises ValueError or KeyError where a row does not say what it is of, or says two things at once."""
    if row["status"] not in ("ok", *EXCUSES) or (row["status"] == "ok") == ("reason" in row):
        raise ValueError("a reason is given where, and only where, the status is known and not ok")
    if row["status"] != "ok" and "median_us" in row:
        raise ValueError(f"a time is given for what is {row['status']}")
    if not all(isinstance(row[name], str) for name in ("section", "workload", "peer")):
        raise ValueError("a row is of a section, a workload and a peer")
    return row


def append(path: Path, run: Run, rows: Iterable[Row]) -> None:
    """Adds ``rows`` to the file's last run, or begins one where that did not start when ``run`` did.

    A section tells each reason for which a peer is unavailable once.

    Raises:
        ValueError: the file is there and damaged, or a row is not one; nothing is written then.
    """
    runs, shared = _parsed(path) if path.exists() else ([], {})
    lines: list[Row] = []
    if not runs or runs[-1]["started"] != run["started"]:
        lines, shared = [{name: value for name, value in run.items() if name != "rows"}], {}
    told = {_excuse(row) for row in ([] if lines else runs[-1]["rows"]) if row["status"] == "unavailable"}
    fresh = [_checked(row) for row in rows if row["status"] != "unavailable" or _excuse(row) not in told]
    for _, group in groupby(fresh, lambda row: [row.get(name) for name in PLACE]):
        line, shared = _measurement([_rounded(row) for row in group], shared)
        lines.append(line)
    text = (path.read_text() if runs else "") + "".join(
        f"{json.dumps(line, separators=(',', ':'))}\n" for line in lines
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, text)


def _measurement(rows: list[Row], above: Row) -> tuple[Row, Row]:
    """Rows of one place as a line under what holds ``above`` it, and what holds below it."""
    names = dict.fromkeys(name for row in rows for name in row if name not in ("peer", "status", "reason"))
    measured = {row["peer"]: row for row in rows if row.keys() - {*SHARED, "peer", "status", "reason"}}
    shared = {name: rows[0][name] for name in PLACE if name in rows[0]}
    for name in SHARED[len(PLACE) :]:
        if len(values := {row[name] for row in rows if name in row}) == 1:
            (shared[name],) = values
    known = above.get("peers", [])
    shared["peers"] = known if [peer for peer in known if peer in measured] == [*measured] else [*measured]
    line = {name: shared.get(name) for name in {**shared, **above} if shared.get(name) != above.get(name)}
    for name in names:
        if name not in shared:
            values = [measured.get(peer, {}).get(name) for peer in shared["peers"]]
            while values and values[-1] is None:
                values.pop()
            line[name] = values
    for status in EXCUSES:
        if excused := {row["peer"]: row["reason"] for row in rows if row["status"] == status}:
            line[status] = excused
    return line, shared


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


def _excuse(row: Row) -> tuple[str, ...]:
    return row["section"], row["peer"], row["reason"]


def write(path: Path, text: str) -> None:
    """Replaces a file as a whole: whoever is interrupted leaves the old one."""
    new = path.with_name(f"{path.name}.unfinished")
    new.write_text(text)
    os.replace(new, path)


def last(path: Path, run: Run) -> Run | None:
    """The file's last run, if there is one and it was made on what ``run`` is made on, with the same versions.

    Raises:
        ValueError: the file is there and damaged.
    """
    runs = read(path) if path.exists() else []
    return runs[-1] if runs and _made_on(runs[-1]) == _made_on(run) else None


def _made_on(run: Run) -> Run:
    return {name: value for name, value in run.items() if name not in ("started", "rows")}


def file_name(device: str, device_type: str, date: str) -> str:
    """Of a machine's results of a day."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return f"{device_type}-{slug}-{date}.jsonl"


def newest(folder: Path = FOLDER) -> dict[str, Run]:
    """The run to show of every device type: the newest of the full profile, or of another if there is none.

    Rehearsals are never shown.
    """
    found = [run for path in sorted(folder.glob("*.jsonl")) for run in read(path) if run["profile"] != "dry"]
    return {run["device_type"]: run for run in sorted(found, key=lambda r: (r["profile"] == "full", r["started"]))}


def faults(rows: Iterable[Row], device: str, profile: str) -> list[Row]:
    """Rows of gpsa_kernels that are wrong, or failed, or on a GPU not there where all depends on them.

    All depends on the models and on the headline of the operator.
    """
    first = ("operator", str(headline(device, profile)))

    def needed(row: Row) -> bool:
        return device == "cuda" and (row["section"] == "models" or (row["section"], row["workload"]) == first)

    ours = [row for row in rows if row["peer"].startswith("gpsa_kernels") and row["status"] != "ok"]
    return [row for row in ours if row["status"] != "unavailable" or needed(row)]


def command_line(module: str, text: str | None) -> argparse.ArgumentParser:
    """A parser whose help is a module's docstring as it stands."""
    shown = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"python -m {module}", description=text, formatter_class=shown)
