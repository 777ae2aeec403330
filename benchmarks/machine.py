"""What a run was measured on and with.

``python -m benchmarks.machine`` tells what there is; its last line, in JSON, is a run's header and the GPU's
compute capability.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import gpsa_kernels
from benchmarks.workloads import PROFILES
from gpsa_kernels import info

ROOT = Path(__file__).parent.parent
READINGS = {"sm_mhz": "clocks.sm", "memory_mhz": "clocks.mem", "celsius": "temperature.gpu", "watts": "power.draw"}


def describe(device: str, profile: str) -> dict[str, Any]:
    """The header of a run, started now, in the fields of ``results.RUN``."""
    header = {
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu(),
        "device_type": device,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "timm": _version("timm"),
        "gpsa_kernels": gpsa_kernels.__version__,
        "commit": _commit() or f"none, sources {sources()}",
        "profile": profile,
    }
    return {name: value for name, value in header.items() if value is not None}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"


def _commit() -> str | None:
    commit = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    changed = _output(
        "git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no", "--", "gpsa_kernels", "csrc"
    )
    return commit if commit is None or not changed else f"{commit}, changed"


def sources(root: Path = ROOT) -> str:
    """A hash of what is measured, where no commit names it: the files of gpsa_kernels/ and csrc/ that are not built."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in ("gpsa_kernels", "csrc") for path in (root / folder).rglob("*")):
        if path.suffix in (".py", ".cu", ".cuh", ".h", ".cpp"):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def clocks(device: str, section: str, moment: str) -> list[dict[str, Any]]:
    """A row with the GPU's clocks, temperature and power at a moment, "before" or "after"; none where none are told."""
    query = ",".join(READINGS.values())
    told = device == "cuda" and _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "--id=0")
    if not told:
        return []
    values = zip(READINGS, told.split(","), strict=True)
    known = {name: float(value) for name, value in values if value.strip()[:1].isdigit()}
    return [{"section": "clocks", "workload": section, "peer": moment, "status": "ok", **known}]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a command prints, or None where it does not exist or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.machine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--profile", choices=PROFILES, default="full")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device was found")
    print(info.report())
    capability = torch.cuda.get_device_capability() if options.device == "cuda" else (9, 0)
    facts = {"run": describe(options.device, options.profile), "capability": "{}.{}".format(*capability)}
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
