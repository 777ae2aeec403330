"""backends/cuda.py without a GPU: why it cannot run, what fake tensors become, and what it asks the library."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import emulation
import pytest
import torch
from reference import inputs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import gpsa_kernels
from gpsa_kernels import gpsa_attention, info
from gpsa_kernels.backends import cuda
from gpsa_kernels.backends.base import Call

GOOD = {
    "version": gpsa_kernels.__version__,
    "cuda": "13.0",
    "nvcc": "13.0.88",
    "architectures": ["sm_80", "sm_90", "compute_90"],
    "torch": "2.10.0+cu130",
    "oldest_torch": "2.10",
}


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """An empty folder where the library is looked for, and nothing known about it yet, with a torch for CUDA 13.0."""
    monkeypatch.setattr(cuda, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", GOOD["cuda"])
    cuda._load.cache_clear()
    cuda._code_for.cache_clear()
    yield tmp_path
    cuda._load.cache_clear()
    cuda._code_for.cache_clear()


REASONS = {  # what is beside the library, the library, and what the reason says
    "no library": (None, None, ["built without the CUDA library", "GPSA_BUILD_CUDA=1"]),
    "no JSON": (b"{", None, ["build.json cannot be read", "Expecting property name"]),
    "nothing said": (b"{}", None, ["build.json cannot be read", "missing"]),
    "too much said": (b'{"flux": 1}', None, ["build.json cannot be read", "flux"]),
    "no text": (b"\xff", None, ["build.json cannot be read", "utf-8"]),
    "another version": ({"version": "0.0.1"}, None, ["is of gpsa_kernels 0.0.1", "build it again"]),
    "another CUDA": ({"cuda": "99.1"}, None, ["was built for CUDA 99.1", torch.__version__]),
    "a newer torch": ({"oldest_torch": "99.0"}, None, ["needs torch >= 99.0", torch.__version__]),
    "lost": ({}, None, ["its library cannot be loaded", "cannot open shared object file"]),
    "empty": ({}, b"", ["its library cannot be loaded", "file too short"]),
    "broken": ({}, b"\x7fELF" + bytes(999), ["its library cannot be loaded"]),
}


def assert_reason(*words: str) -> None:
    """It is what unavailable() says, what info shows, and what asking for the backend by name raises."""
    reason = cuda.unavailable()
    assert reason is not None
    for word in words:
        assert word in reason
    assert reason in info.report()
    tensors = inputs(1, 1, (2, 2), 8, torch.float16)
    with pytest.raises(RuntimeError) as raised:
        gpsa_attention(*tensors, (2, 2), backend="cuda")
    assert str(raised.value) == f"backend 'cuda' cannot run this call: {reason}"
    assert gpsa_attention(*tensors, (2, 2)).shape == tensors[0].shape


@pytest.mark.parametrize("case", REASONS)
def test_a_library_that_cannot_be_used(folder, case):
    said, library, words = REASONS[case]
    if said is not None:
        (folder / "build.json").write_bytes(said if isinstance(said, bytes) else json.dumps(GOOD | said).encode())
    if library is not None:
        (folder / "gpsa_cuda.so").write_bytes(library)
    assert_reason(*words)


def test_a_torch_without_cuda(folder, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    (folder / "build.json").write_text(json.dumps(GOOD))
    assert_reason(f"was built for CUDA {GOOD['cuda']}", "has no CUDA")


@pytest.mark.parametrize("gpu", [True, False])
def test_a_library_that_loads_is_loaded_once(folder, monkeypatch, gpu):
    (folder / "build.json").write_text(json.dumps(GOOD))
    loaded = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert cuda.unavailable() == cuda.unavailable() == (None if gpu else "no CUDA device was found")
    assert loaded == [str(folder / "gpsa_cuda.so")]
    tensors = inputs(1, 1, (2, 2), 8, torch.float16)
    reason = "its kernels run on CUDA tensors, and q is on cpu" if gpu else "no CUDA device was found"
    with pytest.raises(RuntimeError, match=f"backend 'cuda' cannot run this call: {reason}"):
        gpsa_attention(*tensors, (2, 2), backend="cuda")


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 0), ["sm_80"], True),
        ((8, 6), ["sm_80"], True),  # machine code runs on later devices of its major
        ((9, 0), ["sm_80"], False),
        ((8, 0), ["sm_86"], False),
        ((7, 5), ["sm_80", "sm_90", "compute_90"], False),
        ((12, 1), ["sm_80", "compute_90"], True),  # PTX on all later ones
        ((9, 0), ["compute_100"], False),
        ((9, 0), ["sm_90a"], True),
        ((9, 1), ["sm_90a"], False),  # architecture-specific code nowhere else
        ((10, 3), ["compute_100f"], True),  # family-specific code in its major
        ((11, 0), ["compute_100f"], False),
    ],
)
def test_devices_that_the_library_has_no_code_for(folder, monkeypatch, capability, architectures, runs):
    (folder / "build.json").write_text(json.dumps(GOOD | {"architectures": architectures}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = cuda._code_for(0)
    assert (reason is None) == runs
    assert runs or reason.endswith("the device has compute capability {}.{}".format(*capability))


@pytest.fixture
def _available(monkeypatch):
    """As if the library had loaded; finding that out reads files, which no compiler can trace."""
    monkeypatch.setattr(cuda, "_load", lambda: None if Path(__file__).read_text() else "impossible")
    monkeypatch.setattr(cuda, "_code_for", lambda device: None if Path(__file__).read_text() else "impossible")
    torch._dynamo.reset()
    with emulation.using():
        yield


def cuda_tensors(grid_size: tuple[int, int] = (14, 14), head_dim: int = 48):
    """q, k and v as views of one projection's result, pos_weight and gate; where no GPU is, in FakeTensorMode."""
    qkv = torch.empty(2, math.prod(grid_size), 3, 4, head_dim, device="cuda", dtype=torch.bfloat16)
    return *qkv.permute(2, 0, 3, 1, 4).unbind(), torch.empty(4, 3, device="cuda"), torch.empty(4, device="cuda")


@pytest.mark.usefixtures("_available")
@pytest.mark.parametrize(
    ("grid_size", "head_dim", "dropout_p", "saves_content"),
    [
        ((14, 14), 48, 0.0, False),
        ((16, 16), 48, 0.1, False),
        ((17, 16), 48, 0.0, True),
        ((14, 14), 72, 0.0, True),
        ((8, 32), 48, 0.0, True),
    ],
)
def test_fake_tensors(grid_size, head_dim, dropout_p, saves_content):
    settings = (*grid_size, 0.1, dropout_p)
    with FakeTensorMode():
        tensors = cuda_tensors(grid_size, head_dim)
        seed = torch.empty(1, dtype=torch.int64, device="cuda") if dropout_p else None
        out, *saved = torch.ops.gpsa.attention_forward(*tensors, seed, *settings, "cuda", True)
        grads = torch.ops.gpsa.attention_backward(out, *tensors, seed, *settings, *saved, "cuda")
    assert saved[0].shape == (out.shape if saves_content else (0,))
    assert {t.device.type for t in (out, *saved, *grads)} == {"cuda"}


@pytest.mark.usefixtures("_available")
def test_compile_and_export_see_one_opaque_operator():
    class Attention(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return gpsa_attention(*tensors, (14, 14), backend="cuda")

    with FakeTensorMode():
        tensors = cuda_tensors()
        assert torch.compile(Attention(), fullgraph=True, backend="eager")(*tensors).shape == (2, 4, 196, 48)
        for strict in (False, True):
            program = torch.export.export(Attention(), tensors, strict=strict)
            called = [node.target for node in program.graph.nodes if node.op == "call_function"]
            assert called[0] == torch.ops.gpsa.attention_forward.default
            assert {str(target) for target in called[1:]} == {"<built-in function getitem>"}


@pytest.mark.parametrize(
    ("device", "gpus", "expected"), [("cuda:3", 0, 3), ("cuda:0", 4, 0), ("cuda", 4, 2), ("cuda", 0, -1)]
)
def test_the_library_is_asked_about_the_device_of_q(monkeypatch, device, gpus, expected):
    asked = []
    library = SimpleNamespace(saves_content=lambda *shape: asked.append(shape))
    monkeypatch.setattr(torch.ops, "gpsa_cuda", library, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    q = SimpleNamespace(device=torch.device(device), dtype=torch.bfloat16, size=(5, 3, 12, 8).__getitem__)
    cuda._saves_content.cache_clear()
    cuda.saves_content(Call(q, q, q, q, q, None, 3, 4, 1.0, 0.1))
    cuda._saves_content.cache_clear()
    assert asked == [(3, 4, 8, True, 0.1, expected)]
