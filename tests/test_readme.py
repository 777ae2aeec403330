"""What the README shows is true: its code runs, its commands exist, its figures are the measured ones."""

import re
import runpy
import shutil
import subprocess
import sys

import PIL.Image
import pytest
import torch

from benchmarks import report, results
from benchmarks.results import ROOT
from gpsa_kernels import BACKENDS, gpsa_attention

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"(?s)```python\n(.*?)```", README)


@pytest.mark.parametrize("block", BLOCKS, ids=[str(i) for i in range(len(BLOCKS))])
def test_python_blocks_run(block):
    exec(block, {})


def test_the_formula_shown_is_the_operator():
    names: dict = {}
    exec(next(block for block in BLOCKS if "def gpsa(" in block), names)
    q, k, v = torch.randn(3, 2, 3, 20, 8, dtype=torch.float64).unbind()
    pos_weight, gate = torch.randn(3, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    expected = names["gpsa"](q, k, v, pos_weight, gate, 4, 5)
    torch.testing.assert_close(gpsa_attention(q, k, v, pos_weight, gate, (4, 5)), expected)


def test_usages_are_short():
    assert all(len(block.strip().splitlines()) <= 10 for block in BLOCKS if "def gpsa(" not in block)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake ([a-z-]+)(?= |`)", README))))
def test_make_commands_exist(target):
    plan = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {"demo": "-m gpsa_kernels demo", "gpu-report": "-m benchmarks.gpu_report"}.get(target, "-m pytest") in plan


@pytest.mark.parametrize("command", re.findall(r"`python -m (.*?)`", README))
def test_modules_shown_can_be_run(monkeypatch, command):
    module, *arguments = command.split()
    monkeypatch.setattr("sys.argv", [module, *arguments, "--help"])
    monkeypatch.delitem(sys.modules, f"{module}.__main__", raising=False)  # other tests import it
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_module(module, run_name="__main__")


def test_every_backend_is_in_the_table():
    table = README.split("## What runs where")[1]
    assert re.findall(r"(?m)^\| `(\w+)` \|", table.split("\n\n")[1]) == list(reversed(BACKENDS))


@pytest.mark.parametrize("name", ["README.md", "docs/benchmarks.md"])
def test_figures_are_the_measured_ones(name):
    text = (ROOT / name).read_text()
    assert report.MARKED.search(text)
    assert report.filled(text, results.newest()) == text


def test_pictures_are_there_and_of_the_newest_runs():
    assert all((ROOT / path).stat().st_size < 25_000 for path in re.findall(r"!\[.*?\]\((.*?)\)", README))
    shown = set(report.SHOWN.findall("".join(path.read_text() for path in report.FILES)))
    assert shown == {path.name for path in report.PLOTS.iterdir()}
    for name in shown:
        run = results.newest()[name.partition("-")[0]]
        assert PIL.Image.open(report.PLOTS / name).text["Description"] == f"from the run of {run['started']}"
