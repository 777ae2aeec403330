"""One command that turns minutes on a GPU into evidence: builds, tests, checks, measures and profiles.

python -m benchmarks.gpu_report [--output DIR] [--minutes 9] [--dry-run] [--skip STEP ...]

Steps run in order of importance until the time is up. What is done is kept in the output folder, with a log of every
step; the same command again goes on from there. It needs torch and timm, and uses nvcc, triton, pytest,
compute-sanitizer and ncu where they are installed; it installs nothing and needs no network.

Exit status: 0 all done and right, 1 something was wrong, 2 nothing wrong but not all done.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
LEAST_SECONDS = 10  # that must be left for a step to begin
TAIL_LINES = 15

DONE, WRONG, MISSING, UNFINISHED, LEFT = "done", "wrong", "missing", "out of time", "not begun"


@dataclass(frozen=True)
class Step:
    """A command.

    Attributes:
        name: for --skip, the logs and the table.
        command: words; the first may be a tool that is not there.
        minutes: of the time limit it may take at most.
        needs: files of the repository without which it makes no sense.
        required: whether it counts as wrong if it fails or is missing.
        environment: in addition to this process's.
    """

    name: str
    command: Sequence[str]
    minutes: float
    needs: tuple[str, ...] = ()
    required: bool = True
    environment: dict[str, str] = field(default_factory=dict)

    def obstacle(self) -> str | None:
        """What it lacks, or None."""
        for path in self.needs:
            if not (ROOT / path).exists():
                return f"there is no {path}"
        return None if find_tool(self.command[0]) else f"{self.command[0]} was not found"


def find_tool(name: str) -> str | None:
    """Where a program is: as given, on PATH, or with CUDA."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name) or shutil.which(name, path=f"{home}/bin")


def steps(dry: bool, results: Path) -> list[Step]:
    """All steps, most important first; in a dry run what needs a GPU is run on the CPU, without the GPU's tools."""
    device, profile = ("cpu", "dry") if dry else ("cuda", "full")
    exercise = (PYTHON, "-m", "benchmarks.exercise", "--device", device)
    sanitized = (*exercise, "--small")
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # or an access past a tensor's end lands in the cache's block

    def sanitizer(tool: str) -> Step:
        options = () if dry else ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1")
        installed = find_tool("compute-sanitizer") is not None
        return Step(tool, (*options, *sanitized), 2.0, required=dry or installed, environment=uncached)

    def measured(section: str, minutes: float) -> Step:
        options = (
            "--device",
            device,
            "--profile",
            profile,
            "--sections",
            section,
            "--output",
            str(results),
            "--resume",
        )
        return Step(section, (PYTHON, "-m", "benchmarks", *options), minutes)

    watched = ("--section", "SpeedOfLight", "--section", "Occupancy", "--section", "LaunchStats")
    watched += ("--section", "MemoryWorkloadAnalysis", "--kernel-name", "regex:gpsa|attention|positional|axis")
    profiler = () if dry else ("ncu", "--target-processes", "all", *watched, "--launch-count", "40")
    profiled = (*exercise, "--small") if dry else exercise
    tested = ("tests/kernels", "tests/cuda/test_primitives.py")
    tests = (PYTHON, "-m", "pytest", "-q", *tested, *(("--collect-only",) if dry else ()))
    interpreted = {"TRITON_INTERPRET": "1"} if dry else {}  # or there would be no test to collect
    build = Step(
        "build",
        (PYTHON, "setup.py", "build_ext", "--inplace"),
        3.0,
        needs=("setup.py", "csrc"),
        environment={"GPSA_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0" if dry else capability()},
    )
    return [
        Step("info", (PYTHON, "-m", "gpsa_kernels", "info"), 1.0),
        build,
        Step("exercise", sanitized if dry else exercise, 2.0),
        Step("tests", tests, 4.0, needs=tested, environment=interpreted),
        measured("operator", 3.0),
        measured("accuracy", 1.0),
        sanitizer("memcheck"),
        measured("models", 2.0),
        measured("tokens", 2.0),
        sanitizer("racecheck"),
        measured("compiled", 3.0),
        Step("profile", (*profiler, *profiled), 2.0, required=False),
        measured("batch", 1.0),
        measured("layer", 2.0),
        measured("dispatch", 0.5),
    ]


def capability() -> str:
    """The GPU's, as the build wants it: 9.0."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def run(step: Step, log: Path, seconds: float) -> tuple[str, str]:
    """Runs a step with its output in ``log``; its status and a word about it."""
    tool = find_tool(step.command[0])
    assert tool is not None
    environment = {**os.environ, **step.environment}
    with log.open("w") as output:
        output.write(f"$ {' '.join(step.command)}\n")
        output.flush()
        process = subprocess.Popen(
            [tool, *step.command[1:]],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that what it started can be ended with it
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return UNFINISHED, f"ended after {seconds:.0f} s"
    return (DONE, "") if code == 0 else (WRONG, f"exit status {code}")


def main(arguments: list[str] | None = None) -> int:
    """Runs what is not done yet; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=ROOT / "gpu-report", help="folder for results, logs and state")
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on the CPU: every step but the GPU's")
    parser.add_argument("--skip", nargs="*", default=[], help="steps to leave out")
    options = parser.parse_args(arguments)
    end = time.monotonic() + 60 * options.minutes

    import torch

    if not options.dry_run and not torch.cuda.is_available():
        print("no CUDA device was found; --dry-run rehearses without one", file=sys.stderr)
        return 1
    folder = options.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    results, state_file = folder / "results.json", folder / "state.json"
    state: dict[str, Any] = json.loads(state_file.read_text()) if state_file.exists() else {}
    chosen = steps(options.dry_run, results)
    if unknown := set(options.skip) - {step.name for step in chosen}:
        parser.error(f"--skip: no step is called {', '.join(sorted(unknown))}")
    chosen = [step for step in chosen if step.name not in options.skip]

    for step in chosen:
        if state.get(step.name, {}).get("status") == DONE:
            continue
        left = end - time.monotonic()
        start = time.monotonic()
        if (obstacle := step.obstacle()) is not None:
            status, word = MISSING, obstacle
        elif left < LEAST_SECONDS:
            status, word = LEFT, ""
        else:
            print(f"{step.name} ...", flush=True)
            status, word = run(step, folder / f"{step.name}.log", min(left, 60 * step.minutes))
        state[step.name] = {"status": status, "word": word, "seconds": round(time.monotonic() - start, 1)}
        state_file.write_text(json.dumps(state, indent=1) + "\n")  # at once: whoever ends us finds what was done
        if status == WRONG:
            tail = (folder / f"{step.name}.log").read_text(errors="replace").splitlines()[-TAIL_LINES:]
            print("\n".join(f"  | {line}" for line in tail), flush=True)

    print(told := table(chosen, state) + measurements(results))
    (folder / "report.txt").write_text(told)
    return verdict(chosen, state, options.dry_run)


def table(chosen: Sequence[Step], state: dict[str, Any]) -> str:
    """What became of every step."""
    lines = [f"{'step':<12}{'status':<14}{'seconds':>8}"]
    for step in chosen:
        entry = state[step.name]
        lines.append(f"{step.name:<12}{entry['status']:<14}{entry['seconds']:>8}  {entry['word']}")
    if any(state[step.name]["status"] in (UNFINISHED, LEFT) for step in chosen):
        lines.append("not all is done: the same command goes on")
    return "\n".join(lines) + "\n"


def measurements(path: Path) -> str:
    """The short table of what was measured, if anything was."""
    from benchmarks import report
    from benchmarks import results as files

    if not path.exists():
        return ""
    latest = files.read(path)["runs"][-1]
    bad = [row for row in latest["rows"] if row["status"] in ("wrong", "failed")]
    lines = [f"{row['status']}: {row['section']} {row['workload']} {row['peer']}: {row['reason']}" for row in bad]
    return "\n".join([*lines, "", report.summary(latest)]) if report.compared(latest) else "\n".join([*lines, ""])


def verdict(chosen: Sequence[Step], state: dict[str, Any], dry: bool) -> int:
    """The exit status; a rehearsal forgives what is not there."""
    found = [(step, state[step.name]["status"]) for step in chosen]
    bad = (WRONG,) if dry else (WRONG, MISSING)
    if any(status in bad and step.required for step, status in found):
        return 1
    return 2 if any(status in (UNFINISHED, LEFT) for _, status in found) else 0


if __name__ == "__main__":
    raise SystemExit(main())
