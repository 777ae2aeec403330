"""The results' files: one a machine and day, with every run of that day; rows are added, never replaced.

{"schema": 1, "runs": [{"started": ..., "device": ..., ..., "rows": [{...}, ...]}, ...]}
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SCHEMA = 1
FOLDER = Path(__file__).parent / "results"

# name -> type; "?" marks what may be absent
RUN: dict[str, type] = {
    "started": str,
    "device": str,
    "device_type": str,
    "driver?": str,
    "threads": int,
    "python": str,
    "torch": str,
    "triton?": str,
    "timm": str,
    "gpsa_kernels": str,
    "commit?": str,
    "profile": str,
    "rows": list,
}
_TIMES: dict[str, type] = {
    "section": str,
    "workload": str,
    "direction": str,
    "peer": str,
    "status": str,
    "reason?": str,
    "timer?": str,
    "rounds?": int,
    "median_us?": float,
    "p20_us?": float,
    "p80_us?": float,
}
_EXACT: dict[str, type] = {"deviation?": float, "eager_deviation?": float, "allowed_deviation?": float}
_MEMORY: dict[str, type] = {"memory_bytes?": int, "memory_kind?": str}
_FLOOR: dict[str, type] = {
    "bytes?": int,
    "flops?": int,
    "copy_gb_s?": float,
    "matmul_tflop_s?": float,
    "floor_us?": float,
    "floor_bound?": str,
    "floor_share?": float,
}
_CASE: dict[str, type] = {"batch": int, "heads": int, "rows": int, "columns": int, "head_dim": int, "dtype": str}
_ATTENTION = {**_TIMES, **_CASE, "temperature": str, **_EXACT, **_MEMORY, **_FLOOR}
_MODEL: dict[str, type] = {"size": str, "image": int, "batch": int, "dtype": str, "compiled": bool}
ROWS: dict[str, dict[str, type]] = {
    **dict.fromkeys(("operator", "tokens", "batch", "compiled", "layer"), _ATTENTION),
    "models": {**_TIMES, **_MODEL, "images_per_s?": float, **_EXACT, **_MEMORY, **_FLOOR},
    "dispatch": _TIMES,
    "accuracy": {
        "section": str,
        "workload": str,
        "peer": str,
        "status": str,
        "reason?": str,
        **_CASE,
        "tensor?": str,
        **{f"{who}{kind}_error?": float for who in ("", "eager_", "autocast_") for kind in ("max", "rms")},
    },
    "clocks": {
        "section": str,
        "workload": str,
        "peer": str,
        "status": str,
        "sm_mhz?": float,
        "memory_mhz?": float,
        "celsius?": float,
        "watts?": float,
    },
}
STATUSES = ("ok", "wrong", "failed", "unavailable")


def check(document: Any) -> None:
    """Raises ValueError, naming the place, where ``document`` is not a results file of this schema."""
    if not isinstance(document, dict) or set(document) != {"schema", "runs"} or document["schema"] != SCHEMA:
        raise ValueError(f"not a results file of schema {SCHEMA}")
    for run in document["runs"]:
        _check_fields(run, RUN, f"run {run.get('started')}")
        for number, row in enumerate(run["rows"]):
            where = f"run {run['started']}, row {number}"
            if row.get("section") not in ROWS:
                raise ValueError(f"{where}: section {row.get('section')!r} is not one of {', '.join(ROWS)}")
            _check_fields(row, ROWS[row["section"]], where)
            if row["status"] not in STATUSES:
                raise ValueError(f"{where}: status {row['status']!r} is not one of {', '.join(STATUSES)}")
            if (row["status"] == "ok") == ("reason" in row):
                raise ValueError(f"{where}: a reason is given where, and only where, the status is not ok")
            if row["status"] != "ok" and "median_us" in row:
                raise ValueError(f"{where}: a time is given for what is {row['status']}")
    starts = [run["started"] for run in document["runs"]]
    if len(set(starts)) != len(starts):
        raise ValueError("two runs have the same start")


def _check_fields(found: dict[str, Any], schema: dict[str, type], where: str) -> None:
    fields = {name.rstrip("?"): kind for name, kind in schema.items()}
    missing = [name for name in schema if not name.endswith("?") and name not in found]
    unknown = [name for name in found if name not in fields]
    if missing or unknown:
        raise ValueError(f"{where}: missing {missing}, unknown {unknown}")
    for name, value in found.items():
        kind = (int, float) if fields[name] is float else fields[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and fields[name] is not bool):
            raise ValueError(f"{where}: {name} is {value!r}, not a {fields[name].__name__}")


def read(path: Path) -> dict[str, Any]:
    """A checked results file.

    Raises:
        ValueError: it is not one.
    """
    document = json.loads(path.read_text())
    check(document)
    return document


def last(path: Path, run: dict[str, Any]) -> dict[str, Any] | None:
    """The file's last run, if there is one and it was made on what ``run`` is made on, with the same versions.

    Raises:
        ValueError: the file is there but no results file.
    """
    runs = read(path)["runs"] if path.exists() else []
    fields = {name.rstrip("?") for name in RUN} - {"started", "rows"}
    same = bool(runs) and all(runs[-1].get(name) == run.get(name) for name in fields)
    return runs[-1] if same else None


def append(path: Path, run: dict[str, Any], rows: Sequence[Row]) -> None:
    """Adds ``rows`` to the run that started when ``run`` did, which is added if it is new; the file too.

    Raises:
        ValueError: the file is there but no results file, or a row does not fit the schema; nothing is written then.
    """
    document = read(path) if path.exists() else {"schema": SCHEMA, "runs": []}
    same = [old for old in document["runs"] if old["started"] == run["started"]]
    if not same:
        same = [{**run, "rows": []}]
        document["runs"] += same
    same[0]["rows"] += json.loads(json.dumps(rows))
    check(document)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(_text(document))
    os.replace(unfinished, path)  # whoever is interrupted leaves the old file whole


def _text(document: dict[str, Any]) -> str:
    """JSON with a line for each row, so that a diff shows what was added."""
    placeholder = "rows of run {}"
    runs = [{**run, "rows": placeholder.format(i)} for i, run in enumerate(document["runs"])]
    text = json.dumps({**document, "runs": runs}, indent=1)
    for i, run in enumerate(document["runs"]):
        lines = ",\n   ".join(json.dumps(row) for row in run["rows"])
        text = text.replace(json.dumps(placeholder.format(i)), f"[\n   {lines}\n  ]" if lines else "[]")
    return text + "\n"


def file_name(device: str, device_type: str, date: str) -> str:
    """Of a machine's results of a day."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return f"{device_type}-{slug}-{date}.json"


def newest(folder: Path = FOLDER) -> dict[str, dict[str, Any]]:
    """The run to show of every device type: the newest of the full profile, or of another if there is none.

    Rehearsals are never shown.
    """
    chosen: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        for run in read(path)["runs"]:
            if run["profile"] == "dry":
                continue
            best = chosen.setdefault(run["device_type"], run)
            if (run["profile"] == "full", run["started"]) > (best["profile"] == "full", best["started"]):
                chosen[run["device_type"]] = run
    return chosen
