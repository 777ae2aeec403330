"""The least that any implementation has to do, and how fast this machine can do it.

Per batch element and head, N tokens, head size D: every input is read once and every output written once (4 N D
elements forward, 7 N D backward: q, k, v, dO read, dQ, dK, dV written); the content takes two matrix products forward
and five backward, 2 N^2 D flops each; the separable position takes 2 N (R + C) D flops forward and three times that
backward; the content softmax takes N^2 exponentials in either direction.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from benchmarks.workloads import Case, ModelWorkload, headline

DEPTH = 12  # of every ConViT and DeiT
ELEMENT_SIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


class Work(NamedTuple):
    """What has to be done at least."""

    bytes: int
    flops: int
    exponentials: int = 0

    def __add__(self, other: Work) -> Work:  # type: ignore[override]
        return Work(*(a + b for a, b in zip(self, other, strict=True)))


class Rates(NamedTuple):
    """What a machine does, measured: bytes copied, read and written alike, and large matrix products."""

    copy_gb_s: float
    matmul_tflop_s: float


def attention_work(case: Case, direction: str) -> Work:
    """Of the operator, over the whole batch; ``direction`` is forward, backward or both."""
    if direction == "both":
        return attention_work(case, "forward") + attention_work(case, "backward")
    tensors, products, mixes = {"forward": (4, 2, 1), "backward": (7, 5, 3)}[direction]
    tokens, dim = case.tokens, case.head_dim
    pairs = case.batch * case.heads
    return Work(
        bytes=pairs * tensors * tokens * dim * ELEMENT_SIZE[case.dtype],
        flops=pairs * (products * 2 * tokens**2 * dim + mixes * 2 * tokens * (case.rows + case.columns) * dim),
        exponentials=pairs * tokens**2,
    )


def layer_work(case: Case, direction: str) -> Work:
    """Of a whole layer: the attention's matrix products and those of the four C x C projections (C = heads * head_dim).

    Forward reads x and the weights and writes the result; backward reads x, the gradient and the weights and writes
    the gradients of x and the weights. What is in between might stay on the chip.
    """
    if direction == "both":
        return layer_work(case, "forward") + layer_work(case, "backward")
    dim = case.heads * case.head_dim
    tensors, weights, factor = {"forward": (2, 1, 1), "backward": (3, 2, 2)}[direction]
    attention = attention_work(case, direction)
    elements = case.batch * case.tokens * dim * tensors + 4 * dim * dim * weights
    return Work(
        bytes=elements * ELEMENT_SIZE[case.dtype],
        flops=attention.flops + factor * 8 * case.batch * case.tokens * dim * dim,
        exponentials=attention.exponentials,
    )


def model_work(workload: ModelWorkload, dim: int) -> Work:
    """Matrix products of a vision transformer of this width, patch 16, MLP ratio 4; training is three times
    inference. Bytes are the parameters' alone: how often activations must be moved depends on the fusion."""
    tokens = (workload.image // 16) ** 2
    layer = 24 * tokens * dim**2 + 4 * tokens**2 * dim
    image = DEPTH * layer + 2 * tokens * dim * 768 + 2 * dim * 1000
    steps = 3 if workload.direction == "training" else 1
    parameters = 12 * DEPTH * dim**2 + 768 * dim + 1000 * dim
    return Work(bytes=steps * parameters * 4, flops=steps * workload.batch * image)


def floor(work: Work, rates: Rates) -> tuple[float, str]:
    """The seconds below which no implementation comes, and what sets them: "memory" or "matmul"."""
    memory, matmul = work.bytes / rates.copy_gb_s / 1e9, work.flops / rates.matmul_tflop_s / 1e12
    return max(memory, matmul), "memory" if memory >= matmul else "matmul"


def derived(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the results with what follows from it: its workload's fields; a floor, where rates were measured.

    Raises:
        ValueError: the workload's name is none.
    """
    if row["section"] in ("dispatch", "clocks"):
        return row
    case: Case | ModelWorkload
    if row["section"] == "models":
        case = ModelWorkload.parse(row["workload"], row["direction"])
    else:
        case = Case.parse(row["workload"])
    row = {**vars(case), **row}
    if "copy_gb_s" in row:
        if isinstance(case, ModelWorkload):
            work = model_work(case, row["dim"])
        else:
            work = (layer_work if row["section"] == "layer" else attention_work)(case, row["direction"])
        seconds, bound = floor(work, Rates(row["copy_gb_s"], row["matmul_tflop_s"]))
        row |= {"floor_us": 1e6 * seconds, "floor_bound": bound, "floor_share": 1e6 * seconds / row["median_us"]}
    return row


# ---- without running anything ---------------------------------------------------------------------------------------


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
    """The estimates as markdown."""
    case = headline("cuda", "full")
    lines = [
        f"**An estimate, not a measurement**: the least work of {case} at the vendor's published rates, in µs. "
        "No kernel reaches published rates; between *overlapped* and *in turn* is where a good one can be.",
        "",
        "| | | memory | matrix products | exponentials | overlapped | in turn |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, chip in CHIPS.items():
        for direction in ("forward", "backward"):
            times = roofline(case, direction, chip)
            values = (*times, max(times), sum(times))
            lines.append("| " + " | ".join([name, direction, *(f"{value:.0f}" for value in values)]) + " |")
    return "\n".join(lines) + "\n"
