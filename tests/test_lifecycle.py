"""What happens to modules in a training job: copied, saved, moved, replicated, wrapped, compiled, exported."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from models import gradients, randomized
from timm.models.convit import ConVit as TimmConViT
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from gpsa_kernels import ConViT, FusedGPSA, fuse, unfuse

SIZES = {"num_heads": 3, "depth": 3, "local_up_to_layer": 2, "patch_size": 8, "num_classes": 5}


def own(**kwargs) -> nn.Module:
    return randomized(ConViT(embed_dim=24, image_size=32, **{**SIZES, **kwargs}))


def timm_model(**kwargs) -> nn.Module:
    # timm's embed_dim is that of one head
    return randomized(TimmConViT(embed_dim=8, img_size=32, **{**SIZES, **kwargs}))


def timm_fused(**kwargs) -> nn.Module:
    return fuse(timm_model(**kwargs))


both = pytest.mark.parametrize("build", [own, timm_fused])


def images(batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def assert_gradients_close(actual: dict, expected: dict) -> None:
    """Equal but for the order of the sums over the batch and over 3 blocks of 24 channels, MLPs of 96."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        tolerance = 3 * 96 * torch.finfo(gradient.dtype).eps * gradient.abs().max()
        assert (actual[name] - gradient).abs().max() <= tolerance, name


# ---- copied, saved, moved -------------------------------------------------------------------------------------------


def through_pickle(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@both
@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
def test_copies_are_equal_and_independent(build, copied):
    model = build().eval()
    x = images()
    expected = model(x)
    other = copied(model)
    assert torch.equal(other(x), expected)
    assert list(other.state_dict()) == list(model.state_dict())
    assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(model(x), expected)
    assert torch.equal(unfuse(other)(x), torch.zeros_like(expected))


@both
def test_optimizer_survives_to(build):
    """``.to`` changes parameters in place, so the optimizer keeps training what the layers compute with."""
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.to(torch.float32)
    before = {name: p.clone() for name, p in model.named_parameters()}
    gradients(model, images().float())
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    still = {name for name in before if name.endswith("pos_proj.bias")}
    assert moved == before.keys() - still


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_exact_as_eager(build, dtype):
    """Against the same parameters in float64, the fused layers err no more than the formula spelled out by timm."""
    fused = build().eval()
    eager = TimmConViT(embed_dim=8, img_size=32, **SIZES).eval()
    eager.load_state_dict(fused.state_dict())
    x = images(8).to(dtype)
    fused, eager = fused.to(dtype), eager.to(dtype)
    with torch.no_grad():
        expected = copy.deepcopy(fused).double()(x.double())
        errors = [(model(x).double() - expected).abs() for model in (fused, eager)]
    assert fused(x).dtype == dtype
    # as flash attention's tests allow: twice eager's error, which is one draw of rounding as much as ours
    assert errors[0].max() <= 2 * errors[1].max()
    gradients(fused, x)
    assert all(p.grad.isfinite().all() for p in fused.parameters())


# ---- replicated -----------------------------------------------------------------------------------------------------


def replicate(model: nn.Module) -> nn.Module:
    """One replica made as nn.parallel.replicate makes it, whose parameters are plain tensors with a history.

    The real one broadcasts between GPUs; all else that it does to the modules is here.
    """
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module.named_children():
            setattr(replica, name, replicas[child])
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, parameter.clone())
        for name, buffer in module.named_buffers(recurse=False):
            setattr(replica, name, buffer.clone())
    return replicas[model]


@both
def test_data_parallel_replicas(build):
    model, x = build(), images()
    expected = model(x)
    expected.sin().sum().backward()
    expected_gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    actual = torch.cat([replicate(model)(part) for part in x.chunk(2)])
    actual.sin().sum().backward()
    assert_gradients_close({"": actual}, {"": expected})
    assert_gradients_close({name: p.grad for name, p in model.named_parameters()}, expected_gradients)


def mean_loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).sin().mean()


def ddp_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(rank)  # timm's models start apart: DDP takes rank 0's parameters
    for build in (own, timm_fused):
        model = build()
        wrapped = DistributedDataParallel(model, find_unused_parameters=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        history = [copy.deepcopy(model.state_dict())]
        for step in range(2):
            optimizer.zero_grad()
            mean_loss(wrapped, images(8).chunk(4)[2 * step + rank]).backward()
            history.append({name: p.grad.clone() for name, p in model.named_parameters()})
            optimizer.step()
        torch.save(history, f"{folder}/{build.__name__}{rank}.pt")
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(tmp_path):
    """Two steps on two ranks: gradients equal on both, and those of one process on the joint batch."""
    torch.multiprocessing.spawn(ddp_worker, args=(str(tmp_path),), nprocs=2)
    for build in (own, timm_fused):
        (state, *history), (_, *other) = (torch.load(tmp_path / f"{build.__name__}{rank}.pt") for rank in (0, 1))
        single = build()
        single.load_state_dict(state)
        optimizer = torch.optim.SGD(single.parameters(), lr=0.1)
        for step in range(2):
            optimizer.zero_grad()
            mean_loss(single, images(8).chunk(2)[step]).backward()
            expected = {name: p.grad for name, p in single.named_parameters()}
            assert_gradients_close(history[step], expected)
            assert all(torch.equal(history[step][name], other[step][name]) for name in expected)
            optimizer.step()


# ---- trained --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    layer = randomized(FusedGPSA(24, num_heads=3, attn_drop=0.2, proj_drop=0.2))
    results = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        layer.zero_grad()
        x = torch.randn(2, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        torch.manual_seed(2)
        run(x).sin().sum().backward()
        results.append([x.grad, *(p.grad for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@both
def test_gradient_accumulation(build):
    model, x = build(), images()
    model(x).sin().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for part in x.split(1):
        model(part).sin().sum().backward()
    assert_gradients_close({name: p.grad for name, p in model.named_parameters()}, expected)


@pytest.mark.parametrize("averaged_first", [False, True])
def test_moving_average(averaged_first):
    """The copy follows the model, whether it was made before or after fuse."""
    model = timm_model()
    average = AveragedModel(model) if averaged_first else None
    fuse(model)
    average = average or AveragedModel(model)
    states = []
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        average.update_parameters(model)
        states.append(copy.deepcopy(model.state_dict()))
    for name, value in average.module.state_dict().items():
        torch.testing.assert_close(value, (states[0][name] + states[1][name]) / 2, rtol=0, atol=1e-14)
    model.load_state_dict(average.module.state_dict())
    assert_gradients_close({"": average.eval()(images())}, {"": model.eval()(images())})


# ---- compiled, exported, scripted -----------------------------------------------------------------------------------


@both
def test_compile_without_graph_breaks_or_recompilation(build):
    torch._dynamo.reset()
    model = build(depth=2, local_up_to_layer=1).float()
    # the graphs of forward and backward, run as they are: generating code for them takes minutes on a small machine
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (4, 7):
            x = images(batch).float()
            expected = gradients(model, x)
            out = compiled(x)
            model.zero_grad()
            (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
            assert_gradients_close({"": out}, {"": model(x)})
            assert_gradients_close({name: p.grad for name, p in model.named_parameters()}, expected)


@both
def test_export_of_a_model(build):
    model, x = build().eval(), images()
    assert_gradients_close({"": torch.export.export(model, (x,)).module()(x)}, {"": model(x)})


def test_export():
    layer = randomized(FusedGPSA(24, num_heads=3, grid_size=(2, 8))).eval()
    x = torch.randn(3, 16, 24, dtype=torch.float64)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for batch in (x, torch.cat((x, x))):
        assert_gradients_close({"": program.module()(batch)}, {"": layer(batch)})


def test_torchscript():
    """torch.jit.script compiles timm's model, not a fused one, and the same model again after unfuse."""
    model, x = timm_model().eval(), images()
    expected = model(x)
    assert_gradients_close({"": torch.jit.script(model)(x)}, {"": expected})
    fuse(model)
    with pytest.raises(RuntimeError, match="script unfuse"):
        torch.jit.script(model)
    assert_gradients_close({"": torch.jit.script(unfuse(model))(x)}, {"": expected})


@both
def test_the_old_onnx_export_names_the_backend_that_it_takes(build):
    model = build().eval()
    with pytest.raises(RuntimeError, match=r'dynamo=False\) takes backend="eager" only'):
        torch.onnx.export(model, (images(),), io.BytesIO(), dynamo=False)
    for block in model.blocks:
        block.attn.backend = "eager"
    with pytest.raises(torch.onnx.OnnxExporterError, match="onnx is not installed"):  # which it needs at the very end
        torch.onnx.export(model, (images(),), io.BytesIO(), dynamo=False)
