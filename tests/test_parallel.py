"""Many processes give what one gives: replicated, with sharded parameters, with heads divided, and on DTensors."""

import contextlib
import copy
import datetime
import functools
import io
import re
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import assert_rounded, assert_same_outcome, images, outcome
from reference import inputs, with_gradients
from test_lifecycle import both, own
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from gpsa_kernels import FusedGPSA, gpsa_attention
from gpsa_kernels.parallel import HeadwiseParallel

WORLD, STEPS, MICRO_BATCHES = 4, 3, 2
DOCUMENT = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
MANY_GPUS = DOCUMENT.split("## Many GPUs\n")[1].partition("\n## ")[0]
SHARD_PARAMETERS, DIVIDE_HEADS = re.findall(r"(?s)```python\n(.*?)```", MANY_GPUS)
FULL = states.StateDictOptions(full_state_dict=True)


def join(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=timeout)


def saved(function, *arguments) -> bytes:
    torch.save(function(*arguments), file := io.BytesIO())
    return file.getvalue()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Calls a function in four gloo processes, and returns what each of them returns."""
    store = f"file://{tmp_path_factory.mktemp('parallel')}/store"
    with contextlib.ExitStack() as stack:
        pools = [
            stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"), initializer=join, initargs=(rank, store)))
            for rank in range(WORLD)
        ]

        def call(function, *arguments) -> list:
            results = [pool.submit(saved, function, *arguments) for pool in pools]
            return [torch.load(io.BytesIO(result.result()), weights_only=False) for result in results]

        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in the four, for sums in the same order
        yield call
        torch.set_num_threads(threads)
        call(dist.destroy_process_group)


def model_of(build, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)  # timm's models start at random
    return build(num_heads=4, qkv_bias=True)


def loss_of(out: torch.Tensor) -> torch.Tensor:
    return out.sin().mean() + out.square().mean()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def trained(model: nn.Module, batches: list[torch.Tensor], loss_of_batch=None) -> tuple:
    """The optimizer and the loss of each step."""
    optimizer, losses = sgd(model), []
    for x in batches:
        optimizer.zero_grad()
        loss = loss_of_batch(x) if loss_of_batch else loss_of(model(x))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return optimizer, torch.stack(losses)


def full(t: torch.Tensor) -> torch.Tensor:
    t = t.full_tensor() if isinstance(t, DTensor) else t
    return t.detach().clone()


def assert_equal(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def assert_same_state(actual: dict, expected: dict, model: nn.Module) -> None:
    assert list(actual) == list(expected)
    for name, value in actual.items():
        assert_rounded(value, expected[name], model, name)


# ---- replicas -------------------------------------------------------------------------------------------------------


def replicated(build, static_graph: bool) -> tuple:
    """The losses of all micro-batches, and the last state."""
    model = model_of(build, seed=dist.get_rank())
    wrapped = DistributedDataParallel(model, static_graph=static_graph, find_unused_parameters=False)
    optimizer, losses = sgd(model), []
    for x in images(STEPS * MICRO_BATCHES * WORLD).chunk(STEPS):
        optimizer.zero_grad()
        for i, part in enumerate(x.chunk(MICRO_BATCHES * WORLD)[dist.get_rank() :: WORLD], 1):
            # which torch 2.11 cannot skip of a static graph
            with wrapped.no_sync() if i < MICRO_BATCHES and not static_graph else nullcontext():
                loss = loss_of(wrapped(part)) / MICRO_BATCHES
                loss.backward()
            losses.append(loss.detach())
        optimizer.step()
    return torch.stack(losses), model.state_dict()


@both
@pytest.mark.parametrize("static_graph", [False, True])
def test_data_parallel_replicas_train_as_one_process(ranks, build, static_graph):
    """From rank 0's parameters, with gradients accumulated over micro-batches."""
    of_ranks, states = zip(*ranks(replicated, build, static_graph), strict=True)
    model = model_of(build)
    _, losses = trained(model, images(STEPS * MICRO_BATCHES * WORLD).chunk(STEPS))
    assert_rounded(torch.stack(of_ranks).mean(0).view(STEPS, MICRO_BATCHES).sum(1), losses, model)
    assert_same_state(states[0], model.state_dict(), model)
    for state in states[1:]:
        assert_equal(state, states[0])


def joined() -> dict:
    """The state where the ranks have unequally many batches."""
    model = model_of(own)
    wrapped = DistributedDataParallel(model, find_unused_parameters=False)
    with Join([wrapped]):
        trained(model, images(2 * WORLD + 1).split(1)[dist.get_rank() :: WORLD], lambda x: loss_of(wrapped(x)))
    return model.state_dict()


def test_data_parallel_ranks_may_run_out_of_batches(ranks):
    """The ranks that have none left count as zeros in the mean."""
    model = model_of(own)
    batches = images(2 * WORLD + 1).split(WORLD)
    trained(model, batches, lambda x: sum(loss_of(model(part)) for part in x.split(1)) / WORLD)
    for state in ranks(joined):
        assert_same_state(state, model.state_dict(), model)


# ---- divided parameters and heads -----------------------------------------------------------------------------------


@functools.cache
def mesh_of(*shape: int) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp")[-len(shape) :])


def in_shards(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def in_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    exec(DIVIDE_HEADS, {"model": model, "mesh": {"tp": mesh}})
    return model


def as_packed(t: torch.Tensor) -> torch.Tensor:
    """Of qk and qkv, which are grouped by head where heads are divided."""
    return t.transpose(0, 1).flatten(0, 2) if t.dim() > 2 and t.shape[1] in (2, 3) and t.shape[0] == 4 else t


def momentum(optimizer_state: dict) -> dict:
    return {name: as_packed(of["momentum_buffer"]) for name, of in optimizer_state["state"].items()}


def states_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    return dict(zip(("model", "optimizer"), states.get_state_dict(model, optimizer), strict=True))


def load(model: nn.Module, checkpoint: Path) -> list[dict]:
    """The states of a model and its optimizer, in full, after loading them."""
    optimizer = sgd(model)
    held = states_of(model, optimizer)
    dcp.load(held, checkpoint_id=checkpoint)
    states.set_state_dict(model, optimizer, model_state_dict=held["model"], optim_state_dict=held["optimizer"])
    state, optimizer_state = states.get_state_dict(model, optimizer, options=FULL)
    return [state, momentum(optimizer_state)]


def my_half(batches: torch.Tensor) -> list[torch.Tensor]:
    return [x.chunk(2)[mesh_of(2, 2)["dp"].get_local_rank()] for x in batches.chunk(STEPS)]


def divided(build, heads: bool, checkpoint: Path) -> tuple:
    """Losses of two ranks with half the parameters, or of four with half the heads, too; and what four load of them."""
    mesh, losses = mesh_of(2, 2), None
    if heads or mesh["tp"].get_local_rank() == 0:
        model = in_parallel(model_of(build), mesh["tp"]) if heads else model_of(build)
        optimizer, losses = trained(in_shards(model, mesh["dp"]), my_half(images(4 * STEPS)))
        group = None if heads else mesh["dp"].get_group()
        dcp.save(states_of(model, optimizer), checkpoint_id=checkpoint, process_group=group)
    dist.barrier()
    return losses, load((in_parallel if heads else in_shards)(model_of(build, seed=9), mesh_of(4)), checkpoint)


@both
@pytest.mark.parametrize("heads", [False, True])
def test_divided_parameters_train_as_one_process_and_load_on_any_number(ranks, build, heads, tmp_path):
    losses, loaded = zip(*ranks(divided, build, heads, tmp_path), strict=True)
    model = model_of(build)
    optimizer, expected = trained(model, images(4 * STEPS).chunk(STEPS))
    assert_rounded(torch.stack(losses[::2]).mean(0), expected, model)
    alone = {"model": model_of(build, seed=9).state_dict()}
    dcp.load(alone, checkpoint_id=tmp_path)
    assert_same_state(alone["model"], model.state_dict(), model)
    if not heads:
        assert_equal(load(model_of(build, seed=9), tmp_path), loaded[0])
    for state, of_optimizer in loaded:
        assert_equal(state, alone["model"])
        assert_same_state(of_optimizer, momentum(states.get_state_dict(model, optimizer)[1]), model)


def mixed(build) -> torch.Tensor:
    """Losses of the documented mixed precision."""
    model = model_of(build).float()
    exec(SHARD_PARAMETERS, {"model": model, "mesh": mesh_of(2, 2)})
    return trained(model, my_half(images(4 * STEPS).float()))[1]


@both
def test_sharded_parameters_in_mixed_precision(ranks, build):
    """As one process that runs a bfloat16 copy on each half of the batch and adds the gradients in float32."""
    model = model_of(build).float()
    optimizer, losses = sgd(model), []
    for x in images(4 * STEPS).float().chunk(STEPS):
        optimizer.zero_grad()
        for half in x.chunk(2):
            low = copy.deepcopy(model).bfloat16()
            loss = loss_of(low(half.bfloat16()))
            loss.backward()
            losses.append(loss.detach())
            for p, of_low in zip(model.parameters(), low.parameters(), strict=True):
                p.grad = of_low.grad.float() / 2 + (0 if p.grad is None else p.grad)
        optimizer.step()
    assert_equal(torch.stack(ranks(mixed, build)[::2], 1).flatten(), torch.stack(losses))


def tokens(model: nn.Module) -> torch.Tensor:
    return images().flatten(1)[:, : 16 * model.num_features].unflatten(1, (16, -1))


def with_input_gradient(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    out = model.blocks[0].attn(x)
    return [full(out), full(*torch.autograd.grad(loss_of(out), x))]


def headwise(build, *shape: int) -> tuple:
    """A model with its heads divided as the document says, and with another's parameters loaded into it."""
    mesh = mesh_of(*shape)["tp"]
    model = model_of(build, seed=dist.get_rank())
    states.set_model_state_dict(model, model_of(build).state_dict())
    in_parallel(model, mesh)
    assert model.blocks[0].attn.qk.weight.to_local().numel() * mesh.size() == 2 * model.num_features**2
    results = (
        {name: as_packed(full(value)) for name, value in outcome(model, images()).items()},
        copy.deepcopy(states.get_model_state_dict(model, options=FULL)),
        full(model.blocks[0].attn.get_attention(tokens(model))),
        with_input_gradient(model, distribute_tensor(tokens(model), mesh, [Shard(1)])),
    )
    states.set_model_state_dict(model, model_of(build, seed=9).state_dict(), options=FULL)
    return *results, states.get_model_state_dict(model, options=FULL)


@both
@pytest.mark.parametrize("shape", [(2, 2), (4,)])
def test_heads_divided_among_ranks_are_those_of_one_process(ranks, build, shape):
    model = model_of(build)
    expected = outcome(model, images())
    maps = model.blocks[0].attn.get_attention(tokens(model)).chunk(shape[-1], 1)
    for rank, (actual, state, attention, of_layer, loaded) in enumerate(ranks(headwise, build, *shape)):
        assert_same_outcome(actual, expected, model)
        assert_equal(state, model.state_dict())
        assert_rounded(attention, maps[rank % shape[-1]], model)
        for value, wanted in zip(of_layer, with_input_gradient(model, tokens(model)), strict=True):
            assert_rounded(value, wanted, model)
        assert_equal(loaded, model_of(build, seed=9).state_dict())


# ---- DTensors -------------------------------------------------------------------------------------------------------

GRID = (3, 7)
SHARDED = {  # q, k and v, and the parameters, over the batch, the heads, the tokens or not
    "b": (Shard(0), Replicate()),
    "h": (Shard(1), Shard(0)),
    "t": (Shard(2), Shard(0)),
    "-": (Replicate(), Replicate()),
}


def call_of(heads: int) -> list[torch.Tensor]:
    """The five tensors and a gradient of the output."""
    tensors = inputs(3, heads, GRID, 8)
    return [*tensors, torch.linspace(-1, 1, tensors[0].numel(), dtype=torch.float64).view(tensors[0].shape)]


def placed(heads: int, placements: str) -> list[torch.Tensor]:
    of_calls, of_heads = (list(p) for p in zip(*(SHARDED[letter] for letter in placements), strict=True))
    of_tensors = [*[of_calls] * 3, *[of_heads] * 2, of_calls]
    return [distribute_tensor(t.detach(), mesh_of(2, 2), p) for t, p in zip(call_of(heads), of_tensors, strict=True)]


def on_dtensors(heads: int, placements: str, backend: str) -> list:
    *tensors, grad_out = placed(heads, placements)
    got = with_gradients(gpsa_attention, tensors, grad_out, GRID, backend=backend)
    return [*map(full, got), full(got[0].transpose(1, 2).flatten(2)), got[0].stride()]


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("heads", "placements"), [*((4, p) for p in ("b-", "-h", "bh", "hh", "bb", "--", "-t")), (2, "hh")]
)
def test_dtensors_pass_through_the_operator(ranks, heads, placements, backend):
    *tensors, grad_out = call_of(heads)
    expected = with_gradients(gpsa_attention, tensors, grad_out, GRID, backend=backend)
    for *got, merged, stride in ranks(on_dtensors, heads, placements, backend):
        assert stride == expected[0].stride()
        for actual, wanted in zip(got, expected, strict=True):
            atol = 3 * 21**2 * torch.finfo(wanted.dtype).eps * wanted.abs().max()  # a rounding for each term of a sum
            torch.testing.assert_close(actual, wanted, rtol=0, atol=atol.item())
        assert_equal(merged, got[0].transpose(1, 2).flatten(2))


# ---- what is refused ------------------------------------------------------------------------------------------------


def refuse() -> None:
    square, line, layer, adapted = mesh_of(2, 2), mesh_of(4), FusedGPSA(24, 4), FusedGPSA(24, 4)
    adapted.qk = nn.Sequential(adapted.qk)
    divide = functools.partial(parallelize_module, parallelize_plan=HeadwiseParallel())
    divide(layer, square["tp"])
    attention = functools.partial(gpsa_attention, grid_size=GRID)
    *tensors, gate, _ = placed(4, "-t")
    elsewhere = distribute_tensor(full(gate), line)
    kinds = "HeadwiseParallel shards a FusedGPSA or SelfAttention"
    given = "must be a DTensor, as another is, got Tensor"
    later = "a layer that is sharded over heads cannot be initialised: do it before, or load parameters"
    for error, message, call in (
        (ValueError, "num_heads must be a multiple of the 2 ranks of the mesh, got 9",
         lambda: divide(FusedGPSA(27, 9), square["tp"])),
        (ValueError, "device_mesh must have one dimension, got 2: pass mesh['name']",
         lambda: divide(FusedGPSA(27, 9), square)),
        (TypeError, f"{kinds}, got Linear", lambda: divide(layer.proj, square["tp"])),
        (TypeError, f"{kinds}, got _HeadwiseGPSA", lambda: divide(layer, square["tp"])),
        (TypeError, "qk must be an nn.Linear to be sharded over heads, got Sequential",
         lambda: divide(adapted, square["tp"])),
        (RuntimeError, later, layer.local_init),
        (TypeError, f"gate {given}", lambda: attention(*tensors, full(gate))),
        (TypeError, f"q {given}", lambda: attention(*map(full, tensors), gate, backend="eager")),
        (ValueError, f"gate must be on q's mesh {square}, got {line}", lambda: attention(*tensors, elsewhere)),
        (RuntimeError, "dropout_p must be 0 for DTensors, whose shards cannot share a mask, got 0.1",
         lambda: attention(*tensors, gate, dropout_p=0.1)),
    ):  # fmt: skip
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            call()


def test_what_is_refused(ranks):
    ranks(refuse)
