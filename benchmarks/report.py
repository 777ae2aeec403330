"""Turns the newest results into tables and pictures.

python -m benchmarks.report                    prints all tables
python -m benchmarks.report --tables models    prints some
python -m benchmarks.report --write            brings those of README.md and docs/ up to date, and their pictures
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks import floors, results
from benchmarks.results import Row, Run, header, headline, is_ours, select, speedups, unique, without_position
from benchmarks.workloads import DIRECTION_NAMES, REFERENCE

ROOT = Path(__file__).parent.parent
PLOTS = ROOT / "benchmarks" / "plots"
FILES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
MARKED = re.compile(r"(?s)(<!-- (?!end of )([a-z ]+) -->\n)(.*?)(<!-- end of \2 -->)")
SHOWN = re.compile(r"\(benchmarks/plots/(.*?)\)")


def compared(run: Run) -> list[tuple[str, list[Row]]]:
    """The comparisons of the README: a label and the rows of all peers."""
    found = [(f"attention {DIRECTION_NAMES[direction]}", headline(run, direction)) for direction in ("forward", "both")]
    for direction in ("forward", "both"):
        found.append((f"layer {DIRECTION_NAMES[direction]}", select(run, section="layer", direction=direction)))
    for row in run["rows"]:
        if row["section"] == "models" and row["peer"] == REFERENCE:
            compiled = ", compiled" if row["compiled"] else ""
            purpose = "inference" if row["direction"] == "inference" else "training step"
            label = f"`convit_{row['size']}` {row['image']} px {purpose}{compiled}"
            found.append((label, select(run, section="models", workload=row["workload"], direction=row["direction"])))
    return [(label, rows) for label, rows in found if speedups(rows)]


def summary(run: Run) -> str:
    """The README's tables: speed-ups over timm, memory, the cost of a call."""
    rows = compared(run)
    ratios = [(label, speedups(found)) for label, found in rows]
    peers = unique(peer for _, found in ratios for peer in found)
    others = ["eager, position once", "SDPA + positional map", "FlexAttention twice"]
    columns = ["timm, compiled", *others, *(peer for peer in peers if is_ours(peer) and not peer.endswith(" eager"))]
    columns = [peer for peer in columns if peer in peers and not peer.endswith("auto, compiled")]
    used = [row["rounds"] for _, found in rows for row in found if "rounds" in row]
    dtypes = " and ".join(unique(row["dtype"] for _, found in rows for row in found))
    lines = [
        f"{header(run)} In {dtypes}; medians of {_span(used)} interleaved rounds.",
        "How many times faster than timm's own code:",
        "",
        *_head("", *columns, "without a position (SDPA, DeiT)"),
    ]
    for label, found in ratios:
        plain = max((ratio for peer, ratio in found.items() if without_position(peer)), default=None)
        lines.append(_line([label, *(_times(found.get(peer)) for peer in columns), _times(plain)]))
    return "\n".join(lines + _memory(run) + _dispatch(run)) + "\n"


def _memory(run: Run) -> list[str]:
    for row in select(run, section="tokens", direction="both", rows=24, columns=24, peer=REFERENCE):
        same = select(run, section="tokens", direction="both", workload=row["workload"])
        ours = [r["memory_bytes"] for r in same if is_ours(r["peer"]) and "memory_bytes" in r]
        if ours and "memory_bytes" in row:
            what = "it takes beside its inputs" if run["device_type"] == "cuda" else "it keeps for the backward pass"
            ratio = row["memory_bytes"] / min(ours)
            return ["", f"At 24×24 tokens the memory that {what} is 1/{ratio:.1f} of what timm's code takes."]
    return []


def _dispatch(run: Run) -> list[str]:
    peers = unique(row["peer"] for row in select(run, section="dispatch"))
    if not peers:
        return []
    lines = ["", *_head("cost of a call before any kernel starts, µs", "forward", "forward + backward")]
    for peer in peers:
        both = [select(run, section="dispatch", peer=peer, direction=direction)[0] for direction in ("forward", "both")]
        lines.append(_line([f"`{peer}`", *(f"{row['median_us']:.0f}" for row in both)]))
    return lines


def attention(run: Run) -> str:
    """Every peer of every workload of the operator, with times, floors and memory, and what became of the others."""
    lines = [header(run)]
    for section in ("operator", "compiled", "layer", "tokens", "batch"):
        for workload in unique(row["workload"] for row in select(run, section=section)):
            rows = select(run, section=section, workload=workload)
            timed = [row for row in rows if "median_us" in row]
            if timed:
                lines += ["", f"**{section}: {workload}**", "", *_timed_table(timed)]
            lines += _excuses(rows)
    return "\n".join(lines) + "\n"


def _timed_table(rows: list[Row]) -> list[str]:
    lines = _head("", "direction", "µs", "p20 to p80", *COMPARED)
    for row in rows:
        same = [r for r in rows if (r["direction"], r["temperature"]) == (row["direction"], row["temperature"])]
        where = f"{DIRECTION_NAMES[row['direction']]}, {row['temperature']}"
        spread = f"{row['p20_us']:.1f} to {row['p80_us']:.1f}"
        lines.append(_line([row["peer"], where, f"{row['median_us']:.1f}", spread, *_compared(row, same)]))
    return lines


COMPARED = ("times timm's speed", "floor, µs", "share of it", "memory, MB", "off by")


def _compared(row: Row, same: list[Row]) -> list[str]:
    """The cells of COMPARED; ``same`` are the rows of the same round."""
    bounded = "floor_us" in row
    return [
        _times(speedups(same).get(row["peer"])),
        f"{row['floor_us']:.1f} ({row['floor_bound']})" if bounded else "",
        f"{row['floor_share']:.0%}" if bounded else "",
        f"{row['memory_bytes'] / 1e6:.1f}" if "memory_bytes" in row else "",
        f"{row['deviation']:.0e}" if "deviation" in row else "",
    ]


def _excuses(rows: list[Row]) -> list[str]:
    """Who has no time, and why, said once for all directions."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            where = found.setdefault((row["peer"], f"{row['status']}: {row['reason']}"), [])
            if "direction" in row and row["status"] != "unavailable":  # that is so in the whole section
                where.append(f" {DIRECTION_NAMES.get(row['direction'], row['direction'])}")
    lines = [f"- {peer}{','.join(unique(where))}: {why}" for (peer, why), where in found.items()]
    return ["", *lines] if lines else []


def models(run: Run) -> str:
    """Images per second and memory of the models."""
    lines = [header(run), "", *_head("", "", "", "images/s", *COMPARED)]
    rows = select(run, section="models")
    for row in [row for row in rows if "median_us" in row]:
        same = select(run, section="models", workload=row["workload"], direction=row["direction"])
        speed = f"{1e6 * row['batch'] / row['median_us']:.1f}"
        lines.append(_line([row["workload"], row["direction"], row["peer"], speed, *_compared(row, same)]))
    return "\n".join(lines + _excuses(rows)) + "\n"


def accuracy(run: Run) -> str:
    """Maximum and RMS error of every backend and tensor, beside those of the formula in eager PyTorch."""
    lines = [header(run)]
    for workload in unique(row["workload"] for row in select(run, section="accuracy")):
        rows = select(run, section="accuracy", workload=workload)
        lines += ["", f"**{workload}**", ""]
        lines += _head(
            "backend", "tensor", "maximum error", "of eager", "of autocast", "RMS error", "of eager", "of autocast"
        )
        for row in [row for row in rows if row["status"] == "ok"]:
            errors = [row[f"{who}{kind}_error"] for kind in ("max", "rms") for who in ("", "eager_", "autocast_")]
            lines.append(_line([row["peer"].split()[-1], row["tensor"], *(f"{error:.1e}" for error in errors)]))
        lines += _excuses(rows)
    return "\n".join(lines) + "\n"


def _head(*titles: str) -> list[str]:
    return [_line(titles), "|---" * len(titles) + "|"]


def _line(cells: Iterable[str]) -> str:
    return re.sub("  +", " ", f"| {' | '.join(cells)} |")


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}×"


def _span(values: list[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"


# ---- files ----------------------------------------------------------------------------------------------------------

TABLES: dict[str, Callable[[Run], str]] = {
    "summary": summary,
    "attention": attention,
    "models": models,
    "accuracy": accuracy,
}


def block(marker: str, runs: dict[str, Run]) -> str:
    """The text between a marker and its end; raises KeyError where there is no such block."""
    if marker == "roofline estimate":
        return floors.estimates()
    device, name = {"cpu results": ("cpu", "CPU"), "gpu results": ("cuda", "GPU")}[marker]
    return summary(runs[device]) if device in runs else f"No {name} has run these benchmarks yet.\n"


def filled(text: str, runs: dict[str, Run]) -> str:
    """``text`` with every marked block made anew."""
    return MARKED.sub(lambda found: found[1] + block(found[2], runs) + found[4], text)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="into README and docs; draws their pictures")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=tuple(TABLES), help="those to print")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="the folder with the results")
    parser.add_argument("--plots", type=Path, help="draw all pictures into this folder")
    options = parser.parse_args(arguments)
    runs = results.newest(options.results)
    if not (options.write or options.plots):
        print("\n".join(TABLES[name](run) for run in runs.values() for name in options.tables))
        return
    from benchmarks import plots  # matplotlib is not everywhere

    if options.plots:
        plots.draw(runs, options.plots)
    if options.write:
        for path in FILES:
            path.write_text(filled(path.read_text(), runs))
        plots.draw(runs, PLOTS, SHOWN.findall("".join(path.read_text() for path in FILES)))


if __name__ == "__main__":
    main()
