"""Turns the newest results into tables and pictures.

python -m benchmarks.report                    prints all tables
python -m benchmarks.report --tables models    prints some
python -m benchmarks.report --write            brings those of README.md and docs/ up to date, and their pictures
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import results
from benchmarks.results import ROOT, Row, Run
from benchmarks.workloads import DIRECTION_NAMES, REFERENCE, TENSORS, Case, attention_work, headline

PLOTS = ROOT / "benchmarks" / "plots"
FILES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
MARKED = re.compile(r"(?s)(<!-- (?!end of )([a-z ]+) -->\n)(.*?)(<!-- end of \2 -->)")
SHOWN = re.compile(r"\(benchmarks/plots/(.*?)\)")

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


def shown_first(run: Run, direction: str) -> list[Row]:
    """The peers at the first workload in one direction; on a GPU of the section with torch.compile, if it is there.

    On a CPU nearly everyone is slower beside compiled peers, so these stay in a table of their own.
    """
    for section in ("compiled", "operator") if run["device_type"] == "cuda" else ("operator", "compiled"):
        rows = select(run, section=section, direction=direction)
        if rows:
            return [row for row in rows if all(row[name] == rows[0][name] for name in ("workload", "temperature"))]
    return []


def speedups(rows: Sequence[Row]) -> dict[str, float]:
    """How many times faster than timm's own code every peer is that has a time."""
    times = {row["peer"]: row["median_us"] for row in rows if "median_us" in row}
    return {peer: times[REFERENCE] / us for peer, us in times.items()} if REFERENCE in times else {}


def header(run: Run) -> str:
    """Where, when and with what a run was measured."""
    on_gpu = run["device_type"] == "cuda"
    facts = [f"driver {run.get('driver', 'unknown')}" if on_gpu else f"{run['threads']} threads"]
    facts += [f"torch {run['torch']}", f"timm {run['timm']}"]
    facts += [f"triton {run.get('triton', 'not installed')}"] if on_gpu else []
    facts += [] if run["profile"] == "full" else [f"{run['profile']} profile"]
    return f"Measured on {run['started'][:10]}: {run['device']}, {', '.join(facts)}."


# ---- tables ---------------------------------------------------------------------------------------------------------


def compared(run: Run) -> list[tuple[str, list[Row]]]:
    """The comparisons of the README: a label and the rows of all peers."""
    names = {direction: DIRECTION_NAMES[direction] for direction in ("forward", "both")}
    found = [(f"attention {name}", shown_first(run, direction)) for direction, name in names.items()]
    found += [(f"layer {name}", select(run, section="layer", direction=direction)) for direction, name in names.items()]
    for row in select(run, section="models", peer=REFERENCE):
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
    columns = ["timm, compiled", "eager, position once", "SDPA + positional map", "FlexAttention twice"]
    columns += [peer for peer in peers if is_ours(peer) and not peer.endswith((" eager", "auto, compiled"))]
    columns = [peer for peer in columns if peer in peers]
    rounds = sorted({row["rounds"] for _, found in rows for row in found if "rounds" in row})
    dtypes = " and ".join(unique(row["dtype"] for _, found in rows for row in found))
    lines = [
        f"{header(run)} In {dtypes}; medians of {' to '.join(map(str, unique((rounds[0], rounds[-1]))))} interleaved "
        "rounds.",
        "How many times faster than timm's own code:",
        "",
        *_head("", *columns, "without a position (SDPA, DeiT)"),
    ]
    for label, found in ratios:
        plain = max((ratio for peer, ratio in found.items() if without_position(peer)), default=None)
        lines.append(_line([label, *(_times(found.get(peer)) for peer in columns), _times(plain)]))
    return "\n".join(lines + _memory(run) + _dispatch(run)) + "\n"


def _memory(run: Run) -> list[str]:
    rows = [row for row in select(run, section="tokens", direction="both", rows=24, columns=24) if "memory_mb" in row]
    taken = {row["peer"]: row["memory_mb"] for row in rows}
    ours = [megabytes for peer, megabytes in taken.items() if is_ours(peer)]
    if not ours or REFERENCE not in taken:
        return []
    what = "it takes beside its inputs" if run["device_type"] == "cuda" else "it keeps for the backward pass"
    ratio = taken[REFERENCE] / min(ours)
    return ["", f"At 24×24 tokens the memory that {what} is 1/{ratio:.1f} of what timm's code takes."]


def _dispatch(run: Run) -> list[str]:
    rows = select(run, section="dispatch")
    lines = ["", *_head("cost of a call before any kernel starts, µs", "forward", "forward + backward")] if rows else []
    for peer in unique(row["peer"] for row in rows):
        lines.append(_line([f"`{peer}`", *(f"{row['median_us']:.0f}" for row in rows if row["peer"] == peer)]))
    return lines


def attention(run: Run) -> str:
    """Every peer of every workload of the operator, with times, floors and memory, and what became of the others."""
    lines = [header(run)]
    for section in ("operator", "compiled", "layer", "tokens", "batch"):
        for workload in unique(row["workload"] for row in select(run, section=section)):
            rows = select(run, section=section, workload=workload)
            timed = [row for row in rows if "median_us" in row]
            if timed:
                head = _head("", "direction", "µs", "p20 to p80", *COMPARED)
                lines += ["", f"**{section}: {workload}**", "", *head]
            for row in timed:
                same = [
                    r for r in timed if (r["direction"], r["temperature"]) == (row["direction"], row["temperature"])
                ]
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
    for row in [row for row in rows if "median_us" in row]:
        same = select(run, section="models", workload=row["workload"], direction=row["direction"])
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


TABLES: dict[str, Callable[[Run], str]] = {
    "summary": summary,
    "attention": attention,
    "models": models,
    "accuracy": accuracy,
}

# ---- pictures, whose library is not everywhere ----------------------------------------------------------------------

# Okabe and Ito's palette, told apart by all kinds of colour vision; ours are the saturated ones
COLOURS = {
    "timm": "#000000",
    "timm, compiled": "#7f7f7f",
    "eager, position once": "#E69F00",
    "eager, position once, compiled": "#E69F00",
    "SDPA + positional map": "#CC79A7",
    "SDPA + cached map": "#CC79A7",
    "FlexAttention twice": "#F0E442",
    "gpsa_kernels eager": "#56B4E9",
    "gpsa_kernels sdpa": "#0072B2",
    "gpsa_kernels triton": "#009E73",
    "gpsa_kernels cuda": "#D55E00",
    "SDPA alone": "#bdbdbd",
}
LINES = {
    "timm": "s",
    "eager, position once": "D",
    "SDPA + positional map": "v",
    "gpsa_kernels sdpa": "^",
    "gpsa_kernels triton": "o",
    "gpsa_kernels cuda": "X",
    "SDPA alone": "x",
}


def _panels(run: Run, found: dict[str, list[Row]], height: float, what: str) -> tuple[Any, list[tuple[Any, list[Row]]]]:
    """A figure with a panel for each direction that has rows; below it what was measured, and on what."""
    from matplotlib.figure import Figure

    found = {direction: rows for direction, rows in found.items() if rows}
    figure = Figure(figsize=(4.5 * len(found), height), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.06, 1, 0.94))
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, direction in zip(panels, found, strict=True):
        axes.set_title(f"attention {DIRECTION_NAMES[direction]}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.text(0.01, 0.008, f"{what}. {header(run)}", fontsize=7, color="#444444", ha="left", va="bottom")
    return figure, list(zip(panels, found.values(), strict=True))


def speedup_bars(run: Run) -> Any:
    """How many times timm's speed every peer reaches at the first workload; None where nothing can be compared."""
    found = {direction: shown_first(run, direction) for direction in ("forward", "both")}
    found = {direction: rows for direction, rows in found.items() if speedups(rows)}
    if not found:
        return None
    count = max(len(speedups(rows)) for rows in found.values())
    what = " or ".join(unique(rows[0]["workload"] for rows in found.values()))
    figure, panels = _panels(run, found, 1.4 + 0.3 * count, what)
    for axes, rows in panels:
        ratios = speedups(rows)
        timed = sorted((row for row in rows if row["peer"] in ratios), key=lambda row: ratios[row["peer"]])
        peers = [row["peer"] for row in timed]
        widths = [ratios[peer] for peer in peers]
        # a peer's own ratio times its own spread
        slow, fast = (
            [ratios[row["peer"]] * row["median_us"] / row[name] for row in timed] for name in ("p80_us", "p20_us")
        )
        spread = [
            [w - s for w, s in zip(widths, slow, strict=True)],
            [f - w for w, f in zip(widths, fast, strict=True)],
        ]
        colours = [COLOURS["SDPA alone"] if without_position(peer) else COLOURS[peer] for peer in peers]
        lines = {"ecolor": "#444444", "elinewidth": 1, "capsize": 2}
        axes.barh(range(len(peers)), widths, color=colours, xerr=spread, error_kw=lines)
        for place, (width, end) in enumerate(zip(widths, fast, strict=True)):
            offset = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
            axes.annotate(f"{width:.2f}×", (end, place), **offset)
        axes.set_yticks(range(len(peers)), peers, fontsize=8)
        for label in axes.get_yticklabels():
            label.set_fontweight("bold" if is_ours(label.get_text()) else "normal")
        axes.axvline(1, color="#000000", linewidth=0.8)
        axes.set(xlim=(0, 1.2 * max(fast)), ylim=(-0.7, count - 0.3), xlabel="times timm's speed; lines: p20 to p80")
    return figure


def time_lines(run: Run) -> Any:
    """Time of one image against tokens, with the floor, both axes logarithmic; None where there are no two grids."""
    rows = [row for row in select(run, section="tokens") if "median_us" in row]
    grids = {row["rows"] * row["columns"]: f"{row['rows']}×{row['columns']}" for row in rows}
    if len(grids) < 2:
        return None
    found = {direction: [row for row in rows if row["direction"] == direction] for direction in ("forward", "both")}
    figure, panels = _panels(run, found, 4.8, f"{rows[0]['heads']} heads, D={rows[0]['head_dim']}, {rows[0]['dtype']}")
    for axes, here in panels:

        def points(name: str, rows: list[Row]) -> list[tuple[int, float]]:
            return sorted({(row["rows"] * row["columns"], row[name] / row["batch"]) for row in rows if name in row})

        for peer, marker in LINES.items():
            if timed := points("median_us", [row for row in here if row["peer"] == peer]):
                style = {"color": COLOURS[peer], "marker": marker, "linewidth": 2.4 if is_ours(peer) else 1.4}
                axes.plot(*zip(*timed, strict=True), label=peer, **style)
        if floors := points("floor_us", here):
            axes.plot(*zip(*floors, strict=True), color="#000000", linestyle=":", linewidth=1.4, label="floor")
        axes.set(xscale="log", yscale="log", xlabel="grid of tokens", ylabel="µs an image")
        axes.set_xticks(list(grids), grids.values(), fontsize=8, rotation=30)
        axes.set_xticks([], minor=True)
        axes.grid(which="major", color="#dddddd", linewidth=0.6)
        axes.legend(fontsize=8, frameon=False)
    return figure


PICTURES = {"speedups": speedup_bars, "time": time_lines}


def draw(runs: dict[str, Run], folder: Path, wanted: Sequence[str] | None = None) -> list[Path]:
    """The pictures ``wanted``, or all that every device type has the data for; the files written.

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
        for name, picture in PICTURES.items():
            path = folder / f"{device}-{name}.png"
            figure = picture(run) if wanted is None or path.name in wanted else None
            if figure is not None:
                drawn, text = BytesIO(), PngInfo()
                figure.savefig(drawn, dpi=96)
                text.add_text("Description", f"from the run of {run['started']}")
                reduced = PIL.Image.open(drawn).convert("RGB").quantize(palette=palette, dither=PIL.Image.Dither.NONE)
                reduced.save(path, optimize=True, pnginfo=text)
                written.append(path)
    return written


# ---- files ----------------------------------------------------------------------------------------------------------


def block(marker: str, runs: dict[str, Run]) -> str:
    """The text between a marker and its end; raises KeyError where there is no such block."""
    if marker == "roofline estimate":
        return estimates()
    device, name = {"cpu results": ("cpu", "CPU"), "gpu results": ("cuda", "GPU")}[marker]
    return summary(runs[device]) if device in runs else f"No {name} has run these benchmarks yet.\n"


def filled(text: str, runs: dict[str, Run]) -> str:
    """``text`` with every marked block made anew."""
    return MARKED.sub(lambda found: found[1] + block(found[2], runs) + found[4], text)


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
