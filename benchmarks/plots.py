"""The pictures: speed-ups, and time against tokens."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import PIL.Image
from matplotlib.figure import Figure
from PIL.PngImagePlugin import PngInfo

from benchmarks import results
from benchmarks.results import Row, Run
from benchmarks.workloads import DIRECTION_NAMES, REFERENCE

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
}
PLAIN = "#bdbdbd"  # without a position
MARKERS = dict(zip(COLOURS, "sPDDvv*^ohX", strict=True))
LINES = ("timm", "eager, position once", "SDPA + positional map", "gpsa_kernels sdpa", "gpsa_kernels triton")
LINES += ("gpsa_kernels cuda", "SDPA alone")


def _style(peer: str) -> dict[str, Any]:
    plain = results.without_position(peer)
    return {
        "color": "#8c8c8c" if plain else COLOURS.get(peer, "#000000"),
        "marker": "x" if plain else MARKERS.get(peer, "o"),
        "linestyle": "--" if plain else "-",
        "linewidth": 2.4 if results.is_ours(peer) else 1.4,
    }


def _caption(figure: Figure, run: Run) -> None:
    figure.text(0.01, 0.008, results.header(run), fontsize=7, color="#555555", ha="left", va="bottom")


def speedups(run: Run) -> Figure | None:
    """Bars: how many times timm's speed every peer reaches at the headline workload."""
    found = [(direction, results.headline(run, direction)) for direction in ("forward", "both")]
    found = [(direction, rows) for direction, rows in found if results.speedups(rows)]
    if not found:
        return None
    count = max(len(results.speedups(rows)) for _, rows in found)
    figure = Figure(figsize=(10, 1.6 + 0.33 * count), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.05, 1, 0.95))
    for axes, (direction, rows) in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        ratios = sorted(results.speedups(rows).items(), key=lambda item: item[1])
        times = {row["peer"]: row for row in rows}
        reference = times[REFERENCE]["median_us"]
        for place, (peer, ratio) in enumerate(ratios):
            plain, row = results.without_position(peer), times[peer]
            axes.barh(
                place,
                ratio,
                color=PLAIN if plain else COLOURS.get(peer, "#56B4E9"),
                hatch="//" if plain else None,
                edgecolor="white" if plain else "none",
                xerr=[[ratio - reference / row["p80_us"]], [reference / row["p20_us"] - ratio]],
                error_kw={"ecolor": "#444444", "elinewidth": 1, "capsize": 2},
            )
            axes.annotate(
                f"{ratio:.2f}×",
                (max(ratio, reference / row["p20_us"]), place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )
        axes.set_yticks(range(len(ratios)), [peer for peer, _ in ratios], fontsize=8)
        for label, (peer, _) in zip(axes.get_yticklabels(), ratios, strict=True):
            label.set_fontweight("bold" if results.is_ours(peer) else "normal")
        axes.axvline(1, color="#000000", linewidth=0.8)
        axes.set_xlim(0, 1.15 * max(reference / times[peer]["p20_us"] for peer, _ in ratios))
        axes.set_ylim(-0.7, count - 0.3)
        axes.set_xlabel("times timm's speed; lines: p20 to p80")
        axes.set_title(f"attention {DIRECTION_NAMES[direction]}\n{rows[0]['workload']}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    _caption(figure, run)
    return figure


def time(run: Run) -> Figure | None:
    """Time of one image against tokens, with the floor drawn in: a panel a direction, logarithmic on both axes."""
    rows = [row for row in results.select(run, section="tokens") if "median_us" in row]
    panels = [(d, here) for d in ("forward", "both") if (here := [row for row in rows if row["direction"] == d])]
    if len({_tokens(row) for row in rows}) < 2:
        return None
    figure = Figure(figsize=(5.6 * len(panels) + 0.4, 4.8), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.04, 1, 0.96))
    for axes, (direction, here) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for peer in LINES:
            points = sorted((_tokens(row), row["median_us"] / row["batch"]) for row in here if row["peer"] == peer)
            if points:
                axes.plot(*zip(*points, strict=True), label=peer, **_style(peer))
        floors = sorted({(_tokens(row), row["floor_us"] / row["batch"]) for row in here if "floor_us" in row})
        if floors:
            axes.plot(*zip(*floors, strict=True), color="#000000", linestyle=":", linewidth=1.4, label="floor")
        grids = {_tokens(row): f"{row['rows']}×{row['columns']}" for row in rows}
        axes.set(xscale="log", yscale="log", xlabel="grid of tokens", ylabel="µs an image")
        axes.set_xticks(list(grids), grids.values(), fontsize=8, rotation=30)
        axes.set_xticks([], minor=True)
        shape = f"{here[0]['heads']} heads, D={here[0]['head_dim']}, {here[0]['dtype']}"
        axes.set_title(f"attention {DIRECTION_NAMES[direction]}, {shape}", fontsize=10)
        axes.grid(which="major", color="#e0e0e0", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    _caption(figure, run)
    return figure


def _tokens(row: Row) -> int:
    return row["rows"] * row["columns"]


PICTURES = {"speedups": speedups, "time": time}


def draw(runs: dict[str, Run], folder: Path, wanted: Sequence[str] | None = None) -> list[Path]:
    """The pictures ``wanted``, or all that every device type has the data for; the files written.

    A picture's metadata says which run it shows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context({"font.family": "DejaVu Sans"}):
        for device, run in runs.items():
            for name, picture in PICTURES.items():
                path = folder / f"{device}-{name}.png"
                figure = picture(run) if wanted is None or path.name in wanted else None
                if figure is not None:
                    written.append(path)
                    _save(figure, path, f"from the run of {run['started']}")
    return written


def _save(figure: Figure, path: Path, description: str) -> None:
    """In 64 colours, which is a quarter of the bytes."""
    drawn, text = BytesIO(), PngInfo()
    figure.savefig(drawn, dpi=110)
    text.add_text("Description", description)
    PIL.Image.open(drawn).convert("RGB").quantize(64).save(path, optimize=True, pnginfo=text)
