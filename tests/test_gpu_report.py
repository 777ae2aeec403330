"""The ten minutes on a GPU, rehearsed without one: whatever breaks, what was found until then is told and kept."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import __main__ as suite
from benchmarks import exercise, gpu_report, peers, results, supervisor
from benchmarks.apart import Gone
from benchmarks.gpu_report import KERNEL_NAMES, KERNELS, PYTHON, ROOT, Step, steps
from benchmarks.workloads import OPERATOR_SECTIONS, attention_workloads, headline, model_workloads
from gpsa_kernels import gpsa_attention

MACHINE = {"device": "Pretended GPU", "device_type": "cuda", "profile": "full", "torch": "2.11.0", "timm": "1.0.31"}
RUN = {"started": "2026-01-02T03:04:05+00:00", **MACHINE}
INTERRUPTED = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('what I have')"
HANGS = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('begun', flush=True); time.sleep(60)"


def step(name: str, script: str, **more: object) -> Step:
    return Step(name, (PYTHON, "-c", script), **{"seconds": 60, **more})


def row(status: str, peer: str = "gpsa_kernels triton") -> dict:
    """A row of a model."""
    place = {"section": "models", "workload": "convit_tiny 224px B=1 bfloat16", "direction": "inference"}
    return {**place, "peer": peer, "status": status, "reason": "so"}


@pytest.fixture
def report(tmp_path, monkeypatch):
    """Runs gpu_report with planted steps on a pretended GPU; its exit status, and from the evidence state and log."""
    monkeypatch.setattr(supervisor, "TICK", 0.1)
    monkeypatch.setattr(supervisor, "GRACE", 0.5)
    monkeypatch.setattr(gpu_report, "LEAST_SECONDS", 0.1)
    monkeypatch.setattr(gpu_report, "ask", lambda report, dry: {"run": RUN, "capability": "9.0"})

    def run(*planted: Step, options: tuple[str, ...] = ()):
        monkeypatch.setattr(gpu_report, "steps", lambda *_: list(planted))
        monkeypatch.setattr(gpu_report, "MINUTES", sum(one.seconds for one in planted) / 60)
        evidence = tmp_path / "evidence"
        code = gpu_report.main(["--output", str(tmp_path / "out"), "--evidence", str(evidence), *options])
        assert {path.name for path in evidence.glob("[!.]*")} == {*gpu_report.FILES}  # or .*.unfinished
        results.read(evidence / "results.jsonl")
        return code, json.loads((evidence / "state.json").read_text())["steps"], (evidence / "log.txt").read_text()

    return run


def wait_until(holds, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("planted", "status", "code", "word"),
    [
        (step("a", "raise ZeroDivisionError"), "wrong", 1, "exit status 1"),
        (step("a", HANGS, seconds=1), "out of time", 2, "ended after 1 s"),
        (step("a", INTERRUPTED, seconds=2), "out of time", 2, "ended after 2 s"),
        (step("a", ""), "done", 0, ""),
        (step("a", "import os; os.kill(os.getpid(), 9)"), "wrong", 1, "exit status 137"),
        (step("a", "import os; os.kill(os.getppid(), 9); " + HANGS), "wrong", 1, "exit status -9"),
        (Step("a", ("no-such-tool",), 1.0), "missing", 0, "no-such-tool was not found"),
        (Step("a", ("sh", "-c", "echo Device not supported; exit 1"), 1.0), "missing", 0, "Device not supported"),
        (step("a", "raise SystemExit('Device not supported')"), "wrong", 1, "exit status 1"),
    ],
)
def test_a_step_that_goes_wrong_is_told_and_the_next_one_runs(report, capsys, planted, status, code, word):
    found, state, log = report(planted, step("b", "print(1)"))
    assert (found, state["a"]["status"], state["a"]["word"], state["b"]["status"]) == (code, status, word, "done")
    assert status in capsys.readouterr().out
    assert "what I have\n" in log or planted.command[-1] != INTERRUPTED  # before it is killed


# a process in a group of its own, as ninja starts them, that outlives its parent
LEAVES_A_CHILD = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, '-c', {HANGS!r}], preexec_fn=os.setpgrp)
open(sys.argv[1], 'w').write(f'{{child.pid}} {{os.getpid()}}')
if sys.argv[2] == "for ever":
    os.kill(os.getppid(), 9)  # what stands between it and the report
time.sleep(0 if sys.argv[2] == "not" else 60)
"""


def all_ended(pids: Path) -> bool:
    stats = [Path(f"/proc/{pid}/stat") for pid in pids.read_text().split()]
    with contextlib.suppress(FileNotFoundError):  # it ended a moment ago
        return all(not stat.exists() or stat.read_text().rpartition(") ")[2][0] == "Z" for stat in stats)
    return False


@pytest.mark.parametrize("hangs", ["not", "too long", "for ever"])
def test_nothing_of_a_step_is_left_behind(report, tmp_path, hangs):
    pids = tmp_path / "pids"
    report(Step("a", (PYTHON, "-c", LEAVES_A_CHILD, str(pids), hangs), 2))
    wait_until(lambda: all_ended(pids), 2)


def test_a_process_that_cannot_be_killed_is_left_behind(tmp_path, monkeypatch):
    def wait(process, timeout=None):  # the kernel does not let it go, for the driver hangs
        assert timeout is not None, "for ever"
        raise subprocess.TimeoutExpired("a", timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    assert supervisor.run(["sleep", "60"], 0.01, tmp_path / "log", dict(os.environ), lambda: None) is None


def test_a_killed_report_leaves_what_it_found_and_nothing_running_and_goes_on(report, tmp_path):
    pids, evidence = tmp_path / "pids", tmp_path / "evidence"
    planted = [step("a", "print('of a')"), Step("b", (PYTHON, "-c", LEAVES_A_CHILD, str(pids), "too long"), 60)]
    script = f"""
import sys
from benchmarks import gpu_report, supervisor
from benchmarks.gpu_report import Step
supervisor.TICK = 0.1
gpu_report.ask = lambda report, dry: {{"run": {RUN!r}, "capability": "9.0"}}
gpu_report.steps = lambda *_: {planted!r}
gpu_report.main(["--output", sys.argv[1], "--evidence", sys.argv[2]])
"""
    command = [PYTHON, "-c", script, str(tmp_path / "out"), str(evidence)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    log = evidence / "log.txt"
    wait_until(lambda: log.exists() and "begun\n" in log.read_text(), 60)  # by the child of b
    assert not all_ended(pids)
    process.kill()
    process.wait(10)
    wait_until(lambda: all_ended(pids))
    assert {path.name for path in evidence.glob("[!.]*")} == {*gpu_report.FILES}
    state = json.loads((evidence / "state.json").read_text())["steps"]
    assert (state["a"]["status"], state["b"]["status"]) == ("done", "interrupted")
    assert "interrupted" in (evidence / "report.txt").read_text()
    code, entries, text = report(planted[0], step("b", "print('of b')"))
    assert (code, entries["b"]["status"]) == (0, "done")
    assert [text.count(f"\n{line}\n") for line in ("of a", "begun", "of b")] == [1, 1, 1]  # a did not run again


@pytest.mark.parametrize("text", [" ", '{"machine": {', "[]", json.dumps({"machine": MACHINE, "steps": {"a": 1}})])
def test_a_damaged_state_is_set_aside(report, tmp_path, text):
    state_file = tmp_path / "out" / "state.json"
    results.write(state_file, text)
    results.write(kept := state_file.with_name("state.json.1"), "of another time")
    code, state, log = report(step("a", ""))
    assert (code, state["a"]["status"]) == (0, "done")
    assert "state.json was renamed to state.json.2: " in log
    assert [kept.read_text(), state_file.with_name("state.json.2").read_text()] == ["of another time", text]


@pytest.mark.parametrize("option", ["--output", "--evidence"])
def test_a_folder_that_cannot_be_written_is_told_at_once(tmp_path, capsys, option):
    assert gpu_report.main(["--output", str(tmp_path / "out"), option, "/dev/null/folder"]) == 1
    assert f"{option}: the folder cannot be written" in capsys.readouterr().err


def test_evidence_is_replaced_as_a_whole(tmp_path, monkeypatch):
    evidence = tmp_path / "evidence"
    report = gpu_report.Report(tmp_path / "out", evidence)
    report.log.write_text("old")
    assert report.publish()
    report.log.write_text("new")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            report.publish()
    assert (evidence / "log.txt").read_text() == "old"
    monkeypatch.setattr(gpu_report, "LARGEST", 10)
    report.log.write_text("beginning" + 100 * "x" + "end")
    report.publish()
    assert (evidence / "log.txt").read_text() == "begin\n[...]\nxxend"


@pytest.mark.parametrize("wrong", [row("wrong"), row("failed"), row("unavailable"), row("failed", "timm")])
def test_a_repeat_with_wrong_rows_stays_wrong(report, tmp_path, wrong):
    code = int(wrong["peer"] != "timm")  # a model of ours must not go unmeasured
    results.append(tmp_path / "out" / "results.jsonl", RUN, [wrong])
    assert report(step("a", ""))[0] == code
    assert report(step("a", "raise ValueError"))[0] == code  # it is done: nothing runs again


def test_on_another_gpu_all_begins_again(report, tmp_path, monkeypatch):
    results.append(tmp_path / "out" / "results.jsonl", RUN, [row("wrong")])
    assert report(step("a", "print('ran')"))[0] == 1
    monkeypatch.setattr(gpu_report, "ask", lambda *_: {"run": RUN | {"device": "Another GPU"}, "capability": "9.0"})
    code, _, log = report(step("a", "print('ran')"))
    assert (code, log.count("\nran\n")) == (0, 2)
    assert "state.json was renamed to state.json.1: ValueError: it is of another machine or version" in log


def test_the_limits_make_nine_minutes_and_what_a_step_leaves_goes_to_the_next(report, monkeypatch):
    assert sum(one.seconds for one in steps(False, Path(), "9.0", ())) <= 60 * gpu_report.MINUTES == 540
    given = []
    monkeypatch.setattr(gpu_report, "perform", lambda step, seconds, _: given.append(seconds) or ("done", "", ""))
    report(step("a", "", seconds=30), step("b", "", seconds=20), step("c", "", seconds=10))
    assert given == pytest.approx([30, 50, 60], abs=1)


def test_no_time_left_is_not_success(report):
    code, state, _ = report(step("a", ""), options=("--minutes", "0"))
    assert (code, state["a"]["status"]) == (2, "not begun")


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_report, "perform", lambda *_: ("wrong", "exit status 1", "no CUDA device was found"))
    assert gpu_report.main(["--output", str(tmp_path)]) == 1
    assert "no CUDA device was found" in (told := capsys.readouterr().out)
    assert "--dry-run" in told


def test_the_gpus_commands_are_the_rehearsed_ones():
    real, dry = (steps(dry, Path("r.json"), "9.0", ()) for dry in (False, True))
    assert [one.name for one in real] == [one.name for one in dry]
    for on_gpu, on_cpu in zip(real, dry, strict=True):
        if "--sections" in on_gpu.command:
            swapped = [{"cpu": "cuda", "dry": "full"}.get(word, word) for word in on_cpu.command]
            differing = {*on_gpu.command} ^ {*swapped}
            assert all(word.startswith("^") for word in differing)  # the headline's name
        elif on_gpu.command[0] != PYTHON:
            assert on_gpu.command[0] == {"profile": "ncu"}.get(on_gpu.name, "compute-sanitizer")
            assert "benchmarks.exercise" in {*on_gpu.command} & {*on_cpu.command}
    assert {word for one in real for word in one.command} >= {*suite.SECTIONS}


def test_the_vendors_tools_look_at_our_kernels_and_know_them_all():
    kernels = set()
    for path in (ROOT / "csrc").glob("*.*"):
        kernels |= set(re.findall(r"__global__[^;{]*?(\w+)\(const", path.read_text()))
    for path in (ROOT / "gpsa_kernels" / "backends" / "triton").glob("*.py"):
        kernels |= set(re.findall(r"^@triton\.jit(?:\(.*\))\ndef (\w+)", path.read_text(), re.MULTILINE))
    assert {name for part in KERNEL_NAMES for name in kernels if part in name} == kernels
    assert all(any(part in name for name in kernels) for part in KERNEL_NAMES)


def test_steps_measure_the_headline_and_the_models_that_they_name():
    chosen = {one.name: one.command for one in steps(False, Path("r.json"), "9.0", ())}
    cases = [w for section in OPERATOR_SECTIONS for w in attention_workloads(section, "cuda", "full")]
    assert {str(w) for w in cases if re.search(chosen["headline"][-1], str(w))} == {str(headline("cuda", "full"))}
    models = [str(w) for w in model_workloads("cuda", "full") if re.search(chosen["models"][-1], str(w))]
    assert list(dict.fromkeys(models)) == [f"convit_{size} 224px B=128 bfloat16" for size in ("small", "tiny")]


def test_nvcc_is_on_the_path_of_every_step(report, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", "/opt/cuda-of-this-machine")
    assert "/opt/cuda-of-this-machine/bin" in report(step("a", "import os; print(os.environ['PATH'])"))[2]


def test_what_exercise_found_unfit_is_left_out_of_all_that_follows(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(gpu_report, "ask", lambda report, dry: {"run": RUN, "capability": "9.0"})
    monkeypatch.setattr(gpu_report, "perform", lambda one, *_: given.append(one) or ("wrong", "", "unfit: cuda\n"))
    assert gpu_report.main(["--output", str(tmp_path / "out"), "--skip", "memcheck", "racecheck", "profile"]) == 1
    before, after = given[:2], given[2:]
    assert [one.name for one in before] == ["build", "exercise"]
    assert not any("--without" in one.command for one in before)
    for one in after:
        if one.name != "check":  # which finds that out by itself
            assert dict(one.environment)["GPSA_CHECK"] == "0"
            expected = ("-k", "not cuda- and not cuda]") if "pytest" in one.command else ("--without", "cuda")
            assert expected in pairwise(one.command)
    sanitized = next(one for one in steps(False, Path("r.json"), "9.0", ["cuda"]) if one.name == "memcheck")
    assert sanitized.command[-2:] == ("--backends", "triton")


def test_the_tests_of_an_unfit_backend_alone_are_left_out():
    pytest.importorskip("triton")
    tests = next(one for one in steps(True, Path(), "", KERNELS) if one.name == "tests")
    environment = {**os.environ, **dict(tests.environment)}
    done = subprocess.run(tests.command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line} == {tests.command[-1]}


def test_what_dies_hangs_or_raises_alone_is_unfit_and_what_is_wrong_is_not(monkeypatch, capsys):
    def worker(function, name, *_):
        def receive(seconds):
            if name == "cuda":
                raise Gone("no answer within 1 s")
            return {"sdpa": exercise.WRONG, "eager": exercise.FAILED}.get(name, exercise.RIGHT)

        return contextlib.nullcontext(SimpleNamespace(receive=receive))

    monkeypatch.setattr(exercise, "Worker", worker)
    assert exercise.main(["--device", "cpu", "--seconds", "1"]) == exercise.FAILED
    told = [f"cuda {direction}: no answer within 1 s" for direction in ("forward", "both")]
    assert capsys.readouterr().out.splitlines() == [*told, "unfit: cuda eager"]


@pytest.mark.parametrize(
    ("function", "status", "told"),
    [
        (lambda q, *_, **__: 2 * q, exercise.WRONG, "is allowed"),
        (lambda *_, **__: 1 / 0, exercise.FAILED, "failed: ZeroDivisionError: division by zero"),
        (gpsa_attention, exercise.RIGHT, "right"),
    ],
)
def test_exercise_tells_right_from_wrong_and_from_failed(monkeypatch, capsys, function, status, told):
    monkeypatch.setattr(peers, "gpsa_attention", function)
    assert exercise.main(["--small", "--device", "cpu", "--backends", "sdpa"]) == status
    lines = capsys.readouterr().out.splitlines()
    assert {line.split(":")[0] for line in lines if told in line} == {"sdpa forward", "sdpa both"}


def test_failures_are_told_when_they_happen(tmp_path):
    tests = "import os\ndef test_wrong():\n    assert 1 == 2\ndef test_fatal():\n    os._exit(9)\n"
    (tmp_path / "test_a.py").write_text(tests)
    command = [PYTHON, "-m", "pytest", "-q", "--tb=short", "-p", "benchmarks.conftest", "-c", os.devnull, "test_a.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 9
    assert "assert 1 == 2" in done.stdout


def test_rehearsal(tmp_path, capsys):
    chosen = ("memcheck", "rest")
    left_out = [one.name for one in steps(True, tmp_path, "", ()) if one.name not in chosen]
    assert gpu_report.main(["--dry-run", "--output", str(tmp_path), "--skip", *left_out]) == 0
    state = json.loads((tmp_path / "state.json").read_text())["steps"]
    assert {name: entry["status"] for name, entry in state.items()} == dict.fromkeys(chosen, "done")
    (run,) = results.read(tmp_path / "results.jsonl")
    assert {r["section"] for r in run["rows"]} == {"accuracy", "dispatch", "layer", "batch", "models"}
    assert "| layer B=1 H=2 4x4 D=16 float32 forward |" in capsys.readouterr().out
