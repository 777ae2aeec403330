"""How the Triton kernels are launched, on a GPU that is not there: fake tensors, and launches that are recorded."""

import contextlib
import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gpsa_kernels import BACKENDS
from gpsa_kernels.backends.base import Call, Saved
from gpsa_kernels.backends.triton import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("a process either interprets or compiles", allow_module_level=True)

import triton
from triton.backends.nvidia.compiler import CUDAOptions

from gpsa_kernels.backends.triton import launch
from gpsa_kernels.backends.triton.table import ATTENTION

OPTIONS = {field.name for field in dataclasses.fields(CUDAOptions)}


@pytest.fixture
def launched(monkeypatch):
    """Every launch as (kernel, device, grid, arguments and options), instead of it; the GPU is a Hopper."""
    launches, current = [], ["cpu"]

    @contextlib.contextmanager
    def on_device(device):
        current.append(device)
        yield
        current.pop()

    def record(kernel, *, grid, warmup, **arguments):
        assert arguments.keys() - OPTIONS == set(kernel.arg_names)  # Triton refuses a launch with one more or less
        launches.append((kernel.__name__, current[-1], grid, arguments))

    monkeypatch.setattr(torch.cuda, "device", on_device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton.JITFunction, "run", record)
    with FakeTensorMode():
        yield launches
    torch.set_float32_matmul_precision("highest")


def step(dtype: torch.dtype, batch: int = 2, grid_size: tuple[int, int] = (14, 14)) -> tuple[Tensor, ...]:
    """A forward and a backward pass of 3 heads of 48 channels, as the operator calls them."""
    qkv = torch.empty(batch, math.prod(grid_size), 3, 3, 48, device="cuda:0", dtype=dtype).permute(2, 0, 3, 1, 4)
    parameters = torch.empty(3, 3, device="cuda:0"), torch.empty(3, device="cuda:0")
    call = Call(*qkv.unbind(), *parameters, None, *grid_size, 0.1, 0.0)
    out, *saved = launch.forward(call, True)
    return launch.backward(out, call, Saved(*saved))


def test_every_kernel_runs_on_the_device_of_its_tensors(launched):
    step(torch.bfloat16, grid_size=(32, 32))
    names = [name for name, *_ in launched]
    attention = ["attention_forward", "attention_backward_query", "attention_backward_key"]
    forward = ["axis_tables", "separable_product", attention[0]]
    assert names == [*forward, *forward[:2], "separable_gradient", *attention[1:]]
    assert {device for _, device, *_ in launched} == {torch.device("cuda:0")}
    for name, _, grid, arguments in launched:
        tile = arguments.get("KEY_TILE" if name.endswith("key") else "QUERY_TILE")
        assert len(grid) == 1
        assert "attention" not in name or grid[0] == 2 * 3 * 1024 / tile


def test_nothing_is_launched_on_a_batch_of_nothing(launched):
    step(torch.bfloat16, batch=0)
    assert {name for name, *_ in launched} == {"axis_tables"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("capability", "table"), [((8, 0), "mma"), ((9, 0), "wgmma"), ((10, 3), "tcgen05"), ((12, 0), "mma")]
)
def test_tiles_and_compiler_options_are_the_tables_rows(launched, monkeypatch, dtype, capability, table):
    monkeypatch.setattr(torch.cuda, "get_device_capability", {torch.device("cuda:0"): capability}.__getitem__)
    step(dtype)
    attention = [(name.removeprefix("attention_"), given) for name, *_, given in launched if "attention" in name]
    assert len(attention) == 3
    for kernel, given in attention:
        row = ATTENTION["float32" if dtype == torch.float32 else table, kernel, 64]
        assert (given["QUERY_TILE"], given["KEY_TILE"]) == (row.query_tile, row.key_tile)
        options = {name: given[name] for name in OPTIONS & given.keys()}
        registers = {"maxnreg": 255} if dtype == torch.float32 else {}
        assert options == {"num_warps": row.warps, "num_stages": row.stages, **registers}


@pytest.mark.parametrize(("setting", "precision"), [("highest", "ieee"), ("high", "tf32")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_float32_is_tf32_where_torch_is_told_so(launched, dtype, setting, precision):
    torch.set_float32_matmul_precision(setting)
    step(dtype, grid_size=(32, 32))
    products = [arguments["PRECISION"] for name, *_, arguments in launched if name != "axis_tables"]
    assert products == [precision if dtype == torch.float32 else "ieee"] * 6


def test_float64_is_for_the_interpreter():
    with FakeTensorMode():
        for dtype, reason in ((torch.float64, "float64 only in Triton's interpreter"), (torch.float32, "None")):
            q = torch.empty(1, 1, 6, 8, device="cuda:0", dtype=dtype)
            assert reason in str(BACKENDS["triton"].unsupported(Call(q, q, q, q, q, None, 2, 3, 1.0, 0.0)))
