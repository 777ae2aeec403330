"""The pictures: speed-ups, time and memory against tokens, error against eager's own error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
    width = 2.4 if results.is_ours(peer) else 1.4
    return {
        "color": "#8c8c8c" if plain else COLOURS.get(peer, "#000000"),
        "marker": "x" if plain else MARKERS.get(peer, "o"),
        "linestyle": "--" if plain else "-",
        "linewidth": width,
        "markersize": 6,
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


def _scaling(run: Run, directions: tuple[str, ...], value: Callable[[Row], float | None], label: str) -> Figure | None:
    """Lines over the number of tokens, of one image: a panel a direction, logarithmic on both axes."""
    rows = [row for row in results.select(run, section="tokens") if value(row) is not None]
    directions = tuple(direction for direction in directions if any(row["direction"] == direction for row in rows))
    tokens = sorted({row["rows"] * row["columns"] for row in rows})
    if not directions or len(tokens) < 2:
        return None
    figure = Figure(figsize=(5.6 * len(directions) + 0.4, 4.8), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.04, 1, 0.96))
    for axes, direction in zip(figure.subplots(1, len(directions), squeeze=False)[0], directions, strict=True):
        here = [row for row in rows if row["direction"] == direction]
        for peer in LINES:
            points = sorted((row["rows"] * row["columns"], value(row)) for row in here if row["peer"] == peer)
            if points:
                axes.plot(*zip(*points, strict=True), label=peer, **_style(peer))
        if "µs" in label:
            floors = sorted(
                {(row["rows"] * row["columns"], row["floor_us"] / row["batch"]) for row in here if "floor_us" in row}
            )
            axes.plot(*zip(*floors, strict=True), color="#000000", linestyle=":", linewidth=1.4, label="floor")
        _token_axis(axes, rows)
        axes.set_yscale("log")
        axes.set_ylabel(label)
        axes.set_title(f"attention {DIRECTION_NAMES[direction]}, {_shape(here[0])}", fontsize=10)
        axes.grid(which="major", color="#e0e0e0", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    _caption(figure, run)
    return figure


def _token_axis(axes: Axes, rows: list[Row]) -> None:
    grids = {row["rows"] * row["columns"]: f"{row['rows']}×{row['columns']}" for row in rows}
    places = sorted(grids)
    axes.set_xscale("log")
    labels: list[str] = []
    for i, n in enumerate(places):  # a label that would touch its neighbour's goes to a second line
        close = i > 0 and n / places[i - 1] < 1.5 and not labels[-1].startswith("\n")
        labels.append(("\n" if close else "") + grids[n])
    axes.set_xticks(places, labels, fontsize=8)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("grid of tokens")


def _shape(row: Row) -> str:
    return f"{row['heads']} heads, D={row['head_dim']}, {row['dtype']}"


def time(run: Run) -> Figure | None:
    """Time of one image against tokens, with the floor drawn in."""

    def value(row: Row) -> float | None:
        return row["median_us"] / row["batch"] if "median_us" in row else None

    return _scaling(run, ("forward", "both"), value, "µs an image")


def memory(run: Run) -> Figure | None:
    """Memory of one image against tokens."""

    def value(row: Row) -> float | None:
        return row["memory_bytes"] / row["batch"] / 1e6 if "memory_bytes" in row else None

    kind = "at the peak, beside the inputs" if run["device_type"] == "cuda" else "kept for backward"
    return _scaling(run, ("both",), value, f"MB an image {kind}")


def errors(run: Run) -> Figure | None:
    """Every backend's error against the error of the formula in eager PyTorch in the same dtype."""
    rows = [row for row in results.select(run, section="accuracy") if row["status"] == "ok"]
    if not rows:
        return None
    figure = Figure(figsize=(5.8, 6.2), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.03, 1, 0.97))
    axes = figure.subplots()
    dtypes = {"float32": "#0072B2", "float16": "#E69F00", "bfloat16": "#009E73"}
    backends = dict(zip(results.unique(row["peer"] for row in rows), "oX^sD", strict=False))
    values = [row[name] for row in rows for name in ("max_error", "eager_max_error") if row[name] > 0]
    low, high = min(values) / 2, max(values) * 2
    axes.fill_between([low, high], [low, high], [low, low], color="#f0f0f0", linewidth=0)
    axes.plot([low, high], [low, high], color="#000000", linewidth=0.8)
    for dtype, colour in dtypes.items():
        for peer, marker in backends.items():
            points = [
                (row["eager_max_error"], row["max_error"])
                for row in rows
                if row["dtype"] == dtype and row["peer"] == peer and row["eager_max_error"] > 0 and row["max_error"] > 0
            ]
            if points:
                x, y = zip(*points, strict=True)
                axes.scatter(x, y, s=26, marker=marker, facecolor="none", edgecolor=colour, label=f"{peer}, {dtype}")
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    axes.set_aspect("equal")
    axes.set_xlabel("maximum error of the formula in eager PyTorch, same dtype")
    axes.set_ylabel("maximum error of the backend")
    axes.set_title(
        "output and all five gradients, against float64\nin the shaded half the backend is the more exact", fontsize=10
    )
    axes.legend(fontsize=7, frameon=False, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    _caption(figure, run)
    return figure


PICTURES = {"speedups": speedups, "time": time, "memory": memory, "errors": errors}


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
                    figure.savefig(path, dpi=80, metadata={"Description": f"from the run of {run['started']}"})
    return written
