"""What nvcc makes of every kernel, for every architecture, within a budget.

``make extension; python -m benchmarks.machine_code --json tests/cuda/budget.json`` writes the budget anew.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import machine_code  # noqa: E402

BUDGET = json.loads(Path(__file__).with_name("budget.json").read_text())
BUDGETED = (
    "registers",
    "spills",
    "matrix_instructions",
    "ldmatrix",
    "exponentials",
    "wide_accesses",
    "scalar_accesses",
)


@pytest.fixture(scope="module")
def codes(library):
    return {" ".join(key): code for key, code in machine_code.read(library).items()}


def test_the_budget_is_of_these_kernels(codes):
    assert list(codes) == list(BUDGET)
    assert {name.split()[0] for name in codes} == {"sm_80", "sm_90", "sm_100", "sm_120"}


def test_every_kernel_is_within_its_budget(codes):
    over = {
        f"{name}: {figure}": (getattr(code, figure), BUDGET[name][figure])
        for name, code in codes.items()
        for figure in BUDGETED
        if getattr(code, figure) > BUDGET[name][figure]
    }
    assert over == {}


def test_nothing_spills_up_to_head_dim_64(codes):
    """The native head_dim is the first number in a kernel's name; a kernel without one has none."""
    head_dims = {name: int((re.findall(r", (\d+)", name) or ["0"])[0]) for name in codes}
    assert set(head_dims.values()) >= {32, 48, 64, 128}
    assert {name: code.spills for name, code in codes.items() if code.spills and head_dims[name] <= 64} == {}


def test_tensors_are_read_and_written_16_bytes_at_a_time(codes):
    assert {name: code for name, code in codes.items() if code.other_accesses} == {}
    assert all(code.wide_accesses for name, code in codes.items() if code.matrix_instructions)


def test_there_are_no_atomics(codes):
    assert {name: code for name, code in codes.items() if code.atomics} == {}


@pytest.mark.parametrize(
    ("instruction", "kind"),
    [
        ("HMMA.16816.F32.BF16", "matrix_instructions"),
        ("LDSM.16.MT88.4", "ldmatrix"),
        ("MUFU.EX2", "exponentials"),
        ("MUFU.RCP", None),
        ("LDGSTS.E.BYPASS.128.ZFILL", "wide_accesses"),
        ("STG.E.128", "wide_accesses"),
        ("LDG.E", "scalar_accesses"),
        ("LDG.E.64.CONSTANT", "scalar_accesses"),
        ("STG.E.U16", "other_accesses"),
        ("LDGSTS.E.64", "other_accesses"),
        ("LD.E", "other_accesses"),
        ("LDGDEPBAR", None),
        ("LDS.128", None),
        ("RED.E.ADD.F32.FTZ.RN.STRONG.GPU", "atomics"),
        ("ATOMG.E.ADD.STRONG.GPU", "atomics"),
        ("ATOMS.ADD", "atomics"),
    ],
)
def test_kinds(instruction, kind):
    assert machine_code.kind(instruction) == kind


def test_the_table_is_printed_by_one_command(library, tmp_path):
    command = [sys.executable, "-m", "benchmarks.machine_code", str(library), "--json", str(tmp_path / "budget.json")]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(printed) == 1 + len(BUDGET)
    assert json.loads((tmp_path / "budget.json").read_text()).keys() == BUDGET.keys()
