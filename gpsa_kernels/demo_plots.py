"""The pictures of the demo: loss curves, gates and attention distances over training, attention maps on a digit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import PIL.Image
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from PIL.PngImagePlugin import PngInfo

from gpsa_kernels.analysis import non_locality
from gpsa_kernels.demo import GATE_LEARNING_RATE, GRID, LEARNING_RATE, Run

# Okabe and Ito's colours, which every kind of colour vision tells apart
BLUE, ORANGE, GREEN, PURPLE, VERMILLION, SKY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9"
HEAD_COLOURS = (BLUE, ORANGE, GREEN, PURPLE)
INK, GREY = "#222222", "#767676"
N = GRID[0] * GRID[1]

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": "medium",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "savefig.dpi": 150,
}


def draw_all(eager: Run, fused: Run, folder: Path, made_by: str) -> list[Path]:
    """Writes every picture into ``folder`` and returns their paths; in the one of the README is what it was made by."""
    with matplotlib.rc_context(STYLE):
        figures = {"losses.png": losses(eager, fused), "gates.png": gates(fused), "attention.png": attention(fused)}
        figures["heads.png"] = heads(fused)
        for name, figure in figures.items():
            figure.savefig(folder / name)
    text = PngInfo()
    text.add_text("Description", made_by)
    # few colours, for few bytes: it is shown in the README
    few = PIL.Image.open(folder / "heads.png").convert("RGB").quantize(48, PIL.Image.Quantize.FASTOCTREE)
    few.save(folder / "heads.png", optimize=True, pnginfo=text)
    return [folder / name for name in figures]


def _heading(figure: Figure, title: str, subtitle: str) -> None:
    """A title and a line of explanation, left-aligned in the top margin, in inches from the edges."""
    width, height = figure.get_size_inches()
    figure.text(0.3 / width, 1 - 0.3 / height, title, size=12, weight="bold", color=INK, va="center")
    figure.text(0.3 / width, 1 - 0.57 / height, subtitle, size=9, color=GREY, va="center")


def losses(eager: Run, fused: Run) -> Figure:
    """Both loss curves, and how far apart they are."""
    figure = Figure(figsize=(8, 5))
    _heading(
        figure,
        "The same training, eager and fused",
        "Same initial weights, same batches, float32: rounding differs, and training amplifies it",
    )
    top, bottom = figure.subplots(
        2, 1, sharex=True, height_ratios=(2.4, 1), gridspec_kw={"hspace": 0.16, "top": 0.85, "bottom": 0.1}
    )
    figure.subplots_adjust(left=0.115, right=0.97)
    steps = np.arange(1, len(eager.losses) + 1)
    top.plot(steps, eager.losses, color=SKY, linewidth=4, label=f"eager: {eager.accuracy:.1%} of test digits right")
    fused_label = f"fused ({fused.backend}): {fused.accuracy:.1%} of test digits right"
    top.plot(steps, fused.losses, color=INK, linewidth=1, label=fused_label)
    top.set_ylabel("training loss\n(cross-entropy)")
    top.set_ylim(bottom=0)
    top.legend(loc="upper right")

    apart = np.abs(np.subtract(eager.losses, fused.losses))
    bottom.semilogy(steps, np.where(apart > 0, apart, np.nan), color=VERMILLION, linewidth=1)
    bottom.yaxis.set_major_locator(LogLocator(numticks=5))
    bottom.yaxis.set_minor_locator(NullLocator())
    bottom.set_ylabel("|difference|\n(gaps: none)" if (apart == 0).any() else "|difference|")
    bottom.set_xlabel("training step")
    bottom.set_xlim(1, max(2, len(steps)))
    return figure


def gates(run: Run) -> Figure:
    """Gate and attention distance of every layer and head over training."""
    gate, distance = np.array(run.gates), np.array(run.distances)  # (epochs + 1, layers, heads)
    epochs, (layers, heads) = np.arange(len(gate)), gate.shape[1:]
    uniform = non_locality(torch.full((1, N, N), 1 / N), GRID).item()  # of a head that attends to all patches alike
    figure = Figure(figsize=(2.3 * layers + 0.6, 5.4))
    _heading(
        figure,
        "Locality, kept or escaped",
        "Every head starts as a convolution: its gate leans towards position, and it attends to the nearest patches. "
        f"Gates learn {GATE_LEARNING_RATE / LEARNING_RATE:.0f} times as fast.",
    )
    axes = figure.subplots(2, layers, sharex=True, sharey="row", squeeze=False)
    figure.subplots_adjust(left=0.09, right=0.98, top=0.81, bottom=0.16, wspace=0.1, hspace=0.14)
    for layer in range(layers):
        upper, lower = axes[:, layer]
        for head in range(heads):
            style = {"color": HEAD_COLOURS[head % len(HEAD_COLOURS)], "label": f"head {head + 1}"}
            upper.plot(epochs, gate[:, layer, head], **style)
            lower.plot(epochs, distance[:, layer, head], **style)
        dashed = {"color": INK, "linewidth": 0.8, "linestyle": (0, (4, 3)), "zorder": 1}
        upper.axhline(gate[0].mean(), **dashed)
        lower.axhline(uniform, label="above: at the start, below: uniform attention", **dashed)
        upper.set_title(f"GPSA layer {layer + 1}", weight="bold", color=INK)
        lower.set_xlabel("epoch")
    axes[0, 0].set(ylim=(0, 1), xlim=(0, epochs[-1]), ylabel="gate\n0 = content, 1 = position")
    axes[1, 0].set(ylim=(0, 1.07 * uniform), ylabel="mean attention\ndistance (patches)")
    axes[1, 0].xaxis.set_major_locator(MaxNLocator(5, integer=True))
    handles, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=heads + 1, bbox_to_anchor=(0.53, 0.0))
    return figure


def attention(run: Run) -> Figure:
    """Where every layer and head looks from one patch of a test digit, before and after training."""
    digit = np.array(run.digit)
    query = _query(digit)
    before, after = (
        np.array(maps)[:, :, query].reshape(len(maps), -1, *GRID) for maps in (run.maps_before, run.maps_after)
    )
    layers, heads = before.shape[:2]
    colours = PowerNorm(0.5, vmin=0, vmax=max(before.max(), after.max()))

    figure = Figure(figsize=(11.4, 6.2))
    _heading(
        figure,
        f"Where each head looks, from one patch of a handwritten {run.label}",
        "Attention of the marked patch, content and position mixed by the gate; the contour is the digit, "
        f"from the test set and recognised as {run.guess}",
    )
    parts: Any = figure.subfigures(1, 3, width_ratios=(0.62, 1, 1))
    left, middle, right = parts
    axis = left.add_axes((0.14, 0.405, 0.8, 0.376))
    _digit(axis, digit, query)
    axis.set_title("digit and query patch", color=INK)

    for panel, maps, gate, title in (
        (middle, before, run.gates[0], "Before training"),
        (right, after, run.gates[-1], "After training"),
    ):
        axes = panel.subplots(layers, heads, squeeze=False)
        panel.subplots_adjust(left=0.1, right=0.98, top=0.781, bottom=0.03, wspace=0.08, hspace=0.26)
        panel.text(0.1, 0.855, title, size=10, weight="bold", color=INK)
        for layer, head in np.ndindex(layers, heads):
            axis = axes[layer, head]
            picture = _map(axis, maps[layer, head], colours, digit, query)
            column = f"head {head + 1}\n" if layer == 0 else ""
            axis.set_title(f"{column}gate {gate[layer][head]:.2f}", size=7.5, pad=3, color=INK)
            if head == 0:
                axis.set_ylabel(f"layer {layer + 1}")
    bar = left.colorbar(picture, cax=left.add_axes((0.14, 0.27, 0.8, 0.026)), orientation="horizontal")
    bar.ax.grid(False)
    bar.locator = MaxNLocator(4)
    bar.update_ticks()
    bar.set_label(f"attention weight, square-root scale\n(alike for all patches: {1 / N:.3f})")
    return figure


def heads(run: Run) -> Figure:
    """The layer with the gate that moved most, before and after training, in a row."""
    digit, gate = np.array(run.digit), np.array(run.gates)[[0, -1]]
    query = _query(digit)
    layer = np.abs(gate[1] - gate[0]).max(axis=1).argmax()
    maps = np.array([run.maps_before, run.maps_after])[:, layer, :, query].reshape(2, -1, *GRID)
    colours = PowerNorm(0.5, vmin=0, vmax=maps.max())
    count = maps.shape[1]
    figure = Figure(figsize=(11.4, 1.85))
    left, *columns = figure.subplots(1, 2 * count + 3, width_ratios=[1, *([0.3] + [1] * count) * 2])
    figure.subplots_adjust(left=0.01, right=0.99, top=0.7, bottom=0.02, wspace=0.08)
    _digit(left, digit, query)
    left.set_title("query patch", size=9, color=INK)
    for moment, title in enumerate((f"Heads of layer {layer + 1} before training", "and after")):
        gap, *axes = columns[moment * (count + 1) :][: count + 1]
        gap.set_axis_off()
        for head, axis in enumerate(axes):
            _map(axis, maps[moment, head], colours, digit, query)
            axis.set_title(f"gate {gate[moment, layer, head]:.2f}", size=9, color=INK)
        axes[0].text(-0.5, -3, title, size=11, weight="bold", color=INK)
    return figure


def _digit(axis: Any, digit: Any, query: int) -> None:
    """The digit, with the patch that is looked from."""
    axis.imshow(digit, cmap="gray_r")
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    axis.spines[:].set(visible=True, color="#CCCCCC")
    _mark(axis, query, 2.0)


def _map(axis: Any, weights: Any, colours: PowerNorm, digit: Any, query: int) -> Any:
    """A head's attention of one patch, over the digit; returns the image, for a colour bar."""
    picture = axis.imshow(weights, cmap="viridis", norm=colours)
    _outline(axis, digit)
    _mark(axis, query, 1.2)
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    axis.spines[:].set_visible(False)
    return picture


def _query(digit: Any) -> int:
    """The patch to look from: the darkest of the digit, nearest to the middle among equals."""
    y, x = np.indices(GRID) - (np.array(GRID)[:, None, None] - 1) / 2
    return int(np.argmax(digit - 1e-3 * np.hypot(y, x)))


def _outline(axis: Any, digit: Any) -> None:
    """The digit's contour over a map of its patches, closed at the picture's edge."""
    rows, columns = digit.shape
    y, x = (np.clip(np.arange(-1, n + 1), -0.5, n - 0.5) for n in (rows, columns))
    axis.contour(x, y, np.pad(digit, 1), levels=[0.4], colors="white", linewidths=0.8, alpha=0.85)
    axis.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))


def _mark(axis: Any, patch: int, width: float) -> None:
    y, x = divmod(patch, GRID[1])
    axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor=VERMILLION, linewidth=width, zorder=5))
