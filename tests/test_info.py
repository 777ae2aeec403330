import json
from dataclasses import replace

import torch

from gpsa_kernels import BACKENDS, __version__, info
from gpsa_kernels.__main__ import main
from gpsa_kernels.backends import cuda


def test_info_lists_every_backend_with_its_reason(monkeypatch, capsys):
    broken = replace(BACKENDS["sdpa"], name="broken", unavailable=lambda: "it lacks a flux compensator")
    monkeypatch.setitem(BACKENDS, "broken", broken)
    assert main(["info"]) == 0
    facts, (_, *table) = (part.splitlines() for part in capsys.readouterr().out.split("\n\n"))
    facts = dict(line.split(maxsplit=1) for line in facts)
    assert facts.keys() == {"gpsa_kernels", "python", "torch", "device", "threads", "library", "auto"}
    assert (facts["gpsa_kernels"], facts["torch"]) == (__version__, torch.__version__)
    assert facts["threads"].isdigit()
    rows = {name: about for name, *about in (line.split(maxsplit=2) for line in table if not line.startswith(" "))}
    assert rows.keys() == BACKENDS.keys()
    assert {runs for runs, _ in rows.values()} <= {"yes", "no"}
    assert rows["eager"][0] == "yes"
    assert rows["broken"] == ["no", "it lacks a flux compensator"]
    assert all(line == line.rstrip() for line in table)


def test_info_says_how_the_library_was_built(monkeypatch, tmp_path):
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
