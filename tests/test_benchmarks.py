"""The benchmarks measure what they say: floors, proofs, clocks, files and tables."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import subprocess
import sys
import time
from collections import Counter
from itertools import product
from types import SimpleNamespace

import PIL.Image
import pytest
import reference
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import __main__ as suite
from benchmarks import apart, measure, models, peers, report, results, timing, workloads
from benchmarks.workloads import DIRECTIONS, Case, ModelWorkload, Rates, Workload
from gpsa_kernels import BACKENDS

TINY = Case(2, 2, 4, 4, 16, "float32")
TINY_MODEL = ModelWorkload("tiny", 32, 1, "float32", "inference", compiled=False)
RATES = Rates(copy_gb_s=1.0, matmul_tflop_s=0.001)
RUN = {"started": "2026-01-02T03:04:05+00:00", "device": "Some CPU (AVX2)", "device_type": "cpu", "threads": 2}
RUN |= {"torch": "2.11.0", "timm": "1.0.31", "profile": "full"}


def row(peer: str, us: float, direction: str = "forward", section: str = "operator", side: int = 14, **more) -> dict:
    """A row of a measured attention."""
    case = Case(8, 9, side, side, 48, "float32")
    times = {"timer": "wall clock", "rounds": 40, "median_us": us, "p20_us": 0.9 * us, "p80_us": 1.1 * us}
    place = {"section": section, "workload": str(case), "direction": direction, "temperature": "warm"}
    return {**place, "peer": peer, "status": "ok", **times, **more}


def rehearse(path, *arguments: str, status: int = 0) -> list[dict]:
    """The rows of the file's last run, after the suite's dry profile has run."""
    assert suite.main(["--profile", "dry", "--device", "cpu", "--output", str(path), *arguments]) == status
    return results.read(path)[-1]["rows"]


@pytest.mark.parametrize(
    ("direction", "moved", "content", "position"),
    [("forward", 75_264, 7_375_872, 526_848), ("backward", 131_712, 18_439_680, 1_580_544)],
)
def test_floor_of_one_head_of_an_image(direction, moved, content, position):
    work = workloads.attention_work(Case(1, 1, 14, 14, 48, "bfloat16"), direction)
    assert work == (moved, content + position, 38_416)
    batched = workloads.attention_work(Case(128, 9, 14, 14, 48, "bfloat16"), direction)
    assert batched == tuple(1152 * amount for amount in work)


@pytest.mark.parametrize("work", [workloads.attention_work, workloads.layer_work])
def test_both_directions_add_up(work):
    parts = [work(TINY, direction) for direction in ("forward", "backward")]
    assert work(TINY, "both") == tuple(map(sum, zip(*parts, strict=True)))


def test_model_flops_are_those_that_torch_counts():
    workload = ModelWorkload("tiny", 224, 2, "float32", "inference", compiled=False)
    model = models.make(models.DEIT, workload).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.randn(2, 3, 224, 224))
    # DeiT has one token more, the class token, which is 1/196 of the tokens and twice that of their pairs
    assert 1 < counter.get_total_flops() / workloads.model_work(workload, model.embed_dim).flops < 1 + 2 / 196


def test_the_full_profile_has_every_shape_that_matters():
    sections = (*workloads.OPERATOR_SECTIONS, "layer")
    chosen = [w for section in sections for w in workloads.attention_workloads(section, "cuda", "full")]
    assert {w.section for w in chosen if any(p.tuned for p in measure.Run(w, "cuda").peers)} == {"tuned"}
    cases = [w.case for w in chosen]
    assert {case.head_dim for case in cases} == {32, 48, 64}
    assert {case.dtype for case in cases} == {"float32", "float16", "bfloat16"}
    assert {case.grid_size for case in cases} >= {(8, 8), (14, 14), (24, 24), (28, 28), (32, 32), (64, 64), (16, 28)}
    assert {1, 256} <= {case.batch for case in cases}
    head = Case(128, 9, 14, 14, 48, "bfloat16")
    assert chosen[:2] == [Workload("operator", head, heat, DIRECTIONS) for heat in ("cold", "warm")]
    found = {(m.size, m.image, m.direction, m.compiled) for m in workloads.model_workloads("cuda", "full")}
    assert found == set(product(("tiny", "small", "base"), (224, 384), ("inference", "training"), (False, True)))


def measured(workload: Workload, *directions: str) -> dict[tuple[str, str], dict]:
    run = measure.Run(dataclasses.replace(workload, temperature="warm"), "cpu")
    rows = [row for direction in directions for row in run.rows(direction, timing.EFFORTS["dry"], lambda _: RATES)]
    return {(row["peer"], row["direction"]): row for row in rows}


@pytest.mark.parametrize("section", ["operator", "layer"])
def test_peers_agree_and_rows_carry_their_floor_and_memory_and_what_auto_takes(monkeypatch, section):
    directions = DIRECTIONS if section == "operator" else ("both",)
    monkeypatch.setattr(peers, "select_backend", lambda call: BACKENDS["eager" if torch.is_grad_enabled() else "sdpa"])
    rows = measured(Workload(section, TINY, "warm", directions), *directions)
    expected = {*product(("timm", "gpsa_kernels eager", "gpsa_kernels sdpa", "SDPA alone"), directions)}
    if section == "operator":
        expected |= {*product(("eager, position once", "SDPA + positional map"), directions)}
        expected.add(("SDPA + cached map", "forward"))
    assert {rows[place]["status"] for place in expected} == {"ok"}
    assert {row["status"] for row in rows.values()} == {"ok", "unavailable"}
    assert all(row["auto"] == ("sdpa" if direction == "forward" else "eager") for (_, direction), row in rows.items())
    for name, backend in BACKENDS.items():
        assert backend.unavailable() in (None, rows[f"gpsa_kernels {name}", "both"].get("reason"))
    found = rows["gpsa_kernels eager", "both"]
    work = (workloads.attention_work if section == "operator" else workloads.layer_work)(TINY, "both")
    assert found["floor_us"] == pytest.approx(1e6 * max(work.bytes, work.flops) / 1e9)
    assert 1e6 * found["memory_mb"] > 3 * 2 * 2 * 16 * 16 * 4  # q, k, v, and the maps


def test_there_is_no_floor_in_16_bits_on_a_cpu(monkeypatch):
    asked = set()
    monkeypatch.setattr(timing, "measure_rates", lambda *_, **__: RATES)
    monkeypatch.setattr(
        measure.Run, "rows", lambda run, _, __, rates: asked.add((run.case.dtype, rates(run.case.dtype)))
    )
    for _, rows in suite.units("operator", "cpu", "full", {}):
        rows()
    assert asked == {("float32", RATES), ("float16", None), ("bfloat16", None)}


def test_a_wrong_peer_is_shown_as_wrong(monkeypatch, tmp_path):
    def planted(name, change):
        return peers.Peer(name, lambda case, tensors: functools.partial(change, peers.eager(case, tensors)))

    doubled = planted("doubled", lambda right, *tensors: 2 * right(*tensors))
    gradient = planted("gradient", lambda right, *rest: right(*rest[:-1], 2 * rest[-1] - rest[-1].detach()))
    raises = planted("raises", lambda *_: 1 / 0)

    def late(case, tensors):
        calls = iter([peers.eager(case, tensors)] * 4)  # the proof, the memory, and warming up
        return lambda *tensors: next(calls, lambda *_: 1 / 0)(*tensors)

    chosen = doubled, gradient, raises, peers.Peer("late", late), *peers.OPERATOR.peers[:2]
    monkeypatch.setattr(measure, "OPERATOR", dataclasses.replace(peers.OPERATOR, peers=chosen))
    rows = measured(Workload("operator", TINY, "warm", DIRECTIONS), "forward", "both")
    status = {peer: (rows[peer, "forward"]["status"], rows[peer, "both"]["status"]) for peer, _ in rows}
    right = {"timm": ("ok", "ok"), "eager, position once": ("ok", "ok"), "gradient": ("ok", "wrong")}
    failing = {"raises": ("failed", "failed"), "late": ("failed", "failed")}
    assert status == {**right, "doubled": ("wrong", "wrong"), **failing}
    assert not any("median_us" in row for row in rows.values() if row["status"] != "ok")
    results.append(tmp_path / "r.jsonl", RUN, rows.values())
    (run,) = results.read(tmp_path / "r.jsonl")
    table = report.TABLES["attention"](run)
    assert "- doubled forward, forward + backward: wrong: it is 1.0e+00 from the formula" in table
    assert "- raises forward, forward + backward: failed: ZeroDivisionError: division by zero" in table


def test_the_truth_is_the_reference(monkeypatch):
    monkeypatch.setattr(peers, "_LARGEST_MAP", 1)  # an image at a time
    tensors = reference.inputs(2, 3, (4, 5), 8)
    grad_out = torch.randn_like(tensors[0])
    expected = reference.with_gradients(reference.literal, tensors, grad_out, (4, 5), 8**-0.5)
    got = peers.formula(tensors, grad_out, Case(2, 3, 4, 5, 8, "float64"), torch.float64)
    torch.testing.assert_close(got, list(expected))
    assert peers.deviation(got, expected) < 1e-12
    got[1][0, 0, 0, 0] = float("nan")
    assert peers.deviation(got, expected) == peers.HOPELESS


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_no_kernel_refuses_a_model_on_a_gpu(monkeypatch, name):
    monkeypatch.setitem(BACKENDS, name, dataclasses.replace(BACKENDS[name], unavailable=lambda: None))
    with torch._subclasses.FakeTensorMode():
        for workload in workloads.model_workloads("cuda", "full"):
            peers.check_backend(name, *models.attention(workload, "cuda"))
        with pytest.raises(peers.Unavailable, match="float32") if name == "cuda" else contextlib.nullcontext():
            peers.check_backend(name, *models.attention(TINY_MODEL, "cuda"))


def test_a_wall_clock_runs_to_the_end_of_the_work_on_a_gpu(monkeypatch):
    done = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("synchronized"))
    assert timing.wall_clock(lambda: done.append("called"), "cuda", calls=2)() > 0
    assert done == ["called", "called", "synchronized"]


class OldGPSA(peers.GPSA):
    """timm's layer as it was up to 1.0.19: no device, no dtype, indices in float32."""

    def __init__(self, dim, num_heads=8, qkv_bias=False, attn_drop=0.0, proj_drop=0.0, locality_strength=1.0):
        super().__init__(dim, num_heads)

    def get_rel_indices(self, num_patches):
        return super().get_rel_indices(num_patches).float()


@pytest.mark.parametrize("subject", [peers.OPERATOR, peers.LAYER], ids=["operator", "layer"])
def test_the_layer_of_an_old_timm_is_measured(monkeypatch, subject):
    monkeypatch.setattr(peers, "GPSA", OldGPSA)
    case = dataclasses.replace(TINY, dtype="bfloat16")
    tensors = subject.inputs(case, "cpu", 0)
    grad_out = torch.randn_like(tensors[0])
    got = measure.gradients(subject.peers[0].prepare(case, tensors), tensors, grad_out)
    assert peers.deviation(got, subject.formula(tensors, grad_out, case, torch.float64)) < 0.1


@pytest.mark.parametrize(("name", "count"), [("flash", 1), ("cuDNN", 2), ("efficient", 1)])
def test_attention_runs_in_the_kernel_that_its_name_names(monkeypatch, name, count):
    tensors, asked, read = peers.inputs(TINY, "cpu", 0), [], torch.nn.attention._cur_sdpa_kernel_backends
    monkeypatch.setattr(peers.F, "scaled_dot_product_attention", lambda q, *_: asked.extend(read()) or q)
    for peer in [peer for peer in peers.OPERATOR.peers if peer.name.endswith(f", {name}")]:
        if name != "flash":
            with pytest.raises(peers.Unavailable, match="it needs cuda"):
                peer.prepare(TINY, tensors)
        peer.make(TINY, tensors)(*tensors)
    assert [kernel.name for kernel in asked] == [f"{name.upper()}_ATTENTION"] * count


@pytest.mark.parametrize(("section", "count"), [("layer", 6), ("tuned", 13)])
def test_compiled_peers_are_measured(monkeypatch, section, count):
    compiler = functools.partial(torch.compile, backend="aot_eager")  # no machine code
    subject = measure.subject(section)
    here = [peer for peer in subject.peers if peer.compiled and peer.make is not peers.flex_twice]
    here = tuple(dataclasses.replace(peer, devices=("cpu",)) for peer in here)
    monkeypatch.setattr(measure, "subject", lambda _: dataclasses.replace(subject, peers=here))
    monkeypatch.setattr(torch, "compile", lambda function, mode="", **more: compiler(function, **more))
    monkeypatch.setattr(measure, "Worker", functools.partial(pretended_worker, False))
    (workload,) = workloads.attention_workloads(section, "cuda", "dry")
    found = Counter(row["status"] for row in measured(workload, "forward", "both").values())
    assert found == Counter(ok=count, unavailable=section == "tuned")  # a cached map has no backward pass


# the backward pass of a peer poisons the process: nothing on the GPU works any more
LOSING = """
import dataclasses, sys, torch
from benchmarks import __main__ as suite, measure, peers

def poison(*_):
    torch.cuda.is_initialized, torch.cuda.synchronize, peers.deviation = lambda: True, poison, poison
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

def losing(case, tensors):
    right = peers.eager(case, tensors)
    return lambda *tensors: poison() if torch.is_grad_enabled() else right(*tensors)

planted = [dataclasses.replace(p, make=losing) if p.name == sys.argv[1] else p for p in measure.OPERATOR.peers]
measure.OPERATOR = dataclasses.replace(measure.OPERATOR, peers=tuple(planted))
raise SystemExit(suite.main(sys.argv[2:]))
"""


def test_a_peer_that_takes_the_context_with_it_is_left_out_by_a_new_process(tmp_path):
    peer = "gpsa_kernels sdpa"
    path = tmp_path / "results.jsonl"
    arguments = ["--profile", "dry", "--device", "cpu", "--sections", "operator", "--output", str(path)]
    assert subprocess.run([sys.executable, "-c", LOSING, peer, *arguments], cwd=results.ROOT).returncode == 1
    (run,) = results.read(path)
    status = {(row["peer"], row["direction"]): row["status"] for row in run["rows"]}
    assert len(status) == len(run["rows"])
    # in the new process the peer is sound, and left out all the same
    assert [status.pop((peer, direction)) for direction in DIRECTIONS] == ["ok", "failed", "failed"]
    assert set(status.values()) == {"ok", "unavailable"}
    assert status["timm", "both"] == status["timm", "backward"] == "ok"
    first, second = [row["reason"] for row in run["rows"] if row["status"] == "failed"]
    assert first.startswith(f"CUDA was lost in {workloads.headline('cpu', 'dry')} backward: AcceleratorError")
    assert first == second


def pretended_worker(wrong: bool, function, peer: str, workload: ModelWorkload, *_):
    """Stands in for a process: timm's compiled model dies, its fused one is wrong if it is asked to be."""
    logits = torch.full((3,), 2.0 if wrong and peer == "gpsa_kernels sdpa" else 1.0).numpy()

    def receive(seconds: float) -> dict[str, object]:
        if peer == models.REFERENCE and workload.compiled:
            raise apart.Gone("the process died with exit code -6")
        return {"dim": 192, "proof": [logits], "truth": [logits]}

    return contextlib.nullcontext(SimpleNamespace(receive=receive, ask=lambda seconds: 1e-3))


@pytest.mark.parametrize("wrong", [False, True])
def test_models_are_proved_and_a_compiled_reference_that_dies_keeps_no_other_from_it(monkeypatch, wrong):
    monkeypatch.setattr(models, "Worker", functools.partial(pretended_worker, wrong))
    monkeypatch.setattr(peers, "select_backend", lambda call: BACKENDS["eager" if torch.is_grad_enabled() else "cuda"])
    workload = dataclasses.replace(TINY_MODEL, compiled=True)
    rows = models.workload_rows(workload, "cpu", timing.EFFORTS["dry"], lambda _: RATES)
    found = {row["peer"]: row for row in rows}
    assert (found["timm"]["reason"], found["timm"]["auto"]) == ("the process died with exit code -6", "cuda")
    assert found["DeiT, SDPA"]["status"] == "ok"
    assert found["DeiT, SDPA"]["floor_us"] == pytest.approx(1e-3 * workloads.model_work(workload, 192).flops)
    sdpa = found["gpsa_kernels sdpa"]
    assert (sdpa["status"], sdpa["deviation"]) == (("wrong", 1) if wrong else ("ok", 0))
    with pytest.raises(apart.Gone, match="nothing to compare it with"):
        models._prove({}, {}, None, torch.float32)


@pytest.mark.parametrize(
    ("function", "argument", "seconds", "reason"),
    [
        (os._exit, 3, 60, "the process died with exit code 3"),
        (time.sleep, 60, 1, "no answer within 1 s"),
        (iter, 3, 60, "TypeError: 'int' object is not iterable"),
        (iter, "a", 60, "the process died with exit code 0"),
    ],
)
def test_a_process_that_has_no_answer_is_survived(function, argument, seconds, reason):
    with apart.Worker(function, argument) as worker, pytest.raises(apart.Gone, match=reason):
        assert worker.receive(seconds) == worker.ask(seconds)


def test_accuracy_rows():
    rows = list(measure.accuracy_rows(dataclasses.replace(TINY, dtype="bfloat16"), "cpu", {}))
    found = {row["peer"]: row for row in rows if row["status"] == "ok"}
    assert found.keys() >= {"formula", "formula, autocast", "gpsa_kernels eager", "gpsa_kernels sdpa"}
    for row in found.values():
        assert len(row["max_error"]) == len(row["rms_error"]) == 6
        assert all(0 < rms <= most for rms, most in zip(row["rms_error"], row["max_error"], strict=True))
        assert 1e-3 < row["max_error"][0] < 0.05  # a 16-bit result holds eight bits


def test_rounds_call_every_peer_once_within_a_budget_but_not_under_the_least():
    called = []
    timed = timing.Interleaved({name: lambda name=name: called.append(name) or 1.0 for name in "abc"})
    timed.run(timing.Effort(20, budget=60.0, least=5))
    rounds = ["".join(called[i : i + 3]) for i in range(0, len(called), 3)]
    assert len(rounds) == 22
    assert {"".join(sorted(order)) for order in rounds} == {"abc"}
    assert len(set(rounds)) > 1
    assert [len(seconds) for seconds in timed.seconds.values()] == [20, 20, 20]
    timed.run(timing.Effort(20, budget=0.0, least=4))
    assert len(timed.seconds["a"]) == 4


def test_summary():
    expected = {"rounds": 11, "median_us": 6.0, "p20_us": 3.0, "p80_us": 9.0}
    assert timing.summary([1e-6 * n for n in range(1, 12)]) == pytest.approx(expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("waits", "timer"), [(False, "cuda graph"), (True, "cuda events")])
def test_a_gpus_clock_takes_a_graph_or_else_events(waits, timer):
    called = []
    x = torch.randn(2**24, device="cuda")

    def call(n):
        called.append(n)
        y = x + x
        return y.sum().item() if waits else y  # no graph can hold what waits for the device

    with measure.own_stream("cuda"):
        clock = timing.CudaClock([lambda: call(0), lambda: call(1)])
        found = clock()
    assert (clock.timer, called[-4:]) == (timer, [0, 1, 0, 1])
    assert 3 * x.nbytes / 50e12 < found < 0.1  # no memory moves 50 TB/s


@pytest.mark.parametrize(("section", "activations"), [("operator", 3), ("layer", 1)])
def test_cold_sets_exceed_the_cache(monkeypatch, section, activations):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=100_000))
    sets = measure.input_sets(Workload(section, TINY, "cold", ("both",)), "cpu")
    sizes = [sum(t.nbytes for t in tensors[:activations]) for tensors, _ in sets]
    assert sum(sizes) >= 200_000 > sum(sizes[:-1])
    assert len({tensors[0].data_ptr() for tensors, _ in sets}) == len(sets)
    assert len({tensors[-1].data_ptr() for tensors, _ in sets}) == 1  # one model's parameters


def test_the_gpus_path_on_cpu_tensors(monkeypatch, tmp_path):
    """Streams, rotating sets, the clock and memory statistics are pretended; everything else runs as on a GPU."""
    pretended = dict.fromkeys(("synchronize", "Stream", "reset_peak_memory_stats", "empty_cache"), lambda: None)
    pretended |= {"is_available": lambda: True, "get_device_name": lambda: "Pretended GPU"}
    pretended |= {"memory_allocated": lambda: 100_000, "max_memory_allocated": lambda: 250_000}
    pretended["stream"] = lambda _: contextlib.nullcontext()
    pretended["get_device_properties"] = lambda _: SimpleNamespace(L2_cache_size=10_000)
    for name, value in pretended.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(measure, "input_sets", lambda workload, _, sets=measure.input_sets: sets(workload, "cpu"))
    monkeypatch.setattr(timing, "measure_rates", lambda *_, **__: RATES)
    monkeypatch.setattr(timing.CudaClock, "__init__", lambda clock, calls: vars(clock).update(timer="", call=calls[0]))
    monkeypatch.setattr(timing.CudaClock, "__call__", lambda clock: timing.wall_clock(clock.call, "cpu")())
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    path = tmp_path / "cuda.jsonl"
    arguments = ["--device", "cuda", "--sections", "operator", "layer"]
    rehearse(path, *arguments, status=1)  # kernels say that they are there, and refuse the headline's CPU tensors
    for name in ("triton", "cuda"):
        gone = dataclasses.replace(BACKENDS[name], unavailable=lambda: "it is not installed")
        monkeypatch.setitem(BACKENDS, name, gone)
    path.unlink()
    rehearse(path, *arguments)
    (run,) = results.read(path)
    assert (run["device"], run["device_type"]) == ("Pretended GPU", "cuda")
    ours = [r for r in run["rows"] if r["peer"] == "gpsa_kernels sdpa"]
    assert [(r["section"], r["direction"], r["temperature"]) for r in ours] == [
        *(("operator", direction, heat) for heat in ("cold", "warm") for direction in DIRECTIONS),
        *(("layer", direction, "cold") for direction in ("forward", "both")),
    ]
    assert {r["memory_mb"] for r in ours if r["direction"] != "backward"} == {0.15}
    assert "driver" in report.header(run)


def test_a_run_goes_on_by_direction_and_on_another_driver_a_new_one_begins_beside_it(tmp_path, monkeypatch):
    path, header = tmp_path / "results.jsonl", results.describe("cpu", "dry")
    rows, asked = measure.Run.rows, []

    def ends_once(run, direction, *more):
        asked.append(direction)
        if asked == list(DIRECTIONS):
            raise KeyboardInterrupt
        return rows(run, direction, *more)

    monkeypatch.setattr(measure.Run, "rows", ends_once)
    for second, driver in enumerate(("580.1", "580.1", "580.2")):
        run = {**header, "started": f"2026-01-02T03:04:0{second}+00:00", "driver": driver}
        monkeypatch.setattr(results, "describe", lambda *_, run=run: run)
        with contextlib.nullcontext() if second else pytest.raises(KeyboardInterrupt):
            rehearse(path, "--resume", "--sections", "operator")
    assert asked == [*DIRECTIONS, "both", *DIRECTIONS]
    first, second = results.read(path)
    assert [(run["driver"], run["started"][17:19]) for run in (first, second)] == [("580.1", "00"), ("580.2", "02")]
    for run in (first, second):
        assert list(dict.fromkeys(row["direction"] for row in run["rows"])) == list(DIRECTIONS)


def test_a_backend_that_is_left_out_is_not_called(tmp_path, monkeypatch):
    monkeypatch.setitem(BACKENDS, "sdpa", BACKENDS["sdpa"])  # given back afterwards
    rows = rehearse(tmp_path / "results.jsonl", "--sections", "operator", "accuracy", "--without", "sdpa")
    found = {(r["section"], r["status"], r["reason"]) for r in rows if r["peer"] == "gpsa_kernels sdpa"}
    assert found == {("operator", "unavailable", "it was left out (--without)")}  # which a run tells once


def test_workloads_are_chosen_by_their_names(tmp_path):
    for chosen, known in (("4x4", {"4x4"}), ("", {"4x4", "5x5"})):
        rows = rehearse(tmp_path / "r.jsonl", "--resume", "--sections", "tokens", "--workloads", chosen)
        assert {r["workload"].split()[2] for r in rows} == known


def test_clocks_are_recorded_around_every_section(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 1980, 2619, [N/A], 112.50\n")
    smi.chmod(0o755)
    assert results.clocks("cpu", "accuracy", "before") == []
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(results, "clocks", lambda _, *moment, clocks=results.clocks: clocks("cuda", *moment))
    first, *_, last = rehearse(tmp_path / "results.jsonl", "--sections", "accuracy")
    found = {"section": "clocks", "workload": "accuracy", "status": "ok", "sm_mhz": 1980, "memory_mhz": 2619}
    assert (first, last) == tuple({**found, "watts": 112.5, "peer": moment} for moment in ("before", "after"))


def test_a_run_names_its_sources(tmp_path):
    kernel = tmp_path / "csrc" / "kernel.cu"
    kernel.parent.mkdir()
    kernel.write_text("a")
    assert results.describe("cpu", "dry")["sources"] == results.sources()
    first = results.sources(tmp_path)
    (tmp_path / "csrc" / "kernel.o").write_text("built")
    assert results.sources(tmp_path) == first
    kernel.write_text("b")
    assert results.sources(tmp_path) != first


def test_committed_are_the_newest_runs_of_each_machine_alone():
    runs = [run for path in results.FOLDER.iterdir() for run in results.read(path)]
    assert 0 < len(runs) == len({run["device"] for run in runs})


def test_results_are_added_never_replaced_and_read_as_they_were(tmp_path):
    path, fast = tmp_path / "cpu.jsonl", Rates(9999, 9999)._asdict()
    later = {**RUN, "started": "2026-01-02T04:00:00+00:00"}
    rows = [
        row("timm", 1234.567, memory_mb=1.23456, deviation=1.2345e-7),
        row("SDPA alone", 12.34567),
        row("timm", 3.0, "both", side=8, max_error=[1, 2.34567], **fast),
        row("late", 5.0, "both", side=8, timer="events"),
        {"section": "clocks", "workload": "operator", "peer": "before", "status": "ok", "watts": 112.5},
    ]
    wrong = {**row("gpsa_kernels sdpa", 0.0), "status": "wrong", "reason": "so", "deviation": 0.5}
    wrong = {name: value for name, value in wrong.items() if not name.endswith(("_us", "timer", "rounds"))}
    texts = [""]
    for run, chosen in ((RUN, rows), (RUN, [wrong]), (later, rows[:1])):
        results.append(path, run, chosen)
        texts.append(path.read_text())
        assert texts[-1].startswith(texts[-2])
    first, second = results.read(path)
    assert {**first, "rows": []} == {**RUN, "rows": []}
    kept = {"median_us": 1235, "p20_us": 1111, "p80_us": 1358, "memory_mb": 1.235, "deviation": 1.23e-07}
    short = {"median_us": 12.35, "p20_us": 11.11, "p80_us": 13.58}
    third = {"max_error": [1, 2.35], "p20_us": 2.7, "p80_us": 3.3, **fast}
    expected = [{**rows[0], **kept}, {**rows[1], **short}, {**rows[2], **third}, {**rows[3], **fast}, rows[4], wrong]
    assert first["rows"] == expected
    assert second["rows"] == [first["rows"][0]]


def test_a_run_tells_once_why_a_peer_is_unavailable(tmp_path):
    path = tmp_path / "cpu.jsonl"
    name = {"peer": "gpsa_kernels cuda", "status": "unavailable"}
    for direction, section, reason in product(("forward", "both"), ("operator", "tokens"), ("no GPU", "no library")):
        here = {"section": section, "workload": str(TINY), "direction": direction}
        results.append(path, RUN, [{**here, **name, "reason": reason}, row("timm", 1.0, direction, section)])
    (run,) = results.read(path)
    assert [r["reason"] for r in run["rows"] if r["status"] != "ok"] == ["no GPU", "no library"]
    assert len(run["rows"]) == 10


PLACE = '{"started": "x"}\n{"section": "dispatch", "workload": "no work", "peers": ["a"], "median_us": '


@pytest.mark.parametrize(
    "text", ["{}", "notes", '["timm", 2]', '{"started": "x"}\n{}', "[1", PLACE + "[1, 2]}", PLACE[17:] + "[1]}"]
)
def test_what_is_no_results_file_is_left_alone(tmp_path, text):
    path = tmp_path / "notes.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"notes\.jsonl, line"):
        results.append(path, RUN, [])
    assert path.read_text() == text


def test_full_runs_are_shown_before_quick_and_newer_before_older(tmp_path):
    for hour, profile in ((1, "full"), (2, "full"), (3, "quick"), (4, "dry")):
        run = {**RUN, "started": f"2026-01-02T0{hour}:00:00+00:00", "profile": profile}
        results.append(tmp_path / "cpu.jsonl", run, [])
    assert results.newest(tmp_path)["cpu"]["started"] == "2026-01-02T02:00:00+00:00"


def test_a_run_is_named_by_its_machine_and_day():
    assert "2 threads" in report.header({**results.describe("cpu", "dry"), "threads": 2})
    name = results.file_name({**RUN, "device": "NVIDIA H100 80GB HBM3", "device_type": "cuda"})
    assert name == "cuda-nvidia-h100-80gb-hbm3-2026-01-02.jsonl"


SLOW = {"floor_us": 50, "floor_bound": "memory"}
SHOWN = {
    **RUN,
    "rows": [
        row("timm", 400.0),
        row("gpsa_kernels sdpa", 100.0, memory_mb=2.0, deviation=4e-7, **SLOW),
        *(
            row(peer, us, section="batch")
            for peer, us in (("timm", 240), ("gpsa_kernels sdpa", 120), ("SDPA + map", 60))
        ),
    ],
}


def test_tables_show_the_median_of_the_headlines_measurements_what_is_faster_and_every_row():
    ours = "what `auto` takes | 3.00× (2.00 to 4.00) | | |"
    assert f"| **gpsa_kernels sdpa**, {ours}\n| SDPA + map | 4.00× | | |" in report.comparison(SHOWN)
    assert "| batch B=8 H=9 14x14 D=48 float32 | SDPA + map: 2.00× | | |" in report.details(SHOWN)
    eager = [{**row, "auto": "eager", "peer": row["peer"].replace("sdpa", "eager")} for row in SHOWN["rows"]]
    table = report.glance({"cpu": {**RUN, "rows": eager}})
    assert "| CPU, `eager` | 3.00× (2.00 to 4.00) | | | |\n| GPU | not measured yet" in table
    table = report.TABLES["attention"](SHOWN)
    cells = "images/s | times timm's speed | floor, µs | share of it | memory, MB | off by |"
    assert f"**operator: B=8 H=9 14x14 D=48 float32**\n\n| | direction | µs | p20 to p80 | {cells}\n" in table
    assert "| timm | forward, warm | 400.0 | 360.0 to 440.0 | 20000.0 | 1.00× | | | | |\n" in table
    cells = "forward, warm | 100.0 | 90.0 to 110.0 | 80000.0 | 4.00× | 50.0 (memory) | 50% | 2.0 | 4e-07"
    assert f"| gpsa_kernels sdpa | {cells} |\n" in table


@pytest.mark.parametrize(("us", "bounded"), [(51, True), (49, False)])
def test_a_floor_that_somebody_goes_below_is_none(us, bounded):
    rows = [row("a", 400, **SLOW), row("b", us, **SLOW)]
    assert report.TABLES["attention"]({**RUN, "rows": rows}).count("50.0 (memory)") == 2 * bounded


def test_every_table_of_the_newest_run_can_be_printed(capsys):
    report.main([])
    told = capsys.readouterr().out
    for line in ("**compiled: ", "**models: convit_base 224px B=1 float32**", "| sdpa | pos_weight |", "| B200 |"):
        assert line in told


def test_pictures(tmp_path):
    (written,) = report.draw({"cpu": SHOWN}, tmp_path)
    assert written.name == "cpu-speedups.png"
    assert RUN["started"] in PIL.Image.open(written).text["Description"]
