"""What nvcc makes of every kernel, for every architecture, within a budget.

``make extension; python -m tools.machine_code cuda --write`` writes the budget anew.
"""

import re

import pytest

from tools import machine_code

BUDGET = machine_code.parse(machine_code.BUDGET.read_text())


@pytest.fixture(scope="module")
def codes(library):
    return machine_code.read(library)


def test_the_budget_is_of_these_kernels(codes):
    built = {architecture for architecture, _ in codes}
    budgeted = {key for key in BUDGET if machine_code.compiler_of(key[1]) == "cuda" and key[0] in built}
    assert set(machine_code.without_twins(codes)) == budgeted


def test_every_kernel_is_within_its_budget(codes):
    assert machine_code.over_budget(machine_code.without_twins(codes), BUDGET) == {}


def test_nearly_all_float16_kernels_have_the_figures_of_their_bfloat16_twins(codes):
    """Those that have not are in the budget, which is of all architectures."""
    assert sum("Half" in name for _, name in codes) > len(codes) / 3
    budgeted = [name for _, name in BUDGET if machine_code.compiler_of(name) == "cuda"]
    assert sum("Half" in name for name in budgeted) < sum("Bfloat16" in name for name in budgeted) / 20


def test_nothing_spills_up_to_head_dim_64(codes):
    """The native head_dim is the first number in a kernel's name; a kernel without one has none."""
    head_dims = {key: int((re.findall(r", (\d+)", key[1]) or ["0"])[0]) for key in codes}
    assert set(head_dims.values()) >= {32, 48, 64, 128}
    assert {key: code.spills for key, code in codes.items() if code.spills and head_dims[key] <= 64} == {}


def test_tensors_are_read_and_written_16_bytes_at_a_time_and_by_no_atomics(codes):
    assert {key: code for key, code in codes.items() if code.other or code.atomics} == {}
    assert all(code.wide for code in codes.values() if code.matrix)


DIVISION = re.compile(r"I2F\S*\.RP|FCHK")  # how an integer's begins, and what chooses the slow path of a float's


def test_no_loop_of_a_whole_image_kernel_divides(library):
    """But forward's over an axis of more than 16, by its lines: once for the tile and once for the line."""
    checked = 0
    for (_, name), text in machine_code.functions(library, "-sass").items():
        if "WholeImage" in name:
            loops = machine_code.in_loops(text)
            assert any(words.startswith("HMMA") for words in loops), name
            allowed = 2 if "WholeImageForward" in name and "Lb0E" in name else 0  # Lb0E: no dropout
            assert sum(map(bool, map(DIVISION.match, loops))) <= allowed, name
            checked += 1
    assert checked > 50


def test_in_loops():
    lines = ["FCHK P0, R1", "I2F.RP R2, R3", "@P0 BRA 0x30", "HMMA R4", "@!P1 BRA.U 0x10", "BRA `(.L_1) 0x50", "EXIT"]
    text = "\n".join(f"        /*{16 * i:04x}*/    {line} ;   /* 0x0 */" for i, line in enumerate(lines))
    assert machine_code.in_loops(text) == ["I2F.RP R2, R3 ", "BRA 0x30 ", "HMMA R4 ", "BRA.U 0x10 "]


KINDS = {
    "matrix": "HMMA.16816.F32.BF16",
    "ldmatrix": "LDSM.16.MT88.4",
    "exponentials": "MUFU.EX2",
    "wide": "LDGSTS.E.BYPASS.128.ZFILL STG.E.128",
    "scalar": "LDG.E LDG.E.64.CONSTANT",
    "narrow": "LDGSTS.E.64",
    "other": "STG.E.U16 LD.E",
    "atomics": "RED.E.ADD.F32.FTZ.RN.STRONG.GPU ATOMG.E.ADD.STRONG.GPU ATOMS.ADD",
    None: "MUFU.RCP LDGDEPBAR LDS.128 REDUX",
}


@pytest.mark.parametrize(("kind", "instructions"), KINDS.items())
def test_kinds(kind, instructions):
    assert set(map(machine_code.kind, instructions.split())) == {kind}


def test_the_table_is_printed_by_one_command(library, codes, capsys):
    machine_code.main(["cuda", "--library", str(library)])
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(codes)


def test_the_budget_says_what_was_measured():
    code = machine_code.Code(*range(len(machine_code.Code._fields)))._replace(instructions=0)
    name = "a<Bfloat16, 48>"
    kernels = {("sm_80", name): code, ("sm_90", name): code._replace(matrix=7), ("sm_120", "b bfloat16 D=48"): code}
    assert machine_code.parse(machine_code.render(kernels)) == kernels
    raised = code._replace(spills=code.spills + 1, instructions=99)
    assert machine_code.over_budget({("sm_80", name): raised}, kernels) == {f"sm_80 {name}: spills": (2, 1)}
