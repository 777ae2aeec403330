"""What ``check`` finds out, and what ``auto`` makes of it: with fake workers, verdicts and GPUs."""

import logging
import math
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from reference import inputs
from timm.models.convit import ConVit as TimmConViT
from torch import nn

from gpsa_kernels import BACKENDS, FusedGPSA, auto, backend_of, check, fuse, gpsa_attention, info, verdict
from gpsa_kernels.__main__ import main
from gpsa_kernels.backends import Call
from gpsa_kernels.check import worker
from gpsa_kernels.verdict import Kind, Verdict

ON_CPU = auto._on_cpu
GPU = {"gpu": "a GPU", "torch": "2.11", "cuda": "13.0", "triton": "3.6"}
KIND = Kind("float32", "inference", 14, 48, False)
# What it is given for a backend is the answer to "prove", or the time of one that is right, or that it hangs or dies.
WORKER = """
import os, signal, sys, time
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[2]))
while True:
    what, *about = connection.recv()
    answer = {answers}.get(about[0] if about else what, 10.0)
    if answer == "hang": time.sleep(60)
    if answer == "exit": sys.exit("no such thing")
    if answer == "crash" or (answer, what) == ("crash later", "measure"): os.kill(os.getpid(), signal.SIGSEGV)
    if what == "measure": answer = {{"us": answer if isinstance(answer, float) else 1.0}}
    elif not isinstance(answer, dict): answer = {{"error": 0.1, "eager": 0.2}}
    connection.send(answer)
"""


@pytest.fixture(autouse=True)
def _fake_gpu(tmp_path, monkeypatch):
    """CPU tensors are treated as a GPU's, for which there are two backends with kernels: ``quick`` and ``slow``."""
    monkeypatch.setenv("GPSA_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("GPSA_CHECK", raising=False)
    for name in ("slow", "quick"):
        kernels = {"name": name, "compose": None, "kernel_devices": frozenset({"cpu", "cuda"})}
        monkeypatch.setitem(BACKENDS, name, replace(BACKENDS["sdpa"], **kernels))
    monkeypatch.setattr(auto, "_on_cpu", auto._on_gpu)
    monkeypatch.setattr(verdict, "machine", lambda index: GPU)
    monkeypatch.setattr(auto, "_unchecked", set())
    forget()
    yield
    forget()


def forget():
    """What another process of the user does not know either."""
    auto._find_out.cache_clear()
    auto._verdicts.clear()


def have_answered(monkeypatch, **answers):
    """By a fake worker."""
    fake = WORKER.format(answers={"machine": {"machine": GPU}, **answers})
    monkeypatch.setattr(check, "WORKER", [sys.executable, "-SEc", fake])
    if "hang" in answers.values():
        monkeypatch.setattr(check, "LIMIT", 1.0)


def call(tokens=196, dtype=torch.float32, grad=False, dropout_p=0.0, head_dim=48):
    q = torch.zeros(1, 2, tokens, head_dim, dtype=dtype, requires_grad=grad)
    return Call(q, q, q, torch.zeros(2, 3), torch.zeros(2), None, 1, tokens, 1.0, dropout_p)


def chosen(*args, **kwargs):
    return auto.choose(call(*args, **kwargs)).name


def known(wrong="", **times):
    """A verdict that all backends are right but one."""
    proofs = {kind.proof(name): "two runs differ" * (name == wrong) for kind in verdict.kinds() for name in times}
    return Verdict(GPU, "2026-11-21", proofs, {str(kind): times for kind in verdict.kinds()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (known(quick=1.0, slow=2.0, sdpa=3.0), "quick"),
        (known(quick=1.0, slow=2.0, sdpa=0.5), "sdpa"),
        (known(wrong="quick", quick=1.0, slow=2.0, sdpa=3.0), "slow"),
        (known(wrong="slow", slow=1.0), "sdpa"),
        (known(), "sdpa"),
    ],
)
def test_the_fastest_proven_backend_is_taken(monkeypatch, found, expected, dtype):
    verdict.write(found)
    monkeypatch.setattr(check, "one_kind", None)  # nothing is checked
    assert chosen(dtype=dtype) == expected
    assert chosen(dtype=torch.float64) == "sdpa"


def test_what_cannot_run_the_call_gives_way():
    verdict.write(known(quick=1.0))
    assert chosen() == "quick"
    assert chosen(dropout_p=0.5) == "eager"
    with torch.autograd.forward_ad.dual_level():
        assert chosen() == "eager"


@pytest.mark.parametrize(
    ("given", "expected", "wrong"),
    [
        ({"quick": 5.0}, "quick", []),
        ({"quick": {"wrong": "q: error 1, allowed 0"}}, "slow", ["quick"]),
        ({"quick": "hang", "slow": 5.0}, "slow", ["quick"]),
        ({"quick": "crash", "slow": 5.0}, "slow", ["quick"]),
        ({"quick": "crash later", "slow": 5.0}, "slow", ["quick"]),
        ({"quick": {"cannot": "Failed to find C compiler"}, "slow": 5.0}, "slow", []),
        ({"quick": {"wrong": "it is"}, "slow": {"wrong": "it is"}}, "sdpa", ["slow", "quick"]),
    ],
    ids=str,
)
def test_the_first_call_of_a_kind_is_checked_and_the_second_is_looked_up(caplog, monkeypatch, given, expected, wrong):
    have_answered(monkeypatch, **{"slow": 20.0, "sdpa": 30.0, "eager": 40.0, **given})
    assert chosen() == expected
    assert [message.split()[1] for message in caplog.messages] == ["checking", *wrong]
    monkeypatch.setattr(check, "one_kind", None)
    assert chosen() == expected
    assert auto._find_out.cache_info().hits == 1
    forget()
    assert chosen() == chosen(grad=True) == expected  # out of the file
    assert len(caplog.messages) == 1 + len(wrong)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"quick": {"cannot": "Failed to find C compiler"}, "slow": {"cannot": "out of memory"}}, "out of memory"),
        ({"machine": {"cannot": "CUDA-capable device(s) is/are busy"}}, "are busy"),
        ({"machine": "crash"}, "its process died of SIGSEGV"),
        ({"machine": "exit"}, "its process ended with status 1: no such thing"),
        ({"machine": {"machine": {"gpu": "another"}}}, "another GPU"),
        ({"folder": None}, "Not a directory"),
    ],
)
def test_what_cannot_be_checked_is_told_once_and_tried_by_the_next_process(
    monkeypatch, caplog, tmp_path, given, reason
):
    have_answered(monkeypatch, **given)
    if "folder" in given:
        monkeypatch.setenv("GPSA_CACHE_DIR", "/dev/null/folder")
    assert [chosen(dtype=dtype) for dtype in (torch.float32, torch.float32, torch.bfloat16)] == ["sdpa"] * 3
    assert [reason in message for message in caplog.messages if "sdpa serves" in message] == [True]
    assert not list(tmp_path.glob("*.json"))


def test_two_processes_check_once(monkeypatch, caplog):
    checks = []

    def one_kind(device, kind, found):
        checks.append(kind)
        vars(found).update(vars(known(quick=1.0)))

    monkeypatch.setattr(check, "one_kind", one_kind)
    with ThreadPoolExecutor() as pool:  # each opens the lock by itself, as two processes do
        found = list(pool.map(lambda _: auto._checked(0, KIND), range(4)))
    assert checks == [KIND]
    assert {verdict.fastest(KIND) for verdict in found} == {"quick"}
    monkeypatch.setattr(auto, "_WAIT", 0.1)
    with verdict.renewed(GPU, 0):
        assert chosen(tokens=500) == "quick"
        verdict._path(GPU).unlink()
        auto._verdicts.clear()
        assert chosen() == "sdpa"
    assert "another process" in caplog.messages[-1]


@pytest.mark.parametrize("text", ["{", "[]", '{"machine": {}}', '{"machine": null, "date": ""}', '{"times": {"a": 1}}'])
def test_a_damaged_or_foreign_file_is_ignored_with_a_warning_and_another_one_added_to(caplog, tmp_path, text):
    verdict._path(GPU).write_text(text)
    for proof, before in (("first", {}), ("second", {"first": ""})):
        with verdict.renewed(GPU, 1.0) as found:
            assert found == Verdict(GPU, proofs=before)
            found.proofs[proof] = ""
    assert [message.split(" is ")[1][:7] for message in caplog.messages] == ["ignored"]
    assert verdict.read(GPU) == found
    assert {path.name for path in tmp_path.iterdir()} == {"lock", verdict._path(GPU).name}


@pytest.mark.parametrize(("setting", "expected"), [("0", "sdpa"), ("trust", "slow")])
def test_the_environment_can_forbid_and_trust(monkeypatch, setting, expected):
    monkeypatch.setenv("GPSA_CHECK", setting)
    monkeypatch.setattr(auto, "BACKENDS", {name: BACKENDS[name] for name in ("slow", "quick", "sdpa", "eager")})
    verdict.write(known(quick=1.0))
    assert chosen() == expected
    assert setting in auto.outlook(torch.device("cuda", 0))
    monkeypatch.setenv("GPSA_CHECK", "yes")
    with pytest.raises(ValueError, match=r"GPSA_CHECK must be 0 .* got 'yes'"):
        chosen(grad=True)


@pytest.mark.parametrize("first", [True, False], ids=["checked while it is traced", "known"])
def test_a_compiled_call_is_one_graph_for_any_batch(monkeypatch, first):
    have_answered(monkeypatch, quick=1.0) if first else verdict.write(known(quick=1.0, sdpa=2.0))
    torch._dynamo.reset()
    graphs = []

    @partial(torch.compile, fullgraph=True, dynamic=True, backend=lambda graph, _: graphs.append(graph) or graph)
    def compiled(*tensors):
        return gpsa_attention(*tensors, (3, 7))

    with torch.no_grad():
        for batch in (2, 4, 5000):
            compiled(*(t.detach() for t in inputs(batch, 3, (3, 7), 8, torch.float32)))
    assert ["'quick'" in graph.code for graph in graphs] == [True]


def test_a_call_is_exported_for_any_batch_and_any_grid():
    verdict.write(known(quick=1.0, sdpa=2.0))

    class Attention(nn.Module):
        def forward(self, q, *rest):
            return gpsa_attention(q, *rest, (1, q.shape[2]))

    sizes = {0: torch.export.Dim("batch", max=9999), 2: torch.export.Dim("tokens", max=9999)}
    tensors = tuple(t.detach() for t in inputs(2, 3, (1, 20), 8, torch.float32))
    dynamic = {"q": sizes, "rest": (sizes, sizes, None, None)}
    exported = torch.export.export(Attention(), tensors, dynamic_shapes=dynamic)
    assert "'quick'" in exported.graph_module.code


def prove(dropout=False):
    return worker.answer(torch.device("cpu"), "prove", "quick", "float32", dropout, (1, 2, 5, 7, 16))


def break_quick(monkeypatch, **functions):
    monkeypatch.setitem(BACKENDS, "quick", replace(BACKENDS["quick"], **functions))


@pytest.mark.parametrize(
    ("scale", "without_gradients", "error"), [(1.001, 1.001, ""), (1.0, 1.001, ""), (math.nan, math.nan, "nan")]
)
def test_a_backend_is_proven_by_the_rule_of_exactness(monkeypatch, scale, without_gradients, error):
    assert prove()["error"] > 0
    assert "one mask" in prove(dropout=True)["unsupported"]
    right = BACKENDS["quick"]

    def forward(call, save):
        found = right.forward(call, save)
        return found._replace(out=found.out * (scale if save else without_gradients))

    break_quick(monkeypatch, forward=forward)
    assert f"out of 5x7 tokens, head_dim 16: error {error}" in prove()["wrong"]


def test_two_runs_may_not_differ(monkeypatch):
    right, factors = BACKENDS["quick"], iter([1, 1 + 1e-7])

    def backward(*about):
        grads = right.backward(*about)
        return grads._replace(q=grads.q * next(factors, 1))

    break_quick(monkeypatch, backward=backward)
    assert prove() == {"wrong": "q of 5x7 tokens, head_dim 16: two runs differ"}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("no memory"), "cannot"),
        (FileNotFoundError("ptxas"), "cannot"),
        (RuntimeError("Failed to find C compiler."), "cannot"),
        (RuntimeError("an illegal memory access"), "wrong"),
    ],
)
def test_what_the_machine_lacks_is_no_fault_of_a_kernel(monkeypatch, error, kind):
    def fail(*_):
        raise error

    break_quick(monkeypatch, forward=fail)
    assert prove() == {kind: f"{type(error).__name__}: {error}"}


def test_the_cpu_is_checked_for_real(monkeypatch):
    monkeypatch.setattr(check, "names", lambda: ["sdpa", "eager"])
    kind, found = Kind("float32", "training", 14, 64, False), Verdict({})
    proofs = check.find_out(torch.device("cpu"), found, [kind], 60.0, 30.0)
    assert found.times[str(kind)].keys() == {"sdpa", "eager", "alone"}
    assert found.fastest(kind) in ("sdpa", "eager")
    assert proofs.keys() == {kind.proof("sdpa"), kind.proof("eager")}
    assert all(0 < answer["error"] < 1e-4 for answer in proofs.values())


def test_the_command_prints_what_auto_takes(monkeypatch, capsys):
    have_answered(monkeypatch, machine={"machine": {}}, slow={"wrong": "out: error 1"}, sdpa=7e3, quick="crash")
    monkeypatch.setattr(auto, "_on_cpu", ON_CPU)
    assert main(["check", "--device", "cpu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    table = {line.split("  ")[0]: line.split() for line in lines}
    assert table["sdpa"] == ["sdpa", *["proven", "1.0e-01", "(2.0e-01)"] * 3]
    assert table["slow"] == ["slow", *["WRONG"] * 3]
    assert any("quick" in line and "SIGSEGV" in line for line in lines)
    assert table["14x14 D=48 inference"][3:] == ["7.00*", "0.01", "-", "-", "0.01"] * 2
    assert table["14x14 D=48 dropout"][3:] == ["7.00", "0.01*", "-", "-", "0.01"] * 2


def test_auto_takes_what_the_command_has_found_out(monkeypatch, capsys):
    have_answered(monkeypatch, quick=5.0, slow=7.0, sdpa=8.0)
    for name, value in (("is_available", True), ("device_count", 1), ("get_device_name", "a GPU")):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    verdict.write(replace(known(slow=1.0), proofs={"an earlier": ""}))
    assert main(["check"]) == 0
    assert "an earlier" in verdict.read(GPU).proofs
    assert "a GPU, torch 2.11, cuda 13.0, triton 3.6, gpsa_kernels" in (said := capsys.readouterr().out)
    assert "7.00     5.00*" in said
    monkeypatch.setattr(check, "one_kind", None)
    assert {chosen(dtype=getattr(torch, dtype)) for dtype in verdict.DTYPES} == {"quick"}


@pytest.mark.parametrize(("limit", "wrong"), [(0.4, ["it did not end within 0 s"]), (9.0, [])])
def test_what_does_not_end_is_wrong_but_at_the_end_of_the_time_unknown(monkeypatch, limit, wrong):
    have_answered(monkeypatch, sdpa="hang")
    monkeypatch.setattr(check, "LIMIT", limit)
    monkeypatch.setattr(check, "names", lambda: ["sdpa"])
    found = Verdict(GPU)
    check.find_out(torch.device("cpu"), found, [KIND], seconds=1.0, reserved=0.3)
    assert list(found.proofs.values()) == wrong
    assert len(found.times) == len(wrong)


@pytest.mark.parametrize(
    ("gpus", "name", "message"),
    [
        ([], None, "no CUDA device was found; --device cpu checks"),
        ([], "cuda:0", "--device cuda:0: no CUDA devices were found"),
        (["A", "A"], "cuda:2", "--device cuda:2: 2 CUDA devices were found"),
        (["A", "B"], None, "there are different GPUs.*cuda:0 .A., cuda:1 .B."),
        (["A"], "tpu", "--device must be cpu or cuda:0, say, got 'tpu'"),
        (["A", "A"], None, "cannot be written|Not a directory"),
    ],
)
def test_bad_use_of_the_command_ends_in_a_sentence(monkeypatch, capsys, gpus, name, message):
    monkeypatch.setenv("GPSA_CACHE_DIR", "/dev/null/folder")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: gpus[index])
    assert main(["check", *(["--device", name] if name else [])]) == 2
    assert re.fullmatch(f"gpsa_kernels check: .*({message}).*\n", capsys.readouterr().err)


@pytest.mark.parametrize(("head_dim", "most"), [(16, 21), (32, 42), (48, 64), (64, 64)])
def test_on_the_cpu_eager_serves_the_training_of_few_tokens(head_dim, most):
    choices = product((most, most + 1), (True, False))
    taken = {(tokens, grad): ON_CPU(call(tokens, grad=grad, head_dim=head_dim)) for tokens, grad in choices}
    assert [about for about, name in taken.items() if name == "eager"] == [(most, True)]
    with torch.no_grad():
        assert ON_CPU(call(most, grad=True, head_dim=head_dim)) == "sdpa"


def test_a_layer_tells_its_backend(monkeypatch):
    monkeypatch.setattr(auto, "_on_cpu", ON_CPU)
    layer = FusedGPSA(24, 2, attn_drop=0.5)
    x = torch.randn(1, 100, 24)
    assert backend_of(layer, x) == "eager"  # dropout
    assert backend_of(layer.eval(), x) == "sdpa"
    assert backend_of(layer, x[:, :16]) == "eager"
    with torch.no_grad():
        assert backend_of(layer, x[:, :16], grid_size=(2, 8)) == "sdpa"
    frozen = layer.requires_grad_(False)
    assert backend_of(frozen, x[:, :16]) == "sdpa"
    assert backend_of(frozen, x[:, :16].requires_grad_()) == "eager"
    layer.pos_proj.register_forward_hook(print)
    assert backend_of(layer, x) == "eager"
    with pytest.raises(TypeError, match="layer must be a FusedGPSA, got Linear"):
        backend_of(nn.Linear(1, 1), x)


def test_fuse_and_info_say_what_will_run(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "gpsa_kernels")
    fuse(TimmConViT(embed_dim=8, img_size=32, num_heads=3, depth=3, local_up_to_layer=2, patch_size=8))
    assert caplog.messages == ["3 layers fused; on cpu: sdpa (to train on few tokens eager)"]
    outlook = partial(auto.outlook, torch.device("cuda", 0))
    assert "the first call" in outlook()
    auto._verdicts.clear()
    verdict.write(known(quick=1.0, sdpa=2.0))
    assert outlook() == "quick (proven 2026-11-21)"
    assert "cpu: sdpa" in info.report()
