"""The Triton kernels without a GPU: compiled for every architecture, within a budget; and the table they come from.

``python -m tools.machine_code triton --write`` writes the budget anew.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gpsa_kernels.backends.triton import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("a process either interprets or compiles", allow_module_level=True)

from gpsa_kernels.backends.triton import tune
from gpsa_kernels.backends.triton.launches import ATTENTION, POSITIONAL, Launch
from tools import machine_code
from tools.ahead_of_time import SHARED_MEMORY_LIMIT, measure_all, variants
from tools.machine_code import ARCHITECTURES

BUDGET = machine_code.parse(machine_code.BUDGET.read_text())
VARIANTS = variants(ARCHITECTURES)


@pytest.fixture(scope="module")
def measured():
    return measure_all(VARIANTS)


def test_the_budget_is_of_these_kernels():
    assert {(f"sm_{v.capability}", str(v)) for v in VARIANTS} == {
        key for key in BUDGET if machine_code.compiler_of(key[1]) == "triton"
    }


def test_every_kernel_of_every_architecture_is_within_its_budget(measured):
    assert machine_code.over_budget(measured, BUDGET) == {}


def test_nothing_spills_up_to_head_dim_64(measured):
    assert {key: code.spills for key, code in measured.items() if "D=128" not in key[1] and code.spills} == {}


def test_every_kernel_fits_its_architecture(measured):
    assert {k: code.shared for k, code in measured.items() if code.shared > SHARED_MEMORY_LIMIT[int(k[0][3:])]} == {}


def test_16_bit_attention_runs_on_tensor_cores(measured):
    kernels = [code for (_, name), code in measured.items() if re.match(r"attention\w* bfloat16", name)]
    assert len(kernels) == 36 * len(ARCHITECTURES)
    assert all(code.matrix > 0 for code in kernels)


# ---- the table and its tuner -----------------------------------------------------------------------------------------


def test_the_table_is_what_the_tuner_writes():
    text = tune.TABLE.read_text()
    assert tune.render(text, ATTENTION, POSITIONAL) == text
    changed = ATTENTION | {("mma", "forward", 64): Launch(128, 16, 8, 1)}
    names: dict = {}
    exec(tune.render(text, changed, POSITIONAL), names)
    assert {key: tuple(row) for key, row in names["ATTENTION"].items()} == {k: tuple(row) for k, row in changed.items()}
    assert {key: tuple(row) for key, row in names["POSITIONAL"].items()} == {k: tuple(r) for k, r in POSITIONAL.items()}


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_the_tuner_times_every_row_that_a_gpu_uses(capability):
    attention = tune.attention_problems(capability)
    assert {kernel for _, kernel, _ in attention} == {kernel for _, kernel, _ in ATTENTION}
    assert len(attention) == 3 * 3 * 3
    assert set(attention) <= set(ATTENTION)
    problems = {**attention, **tune.positional_problems()}
    for problem in problems.values():
        names = [call.kernel.__name__ for call in tune.calls(problem._replace(batch=1), capability, "meta")]
        whole_image = problem.grid_size == (16, 16)  # needs no product of its own, only the gradient
        assert set(names) == set(problem.kernels) - ({"separable_product"} if whole_image else set())
    assert set(tune.positional_problems()) == set(POSITIONAL)


def test_the_tuner_takes_the_fastest_that_runs():
    key = ("mma", "forward", 64)
    problem, own = tune.attention_problems(80)[key]._replace(batch=1), ATTENTION[key]

    def pretended(calls):
        (call,) = calls
        tiles = call.arguments["QUERY_TILE"], call.arguments["KEY_TILE"]
        return None if tiles == (128, 128) else 1 / (tiles[0] * tiles[1] * call.options["num_warps"])

    found = tune.best(
        ATTENTION, key, tune.attention_candidates(own), lambda: tune.calls(problem, 80, "meta"), pretended
    )
    assert (found.query_tile * found.key_tile, found.warps) == (128 * 64, 8)
    assert ATTENTION[key] == own


def test_the_tuner_keeps_a_row_that_nothing_beats():
    key = ("half", 32)
    problem, own = tune.positional_problems()[key]._replace(batch=1), POSITIONAL[key]
    calls = lambda: tune.calls(problem, 80, "meta")  # noqa: E731
    assert tune.best(POSITIONAL, key, tune.positional_candidates(32), calls, lambda calls: 1.0) == own


def test_the_figures_in_the_documentation_are_the_budget():
    text = (Path(__file__).parent.parent / "docs" / "triton.md").read_text()
    rows = re.findall(r"(?m)^\| `(\w+)` \| (sm_\d+) \| ([\d /]+) \| ([\d /]+) \|$", text)
    assert len(rows) == 3 * len(ARCHITECTURES)
    for kernel, architecture, *shown in rows:
        for head_dim, figures in zip((48, 64), shown, strict=True):
            code = BUDGET[architecture, f"{kernel} bfloat16 D={head_dim} 14x14"]
            expected = code.matrix, code.instructions, code.registers, code.shared
            assert tuple(map(int, figures.split(" / "))) == expected
