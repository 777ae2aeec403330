"""The command line: ``python -m gpsa_kernels info``, ``check`` and ``demo``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
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
    check = commands.add_parser("check", help="prove and time the backends on this machine's GPU, for 'auto' to go by")
    check.add_argument("--device", help="cuda:0, say, or cpu; the GPU if there is one kind of it")
    check.add_argument("--seconds", type=_positive, default=180, help="time limit (%(default)s)")
    demo = commands.add_parser("demo", help="train a small ConViT on handwritten digits, eager and fused, and compare")
    demo.add_argument("--epochs", type=_positive, default=15, help="passes over the training digits (%(default)s)")
    demo.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the picture (%(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of the split, the weights and the batches (%(default)s)")
    options = parser.parse_args(arguments)

    if options.command == "info":
        from gpsa_kernels.info import report

        print(report())
        return 0

    if options.command == "check":
        from gpsa_kernels.check.report import command

        return command(options.device, options.seconds)

    return run_demo(options.epochs, options.output, options.seed)


def run_demo(epochs: int, output: Path, seed: int) -> int:
    """Trains both, prints the comparison, draws the picture; returns 0 if both recognise enough digits, else 1."""
    missing = [name for name in ("sklearn", "matplotlib", "tqdm") if find_spec(name) is None]
    if missing:
        print(f"The demo needs {', '.join(missing)}, not installed: pip install 'gpsa-kernels[demo]'", file=sys.stderr)
        return 2
    import torch

    from gpsa_kernels import demo, demo_plots

    started = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    digits = demo.load_digits(seed)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    parameters = sum(p.numel() for p in demo.build_model("auto", seed).parameters())
    gated, plain = demo.GPSA_LAYERS, demo.DEPTH - demo.GPSA_LAYERS
    print(
        f"A ConViT of {gated} GPSA and {plain} self-attention layers ({parameters:,} parameters) "
        f"learns {len(digits.train):,} handwritten digits\nand is tested on {len(digits.test)} others. "
        f"{epochs} epochs, seed {seed}, {device}.\n"
    )
    eager, fused = (demo.train(backend, epochs, seed) for backend in ("eager", demo.fused_backend()))
    print(f"\n{demo.summary(eager, fused)}\n")
    made_by = f"python -m gpsa_kernels demo --epochs {epochs} --seed {seed}"
    demo_plots.draw(fused, output / "heads.png", made_by)
    print(f"  {output / 'heads.png'}\n\nDone in {time.perf_counter() - started:.0f} s.\n{demo.verdict(eager, fused)}")
    for failure in demo.failures([eager, fused]):
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if demo.failures([eager, fused]) else 0


if __name__ == "__main__":
    sys.exit(main())
