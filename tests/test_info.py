import json
import os
import subprocess
import sys

import torch

from gpsa_kernels import BACKENDS, __version__


def test_info_lists_every_backend_with_its_reason():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "gpsa_kernels", "info"], capture_output=True, text=True, check=True, env=environment
    )
    lines = done.stdout.splitlines()
    facts = dict(line.split(maxsplit=1) for line in lines[: lines.index("")])
    assert facts["gpsa_kernels"] == __version__
    assert facts["torch"] == torch.__version__
    assert facts["threads"].isdigit()
    assert "device" in facts
    assert "library" in facts
    table = lines[lines.index("") + 1 :]
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in table[1:] if not line.startswith(" ")}
    assert rows.keys() == BACKENDS.keys()
    for runs, detail in rows.values():
        assert runs in ("yes", "no")
        assert detail
    assert rows["eager"][0] == "yes"
    assert all(len(line) == len(line.rstrip()) for line in lines)


def test_info_says_why_a_backend_cannot_run(monkeypatch):
    from dataclasses import replace

    from gpsa_kernels import info

    broken = replace(BACKENDS["sdpa"], name="broken", unavailable=lambda: "it lacks a flux compensator")
    monkeypatch.setitem(info.BACKENDS, "broken", broken)
    line = next(line for line in info.report().splitlines() if line.startswith("broken"))
    assert line.split(maxsplit=2)[1:] == ["no", "it lacks a flux compensator"]


def test_info_says_how_the_library_was_built(monkeypatch, tmp_path):
    from gpsa_kernels import info
    from gpsa_kernels.backends import cuda

    monkeypatch.setattr(cuda, "FOLDER", tmp_path)
    assert info._library() == "none"
    built = {"version": "0.1.0", "cuda": "13.0", "nvcc": "13.0.88", "architectures": ["sm_90", "compute_90"]}
    (tmp_path / "build.json").write_text(json.dumps(built | {"torch": "2.11.0+cu130", "oldest_torch": "2.10"}))
    assert info._library() == (
        "gpsa_kernels 0.1.0 for CUDA 13.0, torch >= 2.10 (sm_90, compute_90); "
        "built by nvcc 13.0.88 with torch 2.11.0+cu130"
    )
    (tmp_path / "build.json").write_text("{")
    assert info._library().startswith("build.json cannot be read: ")


def test_an_unknown_command_is_refused():
    done = subprocess.run([sys.executable, "-m", "gpsa_kernels", "conquer"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "conquer" in done.stderr
