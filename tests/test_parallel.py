"""Many processes give what one gives: replicated, with sharded parameters, with heads divided, and on DTensors.

All of it runs once, in four gloo processes, and leaves results behind that the tests compare.
"""

import copy
import datetime
import itertools
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import assert_rounded, assert_same_gradients, gradients
from reference import inputs, with_gradients
from test_lifecycle import images, own, timm_fused
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from gpsa_kernels import FusedGPSA, gpsa_attention
from gpsa_kernels.parallel import HeadwiseParallel

WORLD, STEPS, MICRO_BATCHES = 4, 3, 2
BUILDS = [own, timm_fused]
DOCUMENT = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
MANY_GPUS = DOCUMENT.split("## Many GPUs\n")[1].partition("\n## ")[0]
SHARD_PARAMETERS, DIVIDE_HEADS = re.findall(r"(?s)```python\n(.*?)```", MANY_GPUS)
FULL = StateDictOptions(full_state_dict=True)
GRID = (3, 7)
PLACEMENTS = {  # of q, k, v and of the parameters, on a mesh of 2 x 2
    "batch": ([Shard(0), Replicate()], [Replicate(), Replicate()]),
    "heads": ([Replicate(), Shard(1)], [Replicate(), Shard(0)]),
    "batch and heads": ([Shard(0), Shard(1)], [Replicate(), Shard(0)]),
    "heads twice": ([Shard(1), Shard(1)], [Shard(0), Shard(0)]),
    "batch twice": ([Shard(0), Shard(0)], [Replicate(), Replicate()]),
    "replicated": ([Replicate(), Replicate()], [Replicate(), Replicate()]),
    "more ranks than heads": ([Shard(1), Shard(1)], [Shard(0), Shard(0)]),
    "heads of the parameters": ([Replicate(), Shard(2)], [Replicate(), Shard(0)]),
}


def model_of(build, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)  # timm's models start at random
    return build(num_heads=4, qkv_bias=True)


def loss_of(out: torch.Tensor) -> torch.Tensor:
    return out.sin().mean() + out.square().mean()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def trained(model: nn.Module, batches: list[torch.Tensor], forward: nn.Module | None = None) -> tuple:
    """The optimizer and the loss of each step."""
    optimizer, losses = sgd(model), []
    for x in batches:
        optimizer.zero_grad()
        loss = loss_of((forward or model)(x))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return optimizer, torch.stack(losses)


def tokens(model: nn.Module) -> torch.Tensor:
    return images().flatten(1)[:, : 16 * model.num_features].unflatten(1, (16, -1))


def with_input_gradient(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    out = model.blocks[0].attn(x)
    return [full(out), full(*torch.autograd.grad(loss_of(out), x))]


def full(t: torch.Tensor) -> torch.Tensor:
    t = t.full_tensor() if isinstance(t, DTensor) else t
    return t.detach().clone()


def message(call, *args, **kwargs) -> str:
    with pytest.raises((TypeError, ValueError, RuntimeError)) as raised:
        call(*args, **kwargs)
    return f"{raised.type.__name__}: {raised.value}"


# ---- what runs in four processes ------------------------------------------------------------------------------------


def replicated(rank: int, folder: Path) -> dict:
    """Losses, gradients and states, accumulated over micro-batches; then the state of ranks that end apart."""
    results = {}
    for build, static_graph in itertools.product(BUILDS, (False, True)):
        model = model_of(build, seed=rank)
        wrapped = DistributedDataParallel(model, static_graph=static_graph, find_unused_parameters=False)
        optimizer, losses = sgd(model), []
        for x in images(STEPS * MICRO_BATCHES * WORLD).chunk(STEPS):
            optimizer.zero_grad()
            for i, part in enumerate(x.chunk(MICRO_BATCHES * WORLD)[rank::WORLD], 1):
                # which torch 2.11 cannot skip of a static graph
                with wrapped.no_sync() if i < MICRO_BATCHES and not static_graph else nullcontext():
                    loss = loss_of(wrapped(part)) / MICRO_BATCHES
                    loss.backward()
                losses.append(loss.detach())
            if len(losses) == MICRO_BATCHES:
                first = {name: p.grad.clone() for name, p in model.named_parameters()}
            optimizer.step()
        results[build.__name__, static_graph] = torch.stack(losses), first, model.state_dict()
    model = model_of(own)
    wrapped = DistributedDataParallel(model, find_unused_parameters=False)
    with Join([wrapped]):
        trained(model, list(images(2 * WORLD + 1).split(1))[rank::WORLD], wrapped)
    return results | {"uneven": model.state_dict()}


def sharded(rank: int, folder: Path) -> dict:
    """Trained on two ranks, with a checkpoint that four load; and in mixed precision."""
    pair, everybody, results = DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", list(range(WORLD))), {}
    for build in BUILDS:
        checkpoint = folder / f"sharded-{build.__name__}"
        if rank in (0, 1):
            model = fully_shard_blocks(model_of(build), pair)
            batches = [x.chunk(2)[rank] for x in images(4 * STEPS).chunk(STEPS)]
            optimizer, losses = trained(model, batches)
            states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
            dcp.save(states, checkpoint_id=checkpoint, process_group=pair.get_group())
            model = model_of(build).float()
            exec(SHARD_PARAMETERS, {"model": model, "mesh": {"dp": pair}})
            _, mixed = trained(model, [x.float() for x in batches])
            results[build.__name__] = losses, mixed
        dist.barrier()
        model = fully_shard_blocks(model_of(build, seed=9), everybody)
        results[f"{build.__name__} loaded"] = load(model, checkpoint)
    return results


def fully_shard_blocks(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def load(model: nn.Module, checkpoint: Path) -> list[dict]:
    """The states of a model and its optimizer, in full, after loading them."""
    optimizer = sgd(model)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(states, checkpoint_id=checkpoint)
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    state, optimizer_state = get_state_dict(model, optimizer, options=FULL)
    return [state, {name: of["momentum_buffer"] for name, of in optimizer_state["state"].items()}]


def heads(rank: int, folder: Path) -> dict:
    """Heads divided among two ranks and among four, as the document says, and on two with sharded parameters."""
    square, line = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")), init_device_mesh("cpu", (4,))
    results = {}
    for build in BUILDS:
        for mesh in (square["tp"], line):
            model = model_of(build, seed=rank)
            set_model_state_dict(model, model_of(build).state_dict())
            in_parallel(model, mesh)
            assert model.blocks[0].attn.qk.weight.to_local().numel() * mesh.size() == 2 * model.num_features**2
            out, grads = model(images()), gradients(model, images())
            results[build.__name__, mesh.size()] = (
                full(out),
                {name: full(grad) for name, grad in grads.items()},
                copy.deepcopy(get_model_state_dict(model, options=FULL)),
                full(model.blocks[0].attn.get_attention(tokens(model))),
                with_input_gradient(model, distribute_tensor(tokens(model), mesh, [Shard(1)])),
            )
            set_model_state_dict(model, model_of(build, seed=9).state_dict(), options=FULL)
            results[build.__name__, mesh.size(), "loaded"] = get_model_state_dict(model, options=FULL)
        checkpoint = folder / f"heads-{build.__name__}"
        model = fully_shard_blocks(in_parallel(model_of(build), square["tp"]), square["dp"])
        batches = [x.chunk(2)[square["dp"].get_local_rank()] for x in images(4 * STEPS).chunk(STEPS)]
        optimizer, results[build.__name__, "losses"] = trained(model, batches)
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.save(states, checkpoint_id=checkpoint)
        results[build.__name__, "reloaded"] = load(in_parallel(model_of(build, seed=9), line), checkpoint)
    layer, adapted = FusedGPSA(27, 9), FusedGPSA(24, 4)
    adapted.qk = nn.Sequential(adapted.qk)
    results["messages"] = [
        message(parallelize_module, layer, square["tp"], HeadwiseParallel()),
        message(parallelize_module, layer, square, HeadwiseParallel()),
        message(parallelize_module, layer, square["tp"], {"qk": HeadwiseParallel()}),
        message(parallelize_module, model.blocks[0].attn, square["tp"], HeadwiseParallel()),
        message(parallelize_module, adapted, square["tp"], HeadwiseParallel()),
        message(model.blocks[0].attn.local_init),
    ]
    return results


def in_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    exec(DIVIDE_HEADS, {"model": model, "mesh": {"tp": mesh}})
    return model


def call_of(placements: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    tensors = inputs(3, 2 if placements == "more ranks than heads" else 4, GRID, 8)
    return tensors, torch.linspace(-1, 1, tensors[0].numel(), dtype=torch.float64).view(tensors[0].shape)


def dtensors(rank: int, folder: Path) -> dict:
    mesh, line, results = init_device_mesh("cpu", (2, 2)), init_device_mesh("cpu", (4,)), {}
    for name, (of_calls, of_heads) in PLACEMENTS.items():
        for backend in ("sdpa", "eager"):
            tensors, grad_out = call_of(name)
            placements = [of_calls] * 3 + [of_heads] * 2
            placed = [distribute_tensor(t.detach(), mesh, p) for t, p in zip(tensors, placements, strict=True)]
            upstream = distribute_tensor(grad_out, mesh, of_calls)
            got = with_gradients(gpsa_attention, placed, upstream, GRID, backend=backend)
            merged = got[0].transpose(1, 2).flatten(2)
            results[name, backend] = [*map(full, got), full(merged), got[0].stride()]
    q, k, v, pos_weight, gate = placed
    results["meshes"] = str(mesh), str(line)
    results["messages"] = [
        message(gpsa_attention, q, k, v, pos_weight, full(gate), GRID),
        message(gpsa_attention, full(q), full(k), full(v), full(pos_weight), gate, GRID, backend="eager"),
        message(gpsa_attention, q, k, v, pos_weight, distribute_tensor(full(gate), line), GRID),
        message(gpsa_attention, *placed, GRID, dropout_p=0.1),
    ]
    return results


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store, timeout = f"file://{folder}/store", datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=timeout)
    for scenario in (replicated, sharded, heads, dtensors):
        torch.save(scenario(rank, Path(folder)), f"{folder}/{scenario.__name__}{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    torch.multiprocessing.spawn(worker, args=(str(folder),), nprocs=WORLD)
    return folder


# ---- what they left, against one process ----------------------------------------------------------------------------


def left(folder: Path, scenario) -> list[dict]:
    return [torch.load(folder / f"{scenario.__name__}{rank}.pt", weights_only=False) for rank in range(WORLD)]


def assert_equal(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def assert_same_state(actual: dict, expected: dict, model: nn.Module) -> None:
    assert list(actual) == list(expected)
    for name, value in actual.items():
        assert_rounded(value, expected[name], model, name)


builds = pytest.mark.parametrize("build", BUILDS)


@builds
@pytest.mark.parametrize("static_graph", [False, True])
def test_data_parallel_replicas_train_as_one_process(folder, build, static_graph):
    """From rank 0's parameters, with gradients accumulated over micro-batches."""
    ranks = [results[build.__name__, static_graph] for results in left(folder, replicated)]
    model = model_of(build)
    batches = images(STEPS * MICRO_BATCHES * WORLD).chunk(STEPS)
    expected = gradients_of_loss(model, batches[0])
    _, losses = trained(model, batches)
    for _, first, state in ranks:
        assert_equal([first, state], list(ranks[0][1:]))
    assert_same_gradients(ranks[0][1], expected, model)
    mean = torch.stack([losses for losses, *_ in ranks]).mean(0).view(STEPS, MICRO_BATCHES).sum(1)
    assert_rounded(mean, losses, model)
    assert_same_state(ranks[0][2], model.state_dict(), model)


def gradients_of_loss(model: nn.Module, x: torch.Tensor) -> dict:
    loss_of(model(x)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_data_parallel_ranks_may_run_out_of_batches(folder):
    """The ranks that have none left count as zeros in the mean."""
    model = model_of(own)
    optimizer = sgd(model)
    for x in images(2 * WORLD + 1).split(WORLD):
        optimizer.zero_grad()
        (sum(loss_of(model(part)) for part in x.split(1)) / WORLD).backward()
        optimizer.step()
    for results in left(folder, replicated):
        assert_same_state(results["uneven"], model.state_dict(), model)


@builds
def test_sharded_parameters_train_as_one_process_and_load_on_any_number(folder, build):
    results = left(folder, sharded)
    model = model_of(build)
    optimizer, losses = trained(model, images(4 * STEPS).chunk(STEPS))
    assert_rounded(torch.stack([r[build.__name__][0] for r in results[:2]]).mean(0), losses, model)
    state, optimizer_state = get_state_dict(model, optimizer)
    momentum = {name: of["momentum_buffer"] for name, of in optimizer_state["state"].items()}
    loaded = load(model_of(build, seed=9), folder / f"sharded-{build.__name__}")
    for r in results:
        assert_equal(r[f"{build.__name__} loaded"], loaded)
    assert_same_state(loaded[0], state, model)
    assert_same_state(loaded[1], momentum, model)


@builds
def test_sharded_parameters_in_mixed_precision(folder, build):
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
    got = torch.stack([r[build.__name__][1] for r in left(folder, sharded)[:2]], 1).flatten()
    assert_equal(got, torch.stack(losses))


@builds
@pytest.mark.parametrize("ranks", [2, 4])
def test_heads_divided_among_ranks_are_those_of_one_process(folder, build, ranks):
    model = model_of(build)
    expected, of_parameters = model(images()), gradients(model, images())
    maps = model.blocks[0].attn.get_attention(tokens(model)).chunk(ranks, 1)
    for rank, results in enumerate(left(folder, heads)):
        out, grads, state, attention, of_layer = results[build.__name__, ranks]
        assert_rounded(out, expected, model)
        assert_same_gradients({name: as_packed(grad) for name, grad in grads.items()}, of_parameters, model)
        assert_equal(state, model.state_dict())
        assert_rounded(attention, maps[rank % ranks], model)
        for actual, wanted in zip(of_layer, with_input_gradient(model, tokens(model)), strict=True):
            assert_rounded(actual, wanted, model)
        assert_equal(results[build.__name__, ranks, "loaded"], model_of(build, seed=9).state_dict())


def as_packed(t: torch.Tensor) -> torch.Tensor:
    """Of qk and qkv, which are grouped by head in the layer."""
    return t.transpose(0, 1).flatten(0, 2) if t.dim() > 2 and t.shape[1] in (2, 3) and t.shape[0] == 4 else t


@builds
def test_heads_and_parameters_divided_train_as_one_process_and_load_on_any_number(folder, build):
    results = left(folder, heads)
    model = model_of(build)
    optimizer, losses = trained(model, images(4 * STEPS).chunk(STEPS))
    assert_rounded(torch.stack([r[build.__name__, "losses"] for r in results[::2]]).mean(0), losses, model)
    momentum = {name: of["momentum_buffer"] for name, of in get_state_dict(model, optimizer)[1]["state"].items()}
    alone = {"model": model_of(build, seed=9).state_dict()}
    dcp.load(alone, checkpoint_id=folder / f"heads-{build.__name__}")
    assert_same_state(alone["model"], model.state_dict(), model)
    for r in results:
        state, of_optimizer = r[build.__name__, "reloaded"]
        assert_equal(state, alone["model"])
        assert_same_state({name: as_packed(t) for name, t in of_optimizer.items()}, momentum, model)


def test_what_cannot_be_divided_is_refused(folder):
    for results in left(folder, heads):
        assert results["messages"] == [
            "ValueError: num_heads must be a multiple of the 2 ranks of the mesh, got 9",
            "ValueError: device_mesh must have one dimension, got 2: pass mesh['name']",
            "TypeError: HeadwiseParallel shards a FusedGPSA or SelfAttention, got Linear",
            "TypeError: HeadwiseParallel shards a FusedGPSA or SelfAttention, got _HeadwiseGPSA",
            "TypeError: qk must be an nn.Linear to be sharded over heads, got Sequential",
            "RuntimeError: a layer that is sharded over heads cannot be initialised: do it before, or load parameters",
        ]


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("placements", PLACEMENTS)
def test_dtensors_pass_through_the_operator(folder, placements, backend):
    tensors, grad_out = call_of(placements)
    expected = with_gradients(gpsa_attention, tensors, grad_out, GRID, backend=backend)
    for results in left(folder, dtensors):
        *got, merged, stride = results[placements, backend]
        assert stride == expected[0].stride()
        for actual, wanted in zip(got, expected, strict=True):
            atol = 3 * 21**2 * torch.finfo(wanted.dtype).eps * wanted.abs().max()  # a rounding for each term of a sum
            torch.testing.assert_close(actual, wanted, rtol=0, atol=atol.item())
        assert_equal(merged, got[0].transpose(1, 2).flatten(2))


def test_what_dtensors_cannot_do_is_refused(folder):
    for results in left(folder, dtensors):
        assert results["messages"] == [
            "TypeError: gate must be a DTensor, as another is, got Tensor",
            "TypeError: q must be a DTensor, as another is, got Tensor",
            "ValueError: gate must be on q's mesh {}, got {}".format(*results["meshes"]),
            "RuntimeError: dropout_p must be 0 for DTensors, whose shards cannot share a mask, got 0.1",
        ]
