"""Turns the newest results into tables and pictures.

python -m benchmarks.report                    prints all tables
python -m benchmarks.report --tables models    prints some
python -m benchmarks.report --write            brings those of README.md and docs/ up to date, and their pictures
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import results
from benchmarks.results import PLACE, ROOT, Row, Run
from benchmarks.workloads import DIRECTION_NAMES, OPERATOR_SECTIONS, REFERENCE, TENSORS, Case, attention_work, headline

PLOTS = ROOT / "benchmarks" / "plots"
FILES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
MARKED = re.compile(r"(?s)(<!-- (?!end of )([a-z ]+) -->\n)(.*?)(<!-- end of \2 -->)")
SHOWN = re.compile(r"\((?:\.\./)?benchmarks/plots/(.*?)\)")

# ---- choosing rows --------------------------------------------------------------------------------------------------


def select(run: Run, **fields: Any) -> list[Row]:
    """The rows of a run that have these values."""
    return [row for row in run["rows"] if all(row.get(name) == value for name, value in fields.items())]


def measurements(run: Run, **fields: Any) -> list[list[Row]]:
    """The same, a list for each round of peers."""
    found: dict[Any, list[Row]] = {}
    for row in select(run, **fields):
        found.setdefault(tuple(row.get(name) for name in PLACE), []).append(row)
    return list(found.values())


def unique(values: Iterable[Any]) -> list[Any]:
    """Each value once, in the order of first appearance."""
    return list(dict.fromkeys(values))


def is_ours(peer: str) -> bool:
    return peer.startswith("gpsa_kernels")


def without_position(peer: str) -> bool:
    return peer.startswith(("SDPA alone", "DeiT"))


def taken(rows: Sequence[Row]) -> str:
    """Our peer that "auto" takes in a measurement; it had no choice in the runs that do not say."""
    return f"gpsa_kernels {rows[0].get('auto', 'sdpa')}"


def speedups(rows: Sequence[Row]) -> dict[str, float]:
    """How many times faster than timm's own code every peer is that has a time."""
    times = {row["peer"]: row["median_us"] for row in rows if "median_us" in row}
    return {peer: times[REFERENCE] / us for peer, us in times.items()} if REFERENCE in times else {}


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
    on_gpu = run["device_type"] == "cuda"
    facts = [f"driver {run.get('driver', 'unknown')}" if on_gpu else f"{run['threads']} threads"]
    facts += [f"torch {run['torch']}", f"timm {run['timm']}"]
    facts += [f"triton {run.get('triton', 'not installed')}"] if on_gpu else []
    facts += [] if run["profile"] == "full" else [f"{run['profile']} profile"]
    return f"Measured on {run['started'][:10]}: {run['device']}, {', '.join(facts)}."


# ---- tables ---------------------------------------------------------------------------------------------------------


def glance(runs: dict[str, Run]) -> str:
    """The README's first figures: the speed of what "auto" takes, a row a device."""
    titles = "attention forward", "forward + backward", "model inference", "forward + backward"
    lines = _head("times timm's own speed", *titles)
    for device, name in (("cpu", "CPU"), ("cuda", "GPU")):
        if device not in runs:
            lines.append(_line([name, "not measured yet: [`make gpu-report`](docs/benchmarks.md) fills this row"]))
            continue
        run = runs[device]
        columns = [at_headline(run, direction) for direction in ("forward", "both")]
        for direction in ("inference", "training"):
            columns.append(measurements(run, section="models", direction=direction, compiled=False))
        names = unique(taken(rows).split()[-1] for column in columns for rows in column)
        lines.append(_line([f"{name}, `{'` and `'.join(names)}`", *(_spread(reached(column)) for column in columns)]))
    return "\n".join(lines) + "\n"


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
    wide = select(run, section="tokens", direction="both", rows=24, columns=24)
    memory = {row["peer"]: f"{row['memory_mb']:.1f}" for row in wide if "memory_mb" in row}
    speed = {peer: statistics.median(r) for one in reversed(ratios.values()) for peer, r in one.items() if r}
    plain = [peer for peer in sorted(speed, key=speed.__getitem__) if without_position(peer)]
    on_gpu = run["device_type"] == "cuda"
    taking = "beyond what was there" if on_gpu else "kept for backward"
    graphs = ", by replaying CUDA graphs, so without the cost of a call from Python" if on_gpu else ""
    lines = [
        f"{header(run)} {every[0][0]['workload']}: median (smallest to largest) of its "
        f"{max(map(len, found.values()))} measurements{graphs}.",
        "",
        *_head("times timm's own speed", "forward", "forward + backward", f"MB {taking} at 24×24"),
    ]
    for peer in sorted(speed.keys() - plain[:-1], key=speed.__getitem__):
        name = f"**{peer}**, what `auto` takes" if peer in ours else f"{peer}: no position" if peer in plain else peer
        cells = [_spread(ratios[one].get(peer, [])) or failed.get((peer, one), "") for one in ratios]
        lines.append(_line([name, *cells, memory.get(peer, "")]))
    return "\n".join(lines) + "\n"


def details(run: Run) -> str:
    """Layers and models, where something else is faster, and the cost of a call."""
    rounds = [row["rounds"] for row in run["rows"] if "rounds" in row]
    many = f" Medians of {min(rounds)} to {max(rounds)} interleaved rounds." if rounds else ""
    return "\n".join([f"{header(run)}{many}", *_whole(run), *_losses(run), *_dispatch(run)]) + "\n"


def _whole(run: Run) -> list[str]:
    found = measurements(run, section="layer") + measurements(run, section="models")
    found = [[row for row in rows if "median_us" in row] for rows in found if speedups(rows)]
    peers = unique(row["peer"] for rows in found for row in rows if not without_position(row["peer"]))
    columns = [peer for peer in peers if peer != REFERENCE]
    lines = ["", *_head("times timm's own speed", *columns, "without a position (SDPA, DeiT)")] if found else []
    for rows in found:
        first, cells = rows[0], {}
        what = "inference" if first["direction"] == "inference" else "forward + backward"
        (timm,) = (row for row in rows if row["peer"] == REFERENCE)
        for row in rows:
            ends = timm["p20_us"] / row["p80_us"], timm["p80_us"] / row["p20_us"]
            cells[row["peer"]] = f"{speedups(rows)[row['peer']]:.2f}× ({ends[0]:.2f} to {ends[1]:.2f})"
        plain = max((ratio for peer, ratio in speedups(rows).items() if without_position(peer)), default=None)
        label = f"{first['section'].replace('models', '')} {first['workload']} "
        label += DIRECTION_NAMES.get(first["direction"], what)
        lines.append(_line([label, *(cells.get(peer, "") for peer in columns), _times(plain)]))
    return lines


def _losses(run: Run) -> list[str]:
    lines = []
    for rows in measurements(run):
        times = {row["peer"]: row["median_us"] for row in rows if "median_us" in row}
        ours = times.get(taken(rows), 0.0)
        times = {peer: us for peer, us in times.items() if us < ours and not without_position(peer)}
        times.pop("gpsa_kernels auto, compiled", None)
        if times:
            best, first = min(times, key=times.__getitem__), rows[0]
            what = DIRECTION_NAMES.get(first["direction"], first["direction"])
            lines.append(_line([f"{first['section']} {first['workload']}", what, best, _times(ours / times[best])]))
    head = _head("something else is faster than what `auto` takes", "", "what", "times its speed")
    return ["", *head, *lines] if lines else []


def _dispatch(run: Run) -> list[str]:
    rows = select(run, section="dispatch")
    lines = ["", *_head("cost of a call before any kernel starts, µs", "forward", "forward + backward")] if rows else []
    for peer in unique(row["peer"] for row in rows):
        lines.append(_line([f"`{peer}`", *(f"{row['median_us']:.0f}" for row in rows if row["peer"] == peer)]))
    return lines


def attention(run: Run) -> str:
    """Every peer of every workload of the operator, with times, floors and memory, and what became of the others."""
    lines = [header(run)]
    for section in ("layer", *OPERATOR_SECTIONS):
        for workload in unique(row["workload"] for row in select(run, section=section)):
            rows = select(run, section=section, workload=workload)
            if any("median_us" in row for row in rows):
                head = _head("", "direction", "µs", "p20 to p80", *COMPARED)
                lines += ["", f"**{section}: {workload}**", "", *head]
            found = measurements(run, section=section, workload=workload)
            for row, same in [(row, peers) for peers in found for row in peers if "median_us" in row]:
                where = f"{DIRECTION_NAMES[row['direction']]}, {row['temperature']}"
                times = [_time(row["median_us"]), f"{_time(row['p20_us'])} to {_time(row['p80_us'])}"]
                lines.append(_line([row["peer"], where, *times, *_compared(row, same)]))
            lines += _excuses(rows)
    return "\n".join(lines) + "\n"


COMPARED = ("times timm's speed", "floor, µs", "share of it", "memory, MB", "off by")


def _compared(row: Row, same: list[Row]) -> list[str]:
    """The cells of COMPARED; ``same`` are the rows of the same round."""
    bounded = "floor_us" in row
    return [
        _times(speedups(same).get(row["peer"])),
        f"{_time(row['floor_us'])} ({row['floor_bound']})" if bounded else "",
        f"{row['floor_share']:.0%}" if bounded else "",
        f"{row['memory_mb']:.1f}" if "memory_mb" in row else "",
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
    for same in measurements(run, section="models"):
        for row in [row for row in same if "median_us" in row]:
            speed = f"{1e6 * row['batch'] / row['median_us']:.1f}"
            lines.append(_line([row["workload"], row["direction"], row["peer"], speed, *_compared(row, same)]))
    return "\n".join(lines + _excuses(rows)) + "\n"


def accuracy(run: Run) -> str:
    """Maximum and RMS error of every backend and tensor, beside those of the formula in eager PyTorch."""
    lines = [header(run)]
    others = ("of eager", "of autocast")
    for workload in unique(row["workload"] for row in select(run, section="accuracy")):
        rows = select(run, section="accuracy", workload=workload)
        lines += ["", f"**{workload}**", ""]
        lines += _head("backend", "tensor", "maximum error", *others, "RMS error", *others)
        found = {row["peer"]: row for row in rows if row["status"] == "ok"}
        for peer in filter(is_ours, found):
            for index, tensor in enumerate(TENSORS):
                eager = found["formula"]
                beside = (found[peer], eager, found.get("formula, autocast", eager))
                errors = [one[f"{kind}_error"][index] for kind in ("max", "rms") for one in beside]
                lines.append(_line([peer.split()[-1], tensor, *(f"{error:.1e}" for error in errors)]))
        lines += _excuses(rows)
    return "\n".join(lines) + "\n"


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


def roofline(case: Case, direction: str, chip: Chip) -> tuple[float, ...]:
    """The microseconds that each kind of a case's least work takes at a chip's published rates: no measurement."""
    work = attention_work(case, direction)
    return tuple(1e6 * amount / rate for amount, rate in zip(work, chip, strict=True))


def estimates() -> str:
    """The rooflines of the headline."""
    case = headline("cuda", "full")
    lines = [
        f"**An estimate, not a measurement**: the least work of {case} at the vendor's published rates, in µs. "
        "No kernel reaches published rates; between *overlapped* and *in turn* is where a good one can be.",
        "",
        *_head("", "", "memory", "matrix products", "exponentials", "overlapped", "in turn"),
    ]
    for name, chip in CHIPS.items():
        for direction in ("forward", "backward"):
            times = roofline(case, direction, chip)
            lines.append(_line([name, direction, *(f"{us:.0f}" for us in (*times, max(times), sum(times)))]))
    return "\n".join(lines) + "\n"


def _head(*titles: str) -> list[str]:
    return [_line(titles), "|---" * len(titles) + "|"]


def _line(cells: Iterable[str]) -> str:
    return re.sub("  +", " ", f"| {' | '.join(cells)} |")


def _time(us: float) -> str:
    return f"{us:.1f}" if us < 1000 else f"{us:.0f}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}×"


def _spread(ratios: Sequence[float]) -> str:
    """The median, and the range where there is one."""
    ends = unique(f"{end(ratios):.2f}" for end in (min, max) if ratios)
    return (_times(statistics.median(ratios)) if ratios else "") + (f" ({' to '.join(ends)})" if ends[1:] else "")


TABLES: dict[str, Callable[[Run], str]] = {
    "comparison": comparison,
    "details": details,
    "attention": attention,
    "models": models,
    "accuracy": accuracy,
}

# ---- pictures, whose library is not everywhere ----------------------------------------------------------------------

# by the longest beginning of a peer's name; Okabe and Ito's palette, told apart by all kinds of colour vision
COLOURS = {
    "timm": "#000000",
    "eager, position once": "#E69F00",
    "SDPA + ": "#CC79A7",
    "FlexAttention twice": "#F0E442",
    "gpsa_kernels": "#56B4E9",
    "gpsa_kernels sdpa": "#0072B2",
    "gpsa_kernels triton": "#009E73",
    "gpsa_kernels cuda": "#D55E00",
    "SDPA alone": "#bdbdbd",
}


def colour(peer: str) -> str:
    return COLOURS[max(filter(peer.startswith, COLOURS), key=len)]


def speedup_bars(run: Run) -> Any:
    """How many times timm's speed every peer reaches at the headline; None where nothing can be compared."""
    found = {direction: pooled(at_headline(run, direction)) for direction in ("forward", "both")}
    found = {direction: ratios for direction, ratios in found.items() if ratios}
    if not found:
        return None
    from matplotlib.figure import Figure

    count = max(map(len, found.values()))
    figure = Figure(figsize=(4.5 * len(found), 1.4 + 0.3 * count), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.06, 1, 0.94))
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (direction, ratios) in zip(panels, found.items(), strict=True):
        axes.set_title(f"attention {DIRECTION_NAMES[direction]}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        peers = sorted(ratios, key=lambda peer: statistics.median(ratios[peer]))
        widths = [statistics.median(ratios[peer]) for peer in peers]
        spread = [
            [width - min(ratios[peer]) for peer, width in zip(peers, widths, strict=True)],
            [max(ratios[peer]) - width for peer, width in zip(peers, widths, strict=True)],
        ]
        colours = [colour(peer) for peer in peers]
        lines = {"ecolor": "#444444", "elinewidth": 1, "capsize": 2}
        axes.barh(range(len(peers)), widths, color=colours, xerr=spread, error_kw=lines)
        for place, (peer, width) in enumerate(zip(peers, widths, strict=True)):
            offset = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
            axes.annotate(f"{width:.2f}×", (max(ratios[peer]), place), **offset)
        axes.set_yticks(range(len(peers)), peers, fontsize=8)
        for label in axes.get_yticklabels():
            label.set_fontweight("bold" if is_ours(label.get_text()) else "normal")
        axes.axvline(1, color="#000000", linewidth=0.8)
        most = 1.2 * max(map(max, ratios.values()))
        axes.set(xlim=(0, most), ylim=(-0.7, count - 0.3), xlabel="times timm's speed, with its range")
    about = f"{headline(run['device_type'], run['profile'])}. {header(run)}"
    figure.text(0.01, 0.008, about, fontsize=7, color="#444444", ha="left", va="bottom")
    return figure


def draw(runs: dict[str, Run], folder: Path, wanted: Sequence[str] | None = None) -> list[Path]:
    """The speed-ups of every device type that has the data, or those pictures that are ``wanted``; the files written.

    They have the colours above and shades of grey, which take a third of the bytes of all colours; a picture's metadata
    says which run it shows.
    """
    import PIL.Image
    from PIL.ImageColor import getrgb
    from PIL.PngImagePlugin import PngInfo

    palette = PIL.Image.new("P", (1, 1))
    palette.putpalette(
        [value for colour in ("white", "#444444", "#aaaaaa", *unique(COLOURS.values())) for value in getrgb(colour)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for device, run in runs.items():
        path = folder / f"{device}-speedups.png"
        figure = speedup_bars(run) if wanted is None or path.name in wanted else None
        if figure is not None:
            drawn, text = BytesIO(), PngInfo()
            figure.savefig(drawn, dpi=96)
            text.add_text("Description", f"from the run of {run['started']}")
            reduced = PIL.Image.open(drawn).convert("RGB").quantize(palette=palette, dither=PIL.Image.Dither.NONE)
            reduced.save(path, optimize=True, pnginfo=text)
            written.append(path)
    return written


# ---- files ----------------------------------------------------------------------------------------------------------


UNMEASURED = "No GPU has run these benchmarks yet.\n"
BLOCKS: dict[str, Callable[[dict[str, Run]], str]] = {
    "glance": glance,
    "comparison": lambda runs: "\n".join(map(comparison, runs.values())),
    "details": lambda runs: "\n".join([*map(details, runs.values()), *([] if "cuda" in runs else [UNMEASURED])]),
    "roofline estimate": lambda runs: estimates(),
}


def filled(text: str, runs: dict[str, Run]) -> str:
    """``text`` with every marked block made anew; raises KeyError where there is no such block."""
    return MARKED.sub(lambda found: found[1] + BLOCKS[found[2]](runs) + found[4], text)


def main(arguments: list[str] | None = None) -> None:
    parser = results.command_line("benchmarks.report", __doc__)
    parser.add_argument("--write", action="store_true", help="into README and docs; draws their pictures")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=tuple(TABLES), help="those to print")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="the folder with the results")
    parser.add_argument("--plots", type=Path, help="draw all pictures into this folder")
    options = parser.parse_args(arguments)
    runs = results.newest(options.results)
    if not (options.write or options.plots):
        print("\n".join(TABLES[name](run) for run in runs.values() for name in options.tables))
    if options.plots:
        draw(runs, options.plots)
    if options.write:
        for path in FILES:
            path.write_text(filled(path.read_text(), runs))
        draw(runs, PLOTS, SHOWN.findall("".join(path.read_text() for path in FILES)))


if __name__ == "__main__":
    main()
