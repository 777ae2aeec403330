"""csrc/register.cpp on CPU tensors: what it hands to the launchers, and what it returns."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gpsa_kernels.backends import cuda
from gpsa_kernels.backends.base import Call, Saved
from gpsa_kernels.tensors import parameter_gradients

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
TORCH = Path(torch.__file__).parent
ON_THE_HOST = {
    "(gpsa_cuda,": "(gpsa_host,",
    'STD_TORCH_CHECK(q.is_cuda(), "q must be on a CUDA device");': "",
    "const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());": "",
    "TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(q.get_device_index(), &stream));": "",
}
SLOTS, INFERENCE, FORWARD, BACKWARD = 3, 1000, 2000, 3000


class Sizes(ctypes.Structure):
    _fields_ = [
        ("slots", ctypes.c_int),
        ("inference_workspace", ctypes.c_int64),
        ("forward_workspace", ctypes.c_int64),
        ("backward_workspace", ctypes.c_int64),
        ("content", ctypes.c_bool),
    ]


@pytest.fixture(scope="module")
def launchers(tmp_path_factory) -> ctypes.CDLL:
    """The operators in torch.ops.gpsa_host, and what launchers_host.cpp remembers."""
    folder = tmp_path_factory.mktemp("register")
    source = (CSRC / "register.cpp").read_text()
    for text, replacement in ON_THE_HOST.items():
        assert text in source
        source = source.replace(text, replacement)
    (folder / "register.cpp").write_text(source)
    command = ["g++", "-std=c++17", "-shared", "-fPIC", f"-I{CSRC}", f"-isystem{TORCH / 'include'}"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-L{TORCH / 'lib'}", "-o", str(folder / "host.so")]
    sources = [str(folder / "register.cpp"), str(HERE / "launchers_host.cpp")]
    subprocess.run([*command, *sources, "-ltorch_cpu"], check=True)
    torch.ops.load_library(str(folder / "host.so"))
    return ctypes.CDLL(str(folder / "host.so"))


@pytest.fixture(autouse=True)
def _on_the_host(monkeypatch, launchers):
    monkeypatch.setattr(torch.ops, "gpsa_cuda", torch.ops.gpsa_host, raising=False)


def tensors(count: int, dim: int = 8) -> tuple[Tensor, ...]:
    """Views of one projection's result, and so in rows of (B, N, H, D)."""
    return torch.randn(2, 12, count, 2, dim).bfloat16().permute(2, 0, 3, 1, 4).unbind()


def bits(*named: Tensor) -> Tensor:
    first, *others = (t.contiguous().view(torch.int16) for t in named)
    for other in others:
        first = first ^ other
    return first


UNREADABLE = {
    "an odd first element": lambda: tensors(4, 16)[0][..., 4:12],
    "rows of an odd length": lambda: tensors(4, 12)[0][..., :8],
    "channels apart": lambda: tensors(4)[0].mT.contiguous().mT,
    "one row for all": lambda: tensors(4)[0][:, :, :1, :1].expand(2, 2, 12, 8),
}


# of calls that are tiled, or save something, or both: their dtypes
PARAMETERS = {
    (True, True): (torch.bfloat16, torch.bfloat16),
    (True, False): (torch.float16, torch.float32),
    (False, True): (torch.float64, torch.bfloat16),
    (False, False): (torch.float32, torch.float16),
}


@pytest.mark.parametrize("odd", [None, *UNREADABLE])
@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("tiled", [True, False])
def test_what_the_launchers_are_given_and_what_comes_back(launchers, tiled, save, odd):
    workspaces = (INFERENCE, FORWARD, BACKWARD) if tiled else (0, 0, 0)
    Sizes.in_dll(launchers, "answer").__init__(SLOTS, *workspaces, tiled)
    given = (ctypes.c_void_p * 6).in_dll(launchers, "given")
    numbers = (ctypes.c_float * 13).in_dll(launchers, "numbers")
    workspace = ctypes.c_int64.in_dll(launchers, "workspace_size")
    q, k, v, grad_out = tensors(4)
    pos_weight, gate, seed = torch.randn(2, 3), torch.randn(2), torch.tensor([7])
    if odd:
        q, k, v, grad_out = (UNREADABLE[odd]() for _ in range(4))
        of_weights, of_gates = PARAMETERS[tiled, save]
        pos_weight, gate = torch.randn(3, 2, dtype=of_weights).T, gate.to(of_gates)
    call = Call(q, k, v, pos_weight, gate, seed, 3, 4, 0.5, 0.25)
    expected = torch.cat((pos_weight.flatten(), gate, torch.tensor((3, 4, 0.5, 0.25, 7)))).float()
    not_copied = [not odd] * 4 + [gate.dtype == torch.float32, not odd]
    addresses = [t.data_ptr() for t in (q, k, v, pos_weight, gate, grad_out)]

    out, content, logsumexp = cuda.forward(call, save)
    assert [a == b for a, b in zip(given[:5], addresses, strict=False)] == not_copied[:5]
    assert torch.equal(torch.tensor(numbers), expected)
    assert workspaces[save] <= workspace.value <= 1.1 * workspaces[save]
    assert torch.equal(bits(out), bits(q, k, v))
    assert [content is not None, logsumexp is not None] == [save and tiled, save]
    assert content is None or torch.equal(bits(content), bits(k))
    assert logsumexp is None or torch.equal(logsumexp, torch.arange(48.0).view(2, 2, 12))

    saved = Saved(v if tiled else q.new_empty(0), torch.randn(2, 2, 12))
    grads = cuda.backward(grad_out, call, saved)
    assert [a == b for a, b in zip(given, addresses, strict=True)] == not_copied
    assert torch.equal(torch.tensor(numbers), expected)
    assert workspaces[2] <= workspace.value <= 1.1 * workspaces[2]
    assert torch.equal(bits(grads.q), bits(q, grad_out))
    assert torch.equal(bits(grads.k), bits(k, v) if tiled else bits(k))
    assert torch.equal(bits(grads.v), bits(v))
    of_parameters = parameter_gradients(saved.logsumexp.view(2 * SLOTS, 2 * 4), pos_weight, gate)
    for ours, theirs in zip(grads[3:], of_parameters, strict=True):
        assert (ours.dtype, ours.stride()) == (theirs.dtype, theirs.stride())
        assert torch.equal(ours, theirs)
    for t in (out, content, *grads[:3]):
        assert t is None or (t.shape, t.stride(), t.dtype) == ((2, 2, 12, 8), (192, 8, 16, 1), torch.bfloat16)


def test_a_batch_of_nothing_has_gradients_of_zero(launchers):
    Sizes.in_dll(launchers, "answer").__init__(SLOTS, 0, 0, 0, False)
    q = tensors(1)[0][:0]
    pos_weight, gate = torch.randn(2, 3), torch.randn(2).half()
    call = Call(q, q, q, pos_weight, gate, None, 3, 4, 0.5, 0.0)
    assert cuda.forward(call, True).out.shape == q.shape
    grads = cuda.backward(q, call, Saved(None, torch.empty(0, 2, 12)))
    for grad, like in zip(grads, call[:5], strict=True):
        assert torch.equal(grad, torch.zeros_like(like))
