import re
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from gpsa_kernels import __main__, demo


def pictures(images):
    return {image.numpy().tobytes() for image in images}


def test_the_test_digits_are_held_out(monkeypatch):
    digits = demo.load_digits(seed=0)
    assert sorted([*digits.train.tolist(), *digits.test.tolist()]) == list(range(1797))
    assert len(digits.images) == len(digits.labels) == 1797
    assert len(digits.test) == 360
    shares = digits.labels[digits.test].bincount() / digits.labels.bincount()
    assert shares.sub(0.2).abs().max() < 0.01
    assert not pictures(digits.images[digits.train]) & pictures(digits.images[digits.test])
    for warp in ("WARP", "SHIFT"):
        monkeypatch.setattr(demo, warp, 0.0)  # or no picture that is trained on would be one that is tested on
    drawn = pictures(demo.draw(digits.images[digits.test]))
    assert not any(pictures(images) & drawn for images, _ in demo.epoch(digits, torch.Generator()))


def test_both_runs_see_the_same_weights_and_batches():
    models = (demo.build_model(backend, seed=3).state_dict() for backend in ("eager", "auto"))
    torch.testing.assert_close(*models, rtol=0, atol=0)
    batches = (list(demo.epoch(demo.load_digits(seed=3), torch.Generator().manual_seed(3))) for _ in range(2))
    torch.testing.assert_close(*batches, rtol=0, atol=0)


def test_drawing_a_digit():
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 3, 4] = 1.0
    assert (demo.draw(image) + 0.5).sum().item() == pytest.approx(4.0)  # twice as large, so four times the ink
    right = demo.draw(image, torch.tensor([[[0.0, 0.0, -2 / 8], [0.0, 0.0, 0.0]]]))
    assert torch.allclose(right, demo.draw(image.roll(1, dims=3)), atol=1e-6)


def test_the_accuracy_bar():
    empty = dict.fromkeys(demo.Run.__dataclass_fields__, 0)
    for accuracies, failed in ((0.97, 0.99), 0), ((0.9699, 0.99), 1), ((0.5, float("nan")), 2):
        runs = [demo.Run(**{**empty, "backend": "x", "accuracy": accuracy}) for accuracy in accuracies]
        assert len(demo.failures(runs)) == failed


def test_one_epoch_through_the_command_line(tmp_path):
    output = tmp_path / "picture"
    command = [sys.executable, "-m", "gpsa_kernels", "demo", "--epochs", "1", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    # one epoch is too short, and the exit code has to say so
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("FAILED: ") == 2
    for words in ("test accuracy", "time in training steps", "Largest difference of the loss curves"):
        assert words in done.stdout
    auto, fused = demo.auto_backend(), demo.fused_backend()
    verdict = rf'"auto" is {auto} here; {fused} trained \d\.\d\d times as fast as eager and kept \d\d% of its memory.*'
    assert re.fullmatch(verdict, done.stdout.splitlines()[-1])
    drawn, shown = (PIL.Image.open(folder / "heads.png") for folder in (output, Path(__file__).parent.parent / "docs"))
    assert drawn.size == shown.size
    made_by = "python -m gpsa_kernels demo --epochs {} --seed 0"
    assert [picture.text["Description"] for picture in (drawn, shown)] == [made_by.format(1), made_by.format(15)]


@pytest.mark.parametrize(("auto", "fused"), [("eager", "sdpa"), ("triton", "triton")])
def test_the_fused_run_is_never_the_eager_one_again(monkeypatch, auto, fused):
    monkeypatch.setattr(demo, "auto_backend", lambda: auto)
    assert demo.fused_backend() == fused


@pytest.mark.parametrize("epochs", ["0", "-1", "many"])
def test_a_senseless_number_of_epochs_is_refused(epochs):
    with pytest.raises(SystemExit, match=r"^2$"):
        __main__.main(["demo", "--epochs", epochs])


def test_missing_dependencies_are_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(__main__, "find_spec", lambda name: None if name == "tqdm" else object())
    assert __main__.run_demo(1, tmp_path, 0) == 2
    assert re.search(r"tqdm.*gpsa-kernels\[demo\]", capsys.readouterr().err)
