"""Turns the newest CPU results into the README's tables.

python benchmarks/report.py            prints them
python benchmarks/report.py --write    puts them into README.md
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MARKERS = re.compile(r"(?s)(<!-- cpu results -->\n).*(<!-- end of cpu results -->)")
TIMED = (
    ("operator forward", "attention forward"),
    ("operator forward and backward", "attention forward + backward"),
    ("convit_tiny inference", "`convit_tiny` inference"),
    ("convit_tiny training step", "`convit_tiny` training step"),
)


def newest() -> Path:
    """The results file with the latest date in its name."""
    return max((ROOT / "benchmarks" / "results").glob("cpu-*.json"))


def tables(report: dict[str, Any]) -> str:
    """The results as markdown: ratios against timm, memory, and the cost of a call."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for row in report["rows"]:
        rows.setdefault(row["workload"], {})[row["peer"]] = row

    lines = [
        f"Measured on {report['date']}: {report['cpu']}, {report['threads']} threads, torch {report['torch']}, "
        f"timm {report['timm']}, float32; medians of {report['rounds']} interleaved rounds "
        "(models: half as many, each model in a process of its own). How many times faster than timm's own code:",
        "",
        "| | gpsa_kernels | without a position (SDPA, DeiT) |",
        "|---|---|---|",
    ]
    for workload, label in TIMED:
        peers = rows[workload]
        base = peers["timm"]["median_us"]
        ours = next(row for peer, row in peers.items() if peer.startswith("gpsa_kernels") and "eager" not in peer)
        plain = next(row for peer, row in peers.items() if "no position" in peer)
        lines.append(f"| {label} | {base / ours['median_us']:.2f}× | {base / plain['median_us']:.2f}× |")

    memory = rows["saved for backward, 24x24"]
    share = memory["timm"]["bytes"] / memory["gpsa_kernels, auto"]["bytes"]
    lines += [
        "",
        f"At 24×24 tokens the layer keeps 1/{share:.1f} of the memory that timm's keeps for the backward pass.",
    ]

    lines += ["", "| cost of a call before any kernel starts, µs | forward | forward + backward |", "|---|---|---|"]
    for peer in rows["dispatch forward"]:
        both = [rows[name][peer]["median_us"] for name in ("dispatch forward", "dispatch forward and backward")]
        lines.append(f"| `{peer}` | {both[0]:.0f} | {both[1]:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables into README.md")
    text = tables(json.loads(newest().read_text()))
    if parser.parse_args().write:
        readme = ROOT / "README.md"
        readme.write_text(MARKERS.sub(lambda found: found[1] + text + found[2], readme.read_text()))
    else:
        print(text)


if __name__ == "__main__":
    main()
