"""The Triton kernels without a GPU: compiled for every architecture, within a budget; and the table they come from.

``python -m tools.machine_code triton --write`` writes the budget anew.
"""

import itertools
import re
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from gpsa_kernels.backends.triton import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("a process either interprets or compiles", allow_module_level=True)

from gpsa_kernels.backends.triton import attention
from gpsa_kernels.backends.triton.table import ATTENTION, POSITIONAL, Launch
from tools import machine_code, tune
from tools.ahead_of_time import SHARED_MEMORY_LIMIT, measure_all, variants
from tools.machine_code import ARCHITECTURES

BUDGET = machine_code.parse(machine_code.BUDGET.read_text())


@pytest.fixture(scope="module")
def measured(architectures):
    """Every kernel of every architecture; every day those of one, at 48 channels."""
    return measure_all(variants(architectures, (32, 48, 64, 128) if len(architectures) > 1 else (48,)))


def test_the_budget_is_of_these_kernels():
    assert {(f"sm_{v.capability}", str(v)) for v in variants(ARCHITECTURES)} == {
        key for key in BUDGET if machine_code.compiler_of(key[1]) == "triton"
    }


def test_every_kernel_is_within_its_budget(measured):
    assert machine_code.over_budget(measured, BUDGET) == {}


def test_nothing_spills_up_to_head_dim_64(measured):
    assert {key: code.spills for key, code in measured.items() if "D=128" not in key[1] and code.spills} == {}


def test_every_kernel_fits_its_architecture(measured):
    assert {k: code.shared for k, code in measured.items() if code.shared > SHARED_MEMORY_LIMIT[int(k[0][3:])]} == {}


def test_16_bit_attention_runs_on_tensor_cores(measured, architectures):
    kernels = [code for (_, name), code in measured.items() if re.match(r"attention\w* bfloat16", name)]
    assert len(kernels) == (9 if len(architectures) == 1 else 36 * len(architectures))
    assert all(code.matrix > 0 for code in kernels)


def rows_of(text: str) -> dict:
    names: dict = {}
    exec(text, names)
    return names["ATTENTION"] | names["POSITIONAL"]


def test_the_table_is_what_the_tuner_writes():
    text = tune.TABLE.read_text()
    assert tune.render(text, ATTENTION, POSITIONAL) == text
    change = {("mma", "forward", 64): Launch(128, 16, 8, 1)}
    assert rows_of(tune.render(text, ATTENTION | change, POSITIONAL)) == {**ATTENTION, **change, **POSITIONAL}


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_the_tuner_times_every_row_that_a_gpu_uses(capability):
    attention = tune.attention_problems(capability)
    assert {kernel for _, kernel, _ in attention} == {kernel for _, kernel, _ in ATTENTION}
    assert len(attention) == 3 * 3 * 3
    assert set(attention) <= set(ATTENTION)
    problems = {**attention, **tune.positional_problems()}
    for problem in problems.values():
        calls = tune.of_problem(problem, tune.step(problem._replace(batch=1), capability, "meta"))
        whole_image = problem.grid_size == (16, 16)  # needs no product of its own, only the gradient
        expected = set(problem.kernels) - ({"separable_product"} if whole_image else set())
        assert {call.kernel.__name__ for call in calls} == expected
    assert set(tune.positional_problems()) == set(POSITIONAL)


def test_the_tuner_takes_the_fastest_that_runs_or_keeps_the_row():
    key = ("mma", "forward", 64)
    own = ATTENTION[key]

    def pretended():
        row = ATTENTION[key]
        tiles = row.query_tile, row.key_tile
        return None if tiles == (128, 128) else 1 / (tiles[0] * tiles[1] * row.warps)

    found = tune.best(key, tune.attention_candidates(), pretended)
    assert (found.query_tile * found.key_tile, found.warps) == (128 * 64, 8)
    assert ATTENTION[key] == own
    for time in (1.0, None):  # nothing beats it, nothing runs
        assert tune.best(("half", 32), tune.positional_candidates(32), lambda time=time: time) == POSITIONAL["half", 32]


def test_the_tuner_times_a_backward_pass_on_what_its_forward_left(monkeypatch):
    problem = tune.attention_problems(90)["wgmma", "backward_key", 64]
    ran = []
    monkeypatch.setattr(tune, "step", partial(lambda step, p, c, _: step(p, c, "meta"), tune.step))
    monkeypatch.setattr(tune, "run", lambda calls: ran.append([call.kernel.__name__ for call in calls]))
    monkeypatch.setattr(tune.triton.testing, "do_bench", lambda call, return_mode: (call(), 1.0)[1])
    assert tune.milliseconds(problem, 90) == 1.0
    whole, timed = ([name for name in names if name.startswith("attention")] for names in ran)
    assert whole == ["attention_forward", "attention_backward_query", "attention_backward_key"]
    assert timed == ["attention_backward_key"]


def test_the_tuner_compiles_what_is_launched(monkeypatch):
    key, row = ("wgmma", "backward_key", 64), Launch(32, 64, 4, 1)
    problem = tune.attention_problems(90)[key]
    monkeypatch.setitem(ATTENTION, key, ATTENTION[key])
    compiled = []
    kernel = attention.attention_backward_key
    monkeypatch.setattr(kernel, "warmup", lambda **given: compiled.append(given))
    assert tune.build(key, problem, 90, row)
    settings = ("QUERY_TILE", "KEY_TILE", "num_warps", "num_stages")
    assert [tuple(given[name] for name in settings) for given in compiled] == [row]
    monkeypatch.setattr(kernel, "warmup", lambda **given: 1 / 0)
    assert not tune.build(key, problem, 90, row)


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """Runs the tuner on a pretended H100, where a launch takes as long as its query tile is small, with a table of its
    own: the rows that are changed afterwards, and the candidates that were built, by kernel."""
    table, built = tmp_path / "table.py", []
    table.write_text(tune.TABLE.read_text())
    before = rows_of(table.read_text())
    for name in ("ATTENTION", "POSITIONAL"):
        monkeypatch.setattr(tune, name, dict(getattr(tune, name)))
    monkeypatch.setattr(tune, "TABLE", table)
    monkeypatch.setattr(tune, "ProcessPoolExecutor", lambda *_: nullcontext(SimpleNamespace(map=map)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(tune, "build", lambda key, problem, capability, row: built.append((key[1], row)) or True)
    keys = {problem: key for key, problem in tune.attention_problems(90).items()}
    monkeypatch.setattr(tune, "milliseconds", lambda problem, _: 1 / tune.ATTENTION[keys[problem]].query_tile)

    def tuned(*options, raises=nullcontext):
        with raises():
            tune.main(["--rows", "wgmma-forward-64", "wgmma-backward_key-64", *options])
        return {key: row for key, row in rows_of(table.read_text()).items() if row != before[key]}, built

    return tuned


def test_the_tuner_tries_neighbours_then_the_rest_of_the_rows_that_it_is_given(tuned):
    changed, built = tuned()
    tiles = {key: row.query_tile for key, row in changed.items()}
    assert tiles == {("wgmma", "forward", 64): 128, ("wgmma", "backward_key", 64): 128}
    parts = [(kernel, [row for _, row in part]) for kernel, part in itertools.groupby(built, lambda pair: pair[0])]
    assert [kernel for kernel, _ in parts] == 2 * ["forward", "backward_key"]
    own = ATTENTION["wgmma", "backward_key", 64]
    near, rest = parts[1][1], parts[3][1]
    assert Launch(32, 64, 4, 1) in near
    assert len(near) < 30 < len(rest)
    assert {*near[1:], *rest[1:], own} == set(tune.attention_candidates())


def test_an_interrupted_tuner_leaves_the_rows_that_it_finished(tuned, monkeypatch):
    milliseconds = tune.milliseconds

    def interrupted(problem, capability):
        if problem.kernels == ("attention_backward_key",):
            raise KeyboardInterrupt
        return milliseconds(problem, capability)

    monkeypatch.setattr(tune, "milliseconds", interrupted)
    changed, _ = tuned(raises=partial(pytest.raises, KeyboardInterrupt))
    assert list(changed) == [("wgmma", "forward", 64)]


@pytest.mark.parametrize("options", [["--minutes", "0"], ["--dry-run"]], ids=" ".join)
def test_the_tuner_leaves_the_table(tuned, options):
    assert tuned(*options)[0] == {}


def test_the_tuner_names_its_rows(tuned, capsys):
    tuned("--rows", "mma-forward-64", raises=partial(pytest.raises, SystemExit))
    told = capsys.readouterr().err
    assert "has no row mma-forward-64" in told
    assert "wgmma-backward_key-128" in told
