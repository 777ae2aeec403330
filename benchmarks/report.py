"""Turns the newest results into tables and pictures.

python -m benchmarks.report                    prints all tables
python -m benchmarks.report --tables models    prints some
python -m benchmarks.report --write            brings those of README.md and docs/ up to date, and their pictures
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.results import PLACE, ROOT, Row, Run
from benchmarks.workloads import DIRECTION_NAMES, OPERATOR_SECTIONS, REFERENCE, TENSORS, attention_work, headline

PLOTS = ROOT / "benchmarks" / "plots"
FILES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
MARKED = re.compile(r"(?s)(<!-- (?!end of )([a-z ]+) -->\n)(.*?)(<!-- end of \2 -->)")
SHOWN = re.compile(r"\((?:\.\./)?benchmarks/plots/(.*?)\)")

# ---- choosing rows --------------------------------------------------------------------------------------------------


def measurements(run: Run, **fields: Any) -> list[list[Row]]:
    """The rows of a run that have these values, a list for each round of peers."""
    found: dict[Any, list[Row]] = {}
    for row in run["rows"]:
        if all(row.get(name) == value for name, value in fields.items()):
            found.setdefault(tuple(row.get(name) for name in PLACE), []).append(row)
    return list(found.values())


def unique(values: Iterable[Any]) -> list[Any]:
    """Each value once, in the order of first appearance."""
    return list(dict.fromkeys(values))


def without_position(peer: str) -> bool:
    return peer.startswith(("SDPA alone", "DeiT"))


def taken(rows: Sequence[Row]) -> str:
    """Our peer that "auto" takes in a measurement; it had no choice in the runs that do not say."""
    return f"gpsa_kernels {rows[0].get('auto', 'sdpa')}"


def timed(rows: Iterable[Row]) -> dict[str, Row]:
    """The rows that have a time, by peer."""
    return {row["peer"]: row for row in rows if "median_us" in row}


def speedups(rows: Sequence[Row], than: str = REFERENCE) -> dict[str, float]:
    """How many times faster than timm's own code, or another peer, every peer is that has a time."""
    times = {peer: row["median_us"] for peer, row in timed(rows).items()}
    return {peer: times[than] / us for peer, us in times.items()} if than in times else {}


def at_headline(run: Run, direction: str) -> list[list[Row]]:
    """The measurements of the headline in one direction: one of every section that has it, on a GPU the cold ones."""
    place = {"workload": str(headline(run["device_type"], run["profile"])), "direction": direction}
    found = measurements(run, **place, temperature="cold" if run["device_type"] == "cuda" else "warm")
    return [rows for rows in found if rows[0]["section"] in OPERATOR_SECTIONS and speedups(rows)]


def pooled(found: Iterable[Sequence[Row]]) -> dict[str, list[float]]:
    """The speed-ups of every peer, one of every measurement that it has a time in."""
    ratios: dict[str, list[float]] = {}
    for rows in found:
        for peer, ratio in speedups(rows).items():
            ratios.setdefault(peer, []).append(ratio)
    return ratios


def reached(found: Iterable[Sequence[Row]]) -> list[float]:
    """The speed-up of what "auto" takes, one of every measurement that has it."""
    return [speedups(rows)[taken(rows)] for rows in found if taken(rows) in speedups(rows)]


def header(run: Run) -> str:
    """Where, when and with what a run was measured."""
    facts = [f"{run['threads']} threads"]
    if run["device_type"] == "cuda":
        facts = [f"driver {run.get('driver', 'unknown')}", f"triton {run.get('triton', 'not installed')}"]
    facts += [f"torch {run['torch']}", f"timm {run['timm']}"]
    facts += [] if run["profile"] == "full" else [f"{run['profile']} profile"]
    return f"Measured on {run['started'][:10]}: {run['device']}, {', '.join(facts)}."


# ---- tables ---------------------------------------------------------------------------------------------------------


def table(titles: Sequence[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a table in Markdown, after an empty one; none where it has no rows."""
    lines = [re.sub("  +", " ", f"| {' | '.join(cells)} |") for cells in (titles, *rows)]
    return ["", lines[0], "|---" * len(titles) + "|", *lines[1:]] if lines[1:] else []


def times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}×"


def spread(ratios: Sequence[float]) -> str:
    """The median, and the range where there is one."""
    if not ratios:
        return ""
    ends = unique(f"{end(ratios):.2f}" for end in (min, max))
    return times(statistics.median(ratios)) + (f" ({' to '.join(ends)})" if ends[1:] else "")


def glance(runs: dict[str, Run]) -> str:
    """The README's first figures: the speed of what "auto" takes, a row a device."""
    lines = []
    for device, name in (("cpu", "CPU"), ("cuda", "GPU")):
        if (run := runs.get(device)) is None:
            lines.append([name, "not measured yet: [`make gpu-report`](docs/benchmarks.md) fills this row"])
            continue
        columns = [at_headline(run, direction) for direction in ("forward", "both")]
        for direction in ("inference", "training"):
            found = measurements(run, section="models", direction=direction)
            columns.append([rows for rows in found if not rows[0]["workload"].endswith("compiled")])
        names = unique(taken(rows).split()[-1] for column in columns for rows in column)
        lines.append([f"{name}, `{'` and `'.join(names)}`", *(spread(reached(column)) for column in columns)])
    titles = "attention forward", "forward + backward", "model inference", "forward + backward"
    return "\n".join(table(("times timm's own speed", *titles), lines)[1:]) + "\n"


def comparison(run: Run) -> str:
    """All peers at the headline, the slowest first, and their memory at 24 x 24 tokens."""
    found = {direction: at_headline(run, direction) for direction in ("forward", "both")}
    ratios = {direction: pooled(those) for direction, those in found.items()}
    every = [rows for those in found.values() for rows in those]
    if not every:
        return ""
    ours = unique(map(taken, every))
    for direction, those in found.items():
        beside = [rows for rows in those if rows[0]["section"] in ("compiled", "tuned")]
        ratios[direction]["gpsa_kernels, beside compiled peers"] = reached(beside)
    excuses = ((row["peer"], row["direction"], row["status"]) for rows in every for row in rows)
    failed = {(peer, one): status for peer, one, status in excuses if status in ("wrong", "failed")}
    wide = (row for row in run["rows"] if (row["section"], row.get("direction")) == ("tokens", "both"))
    memory = {row["peer"]: _memory(row) for row in wide if "24x24" in row["workload"]}
    speed = {peer: statistics.median(r) for one in reversed(ratios.values()) for peer, r in one.items() if r}
    plain = [peer for peer in sorted(speed, key=speed.__getitem__) if without_position(peer)]
    on_gpu = run["device_type"] == "cuda"
    lines = []
    for peer in sorted(speed.keys() - plain[:-1], key=speed.__getitem__):
        name = f"**{peer}**, what `auto` takes" if peer in ours else f"{peer}: no position" if peer in plain else peer
        cells = [spread(ratios[one].get(peer, [])) or failed.get((peer, one), "") for one in ratios]
        lines.append([name, *cells, memory.get(peer, "")])
    taking = "beyond what was there" if on_gpu else "kept for backward"
    graphs = ", by replaying CUDA graphs, so without the cost of a call from Python" if on_gpu else ""
    about = f"median (smallest to largest) of its {max(map(len, found.values()))} measurements{graphs}."
    titles = "times timm's own speed", "forward", "forward + backward", f"MB {taking} at 24×24"
    return "\n".join([f"{header(run)} {every[0][0]['workload']}: {about}", *table(titles, lines)]) + "\n"


def details(run: Run) -> str:
    """Layers and models, where something else is faster, and the cost of a call."""
    rounds = [row["rounds"] for row in run["rows"] if "rounds" in row]
    many = f" Medians of {min(rounds)} to {max(rounds)} interleaved rounds." if rounds else ""
    device = run["device_type"]
    picture = f"![How many times faster than timm's own code](../benchmarks/plots/{device}-speedups.png)"
    return "\n".join([f"{header(run)}{many}", "", picture, *_whole(run), *_losses(run), *_dispatch(run)]) + "\n"


def _whole(run: Run) -> list[str]:
    found = measurements(run, section="layer") + measurements(run, section="models")
    found = [rows for rows in found if speedups(rows)]
    peers = unique(peer for rows in found for peer in timed(rows) if peer != REFERENCE and not without_position(peer))
    lines = []
    for rows in found:
        ratios, timm, cells = speedups(rows), timed(rows)[REFERENCE], {}
        for peer, row in timed(rows).items():
            ends = timm["p20_us"] / row["p80_us"], timm["p80_us"] / row["p20_us"]
            cells[peer] = f"{times(ratios[peer])} ({ends[0]:.2f} to {ends[1]:.2f})"
        plain = max((ratio for peer, ratio in ratios.items() if without_position(peer)), default=None)
        label = f"{timm['section'].replace('models', '')} {timm['workload']} {_direction(timm)}"
        lines.append([label, *(cells.get(peer, "") for peer in peers), times(plain)])
    return table(("times timm's own speed", *peers, "without a position (SDPA, DeiT)"), lines)


def _direction(row: Row) -> str:
    return DIRECTION_NAMES.get(row["direction"], row["direction"]).replace("training", "forward + backward")


def _losses(run: Run) -> list[str]:
    lines: dict[str, dict[str, str]] = {}
    for rows in measurements(run):
        ratios = speedups(rows, than=taken(rows))
        faster = [peer for peer in ratios if ratios[peer] > 1 and not without_position(peer)]
        faster = [peer for peer in faster if peer != "gpsa_kernels auto, compiled"]
        if faster:
            best, first = max(faster, key=ratios.__getitem__), rows[0]
            warm = " warm" if run["device_type"] == "cuda" and first.get("temperature") == "warm" else ""
            cells = lines.setdefault(f"{first['section']} {first['workload']}{warm}", {})
            cells[_direction(first).replace("inference", "forward")] = f"{best}: {times(ratios[best])}"
    columns = DIRECTION_NAMES.values()
    rows = [[label, *(cells.get(column, "") for column in columns)] for label, cells in lines.items()]
    return table(("faster than what `auto` takes, times its speed", *columns), rows)


def _dispatch(run: Run) -> list[str]:
    cells: dict[str, list[str]] = {}
    for rows in measurements(run, section="dispatch"):
        for peer, row in timed(rows).items():
            cells.setdefault(f"`{peer}`", []).append(f"{row['median_us']:.0f}")
    titles = "cost of a call before any kernel starts, µs", "forward", "forward + backward"
    return table(titles, ([peer, *those] for peer, those in cells.items()))


def measured(run: Run, sections: Sequence[str]) -> str:
    """Times, floors and memory of every peer of every workload, and what became of the others."""
    lines = [header(run)]
    compared = "images/s", "times timm's speed", "floor, µs", "share of it", "memory, MB", "off by"
    for section, workload in unique((row["section"], row["workload"]) for row in run["rows"]):
        if section not in sections:
            continue
        images = int(re.findall(r"B=(\d+)", workload)[0])
        found = measurements(run, section=section, workload=workload)
        cells = []
        for rows in found:
            bounded = all(row.get("floor_us", 0) <= row["median_us"] for row in timed(rows).values())
            for peer, row in timed(rows).items():
                us, bound = row["median_us"], ["", ""]
                if bounded and "floor_us" in row:
                    bound = [f"{_us(row['floor_us'])} ({row['floor_bound']})", f"{row['floor_us'] / us:.0%}"]
                where = f"{_direction(row)}, {row['temperature']}" if "temperature" in row else _direction(row)
                speed = [f"{1e6 * images / us:.1f}", times(speedups(rows).get(peer))]
                exact = f"{row['deviation']:.0e}" if "deviation" in row else ""
                percentiles = f"{_us(row['p20_us'])} to {_us(row['p80_us'])}"
                cells.append([peer, where, _us(us), percentiles, *speed, *bound, _memory(row), exact])
        lines += ["", f"**{section}: {workload}**", *table(("", "direction", "µs", "p20 to p80", *compared), cells)]
        lines += _excuses(row for rows in found for row in rows)
    return "\n".join(lines) + "\n"


def _us(us: float) -> str:
    return f"{us:.1f}" if us < 1000 else f"{us:.0f}"


def _memory(row: Row) -> str:
    return f"{row['memory_mb']:.1f}" if "memory_mb" in row else ""


def _excuses(rows: Iterable[Row]) -> list[str]:
    """Who has no time, and why, said once for all directions."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            where = found.setdefault((row["peer"], f"{row['status']}: {row['reason']}"), [])
            if "direction" in row and row["status"] != "unavailable":  # that is so in the whole section
                where.append(f" {_direction(row)}")
    lines = [f"- {peer}{','.join(unique(where))}: {why}" for (peer, why), where in found.items()]
    return ["", *lines] if lines else []


def accuracy(run: Run) -> str:
    """Maximum and RMS error of every backend and tensor, beside those of the formula in eager PyTorch."""
    lines = [header(run)]
    for rows in measurements(run, section="accuracy"):
        found = {row["peer"]: row for row in rows if row["status"] == "ok"}
        eager, cells = found["formula"], []
        for peer in [peer for peer in found if peer.startswith("gpsa_kernels")]:
            beside = (found[peer], eager, found.get("formula, autocast", eager))
            for index, tensor in enumerate(TENSORS):
                errors = [one[f"{kind}_error"][index] for kind in ("max", "rms") for one in beside]
                cells.append([peer.split()[-1], tensor, *(f"{error:.1e}" for error in errors)])
        others = "of eager", "of autocast"
        titles = "backend", "tensor", "maximum error", *others, "RMS error", *others
        lines += ["", f"**{rows[0]['workload']}**", *table(titles, cells), *_excuses(rows)]
    return "\n".join(lines) + "\n"


# what the vendor publishes, a second: memory bytes, dense bfloat16 flops with float32 sums, and exponentials, of which
# the special function units do 16 a clock on each multiprocessor
CHIPS = {
    "B200": (8e12, 2250e12, 16 * 148 * 1.86e9),
    "H200 SXM": (4.8e12, 989e12, 16 * 132 * 1.83e9),
    "H100 SXM": (3.35e12, 989e12, 16 * 132 * 1.83e9),
    "A100 SXM 80 GB": (2.04e12, 312e12, 16 * 108 * 1.41e9),
    "RTX 4090": (1.008e12, 165e12, 16 * 128 * 2.52e9),
}


def roofline(_: Run) -> str:
    """What the headline takes at least by published rates, no measurement."""
    case, lines = headline("cuda", "full"), []
    for name, chip in CHIPS.items():
        for direction in ("forward", "backward"):
            work = attention_work(case, direction)
            took = [1e6 * amount / rate for amount, rate in zip(work, chip, strict=True)]
            lines.append([name, direction, *(f"{us:.0f}" for us in (*took, max(took), sum(took)))])
    titles = "", "", "memory", "matrix products", "exponentials", "overlapped", "in turn"
    about = f"**An estimate, not a measurement**: the least work of {case} at the vendor's published rates, in µs."
    return "\n".join([about, *table(titles, lines)]) + "\n"


TABLES: dict[str, Callable[[Run], str]] = {
    "comparison": comparison,
    "details": details,
    "attention": partial(measured, sections=("layer", *OPERATOR_SECTIONS)),
    "models": partial(measured, sections=("models",)),
    "accuracy": accuracy,
    "roofline": roofline,
}

# ---- pictures, whose libraries are not everywhere -------------------------------------------------------------------


def draw(runs: dict[str, Run], folder: Path) -> list[Path]:
    """How many times timm's speed every peer reaches at the headline, a picture for each device; the files written.

    A picture's metadata says which run it shows.
    """
    import PIL.Image
    from matplotlib.figure import Figure
    from PIL.PngImagePlugin import PngInfo

    written = []
    for device, run in runs.items():
        found = {direction: pooled(at_headline(run, direction)) for direction in ("forward", "both")}
        speed = {peer: statistics.median(r) for those in reversed(found.values()) for peer, r in those.items()}
        peers = sorted(speed, key=speed.__getitem__)
        figure = Figure(figsize=(6.5, 0.8 + 0.36 * len(peers)), layout="constrained")
        axes = figure.subplots()
        for (direction, ratios), colour, shift in zip(found.items(), ("#0072B2", "#E69F00"), (0.2, -0.2), strict=True):
            places = [place + shift for place, peer in enumerate(peers) if peer in ratios]
            medians = [statistics.median(ratios[peer]) for peer in peers if peer in ratios]
            below = [statistics.median(ratios[peer]) - min(ratios[peer]) for peer in peers if peer in ratios]
            above = [max(ratios[peer]) - statistics.median(ratios[peer]) for peer in peers if peer in ratios]
            label = DIRECTION_NAMES[direction]
            bars = axes.barh(places, medians, 0.38, xerr=[below, above], color=colour, ecolor="#666666", label=label)
            axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=7)
        axes.set_yticks(range(len(peers)), peers, fontsize=8)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xlabel("times timm's speed, median and range", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower right", frameon=False, fontsize=8)
        drawn, text = BytesIO(), PngInfo()
        figure.savefig(drawn, dpi=80)
        text.add_text("Description", f"from the run of {run['started']}")
        folder.mkdir(parents=True, exist_ok=True)
        written.append(folder / f"{device}-speedups.png")
        PIL.Image.open(drawn).convert("RGB").quantize(8).save(written[-1], optimize=True, pnginfo=text)
    return written


# ---- files ----------------------------------------------------------------------------------------------------------

UNMEASURED = "No GPU has run these benchmarks yet.\n"
BLOCKS: dict[str, Callable[[dict[str, Run]], str]] = {
    "glance": glance,
    "comparison": lambda runs: "\n".join(map(comparison, runs.values())),
    "details": lambda runs: "\n".join([*map(details, runs.values()), *([] if "cuda" in runs else [UNMEASURED])]),
}


def filled(text: str, runs: dict[str, Run]) -> str:
    """``text`` with every marked block made anew; raises KeyError where there is no such block."""
    return MARKED.sub(lambda found: found[1] + BLOCKS[found[2]](runs) + found[4], text)


def main(arguments: list[str] | None = None) -> None:
    parser = results.command_line("benchmarks.report", __doc__)
    parser.add_argument("--write", action="store_true", help="into README and docs; draws their pictures")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=tuple(TABLES), help="those to print")
    options = parser.parse_args(arguments)
    runs = results.newest()
    if not options.write:
        print("\n".join(unique(TABLES[name](run) for run in runs.values() for name in options.tables)))
        return
    for path in FILES:
        path.write_text(filled(path.read_text(), runs))
    draw(runs, PLOTS)


if __name__ == "__main__":
    main()
