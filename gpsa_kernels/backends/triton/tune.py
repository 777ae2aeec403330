"""Times the launches of this GPU and rewrites the table: ``python -m gpsa_kernels.backends.triton.tune``.

Nothing is tuned at import or at a first call: this is run once for an architecture, and what it finds is committed.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from gpsa_kernels.backends.base import Call, Saved
from gpsa_kernels.backends.triton import launches
from gpsa_kernels.backends.triton.configs import launch_class
from gpsa_kernels.backends.triton.launch import KernelCall, plan_backward, plan_forward
from gpsa_kernels.backends.triton.launches import ATTENTION, POSITIONAL, Launch, PositionalLaunch

TABLE = Path(launches.__file__)
Key = TypeVar("Key")
Row = TypeVar("Row")


class Problem(NamedTuple):
    """What a row of the table is timed on, and the kernels whose time counts."""

    kernels: tuple[str, ...]
    dtype: torch.dtype
    batch: int
    head_dim: int
    grid_size: tuple[int, int]
    dropout_p: float = 0.0


def calls(problem: Problem, capability: int, device: str) -> list[KernelCall]:
    """The launches of a training step that the problem's row decides about, as the table has it now."""
    heads, tokens = 9, problem.grid_size[0] * problem.grid_size[1]

    def tensor(*shape: int, dtype: torch.dtype = problem.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_()

    q, k, v = (tensor(problem.batch, tokens, heads, problem.head_dim).transpose(1, 2) for _ in range(3))
    pos_weight, gate = tensor(heads, 3, dtype=torch.float32), tensor(heads, dtype=torch.float32)
    seed = torch.ones(1, dtype=torch.int64, device=device) if problem.dropout_p else None
    call = Call(q, k, v, pos_weight, gate, seed, *problem.grid_size, problem.head_dim**-0.5, problem.dropout_p)
    forward = plan_forward(call, True, capability)
    out, *saved = forward.result
    backward = plan_backward(out, call, Saved(*saved), capability)
    return [call for call in (*forward.calls, *backward.calls) if call.kernel.__name__ in problem.kernels]


def milliseconds(chosen: list[KernelCall]) -> float | None:
    """The median time of running these launches, or None where one does not fit the GPU."""

    def run() -> None:
        for call in chosen:
            call.kernel[(call.programs,)](**call.arguments, **call.options)

    try:
        return triton.testing.do_bench(run, return_mode="median")
    except OutOfResources:
        return None


def attention_problems(capability: int) -> dict[tuple[str, str, int], Problem]:
    """The rows of the attention table that a GPU of this compute capability uses."""
    problems = {}
    for dtype, dropout_p in ((torch.bfloat16, 0.0), (torch.bfloat16, 0.1), (torch.float32, 0.0)):
        name = launch_class(dtype.itemsize, "dense" if dropout_p else "rows", capability)
        for kernel, (limit, head_dim) in itertools.product(
            ("forward", "backward_query", "backward_key"), ((32, 32), (64, 48), (128, 128))
        ):
            problem = Problem((f"attention_{kernel}",), dtype, 128, head_dim, (14, 14), dropout_p)
            problems[name, kernel, limit] = problem
    return problems


def positional_problems() -> dict[tuple[str, int], Problem]:
    """Every row of the positional table."""
    kernels = ("separable_product", "separable_gradient")
    dtypes = {"half": torch.bfloat16, "float32": torch.float32}
    return {
        (width, columns): Problem(kernels, dtypes[width], max(1, 128 * 196 // columns**2), 48, (columns, columns))
        for width, columns in POSITIONAL
    }


def attention_candidates(row: Launch) -> list[Launch]:
    """What is tried in a row's place; registers are a matter of the compiler, not of time, and stay."""
    sizes = (16, 32, 64, 128)
    return [
        Launch(query_tile, key_tile, warps, stages, row.registers)
        for query_tile, key_tile, warps, stages in itertools.product(sizes, sizes, (4, 8), (1, 2, 3))
    ]


def positional_candidates(columns: int) -> list[PositionalLaunch]:
    """What is tried for grids of so many columns."""
    query_columns = sorted({min(columns, size) for size in (16, 32, 64)})
    return [
        PositionalLaunch(row_tile, channels, some, warps)
        for row_tile, channels, some, warps in itertools.product((16, 32), (1, 2, 4, 8, 16), query_columns, (4, 8))
    ]


def best(
    table: dict[Key, Row],
    key: Key,
    candidates: Iterable[Row],
    chosen: Callable[[], list[KernelCall]],
    time: Callable[[list[KernelCall]], float | None] = milliseconds,
) -> Row:
    """The candidate with the least time, the table's own row among them; the table is left as it was."""
    own = table[key]
    times: list[tuple[float, Row]] = []
    try:
        for candidate in (own, *candidates):
            table[key] = candidate
            measured = time(chosen())
            if measured is not None:
                times.append((measured, candidate))
    finally:
        table[key] = own
    return min(times, key=lambda pair: pair[0])[1]


def render(
    text: str, attention: dict[tuple[str, str, int], Launch], positional: dict[tuple[str, int], PositionalLaunch]
) -> str:
    """The text of ``launches.py`` with these rows in its tables."""
    for name, rows in (("ATTENTION", attention), ("POSITIONAL", positional)):
        body = "".join(f"    {key!r}: {row!r},\n" for key, row in rows.items()).replace("'", '"')
        head, _, rest = text.partition(f"\n{name}: ")
        declaration, _, rest = rest.partition("{\n")
        _, _, tail = rest.partition("\n}\n")
        text = f"{head}\n{name}: {declaration}{{\n{body}}}\n{tail}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="say what would change, and leave the table")
    options = parser.parse_args()
    major, minor = torch.cuda.get_device_capability()
    capability = 10 * major + minor
    attention, positional = dict(ATTENTION), dict(POSITIONAL)
    for key, problem in attention_problems(capability).items():
        chosen = partial(calls, problem, capability, "cuda")
        attention[key] = best(ATTENTION, key, attention_candidates(ATTENTION[key]), chosen)
        print(key, attention[key], "as it was" if attention[key] == ATTENTION[key] else "", flush=True)
    for width, problem in positional_problems().items():
        chosen = partial(calls, problem, capability, "cuda")
        positional[width] = best(POSITIONAL, width, positional_candidates(width[1]), chosen)
        print(width, positional[width], "as it was" if positional[width] == POSITIONAL[width] else "", flush=True)
    if not options.dry_run:
        TABLE.write_text(render(TABLE.read_text(), attention, positional))
        print(f"{TABLE} written: compile it ahead of time (report.py) and run tests/kernels before you commit it")


if __name__ == "__main__":
    main()
