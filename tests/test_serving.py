"""What docs/serving.md shows is true: its code runs, in its order, and what it serves has the model's numbers."""

import copy
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import assert_rounded, randomized
from timm.models.convit import ConVit as TimmConViT
from torch import nn

from gpsa_kernels import fuse

DOCUMENT = (Path(__file__).parent.parent / "docs" / "serving.md").read_text()
SIZES = {"embed_dim": 8, "num_heads": 4, "depth": 2, "local_up_to_layer": 1, "img_size": 40, "patch_size": 8}


def blocks(heading: str, language: str = "python") -> list[str]:
    section = DOCUMENT.split(f"\n## {heading}\n")[1].partition("\n## ")[0]
    return re.findall(rf"(?s)```{language}\n(.*?)```", section)


def timm_model() -> nn.Module:
    torch.manual_seed(0)
    return randomized(TimmConViT(**SIZES, num_classes=5)).eval()


@pytest.fixture
def names(tmp_path, monkeypatch) -> dict:
    """What the document starts from, smaller, in a folder for what it saves."""
    monkeypatch.chdir(tmp_path)
    return {"torch": torch, "model": fuse(timm_model()).float(), "images": torch.randn(4, 3, 40, 40)}


def run(names: dict, heading: str) -> None:
    for block in blocks(heading):
        exec(block, names)


def assert_served(logits: torch.Tensor, names: dict) -> None:
    with torch.no_grad():
        assert_rounded(logits.detach(), names["model"](names["images"][:3]), names["model"])


def called(program) -> set[str]:
    return {node.target.namespace for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}


def test_the_document_starts_with_a_fused_model():
    (start,) = re.findall(r"(?s)```python\n(.*?)```", DOCUMENT.partition("\n## ")[0])
    names: dict = {}
    exec(start.replace("pretrained=True", "depth=2, local_up_to_layer=1"), names)  # there is no network
    assert names["model"](names["images"][:1]).shape == (1, 1000)


def test_an_exported_program_has_operators_of_torch_alone(names):
    run(names, "An exported program")
    assert_served(names["logits"], names)
    assert called(names["program"]) == {"aten"}
    eager = fuse(timm_model(), backend="eager").float()
    assert called(torch.export.export(eager, (names["images"],))) == {"aten"}
    double = torch.export.export(names["model"].double(), (names["images"].double(),))
    assert called(double) == {"aten", "gpsa"}


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_a_package_is_served_by_a_program_without_python(names, tmp_path):
    run(names, "An exported program")
    run(names, "An AOTInductor package, without Python")
    assert_served(names["logits"], names)
    torch.save(names["images"][:3].clone(), "images.pt")
    (tmp_path / "serve.cpp").write_text(blocks("An AOTInductor package, without Python", "cpp")[0])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for commands in blocks("An AOTInductor package, without Python", "bash"):
        subprocess.run(["bash", "-ec", commands], check=True, env=os.environ | {"PATH": path})
    assert_served(torch.load("logits.pt"), names)
    assert b"libpython" not in (tmp_path / "serve").read_bytes()


def test_onnx(names):
    run(names, "ONNX")
    assert_served(torch.from_numpy(names["logits"]), names)
    assert {node.domain for node in names["program"].model.graph} == {""}


@pytest.mark.parametrize("dtype", ["bfloat16", "half"])
def test_half_precision(names, dtype):
    for block in blocks("Half precision"):
        exec(block.replace("bfloat16", dtype), names)
    run(names, "An exported program")
    eager, double = getattr(timm_model().float(), dtype)(), copy.deepcopy(names["model"]).double()
    with torch.no_grad():
        expected = double(names["images"][:3].double())
        errors = [(out.double() - expected).abs().max() for out in (names["logits"], eager(names["images"][:3]))]
    assert errors[0] <= 2 * errors[1]


def test_cuda_graphs_are_shown_in_python():
    for block in blocks("CUDA graphs"):
        compile(block, "docs/serving.md", "exec")
