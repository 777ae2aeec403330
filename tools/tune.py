"""Times the launches of this GPU and rewrites the table: ``python -m tools.tune``.

Nothing is tuned at import or at a first call: this is run once for an architecture, and what it finds is committed.
Every row is tried with its neighbours first, then, while there is time, with the rest; what is found is saved after
every row. Processes beside this one compile; this one times, on a GPU that nobody else uses.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime.errors import OutOfResources

from gpsa_kernels.backends.triton import table as launch_table
from gpsa_kernels.backends.triton.launch import KernelCall
from gpsa_kernels.backends.triton.rules import launch_class
from gpsa_kernels.backends.triton.table import ATTENTION, POSITIONAL, Launch, PositionalLaunch
from tools.ahead_of_time import training_step

TABLE = Path(launch_table.__file__)
NEAR = 2  # changes of one setting by one step that lead to a neighbour
Row = Launch | PositionalLaunch


class Problem(NamedTuple):
    """What a row of the table is timed on, and the kernels whose time counts."""

    kernels: tuple[str, ...]
    dtype: torch.dtype
    batch: int
    head_dim: int
    grid_size: tuple[int, int]
    dropout_p: float = 0.0


def step(problem: Problem, capability: int, device: str) -> list[KernelCall]:
    """The launches of a training step with 9 heads, as the table has them now."""
    _, dtype, batch, head_dim, grid_size, dropout_p = problem
    return training_step(batch, 9, head_dim, grid_size, dtype, dropout_p, capability, device)


def of_problem(problem: Problem, calls: list[KernelCall]) -> list[KernelCall]:
    return [call for call in calls if call.kernel.__name__ in problem.kernels]


def run(calls: list[KernelCall]) -> None:
    for call in calls:
        call.kernel[(call.programs,)](**call.arguments, **call.options)


def milliseconds(problem: Problem, capability: int) -> float | None:
    """The median time of the problem's launches as the table has them now, or None where one does not fit the GPU."""
    calls = step(problem, capability, "cuda")
    try:
        run(calls)  # the whole step, so that what its parts leave for each other is real
        return triton.testing.do_bench(partial(run, of_problem(problem, calls)), return_mode="median")
    except OutOfResources:
        return None


def table_of(key: Any) -> dict[Any, Any]:
    """The table that has the row of this key."""
    return ATTENTION if key in ATTENTION else POSITIONAL


def build(key: Any, problem: Problem, capability: int, row: Row) -> bool:
    """Compiles the problem's launches with ``row`` in the table into Triton's cache; whether that went well."""
    table_of(key)[key] = row
    try:
        for call in of_problem(problem, step(problem, capability, "meta")):
            call.kernel.warmup(**call.arguments, **call.options, grid=(call.programs,))
    except Exception as error:  # whatever a compiler says about a candidate, the others are tried
        print(f"{key} {row}: {type(error).__name__}: {error}".split("\n")[0], flush=True)
        return False
    return True


def attention_problems(capability: int) -> dict[tuple[str, str, int], Problem]:
    """The rows of the attention table that a GPU of this compute capability uses."""
    dtypes = (torch.bfloat16, 0.0), (torch.bfloat16, 0.1), (torch.float32, 0.0)
    kernels, head_dims = ("forward", "backward_query", "backward_key"), ((32, 32), (64, 48), (128, 128))
    problems = {}
    for (dtype, dropout_p), kernel, (limit, head_dim) in itertools.product(dtypes, kernels, head_dims):
        name = launch_class(dtype.itemsize, "dense" if dropout_p else "rows", capability)
        problems[name, kernel, limit] = Problem((f"attention_{kernel}",), dtype, 128, head_dim, (14, 14), dropout_p)
    return problems


def positional_problems() -> dict[tuple[str, int], Problem]:
    """Every row of the positional table."""
    kernels = ("separable_product", "separable_gradient")
    dtypes = {"half": torch.bfloat16, "float32": torch.float32}
    return {
        (width, columns): Problem(kernels, dtypes[width], max(1, 128 * 196 // columns**2), 48, (columns, columns))
        for width, columns in POSITIONAL
    }


def attention_candidates() -> list[Launch]:
    """What can stand in a row's place."""
    sizes = (16, 32, 64, 128)
    return list(itertools.starmap(Launch, itertools.product(sizes, sizes, (4, 8), (1, 2, 3))))


def positional_candidates(columns: int) -> list[PositionalLaunch]:
    """What can stand in the row of so many columns."""
    query_columns = sorted({min(columns, size) for size in (16, 32, 64)})
    return [PositionalLaunch(*tiles) for tiles in itertools.product((16, 32), (1, 2, 4, 8, 16), query_columns, (4, 8))]


def distance(a: Row, b: Row) -> float:
    """In how many steps one launch becomes the other: stages by one, everything else doubled or halved."""
    pairs = zip(a._fields, a, b, strict=True)
    return sum(abs(m - n) if name == "stages" else abs(math.log2(m / n)) for name, m, n in pairs)


def best(key: Any, candidates: Iterable[Row], milliseconds: Callable[[], float | None]) -> Row:
    """The candidate with the least time, the table's own row among them; the table is left as it was."""
    table = table_of(key)
    own = table[key]
    times: dict[Row, float] = {}
    try:
        for candidate in (own, *candidates):
            table[key] = candidate
            if (measured := milliseconds()) is not None:
                times[candidate] = measured
    finally:
        table[key] = own
    return min(times, key=times.__getitem__, default=own)


def render(
    text: str, attention: dict[tuple[str, str, int], Launch], positional: dict[tuple[str, int], PositionalLaunch]
) -> str:
    """The text of ``table.py`` with these rows in its tables."""

    def written(row: Row) -> str:
        return f"{type(row).__name__}{tuple(row)}"

    bodies = {"_ATTENTION": "", "POSITIONAL": ""}
    for key, rows in itertools.groupby(attention.items(), lambda item: item[0][:2]):
        bodies["_ATTENTION"] += f"    {key}: [{', '.join(written(row) for _, row in rows)}],\n"
    for key, row in positional.items():
        bodies["POSITIONAL"] += f"    {key}: {written(row)},\n"
    for name, body in bodies.items():
        quoted = body.replace("'", '"')
        text = re.sub(rf"(?s)(\n{name}: [^\n]*{{\n).*?(?=}}\n)", rf"\g<1>{quoted}", text)
    return text


def save() -> None:
    """Writes the tables, as they are now, into ``table.py``."""
    unfinished = TABLE.with_suffix(".unfinished")
    unfinished.write_text(render(TABLE.read_text(), ATTENTION, POSITIONAL))
    os.replace(unfinished, TABLE)  # whoever is interrupted leaves the old table whole


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.tune", description=__doc__)
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="the rows to time, half-16 say, instead of all")
    parser.add_argument("--minutes", type=float, default=10.0, help="no row is begun later")
    parser.add_argument("--dry-run", action="store_true", help="say what would change, and leave the table")
    options = parser.parse_args(arguments)
    end = time.monotonic() + 60 * options.minutes
    major, minor = torch.cuda.get_device_capability()
    capability = 10 * major + minor
    problems: dict[tuple[Any, ...], Problem] = {**attention_problems(capability), **positional_problems()}
    names = {"-".join(map(str, key)): key for key in problems}  # wgmma-backward_key-64
    if unknown := sorted(set(options.rows or ()) - set(names)):
        parser.error(f"--rows: this GPU has no row {', '.join(unknown)}; it has {', '.join(names)}")
    committed = {name: table_of(names[name])[names[name]] for name in options.rows or names}
    workers = max(1, len(os.sched_getaffinity(0)) - 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for near, (name, own) in itertools.product((True, False), committed.items()):
            if time.monotonic() > end:
                print("the time is up: what is not named above was not tried")
                break
            key = names[name]
            table, problem = table_of(key), problems[key]
            everything = attention_candidates() if isinstance(own, Launch) else positional_candidates(key[1])
            candidates = [row for row in everything if row != own and (distance(row, own) <= NEAR) == near]
            built = list(pool.map(partial(build, key, problem, capability), [table[key], *candidates]))
            fitting = list(itertools.compress(candidates, built[1:]))
            table[key] = best(key, fitting, partial(milliseconds, problem, capability))
            print(f"{name}: {table[key]}", "" if table[key] != own else "as it was", flush=True)
            if not options.dry_run:
                save()
    if not options.dry_run:
        print(f"{TABLE} written: run tests/kernels and tools.machine_code triton --write before you commit it")


if __name__ == "__main__":
    main()
