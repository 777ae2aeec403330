"""The demo's picture, which the README shows: where the heads of a layer look, before and after training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import PIL.Image
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL.PngImagePlugin import PngInfo

from gpsa_kernels.demo import Run

INK, FRAME, MARK = "#222222", "#CCCCCC", "#D55E00"


def draw(run: Run, path: Path, made_by: str) -> None:
    """Writes the picture, and into it what it was made by."""
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK}):
        heads(run).savefig(path, dpi=90)
    text = PngInfo()
    text.add_text("Description", made_by)
    # few colours, for few bytes
    few = PIL.Image.open(path).convert("RGB").quantize(32, PIL.Image.Quantize.FASTOCTREE)
    few.save(path, optimize=True, pnginfo=text)


def heads(run: Run) -> Figure:
    """The layer with the gate that moved most, in a row: attention of one patch of the digit."""
    digit, gate = run.digit.numpy(), run.gates.numpy()
    # the patch to look from: the darkest, nearest to the middle among equals
    y, x = np.indices(digit.shape) - (np.array(digit.shape)[:, None, None] - 1) / 2
    query = int(np.argmax(digit - 1e-3 * np.hypot(y, x)))
    layer = np.abs(gate[1] - gate[0]).max(axis=1).argmax()
    maps = run.maps.numpy()[:, layer, :, query].reshape(2, -1, *digit.shape)
    count = maps.shape[1]
    figure = Figure(figsize=(11.4, 1.85))
    left, *columns = figure.subplots(1, 2 * count + 3, width_ratios=[1, *([0.3] + [1] * count) * 2])
    figure.subplots_adjust(left=0.01, right=0.99, top=0.7, bottom=0.02, wspace=0.08)
    left.imshow(digit, cmap="gray_r")
    _frame(left, "query patch", query, digit)
    left.spines[:].set(visible=True, color=FRAME)
    for moment, title in enumerate((f"Heads of layer {layer + 1} before training", "and after")):
        gap, *axes = columns[moment * (count + 1) :][: count + 1]
        gap.set_axis_off()
        axes[0].text(-0.5, -3, title, size=11, weight="bold")
        for head, axis in enumerate(axes):
            axis.imshow(maps[moment, head], cmap="viridis", norm=PowerNorm(0.5, vmin=0, vmax=maps.max()))
            _outline(axis, digit)
            _frame(axis, f"gate {gate[moment, layer, head]:.2f}", query, digit)
    return figure


def _frame(axis: Any, title: str, query: int, digit: Any) -> None:
    """A title, no ticks and no frame, and a mark around the patch that is looked from."""
    axis.set_title(title, size=9)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    y, x = divmod(query, digit.shape[1])
    axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor=MARK, linewidth=1.4, zorder=5))


def _outline(axis: Any, digit: Any) -> None:
    """The digit's contour over a map of its patches, closed at the picture's edge."""
    rows, columns = digit.shape
    y, x = (np.clip(np.arange(-1, n + 1), -0.5, n - 0.5) for n in (rows, columns))
    axis.contour(x, y, np.pad(digit, 1), levels=[0.4], colors=FRAME, linewidths=0.6, antialiased=False)
    axis.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
