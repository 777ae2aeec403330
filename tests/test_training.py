"""docs/training.md: what it shows runs, smaller, on a CPU."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import PIL.Image
import pytest
import torch

from gpsa_kernels import convit_tiny

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "training.md").read_text().partition("## Many GPUs")[0]
SETUP, *COMMANDS = re.findall(r"(?s)```bash\n(.*?)```", PAGE)
FRACTION, WATCH, CHECKPOINTS = re.findall(r"(?s)```python\n(.*?)```", PAGE)
SCRIPTS = ROOT / "pytorch-image-models"

SHALLOW = "depth=2 local_up_to_layer=1"
SMALL = f"--device cpu --workers 1 --img-size 32 --model-kwargs img_size=32 {SHALLOW}"
SMALLER = {
    r'"\${recipe\[@\]}"': rf"\g<0> {SMALL} --epochs 1 --warmup-epochs 0 --batch-size 4",
    r"validate\.py imagenet": rf"\g<0> {SMALL}",
    r"benchmark\.py": rf"\g<0> {SMALL.replace('--workers 1', '')} --batch-size 2 --num-warm-iter 1 --num-bench-iter 5",
    r"--img-size 384 --model-kwargs img_size=384 (.*)--epochs 30 --batch-size 64": (
        rf"--img-size 48 --model-kwargs img_size=48 {SHALLOW} \1"
    ),
    r"--epochs 3000": "--epochs 1",
    r"--resume \S+": r"\g<0> --epochs 2",
    r"--torchcompile": r"\g<0> eager",
    r"--nproc-per-node=8": "--nproc-per-node=1",
    r"--nnodes=2(.*)node0:29500": r"--nnodes=1\1localhost:0",
    r" --batch-size 64": "",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What the page expects where it is read: a data set, with as many images of each class."""
    for split, count in (("train", 10), ("val", 2)):
        for label in ("cat", "dog"):
            (tmp_path / "imagenet" / split / label).mkdir(parents=True)
            for index in range(count):
                noise = PIL.Image.effect_noise((40, 40), 100).convert("RGB")
                noise.save(tmp_path / "imagenet" / split / label / f"{index}.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(path: Path) -> list[list[str]]:
    with path.open() as file:
        return list(csv.reader(file))


def smaller(command: str) -> str:
    for pattern, replacement in SMALLER.items():
        command = re.sub(pattern, replacement, command.replace("\\\n    ", ""))
    return command


@pytest.mark.skipif(not SCRIPTS.exists(), reason=f"timm's scripts are not here: {SETUP.splitlines()[-1]}")
def test_every_command_runs(folder):
    (folder / SCRIPTS.name).symlink_to(SCRIPTS)
    exec(FRACTION.replace("0.1", "0.5"), {})
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    script = "set -e\n" + smaller("".join(COMMANDS))
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    output = folder / "output"
    epochs = {path.parent.name: "".join(row[0].strip("epoch") for row in rows(path)) for path in output.glob("*/*.csv")}
    once = ("convit-small-ema", "convit-small-384", "convit-small-tenth", "convit-base")
    assert epochs == {"convit-small": "01", **dict.fromkeys(once, "0")}
    larger = torch.load(output / "convit-small-384" / "last.pth.tar", weights_only=False)["state_dict"]
    assert larger["pos_embed"].shape == (1, 9, 432)

    small = '"fused_convit_small", img_size=32, depth=2, local_up_to_layer=1,'
    exec((WATCH + CHECKPOINTS).replace("224, 224", "32, 32").replace('"fused_convit_small",', small), {})
    watched = {tuple(row[:3]) for row in rows(folder / "heads.csv")}
    assert watched == {*product("01", ["blocks.0.attn"], "012345678")}


def test_a_fraction_of_every_class_is_linked(folder):
    exec(FRACTION.replace("0.1", "0.3"), {})
    kept = sorted(path.relative_to(folder / "imagenet-tenth") for path in folder.glob("imagenet-tenth/train/*/*.jpg"))
    assert [path.parent.name for path in kept] == 3 * ["cat"] + 3 * ["dog"]
    for path in kept:
        assert (folder / "imagenet-tenth" / path).read_bytes() == (folder / "imagenet" / path).read_bytes()
    assert len(list(folder.glob("imagenet-tenth/val/*/*.jpg"))) == 4


def test_what_is_watched_is_what_the_layers_say(folder):
    model, images, names = convit_tiny(image_size=32, depth=3, local_up_to_layer=2), torch.randn(2, 3, 32, 48), {}
    exec(WATCH, names)
    tokens = []
    for epoch in range(2):
        names["watch"](model, images, epoch)
    model.blocks[1].attn.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0]))
    model(images)
    attention, written = model.blocks[1].attn, rows(folder / "heads.csv")
    assert [tuple(row[:3]) for row in written] == [*product("01", ("blocks.0.attn", "blocks.1.attn"), "0123")]
    gates, distances = torch.tensor([[float(x) for x in row[3:]] for row in written[-4:]]).T
    torch.testing.assert_close(gates, attention.gating_param.detach().sigmoid())
    torch.testing.assert_close(distances, attention.get_attention_map(tokens[0], False, (2, 3)).detach())
