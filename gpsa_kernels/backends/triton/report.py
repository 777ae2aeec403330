"""Prints what the compiled kernels take on each architecture: ``python -m gpsa_kernels.backends.triton.report``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import triton

from gpsa_kernels.backends.triton.compiled import ARCHITECTURES, Usage, Variant, measure, variants


def measure_all(chosen: list[Variant], workers: int = 2) -> Iterator[tuple[Variant, Usage]]:
    """The usage of each variant, compiled in ``workers`` processes, in the order given."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from zip(chosen, pool.map(measure, chosen), strict=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, help="80 for sm_80, ...")
    parser.add_argument("--head-dim", type=int, nargs="+", default=(32, 48, 64, 128))
    parser.add_argument("--json", type=Path, help="write the figures here too: the budget of tests/triton")
    options = parser.parse_args()
    chosen = [
        variant
        for capability in options.arch
        for variant in variants(capability)
        if variant.head_dim in options.head_dim
    ]
    print(f"triton {triton.__version__}; instructions are counted in the code, loops once")
    print(f"{'kernel':<64}{'registers':>10}{'spills':>8}{'shared':>8}{'matrix':>8}{'all':>8}")
    figures = {}
    for variant, usage in measure_all(chosen):
        print(f"{variant!s:<64}{usage.registers:>10}{usage.spills:>8}{usage.shared:>8}", end="")
        print(f"{usage.matrix_instructions:>8}{usage.instructions:>8}", flush=True)
        figures[str(variant)] = usage._asdict()
    if options.json:
        options.json.write_text(json.dumps({"triton": triton.__version__, "usage": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
