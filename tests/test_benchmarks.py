"""The benchmarks measure what they say: floors, proofs, clocks, files and tables."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import signal
import subprocess
import sys
from collections import Counter
from itertools import product
from types import SimpleNamespace

import PIL.Image
import pytest
import torch

from benchmarks import __main__ as suite
from benchmarks import (
    accuracy,
    check,
    floors,
    machine,
    measure,
    models,
    peers,
    plots,
    report,
    results,
    timing,
    workloads,
)
from benchmarks.workloads import Case, ModelWorkload, Workload
from gpsa_kernels import BACKENDS

TINY = Case(2, 2, 4, 4, 16, "float32")
RATES = floors.Rates(copy_gb_s=1.0, matmul_tflop_s=0.001)
RUN = {
    "started": "2026-01-02T03:04:05+00:00",
    "device": "Some CPU (AVX2)",
    "device_type": "cpu",
    "threads": 2,
    "python": "3.11.7",
    "torch": "2.11.0",
    "timm": "1.0.31",
    "gpsa_kernels": "0.1.0",
    "profile": "full",
}


def row(
    peer: str, us: float, direction: str = "forward", section: str = "operator", side: int = 14, **more: object
) -> dict:
    """A row of a measured attention."""
    case = Case(8, 9, side, side, 48, "float32")
    times = {"timer": "wall clock", "rounds": 40, "median_us": us, "p20_us": 0.9 * us, "p80_us": 1.1 * us}
    header = {"section": section, "workload": str(case), "direction": direction, "temperature": "warm"}
    return {**header, "peer": peer, "status": "ok", **times, **more}


# ---- floors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("direction", "moved", "content", "position"),
    [("forward", 75_264, 7_375_872, 526_848), ("backward", 131_712, 18_439_680, 1_580_544)],
)
def test_floor_of_one_head_of_an_image(direction, moved, content, position):
    work = floors.attention_work(Case(1, 1, 14, 14, 48, "bfloat16"), direction)
    assert work == (moved, content + position, 38_416)
    batched = floors.attention_work(Case(128, 9, 14, 14, 48, "bfloat16"), direction)
    assert batched == tuple(1152 * amount for amount in work)


@pytest.mark.parametrize("work", [floors.attention_work, floors.layer_work])
def test_both_directions_add_up(work):
    parts = [work(TINY, direction) for direction in ("forward", "backward")]
    assert work(TINY, "both") == tuple(map(sum, zip(*parts, strict=True)))


def test_floor_is_the_larger_of_two_times():
    rates = floors.Rates(copy_gb_s=1.0, matmul_tflop_s=0.01)
    assert floors.floor(floors.Work(bytes=3 * 10**9, flops=20 * 10**9), rates) == (3.0, "memory")
    assert floors.floor(floors.Work(bytes=3 * 10**9, flops=50 * 10**9), rates) == (5.0, "matmul")


def test_model_flops_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    workload = ModelWorkload("tiny", 224, 2, "float32", "inference", compiled=False)
    model = models.make(models.DEIT, workload).eval()
    with (
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        model(torch.randn(2, 3, 224, 224))
    ours = floors.model_work(workload, model.embed_dim).flops
    # DeiT has one token more, the class token, which is 1/196 of the tokens and twice that of their pairs
    assert 1 < counter.get_total_flops() / ours < 1 + 2 / 196


def test_roofline_of_the_headline():
    times = floors.roofline(workloads.headline("cuda", "full"), "forward", floors.Chip(3e12, 800e12, 3.9e12))
    assert [round(us) for us in times] == [29, 11, 11]


# ---- workloads ------------------------------------------------------------------------------------------------------


def test_the_full_profile_has_every_shape_that_matters():
    sections = ("operator", "tokens", "batch", "layer", "compiled")
    chosen = [w for section in sections for w in workloads.attention_workloads(section, "cuda", "full")]
    cases = [w.case for w in chosen]
    assert {case.head_dim for case in cases} == {32, 48, 64}
    assert {case.dtype for case in cases} == {"float32", "float16", "bfloat16"}
    assert {case.grid_size for case in cases} >= {(8, 8), (14, 14), (24, 24), (28, 28), (32, 32), (64, 64), (16, 28)}
    assert {1, 256} <= {case.batch for case in cases}
    assert chosen[0].case == Case(128, 9, 14, 14, 48, "bfloat16")
    assert chosen[0].directions == ("forward", "backward", "both")
    assert chosen[0].temperatures == ("cold", "warm")
    models = {(m.size, m.image, m.direction, m.compiled) for m in workloads.model_workloads("cuda", "full")}
    sizes, images = ("tiny", "small", "base"), (224, 384)
    assert models == set(product(sizes, images, ("inference", "training"), (False, True)))


# ---- proofs ---------------------------------------------------------------------------------------------------------


TINY_WORKLOAD = Workload("operator", TINY, workloads.DIRECTIONS, ("warm",))
TINY_HEADLINE = workloads.headline("cpu", "dry")


def measured(workload: Workload, *directions: str) -> list[dict]:
    run = measure.Run(workload, "cpu", "warm")
    return [row for direction in directions for row in run.rows(direction, measure.EFFORTS["dry"], RATES)]


@pytest.fixture(scope="module")
def tiny_rows():
    return measured(TINY_WORKLOAD, *workloads.DIRECTIONS)


def test_peers_agree(tiny_rows):
    status = {(row["peer"], row["direction"]): row["status"] for row in tiny_rows}
    everywhere = ("timm", "eager, position once", "SDPA + positional map", "gpsa_kernels eager", "gpsa_kernels sdpa")
    assert {status[peer, direction] for peer in (*everywhere, "SDPA alone") for direction in workloads.DIRECTIONS} == {
        "ok"
    }
    assert status["SDPA + cached map", "forward"] == "ok"
    assert not {"wrong", "failed"} & set(status.values())
    reasons = {row["peer"]: row.get("reason") for row in tiny_rows}
    for name, backend in BACKENDS.items():
        assert backend.unavailable() in (None, reasons[f"gpsa_kernels {name}"])


def test_rows_carry_their_floor_and_memory(tiny_rows):
    found = next(row for row in tiny_rows if row["peer"] == "gpsa_kernels eager" and row["direction"] == "both")
    work, derived = floors.attention_work(TINY, "both"), floors.derived(found)
    assert derived["floor_us"] == pytest.approx(1e6 * max(work.bytes, work.flops) / 1e9)
    assert derived["floor_share"] == pytest.approx(derived["floor_us"] / found["median_us"])
    assert vars(TINY).items() <= derived.items()
    assert found["memory_bytes"] > 3 * 2 * 2 * 16 * 16 * 4  # q, k, v, and the maps


def test_what_follows_from_a_layers_and_a_models_row():
    layer = floors.derived({**row("timm", 2.0, section="layer"), **RATES._asdict()})
    assert layer["floor_us"] == pytest.approx(1e-3 * floors.layer_work(Case.parse(layer["workload"]), "forward").flops)
    name = {"section": "models", "workload": "convit_small 384px B=2 bfloat16 compiled", "direction": "training"}
    workload = ModelWorkload("small", 384, 2, "bfloat16", "training", compiled=True)
    found = floors.derived({**name, "median_us": 2e6, "dim": 432, **RATES._asdict()})
    assert str(workload) == name["workload"]
    assert {**vars(workload), **name}.items() <= found.items()
    assert found["floor_us"] == pytest.approx(1e-3 * floors.model_work(workload, 432).flops)


def test_there_is_no_floor_in_16_bits_on_a_cpu(monkeypatch):
    monkeypatch.setattr(timing, "measure_rates", lambda *_, **__: RATES)
    asked = []
    monkeypatch.setattr(
        measure.Run, "rows", lambda run, direction, effort, rates: asked.append((run.case.dtype, rates))
    )
    for unit in suite.units("operator", "cpu", "full", {}):
        unit.rows()
    assert set(asked) == {("float32", RATES), ("float16", None), ("bfloat16", None)}


def test_a_wrong_peer_is_shown_as_wrong(monkeypatch):
    def doubled(case, tensors):
        right = peers.eager(case, tensors)
        return lambda *tensors: 2 * right(*tensors)

    def one_wrong_gradient(case, tensors):
        right = peers.eager(case, tensors)
        return lambda q, k, v, w, gate: right(q, k, v, w, 2 * gate - gate.detach())

    def raises(case, tensors):
        raise ZeroDivisionError("by zero")

    planted = [("doubled", doubled), ("gradient", one_wrong_gradient), ("raises", raises)]
    new = tuple(peers.Peer(name, make) for name, make in planted)
    subject = dataclasses.replace(peers.OPERATOR, peers=(*peers.OPERATOR.peers[:2], *new))
    monkeypatch.setattr(measure, "OPERATOR", subject)
    found = measured(TINY_WORKLOAD, "forward", "both")
    status = {(row["peer"], row["direction"]): row["status"] for row in found}
    assert status["timm", "both"] == status["eager, position once", "both"] == "ok"
    assert status["doubled", "forward"] == status["doubled", "both"] == "wrong"
    assert (status["gradient", "forward"], status["gradient", "both"]) == ("ok", "wrong")
    assert status["raises", "forward"] == "failed"
    assert not any("median_us" in row for row in found if row["status"] != "ok")
    assert next(row for row in found if row["peer"] == "raises")["reason"] == "ZeroDivisionError: by zero"
    table = report.attention({**RUN, "rows": [floors.derived(row) for row in found]})
    assert "- doubled forward, forward + backward: wrong: it is 1.0e+00 from the formula" in table


def test_layers_agree():
    found = measured(Workload("layer", TINY, ("both",), ("warm",)), "both")
    status = {row["peer"]: row["status"] for row in found}
    assert status["timm"] == status["gpsa_kernels eager"] == status["gpsa_kernels sdpa"] == "ok"
    assert status["SDPA alone"] == "ok"
    assert {row["status"] for row in found} <= {"ok", "unavailable"}


def test_the_truth_is_the_reference():
    import reference

    tensors = reference.inputs(2, 3, (4, 5), 8)
    grad_out = torch.randn_like(tensors[0])
    expected = reference.with_gradients(reference.literal, tensors, grad_out, (4, 5), 8**-0.5)
    got = check.formula(tensors, grad_out, Case(2, 3, 4, 5, 8, "float64"), torch.float64)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert check.deviation(got, expected) < 1e-12
    got[1][0, 0, 0, 0] = float("nan")
    assert check.deviation(got, expected) == check.HOPELESS


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_no_kernel_refuses_a_model_on_a_gpu(monkeypatch, name):
    monkeypatch.setitem(BACKENDS, name, dataclasses.replace(BACKENDS[name], unavailable=lambda: None))
    with torch._subclasses.FakeTensorMode():
        for workload in workloads.model_workloads("cuda", "full"):
            models.check_backend(name, workload, "cuda")
        in_float32 = ModelWorkload("tiny", 224, 1, "float32", "inference", compiled=False)
        refused = pytest.raises(peers.Unavailable, match="float32") if name == "cuda" else contextlib.nullcontext()
        with refused:
            models.check_backend(name, in_float32, "cuda")


def test_a_model_on_a_gpu_is_timed_to_the_end_of_its_work(monkeypatch):
    done = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("synchronized"))
    monkeypatch.setattr(models, "memory", lambda job, device: {"memory_bytes": 150})

    class Job(models.Job):
        def __init__(self, peer, workload, device):
            super().__init__(peer, workload, "cpu")
            self.device = device

        def logits(self, model, low):
            done.append("called")
            return model(self.images)

    answers = iter([True, False])
    pipe = SimpleNamespace(send=done.append, recv=lambda: next(answers))
    monkeypatch.setattr(models, "Job", Job)
    workload = ModelWorkload("tiny", 32, 1, "float32", "inference", compiled=False)
    models._serve(pipe, models.REFERENCE, workload, "cuda", torch.get_num_threads())
    facts, *call, seconds = done[-4:]
    assert facts["memory"] == {"memory_bytes": 150}
    assert call == ["called", "synchronized"]
    assert seconds > 0


def test_models_are_proved():
    good = {"proof": [torch.ones(3).numpy()], "truth": [torch.ones(3).numpy()]}
    bad = {"proof": [(2 * torch.ones(3)).numpy()]}
    assert "reason" not in models._proved(good, good, torch.float32)
    assert models._proved(bad, good, torch.float32)["status"] == "wrong"
    assert models._proved(bad, None, torch.float32)["status"] == "failed"


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
    assert check.deviation(got, subject.formula(tensors, grad_out, case, torch.float64)) < 0.1


@pytest.mark.parametrize("name", ["flash", "cuDNN", "efficient"])
def test_attention_without_a_position_runs_in_the_kernel_that_it_names(monkeypatch, name):
    (peer,) = (peer for peer in peers.OPERATOR.peers if peer.name == f"SDPA alone, {name}")
    tensors = peers.inputs(TINY, "cpu", 0)
    if name != "flash":
        with pytest.raises(peers.Unavailable, match="it needs cuda"):
            peer.prepare(TINY, tensors)
    entered = []
    read = torch.nn.attention._cur_sdpa_kernel_backends
    monkeypatch.setattr(peers.F, "scaled_dot_product_attention", lambda *_: entered.append(read()))
    peer.make(TINY, tensors)(*tensors)
    assert [[kernel.name for kernel in kernels] for kernels in entered] == [[f"{name.upper()}_ATTENTION"]]


def test_compiled_layers_are_measured_on_a_gpu(monkeypatch):
    (workload,) = workloads.attention_workloads("layer", "cuda", "dry")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))  # no machine code
    monkeypatch.setattr(measure, "probe", lambda *_: None)
    found = [(row["peer"], row["status"]) for row in measured(workload, "forward", "both") if "compiled" in row["peer"]]
    assert found == 2 * [(peer.name, "ok") for peer in peers.LAYER.peers if peer.compiled]


def lost_context(*_: object) -> None:
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize("lost", [False, True])
def test_a_peer_that_fails_while_it_is_timed_costs_itself_alone(monkeypatch, lost):
    def fails_late(case, tensors):
        calls = iter([peers.eager(case, tensors)] * 5)  # the proof and the clock take fewer, the rounds more

        def function(*tensors):
            with contextlib.suppress(StopIteration):
                return next(calls)(*tensors)
            if lost:
                monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
                monkeypatch.setattr(torch.cuda, "synchronize", lost_context)
            lost_context()

        return function

    late = (peers.Peer("late", fails_late), *peers.OPERATOR.peers[:3])
    monkeypatch.setattr(measure, "OPERATOR", dataclasses.replace(peers.OPERATOR, peers=late))
    reason = "AcceleratorError: CUDA error: an illegal memory access was encountered"
    if lost:
        with pytest.raises(measure.ContextLost) as caught:
            measured(TINY_WORKLOAD, "forward")
        assert caught.value.row["peer"] == "late"
        assert caught.value.row["reason"] == f"CUDA was lost in {TINY} forward: {reason}"
        return
    found = {row["peer"]: row for row in measured(TINY_WORKLOAD, "forward")}
    assert found.pop("late")["reason"] == reason
    assert {row["status"] for row in found.values()} == {"ok"}


# the backward pass of a peer poisons the process: nothing on the GPU works any more
LOSING = """
import dataclasses, sys, torch
from benchmarks import __main__ as suite, measure, peers

def poison(*_):
    torch.cuda.is_initialized, torch.cuda.synchronize, measure.check.deviation = lambda: True, poison, poison
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
    done = subprocess.run([sys.executable, "-c", LOSING, peer, *arguments], cwd=machine.ROOT)
    assert done.returncode == 1
    (run,) = results.read(path)
    status = {(row["peer"], row["direction"]): row["status"] for row in run["rows"]}
    assert len(status) == len(run["rows"])
    # in the new process the peer is sound, and left out all the same
    assert [status.pop((peer, direction)) for direction in workloads.DIRECTIONS] == ["ok", "failed", "failed"]
    assert set(status.values()) == {"ok", "unavailable"}
    assert status["timm", "both"] == status["timm", "backward"] == "ok"
    reasons = [row["reason"] for row in run["rows"] if row["status"] == "failed"]
    assert reasons[0].startswith(f"CUDA was lost in {TINY_HEADLINE} backward: AcceleratorError")
    assert reasons[0] == reasons[1]


class WorkerOfACompiledModel:
    """Stands in for a process; timm's compiled model dies."""

    def __init__(self, peer: str, workload: ModelWorkload, _: str) -> None:
        self.dies = peer == models.REFERENCE and workload.compiled

    def start(self) -> dict[str, object]:
        if self.dies:
            raise RuntimeError("the process died with exit code -6")
        ones = [torch.ones(3).numpy()]
        return {"dim": 192, "proof": ones, "truth": ones}

    def __call__(self) -> float:
        return 1e-3

    def stop(self) -> None:
        pass


def test_a_compiled_reference_that_dies_keeps_no_other_from_being_compared(monkeypatch):
    monkeypatch.setattr(models, "_Worker", WorkerOfACompiledModel)
    workload = ModelWorkload("tiny", 32, 1, "float32", "inference", compiled=True)
    found = {row["peer"]: row for row in models.workload_rows(workload, "cpu", measure.EFFORTS["dry"], RATES)}
    assert found["timm"]["reason"] == "the process died with exit code -6"
    assert found["gpsa_kernels sdpa"]["status"] == found["DeiT, SDPA"]["status"] == "ok"
    assert found["gpsa_kernels sdpa"]["deviation"] == 0


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_peer_that_dies_is_survived(monkeypatch):
    monkeypatch.setattr(measure, "_probe", die)
    assert measure.probe("operator", "timm", TINY, "cpu", "forward") == "the process died of signal 11"


def test_accuracy_rows():
    case = Case(1, 2, 4, 4, 16, "bfloat16")
    found = list(accuracy.case_rows(case, "cpu", {}))
    for backend in ("eager", "sdpa"):
        mine = [row for row in found if row["peer"] == f"gpsa_kernels {backend}"]
        assert [row["tensor"] for row in mine] == list(check.NAMES)
        assert all(0 < row["rms_error"] <= row["max_error"] for row in mine)
        # a 16-bit result holds eight bits
        assert mine[0]["max_error"] < 0.05 < 1 < 1e3 * mine[0]["max_error"]


# ---- clocks ---------------------------------------------------------------------------------------------------------


def test_rounds_call_every_peer_once():
    called = []
    timed = timing.Interleaved({name: lambda name=name: called.append(name) or 1.0 for name in "abc"})
    timed.run(20, budget=60.0, least=5)
    rounds = ["".join(called[i : i + 3]) for i in range(0, len(called), 3)]
    assert len(rounds) == 22
    assert {"".join(sorted(order)) for order in rounds} == {"abc"}
    assert len(set(rounds)) > 1
    assert [len(seconds) for seconds in timed.seconds.values()] == [20, 20, 20]


def test_budget_ends_the_rounds_but_not_the_least():
    timed = timing.Interleaved({"a": lambda: 1.0})
    timed.run(20, budget=0.0, least=4)
    assert len(timed.seconds["a"]) == 4


def test_cpu_samples_take_the_sets_in_turn():
    called = []
    clock = timing.CpuSample([lambda: called.append(0), lambda: called.append(1)])
    called.clear()
    assert all(clock() >= 0 for _ in range(4))
    assert called == [0, 1, 0, 1]


def test_summary():
    assert timing.summary([1e-6 * n for n in range(1, 12)]) == {
        "rounds": 11,
        "median_us": 6.0,
        "p20_us": 3.0,
        "p80_us": 9.0,
    }


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
        clock = timing.sample([lambda: call(0), lambda: call(1)], "cuda")
        found = clock()
    assert (clock.timer, called[-4:]) == (timer, [0, 1, 0, 1])
    assert 3 * x.nbytes / 50e12 < found < 0.1  # no memory moves 50 TB/s


def test_cold_sets_exceed_the_cache(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=100_000))
    for section, activations in (("operator", 3), ("layer", 1)):
        sets = measure.input_sets(Workload(section, TINY, ("both",), ("cold",)), "cpu", "cold")
        sizes = [sum(t.numel() * t.element_size() for t in tensors[:activations]) for tensors, _ in sets]
        assert sum(sizes) >= 200_000 > sum(sizes[:-1])
        assert len({tensors[0].data_ptr() for tensors, _ in sets}) == len(sets)
        assert len({tensors[-1].data_ptr() for tensors, _ in sets}) == 1  # one model's parameters


def test_the_gpus_path_on_cpu_tensors(monkeypatch, tmp_path):
    """Streams, rotating sets, the clock and memory statistics are pretended; everything else runs as on a GPU."""
    pretended = {
        "synchronize": lambda: None,
        "is_available": lambda: True,
        "Stream": lambda: None,
        "stream": lambda _: contextlib.nullcontext(),
        "get_device_properties": lambda _: SimpleNamespace(L2_cache_size=10_000),
        "get_device_name": lambda: "Pretended GPU",
        "memory_allocated": lambda: 100,
        "max_memory_allocated": lambda: 250,
        "reset_peak_memory_stats": lambda: None,
        "empty_cache": lambda: None,
    }
    for name, value in pretended.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("OPERATOR", "LAYER"):
        subject = getattr(measure, name)
        inputs = subject.inputs
        on_cpu = dataclasses.replace(subject, inputs=lambda case, _, seed, inputs=inputs: inputs(case, "cpu", seed))
        monkeypatch.setattr(measure, name, on_cpu)
    monkeypatch.setattr(timing, "measure_rates", lambda *_, **__: RATES)
    monkeypatch.setattr(timing, "CudaSample", timing.CpuSample)
    monkeypatch.setattr(timing.CpuSample, "pool", None, raising=False)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    path = tmp_path / "cuda.jsonl"
    arguments = ["--device", "cuda", "--profile", "dry", "--output", str(path), "--sections", "operator", "layer"]
    assert suite.main(arguments) == 1  # triton says that it is there, and refuses the headline's CPU tensors
    gone = dataclasses.replace(BACKENDS["triton"], unavailable=lambda: "it is not installed")
    monkeypatch.setitem(BACKENDS, "triton", gone)
    path.unlink()
    assert suite.main(arguments) == 0
    (run,) = results.read(path)
    assert (run["device"], run["device_type"]) == ("Pretended GPU", "cuda")
    ours = [r for r in run["rows"] if r["peer"] == "gpsa_kernels sdpa"]
    places = [(r["section"], r["direction"], r["temperature"]) for r in ours]
    assert places == [
        *(("operator", direction, heat) for heat in ("cold", "warm") for direction in workloads.DIRECTIONS),
        *(("layer", direction, "cold") for direction in ("forward", "both")),
    ]
    assert {r["memory_bytes"] for r in ours if r["direction"] != "backward"} == {150}
    assert "driver" in results.header(run)


# ---- files ----------------------------------------------------------------------------------------------------------


def test_what_was_measured_is_kept_by_direction(tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    arguments = ["--profile", "dry", "--device", "cpu", "--output", str(path), "--resume", "--sections", "operator"]
    rows, asked = measure.Run.rows, []

    def ends_once(run, direction, *more):
        asked.append(direction)
        if asked == list(workloads.DIRECTIONS):
            raise KeyboardInterrupt
        return rows(run, direction, *more)

    monkeypatch.setattr(measure.Run, "rows", ends_once)
    with pytest.raises(KeyboardInterrupt):
        suite.main(arguments)
    first = results.read(path)[0]["rows"]
    assert {row["direction"] for row in first} == {"forward", "backward"}
    assert suite.main(arguments) == 0
    assert asked == [*workloads.DIRECTIONS, "both"]
    (run,) = results.read(path)
    assert run["rows"][: len(first)] == first
    assert {row["direction"] for row in run["rows"][len(first) :]} == {"both"}


def test_committed_are_the_newest_runs_of_each_machine_alone():
    runs = [run for path in results.FOLDER.iterdir() for run in results.read(path)]
    assert runs
    assert len({run["device"] for run in runs}) == len(runs)


def test_results_are_added_never_replaced(tmp_path):
    path = tmp_path / "cpu.jsonl"
    later = {**RUN, "started": "2026-01-02T04:00:00+00:00"}
    texts = [""]
    for run, us in ((RUN, 1234.567), (RUN, 1.0), (later, 3.0)):
        results.append(path, run, [row("timm", us), row("SDPA alone", us, memory_bytes=1234567)])
        texts.append(path.read_text())
        assert texts[-1].startswith(texts[-2])
    first, second = results.read(path)
    assert first == {**RUN, "rows": first["rows"]}
    assert [one["median_us"] for one in first["rows"] + second["rows"]] == [1234.6, 1234.6, 1, 1, 3, 3]
    expected = floors.derived(row("SDPA alone", 3.0, memory_bytes=1234567))
    assert second["rows"][1] == {**expected, "p80_us": 3.3}


def test_a_section_tells_once_why_a_peer_is_unavailable(tmp_path):
    path = tmp_path / "cpu.jsonl"
    name = {"peer": "gpsa_kernels cuda", "status": "unavailable"}
    for direction, section, reason in product(("forward", "both"), ("operator", "tokens"), ("no GPU", "no library")):
        here = {"section": section, "workload": str(TINY), "direction": direction}
        results.append(path, RUN, [{**here, **name, "reason": reason}, {**here, "peer": "timm", "status": "ok"}])
    (run,) = results.read(path)
    assert Counter(r["status"] for r in run["rows"]) == {"ok": 8, "unavailable": 4}
    assert {(r["section"], r["reason"], r["direction"]) for r in run["rows"] if "reason" in r} == set(
        product(("operator", "tokens"), ("no GPU", "no library"), ("forward",))
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"status": "great"}, "the status is known"),
        ({"status": "wrong", "reason": "x"}, "a time is given for what is wrong"),
        ({"reason": "x"}, "a reason is given where"),
    ],
)
def test_a_row_that_contradicts_itself_is_refused(tmp_path, change, message):
    path = tmp_path / "cpu.jsonl"
    results.append(path, RUN, [row("timm", 2.0)])
    before = path.read_text()
    with pytest.raises(ValueError, match=message):
        results.append(path, RUN, [{**row("timm", 2.0), **change}])
    assert path.read_text() == before


@pytest.mark.parametrize("text", ["{}", "notes", '["timm", 2]', '{"started": "x"}\n["timm"]', "[1"])
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
    assert "2 threads" in results.header({**machine.describe("cpu", "dry"), "threads": 2})
    name = results.file_name("NVIDIA H100 80GB HBM3", "cuda", "2026-01-02")
    assert name == "cuda-nvidia-h100-80gb-hbm3-2026-01-02.jsonl"


# ---- tables and pictures --------------------------------------------------------------------------------------------

SLOW = floors.Rates(copy_gb_s=10.838016 / 0.05, matmul_tflop_s=1000.0)  # the floor of 8 images takes 50 µs
ROWS = [
    row("timm", 400.0),
    row("SDPA + positional map", 200.0),
    row("gpsa_kernels sdpa", 100.0, memory_bytes=2_000_000, deviation=4e-7, **SLOW._asdict()),
    row("SDPA alone", 80.0),
    row("timm", 900.0, "both", "tokens", 24, memory_bytes=6_000_000),
    row("gpsa_kernels sdpa", 300.0, "both", "tokens", 24, memory_bytes=1_500_000),
    row("timm", 90.0, "both", "tokens", 8, memory_bytes=600_000),
    row("gpsa_kernels sdpa", 30.0, "both", "tokens", 8, memory_bytes=150_000),
]
ROWS = [floors.derived(row) for row in ROWS]


def test_summary_table():
    assert report.summary({**RUN, "rows": ROWS}) == (
        "Measured on 2026-01-02: Some CPU (AVX2), 2 threads, torch 2.11.0, timm 1.0.31. In float32; medians of 40 "
        "interleaved rounds.\n"
        "How many times faster than timm's own code:\n"
        "\n"
        "| | SDPA + positional map | gpsa_kernels sdpa | without a position (SDPA, DeiT) |\n"
        "|---|---|---|---|\n"
        "| attention forward | 2.00× | 4.00× | 5.00× |\n"
        "\n"
        "At 24×24 tokens the memory that it keeps for the backward pass is 1/4.0 of what timm's code takes.\n"
    )


def test_attention_table():
    found = report.attention({**RUN, "rows": ROWS[:3]}).splitlines()
    assert found[2] == "**operator: B=8 H=9 14x14 D=48 float32**"
    assert found[4:] == [
        "| | direction | µs | p20 to p80 | times timm's speed | floor, µs | share of it | memory, MB | off by |",
        "|---|---|---|---|---|---|---|---|---|",
        "| timm | forward, warm | 400.0 | 360.0 to 440.0 | 1.00× | | | | |",
        "| SDPA + positional map | forward, warm | 200.0 | 180.0 to 220.0 | 2.00× | | | | |",
        "| gpsa_kernels sdpa | forward, warm | 100.0 | 90.0 to 110.0 | 4.00× | 50.0 (memory) | 50% | 2.0 | 4e-07 |",
    ]


def test_pictures(tmp_path):
    run = {**RUN, "rows": ROWS}
    written = plots.draw({"cpu": run}, tmp_path)
    assert {path.name for path in written} == {"cpu-speedups.png", "cpu-time.png"}
    assert all(RUN["started"] in PIL.Image.open(path).text["Description"] for path in written)
