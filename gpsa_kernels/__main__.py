"""The command line: ``python -m gpsa_kernels info`` and ``python -m gpsa_kernels demo``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


_positive.__name__ = "positive integer"  # what argparse calls it in its error message


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns the process's exit code."""
    parser = argparse.ArgumentParser(prog="python -m gpsa_kernels", description="Fused GPSA for ConViT models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("info", help="show versions, the device, and which backends run here")
    demo = commands.add_parser("demo", help="train a small ConViT on handwritten digits, eager and fused, and compare")
    demo.add_argument("--epochs", type=_positive, default=15, help="passes over the training digits (%(default)s)")
    demo.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the pictures (%(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of the split, the weights and the batches (%(default)s)")
    options = parser.parse_args(arguments)

    if options.command == "info":
        from gpsa_kernels.info import report

        print(report())
        return 0

    from gpsa_kernels.demo import main as run_demo

    return run_demo(options.epochs, options.output, options.seed)


if __name__ == "__main__":
    sys.exit(main())
