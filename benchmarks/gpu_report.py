"""One command that turns ten minutes on a GPU into evidence: builds, tests, checks, measures and profiles.

python -m benchmarks.gpu_report [--evidence DIR] [--output DIR] [--minutes 9] [--dry-run] [--skip STEP ...]

What is done is kept in the output folder, and the same command again goes on from there; docs/benchmarks.md tells more.
It needs torch and timm, uses nvcc, triton, pytest, pytest-xdist, compute-sanitizer and ncu where they are installed,
installs nothing and needs no network.

Exit status: 0 all done and right, 1 something was wrong, 2 nothing wrong but not all done.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import report as tables
from benchmarks import results, supervisor
from benchmarks.results import ROOT
from benchmarks.workloads import headline

PYTHON = sys.executable
FILES = ("results.jsonl", "state.json", "report.txt", "log.txt")
MINUTES = 9.0  # that the steps' limits are made for
LEAST_SECONDS = 10  # that must be left for a step to begin

LARGEST = 15 * 2**20  # characters of a file in the evidence folder

DONE, WRONG, MISSING, UNFINISHED, LEFT = "done", "wrong", "missing", "out of time", "not begun"
UNDER_WAY = "interrupted"  # until it is something else


KERNELS = ("triton", "cuda")  # the backends with kernels of ours, and what these are called
KERNEL_NAMES = ("gpsa_kernel", "attention_", "separable_", "axis_tables")
NOT_SUPPORTED = re.compile("Device not supported|ERR_NVGPUCTRPERM|LibraryNotLoaded")


class Step(NamedTuple):
    """A command."""

    name: str  # for --skip, the log and the table
    command: Sequence[str]  # words; the first is Python, or a vendor's tool, which a machine may lack or forbid
    seconds: float  # what it may take at most of nine minutes, beside what the steps before it left over
    environment: Sequence[tuple[str, str]] = ()  # in addition to this process's


def tools() -> str:
    """The PATH of every step: this process's, and CUDA's programs."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return os.pathsep.join([os.environ.get("PATH", os.defpath), f"{home}/bin"])


def steps(dry: bool, output: Path, capability: str, unfit: Sequence[str]) -> list[Step]:
    """All steps, most important first, without the backends that are unfit.

    In a dry run what needs a GPU runs on the CPU, without the GPU's tools.
    """
    device, profile = ("cpu", "dry") if dry else ("cuda", "full")
    first = f"^{re.escape(str(headline(device, profile)))}$"
    exercise = (PYTHON, "-m", "benchmarks.exercise", "--device", device)
    fit = [name for name in KERNELS if name not in unfit]
    kernels = () if dry else ("--backends", *fit)
    # "auto" takes its first choice, or none of the kernels where one is unfit: no step waits for another's proofs
    trusting = ("GPSA_CHECK", "0" if unfit else "trust")
    uncached = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)  # or an access past a tensor's end lands in the cache's block

    def measured(name: str, seconds: float, *sections: str, workloads: str = "") -> Step:
        options = ["--device", device, "--profile", profile, "--output", str(output), "--resume", "--sections"]
        options += [*(sections or (name,)), *(("--workloads", workloads) if workloads else ())]
        options += ["--without", *unfit] if unfit else []
        return Step(name, (PYTHON, "-m", "benchmarks", *options), seconds, environment=(trusting,))

    def tested(name: str, seconds: float, *files: str, marked: str = "") -> Step:
        options = ["-q", "--tb=short", "-p", "benchmarks.conftest"]
        # as their tests' parameter, which one of these characters follows: the folder tests/cuda is something else
        options += ["-k", " and ".join(f"not {name}- and not {name}]" for name in unfit)] if unfit else []
        options += ["-n", "auto"] if importlib.util.find_spec("xdist") else []
        options += ["-m", marked] if marked else []
        options += ["--collect-only"] if dry else []
        interpreted = [("TRITON_INTERPRET", "1")] if dry else []  # or there would be no test to collect
        environment = (trusting, *interpreted)
        return Step(name, (PYTHON, "-m", "pytest", *options, *files), seconds, environment=environment)

    def sanitized(tool: str, seconds: float) -> Step:
        options = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
        options += [word for name in KERNEL_NAMES for word in ("--kernel-name", f"kns={name}")]
        command = (*([] if dry else options), *exercise, "--small", *kernels)
        return Step(tool, command, seconds, environment=uncached)

    profiler = ["ncu", "--target-processes", "all", "--clock-control", "none", "--csv", "--launch-count", "60"]
    profiler += ["--kernel-name", f"regex:{'|'.join(KERNEL_NAMES)}"]
    for watched in ("SpeedOfLight", "Occupancy", "LaunchStats", "MemoryWorkloadAnalysis"):
        profiler += ["--section", watched]
    build = (("GPSA_BUILD_CUDA", "1"), ("TORCH_CUDA_ARCH_LIST", capability))
    return [
        Step("build", (PYTHON, "setup.py", "build_ext", "--inplace"), 75, environment=build),
        Step("exercise", (*exercise, *(("--seconds", "240", "--small") if dry else ("--seconds", "45"))), 60),
        tested("smoke", 50, "tests/kernels", marked="smoke"),
        measured("headline", 45, "operator", workloads=first),
        measured("models", 60, workloads=r"(tiny|small) (32|224)px B=\d+ \w+$"),
        sanitized("memcheck", 40),
        Step("check", (PYTHON, "-m", "gpsa_kernels", "check", "--device", device, "--seconds", "35"), 40),
        measured("operator", 25),
        measured("tokens", 25),
        measured("compiled", 25),
        tested("tests", 30, "tests/kernels", "tests/cuda/test_primitives.py"),
        sanitized("racecheck", 20),
        Step("profile", (*([] if dry else profiler), *exercise, *(["--small"] if dry else kernels)), 20),
        measured("rest", 25, "accuracy", "dispatch", "layer", "models", "batch", "tuned"),
    ]


class Report:
    """What was found so far: four files in a folder, and in the evidence folder if one was asked for.

    Raises OSError where the folder cannot be written.
    """

    def __init__(self, folder: Path, evidence: Path | None) -> None:
        self.folder, self.evidence = folder, evidence
        self.results_file, self.state_file, self.text_file, self.log = (folder / name for name in FILES)
        self.machine: dict[str, Any] = {}
        self.state: dict[str, Any] = {}
        self.steps: list[Step] = []
        folder.mkdir(parents=True, exist_ok=True)
        self.say(f"==== {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(sys.argv)}")

    def say(self, text: str) -> None:
        print(text, flush=True)
        with self.log.open("a") as log:
            log.write(f"{text}\n")

    def take_up(self, machine: dict[str, Any]) -> None:
        """Goes on with what the folder has of this machine; another one's state, or a damaged one, is set aside."""
        self.machine = machine
        try:
            old = json.loads(self.state_file.read_text())
            if old["machine"] != machine:
                raise ValueError("it is of another machine or version")
            self.state = {name: {**entry, "status": entry["status"]} for name, entry in old["steps"].items()}
        except FileNotFoundError:
            return
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            number = 1
            while (kept := self.folder / f"{self.state_file.name}.{number}").exists():
                number += 1
            os.replace(self.state_file, kept)
            self.say(f"{self.state_file.name} was renamed to {kept.name}: {type(error).__name__}: {error}")

    def set(self, step: Step, status: str, word: str = "", seconds: float = 0.0, **more: Any) -> None:
        """What became of a step, in all files at once: whoever ends us finds it."""
        self.state[step.name] = {"status": status, "word": word, "seconds": round(seconds, 1), **more}
        results.write(self.state_file, json.dumps({"machine": self.machine, "steps": self.state}, indent=1) + "\n")
        results.write(self.text_file, self.text())
        self.publish()

    def publish(self) -> bool:
        """Copies the files to the evidence folder, each replaced as a whole; tells what keeps it from being written."""
        try:
            for name in FILES if self.evidence else ():
                text = (self.folder / name).read_text(errors="replace") if (self.folder / name).exists() else ""
                cut = f"{text[: LARGEST // 2]}\n[...]\n{text[-LARGEST // 2 :]}"
                results.write(self.evidence / name, cut if len(text) > LARGEST else text)
        except OSError as error:
            print(f"--evidence: the folder cannot be written: {error}", file=sys.stderr, flush=True)
            return False
        return True

    def text(self) -> str:
        """The table of the steps, what is wrong, whose fault it ever is, and the short table of what was measured."""
        lines = [f"{'step':<12}{'status':<14}{'seconds':>8}"]
        for step in self.steps:
            entry = self.state.get(step.name, {"status": LEFT, "word": "", "seconds": 0.0})
            lines.append(f"{step.name:<12}{entry['status']:<14}{entry['seconds']:>8}  {entry['word']}")
        if {UNFINISHED, LEFT, UNDER_WAY} & set(map(self.status, self.steps)):
            lines.append("not all is done: the same command goes on")
        try:
            if run := self.run():
                failed = [row for row in run["rows"] if row["status"] in ("wrong", "failed")]
                lines += ["", *dict.fromkeys(map(_told, [*self.faults(), *failed]))]
                lines += ["", tables.comparison(run), tables.details(run)]
        except Exception as error:  # the rest is worth showing, whatever the rows are like
            lines.append(f"the rows cannot be shown: {type(error).__name__}: {error}")
        return "\n".join([*lines, ""])

    def status(self, step: Step) -> str:
        return self.state.get(step.name, {}).get("status", LEFT)

    def run(self) -> results.Run | None:
        return results.last(self.results_file, self.machine)

    def faults(self) -> list[results.Row]:
        run = self.run()
        return results.faults(run) if run else []

    def verdict(self) -> int:
        """The exit status; the vendor's tools may be missing."""
        found = set(map(self.status, self.steps))
        if WRONG in found or self.faults():
            return 1
        return 2 if found & {UNFINISHED, LEFT} else 0


def _told(row: results.Row) -> str:
    about = (row[name] for name in ("section", "workload", "direction", "peer") if name in row)
    return f"{row['status']}: {' '.join(about)}: {row['reason']}"


def perform(step: Step, seconds: float, report: Report) -> tuple[str, str, str]:
    """Runs a step; its status, a word about it, and what it printed."""
    report.say(f"==== {step.name}: {' '.join(step.command)}")
    before = report.log.stat().st_size
    environment = {**os.environ, "PATH": tools(), **dict(step.environment)}
    command = [shutil.which(step.command[0], path=tools()) or step.command[0], *step.command[1:]]
    code = supervisor.run(command, seconds, report.log, environment, report.publish)
    printed = report.log.read_bytes()[before:].decode(errors="replace")
    if step.command[0] != PYTHON and (refused := NOT_SUPPORTED.search(printed)):
        return MISSING, refused[0], printed
    if code is None:
        return UNFINISHED, f"ended after {seconds:.0f} s", printed
    return (DONE, "", printed) if code == 0 else (WRONG, f"exit status {code}", printed)


def ask(report: Report, dry: bool) -> dict[str, Any] | None:
    """The machine, told by a process of its own: the first call of a GPU's driver may not return."""
    words = ("--device", "cpu", "--profile", "dry") if dry else ("--device", "cuda")
    step = Step("machine", (PYTHON, "-m", "benchmarks", "--describe", *words), 60)
    status, word, printed = perform(step, step.seconds, report)
    if status != DONE:
        print(printed.strip())
        report.say(f"the GPU does not answer ({word}); --dry-run rehearses without one")
        return None
    return json.loads(printed.splitlines()[-1])


def main(arguments: list[str] | None = None) -> int:
    """Runs what is not done yet; returns the exit status."""
    parser = results.command_line("benchmarks.gpu_report", __doc__)
    parser.add_argument("--evidence", type=Path, help="folder for a copy of the four files, brought up to date")
    parser.add_argument("--output", type=Path, default=ROOT / "gpu-report", help="folder for results, state and log")
    parser.add_argument("--minutes", type=float, help="time limit, which the steps' limits go with; 9, of a dry run 60")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on the CPU: every step but the GPU's")
    names = [step.name for step in steps(False, Path(), "", ())]
    parser.add_argument("--skip", nargs="*", choices=names, default=[], metavar="STEP", help=f"of {', '.join(names)}")
    options = parser.parse_args(arguments)
    dry = options.dry_run
    minutes = (60 if dry else MINUTES) if options.minutes is None else options.minutes
    end = time.monotonic() + 60 * minutes
    try:
        report = Report(options.output.resolve(), options.evidence and options.evidence.resolve())
    except OSError as error:
        print(f"--output: the folder cannot be written: {error}", file=sys.stderr)
        return 1

    def plan(capability: str, unfit: Sequence[str]) -> list[Step]:
        return [step for step in steps(dry, report.results_file, capability, unfit) if step.name not in options.skip]

    if not report.publish():
        return 1
    facts = ask(report, dry)
    if facts is None:
        report.publish()
        return 1
    report.take_up({name: value for name, value in facts["run"].items() if name not in ("started", "commit")})

    unfit: Sequence[str] = report.state.get("exercise", {}).get("unfit", ())
    report.steps = plan(facts["capability"], unfit)
    for index, name in enumerate([step.name for step in report.steps]):
        step, left = report.steps[index], end - time.monotonic()
        if report.status(step) == DONE:
            continue
        if shutil.which(step.command[0], path=tools()) is None:
            report.set(step, MISSING, f"{step.command[0]} was not found")
        elif left < LEAST_SECONDS:
            report.set(step, LEFT)
        else:
            to_come = [one.seconds for one in report.steps[index:] if report.status(one) != DONE]
            spare = left - sum(to_come) * minutes / MINUTES
            limit = step.seconds * minutes / MINUTES + max(0.0, spare)
            report.set(step, UNDER_WAY)
            start = time.monotonic()
            status, word, printed = perform(step, min(left, limit), report)
            more = {}
            if name == "exercise" and (told := re.findall("^unfit:(.*)$", printed, re.MULTILINE)):
                more["unfit"] = unfit = told[-1].split()
                report.steps = plan(facts["capability"], unfit)
            report.set(step, status, word, time.monotonic() - start, **more)
    print(report.text())
    return report.verdict()


if __name__ == "__main__":
    raise SystemExit(main())
