"""backends/cuda.py without a GPU: why it cannot run, what fake tensors become, and what it does around the kernels."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from reference import assert_as_exact_as_eager, inputs, literal
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import gpsa_kernels
from gpsa_kernels import gpsa_attention, info
from gpsa_kernels.backends import cuda

GOOD = {
    "version": gpsa_kernels.__version__,
    "cuda": torch.version.cuda or "13.0",
    "nvcc": "13.0.88",
    "architectures": ["sm_80", "sm_90", "compute_90"],
    "torch": "2.10.0+cu130",
    "oldest_torch": "2.10",
}


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """An empty folder where the library is looked for, and nothing known about it yet."""
    monkeypatch.setattr(cuda, "FOLDER", tmp_path)
    cuda._load.cache_clear()
    cuda._code_for.cache_clear()
    yield tmp_path
    cuda._load.cache_clear()
    cuda._code_for.cache_clear()


# ---- why it cannot run ---------------------------------------------------------------------------------------------


def assert_reason(*words: str) -> None:
    """It is what unavailable() says, what info shows, and what asking for the backend by name raises."""
    reason = cuda.unavailable()
    assert reason is not None
    for word in words:
        assert word in reason
    assert reason in info.report()
    q, k, v, pos_weight, gate = inputs(1, 1, (2, 2), 8, torch.float16)
    with pytest.raises(RuntimeError) as raised:
        gpsa_attention(q, k, v, pos_weight, gate, (2, 2), backend="cuda")
    assert str(raised.value) == f"backend 'cuda' cannot run this call: {reason}"
    assert gpsa_attention(q, k, v, pos_weight, gate, (2, 2)).shape == q.shape


def test_no_library(folder):
    assert_reason("built without the CUDA library", "GPSA_BUILD_CUDA=1")


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "Expecting property name"), ("{}", "missing"), ('{"flux": 1}', "flux"), ("\udcff", "utf-8")],
)
def test_metadata_that_cannot_be_read(folder, text, words):
    (folder / "build.json").write_bytes(text.encode(errors="surrogateescape"))
    assert_reason("build.json cannot be read", words)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"version": "0.0.1"}, ["is of gpsa_kernels 0.0.1", "build it again"]),
        ({"cuda": "99.1"}, ["was built for CUDA 99.1", torch.__version__]),
        ({"oldest_torch": "99.0"}, ["needs torch >= 99.0", torch.__version__]),
    ],
)
@pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no CUDA")
def test_a_library_built_for_something_else(folder, changed, words):
    (folder / "build.json").write_text(json.dumps(GOOD | changed))
    assert_reason(*words)


def test_a_torch_without_cuda(folder, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    (folder / "build.json").write_text(json.dumps(GOOD))
    assert_reason(f"was built for CUDA {GOOD['cuda']}", "has no CUDA")


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no CUDA")
@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot open shared object file"), (b"", "file too short"), (b"\x7fELF" + bytes(999), "cannot be loaded")],
)
def test_a_library_that_cannot_be_loaded(folder, content, words):
    (folder / "build.json").write_text(json.dumps(GOOD))
    if content is not None:
        (folder / "gpsa_cuda.so").write_bytes(content)
    assert_reason("its library cannot be loaded", words)


def test_a_broken_library_does_not_break_the_import(tmp_path):
    package = Path(gpsa_kernels.__file__).parent
    shutil.copytree(package, tmp_path / "gpsa_kernels", ignore=shutil.ignore_patterns("__pycache__", "_cuda"))
    broken = tmp_path / "gpsa_kernels" / "_cuda"
    broken.mkdir()
    (broken / "build.json").write_text("not json")
    (broken / "gpsa_cuda.so").write_text("not a library")
    done = subprocess.run([sys.executable, "-m", "gpsa_kernels", "info"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("library") and "cannot be read" in line for line in lines)
    assert any(line.split()[:2] == ["cuda", "no"] and "cannot be read" in line for line in lines)


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
    if runs:
        assert reason is None
    else:
        assert reason.endswith(f"the device has compute capability {capability[0]}.{capability[1]}")


# ---- fake tensors --------------------------------------------------------------------------------------------------


SLOTS, FORWARD_BYTES, BACKWARD_BYTES = 3, 24, 40


def stand_in_sizes(batch, heads, rows, columns, head_dim, bfloat16, dropout_p, device):
    """gpsa_cuda::sizes of a device that never has enough shared memory for more than 48 channels."""
    assert (type(rows), type(head_dim), type(bfloat16), type(device)) == (int, int, bool, int)
    return SLOTS, FORWARD_BYTES, BACKWARD_BYTES, rows * columns > 256 or head_dim > 48 or dropout_p > 0


@pytest.fixture
def _available(monkeypatch):
    """As if the library had loaded; finding that out reads files, which no compiler can trace."""
    monkeypatch.setattr(torch.ops, "gpsa_cuda", SimpleNamespace(sizes=stand_in_sizes), raising=False)
    cuda._sizes.cache_clear()
    monkeypatch.setattr(cuda, "_load", lambda: None if Path(__file__).read_text() else "impossible")
    monkeypatch.setattr(cuda, "_code_for", lambda device: None if Path(__file__).read_text() else "impossible")
    torch._dynamo.reset()
    yield
    cuda._sizes.cache_clear()


def cuda_tensors(grid_size: tuple[int, int] = (14, 14), head_dim: int = 48, dtype: torch.dtype = torch.bfloat16):
    """q, k and v as views of one projection's result, pos_weight and gate; where no GPU is, in FakeTensorMode."""
    tokens = grid_size[0] * grid_size[1]
    qkv = torch.empty(2, tokens, 3, 4, head_dim, device="cuda", dtype=dtype)
    return *qkv.permute(2, 0, 3, 1, 4).unbind(), torch.empty(4, 3, device="cuda"), torch.empty(4, device="cuda")


@pytest.mark.usefixtures("_available")
@pytest.mark.parametrize(
    ("grid_size", "head_dim", "dropout_p", "saves_content"),
    [
        ((14, 14), 48, 0.0, False),
        ((16, 16), 48, 0.0, False),
        ((17, 16), 48, 0.0, True),
        ((14, 14), 64, 0.0, True),
        ((14, 14), 48, 0.1, True),
    ],
)
def test_fake_tensors(grid_size, head_dim, dropout_p, saves_content):
    tokens = grid_size[0] * grid_size[1]
    settings = (*grid_size, 0.1, dropout_p, "cuda")
    heads_last = (tokens * 4 * head_dim, head_dim, 4 * head_dim, 1)
    with FakeTensorMode():
        tensors = cuda_tensors(grid_size, head_dim)
        seed = torch.empty(1, dtype=torch.int64, device="cuda") if dropout_p else None
        out, content, logsumexp = torch.ops.gpsa.attention_forward(*tensors, seed, *settings, True)
        grads = torch.ops.gpsa.attention_backward(out, *tensors, seed, *settings[:4], content, logsumexp, "cuda")
    assert (out.shape, out.stride(), out.dtype) == ((2, 4, tokens, head_dim), heads_last, torch.bfloat16)
    assert content.shape == (out.shape if saves_content else (0,))
    assert (logsumexp.shape, logsumexp.dtype) == ((2, 4, tokens), torch.float32)
    assert all(t.device.type == "cuda" for t in (out, content, logsumexp, *grads))
    for grad, like in zip(grads, tensors, strict=True):
        assert (grad.shape, grad.dtype) == (like.shape, like.dtype)
    assert all(grad.stride() == heads_last for grad in grads[:3])


@pytest.mark.usefixtures("_available")
def test_the_public_function_on_fake_tensors():
    with FakeTensorMode():
        tensors = cuda_tensors()
        assert gpsa_attention(*tensors, (14, 14), backend="cuda").shape == (2, 4, 196, 48)
        float32 = cuda_tensors(dtype=torch.float32)
        torch.set_autocast_dtype("cuda", torch.float16)
        torch.set_autocast_enabled("cuda", True)  # torch.autocast does nothing where no GPU is
        try:
            assert gpsa_attention(*float32, (14, 14), backend="cuda").dtype == torch.float16
        finally:
            torch.set_autocast_enabled("cuda", False)
        with pytest.raises(RuntimeError, match=r"take float16 and bfloat16, and q is torch\.float32"):
            gpsa_attention(*float32, (14, 14), backend="cuda")
        for head_dim in (12, 136):
            with pytest.raises(RuntimeError, match=f"multiple of 8 from 8 to 128, got {head_dim}"):
                gpsa_attention(*cuda_tensors(head_dim=head_dim), (14, 14), backend="cuda")
        q, k, v, pos_weight, gate = cuda_tensors()
        v = v.mT.contiguous().mT
        with pytest.raises(RuntimeError, match="v's last dimension has stride 196"):
            gpsa_attention(q, k, v, pos_weight, gate, (14, 14), backend="cuda")


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


# ---- around the kernels --------------------------------------------------------------------------------------------


def branches(q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, grid: tuple[int, int], scale: float) -> list[Tensor]:
    """The content's and the position's own output."""
    gates = (torch.full((q.size(1),), logit, dtype=torch.float64) for logit in (-math.inf, math.inf))
    return [literal(q, k, v, pos_weight, gate, grid, scale) for gate in gates]


def stand_in_forward(q, k, v, pos_weight, gate, seed, out, content, logsumexp, workspace, rows, columns, scale, p):
    """gpsa_cuda::forward by the formula, with what the kernels ask for asserted."""
    check_arguments((q, k, v, out), pos_weight, gate, workspace, FORWARD_BYTES)
    assert (content is not None) == (logsumexp is not None and rows * columns > 256)
    double = [t.double() for t in (q, k, v, pos_weight)]
    own, position = branches(*double, (rows, columns), scale)
    out.copy_(torch.lerp(own, position, torch.sigmoid(gate.double()).view(-1, 1, 1)))
    if content is not None:
        content.copy_(own)
    if logsumexp is not None:
        logsumexp.copy_((scale * double[0] @ double[1].mT).logsumexp(-1))


def stand_in_backward(
    grad_out, q, k, v, pos_weight, gate, seed, content, logsumexp, grad_q, grad_k, grad_v, sums, workspace, *settings
):
    """gpsa_cuda::backward by the formula."""
    check_arguments((grad_out, q, k, v, grad_q, grad_k, grad_v), pos_weight, gate, workspace, BACKWARD_BYTES)
    rows, columns, scale, _ = settings
    assert logsumexp.isfinite().all()
    assert (content is not None) == (rows * columns > 256)
    with torch.enable_grad():
        leaves = [t.detach().double().requires_grad_() for t in (q, k, v)]
        expanded = pos_weight.double().expand(q.size(0), -1, -1).contiguous().requires_grad_()
        parts = [
            branches(*(t[b : b + 1] for t in leaves), expanded[b], (rows, columns), scale) for b in range(q.size(0))
        ]
        own, position = (torch.cat(branch) for branch in zip(*parts, strict=True))
        share = torch.sigmoid(gate.double()).view(-1, 1, 1)
        mixed = torch.lerp(own, position, share)
        upstream = grad_out.double()
        grads = torch.autograd.grad(mixed, leaves, upstream, retain_graph=True)
        (weights,) = torch.autograd.grad(mixed, expanded, upstream)
    for grad, result in zip((grad_q, grad_k, grad_v), grads, strict=True):
        grad.copy_(result)
    gates = (upstream * (share * (1 - share) * (position - own)).detach()).sum((2, 3))
    whole = torch.cat((weights, gates.unsqueeze(-1)), dim=-1)
    parts = torch.tensor([0.5, 0.75, -0.25], dtype=torch.float64).view(SLOTS, 1)  # which sum to 1
    sums.copy_(whole.unsqueeze(2) * parts)


def check_arguments(tokens: tuple[Tensor, ...], pos_weight: Tensor, gate: Tensor, workspace: Tensor, size: int) -> None:
    for t in tokens:
        assert t.stride(-1) == 1
        assert t.data_ptr() % 16 == 0
        assert all(stride % 8 == 0 for stride in t.stride()[:3])
    for t in (pos_weight, gate):
        assert t.dtype == torch.float32
        assert t.is_contiguous()
    assert (workspace.dtype, workspace.numel()) == (torch.uint8, size)


@pytest.fixture
def _stand_in(monkeypatch):
    """The formula in the kernels' place, on the CPU: everything between the operator and them runs as it will."""
    operators = SimpleNamespace(forward=stand_in_forward, backward=stand_in_backward, sizes=stand_in_sizes)
    monkeypatch.setattr(torch.ops, "gpsa_cuda", operators, raising=False)
    cuda._sizes.cache_clear()
    yield
    cuda._sizes.cache_clear()


def operator(q, k, v, pos_weight, gate, grid_size, scale):
    return torch.ops.gpsa.attention_forward(q, k, v, pos_weight, gate, None, *grid_size, scale, 0.0, "cuda")[0]


@pytest.mark.usefixtures("_stand_in")
@pytest.mark.parametrize("grid_size", [(3, 4), (1, 1), (17, 16)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_outputs_and_all_gradients(grid_size, dtype):
    tensors = inputs(2, 3, grid_size, 8, dtype)
    assert_as_exact_as_eager(operator, tensors, grid_size, scale=0.3)


def packed(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return torch.stack((q, k, v), dim=3).unbind(3)


def misaligned_start(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.cat((t.new_zeros(3), t.flatten()))[3:].view(t.shape) for t in tensors)


def odd_stride(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.nn.functional.pad(t, (0, 1))[..., :-1] for t in tensors)


def expanded(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t[:1].expand(t.shape) for t in tensors)


@pytest.mark.usefixtures("_stand_in")
@pytest.mark.parametrize("layout", [packed, misaligned_start, odd_stride, expanded])
def test_any_strides(layout):
    tensors = inputs(2, 2, (3, 4), 8, torch.float16)
    laid_out = layout(*tensors[:3])
    assert all(not t.is_contiguous() or t.data_ptr() % 16 for t in laid_out)
    out = operator(*laid_out, *tensors[3:], (3, 4), 0.3)
    plain = operator(*(t.clone(memory_format=torch.contiguous_format) for t in laid_out), *tensors[3:], (3, 4), 0.3)
    assert torch.equal(out, plain)
    grad_out = torch.randn_like(out)
    grads = (torch.autograd.grad(result, tensors, grad_out) for result in (out, plain))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.usefixtures("_stand_in")
def test_an_expanded_gradient():
    tensors = inputs(2, 2, (3, 4), 8, torch.float16)
    grads = torch.autograd.grad(operator(*tensors, (3, 4), 0.3).sum(), tensors)
    ones = torch.ones(2, 2, 12, 8, dtype=torch.float16)
    expected = torch.autograd.grad(operator(*tensors, (3, 4), 0.3), tensors, ones)
    for a, b in zip(grads, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("_stand_in")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_parameters_of_any_dtype_get_gradients_of_theirs(dtype):
    tensors = inputs(2, 2, (3, 4), 8, torch.float16)
    tensors[3:] = [t.detach().to(dtype).requires_grad_() for t in tensors[3:]]
    grads = torch.autograd.grad(operator(*tensors, (3, 4), 0.3).sum(), tensors)
    assert [grad.dtype for grad in grads] == [t.dtype for t in tensors]


@pytest.mark.usefixtures("_stand_in")
@pytest.mark.parametrize("grid_size", [(3, 4), (17, 16)])
def test_results_have_the_strides_that_fake_tensors_promise(grid_size):
    settings = (*grid_size, 0.3, 0.0, "cuda")
    tensors = [t.detach() for t in inputs(2, 2, grid_size, 8, torch.float16)]
    for save in (True, False):
        real = torch.ops.gpsa.attention_forward(*tensors, None, *settings, save)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(t) for t in tensors]
            fake = torch.ops.gpsa.attention_forward(*fakes, None, *settings, save)
        assert [(t.shape, t.stride(), t.dtype) for t in real] == [(t.shape, t.stride(), t.dtype) for t in fake]


def test_a_batch_of_nothing_has_gradients_of_zero():
    sums = torch.empty(0, 3, SLOTS, 4)
    pos_weight, gate = torch.randn(3, 3), torch.randn(3)
    for grad, like in zip(cuda.parameter_gradients(sums, pos_weight, gate), (pos_weight, gate), strict=True):
        assert torch.equal(grad, torch.zeros_like(like))
