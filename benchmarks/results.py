"""The results' files, one a machine and day, to which lines of JSON are added and none replaced.

{"started": ..., "device": ..., ...}                      a run begins
{"section": ..., ..., "columns": "peer median_us ..."}    what the rows below have in common
["timm", 35120, ...]                                      a row: its columns' values, null for none

Figures have five significant digits. What follows from them (shapes, floors) is added when they are read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks import floors
from benchmarks.workloads import REFERENCE

Row = dict[str, Any]
Run = dict[str, Any]
FOLDER = Path(__file__).parent / "results"
STATUSES = ("ok", "wrong", "failed", "unavailable")

# ---- files ----------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[Run]:
    """A file's runs, each with its ``rows``.

    Raises:
        ValueError: it is damaged, or no results file.
    """
    runs: list[Run] = []
    common: Row = {}
    columns: list[str] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            found = json.loads(line)
            if isinstance(found, list):
                row = {name: value for name, value in zip(columns, found, strict=True) if value is not None}
                runs[-1]["rows"].append(floors.derived(_checked(common | row)))
            elif "started" in found:
                runs.append({**found, "rows": []})
            else:
                common = found
                columns = common.pop("columns").split()
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: {type(error).__name__}: {error}") from error
    return runs


def _checked(row: Row) -> Row:
    """Raises ValueError or KeyError where a row does not say what it is of, or says two things at once."""
    if row["status"] not in STATUSES or (row["status"] == "ok") == ("reason" in row):
        raise ValueError("a reason is given where, and only where, the status is known and not ok")
    if row["status"] != "ok" and "median_us" in row:
        raise ValueError(f"a time is given for what is {row['status']}")
    return {"section": row["section"], "workload": row["workload"], "peer": row["peer"], **row}


def append(path: Path, run: Run, rows: Iterable[Row]) -> None:
    """Adds ``rows`` to the file's last run, or begins one where that did not start when ``run`` did.

    A section tells each reason for which a peer is unavailable once.

    Raises:
        ValueError: the file is there and damaged, or a row is not one; nothing is written then.
    """
    runs = read(path) if path.exists() else []
    new = not runs or runs[-1]["started"] != run["started"]
    told = {_excuse(row) for row in ([] if new else runs[-1]["rows"]) if row["status"] == "unavailable"}
    fresh = [_checked(row) for row in rows if row["status"] != "unavailable" or _excuse(row) not in told]
    lines: list[Any] = [{name: value for name, value in run.items() if name != "rows"}] if new else []
    for _, group in groupby(sorted(fresh, key=_status), _status):
        lines += _table(list(group))
    text = (path.read_text() if runs else "") + "".join(map(_line, lines))
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, text)


def _excuse(row: Row) -> tuple[str, ...]:
    return row["section"], row["peer"], row["reason"]


def _status(row: Row) -> int:
    return STATUSES.index(row["status"])


def _table(rows: list[Row]) -> list[Any]:
    """Rows as lines: what they have in common, then the values of each."""
    names = dict.fromkeys(name for row in rows for name in row)
    common = {n: rows[0][n] for n in names if n != "peer" and all(n in row and row[n] == rows[0][n] for row in rows)}
    columns = [name for name in names if name not in common]
    return [{**common, "columns": " ".join(columns)}, *([row.get(name) for name in columns] for row in rows)]


def _line(value: Any) -> str:
    """JSON whose floats have five significant digits."""
    return json.dumps(json.loads(json.dumps(value), parse_float=_rounded), separators=(",", ":")) + "\n"


def _rounded(text: str) -> float:
    value = float(f"{float(text):.5g}")
    return int(value) if value.is_integer() else value


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


# ---- choosing rows --------------------------------------------------------------------------------------------------


def select(run: Run, **fields: Any) -> list[Row]:
    """The rows of a run that have these values."""
    return [row for row in run["rows"] if all(row.get(name) == value for name, value in fields.items())]


def unique(values: Iterable[Any]) -> list[Any]:
    """Each value once, in the order of first appearance."""
    return list(dict.fromkeys(values))


def is_ours(peer: str) -> bool:
    return peer.startswith("gpsa_kernels")


def without_position(peer: str) -> bool:
    return peer.startswith(("SDPA alone", "DeiT"))


def headline(run: Run, direction: str) -> list[Row]:
    """The peers at the first workload in one direction; on a GPU of the section with torch.compile, if it is there.

    On a CPU nearly everyone is slower beside compiled peers, so these stay in a table of their own.
    """
    for section in ("compiled", "operator") if run["device_type"] == "cuda" else ("operator", "compiled"):
        rows = select(run, section=section, direction=direction)
        if rows:
            first = [row for row in rows if row["workload"] == rows[0]["workload"]]
            return [row for row in first if row["temperature"] == first[0]["temperature"]]
    return []


def speedups(rows: Sequence[Row]) -> dict[str, float]:
    """How many times faster than timm's own code every peer is that has a time."""
    times = {row["peer"]: row["median_us"] for row in rows if "median_us" in row}
    return {peer: times[REFERENCE] / us for peer, us in times.items()} if REFERENCE in times else {}


def header(run: Run) -> str:
    """Where, when and with what a run was measured."""
    versions = [f"torch {run['torch']}", f"timm {run['timm']}"]
    if run["device_type"] == "cuda":
        versions.insert(0, f"driver {run.get('driver', 'unknown')}")
        versions.append(f"triton {run.get('triton', 'not installed')}")
    else:
        versions.insert(0, f"{run['threads']} threads")
    profile = "" if run["profile"] == "full" else f", {run['profile']} profile"
    return f"Measured on {run['started'][:10]}: {run['device']}, {', '.join(versions)}{profile}."
