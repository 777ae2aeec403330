"""What happens to modules in a training job: copied, saved, moved, replicated, wrapped, compiled, empty."""

import copy
import io
import pickle
from functools import partial

import onnxruntime
import pytest
import torch
from models import SHALLOW, assert_rounded, assert_same_outcome, images, outcome, randomized
from timm.models.convit import GPSA
from timm.models.convit import ConVit as TimmConViT
from torch import nn
from torch.nn.parallel import replicate
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from gpsa_kernels import ConViT, FusedGPSA, SelfAttention, convit_tiny, fuse, gpsa_attention, unfuse

SIZES = {**SHALLOW, "num_heads": 3, "patch_size": 8, "num_classes": 5}


def own(**kwargs) -> nn.Module:
    return randomized(ConViT(embed_dim=24, image_size=32, **{**SIZES, **kwargs}))


def timm_model(**kwargs) -> nn.Module:
    # timm's embed_dim is that of one head
    return randomized(TimmConViT(embed_dim=8, img_size=32, **{**SIZES, **kwargs}))


def timm_fused(**kwargs) -> nn.Module:
    return fuse(timm_model(**kwargs))


both = pytest.mark.parametrize("build", [own, timm_fused])


@both
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_equal_and_independent(build, copied):
    model, x = build().eval(), images()
    expected, other = model(x), copied(model)
    assert torch.equal(other(x), expected)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(model(x), expected)
    assert torch.equal(unfuse(other)(x), torch.zeros_like(expected))


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
        errors = [(model(x).double() - expected).abs().max() for model in (fused, eager)]
    assert fused(x).dtype == dtype
    # as flash attention's tests allow: twice eager's error, which is one draw of rounding as much as ours
    assert errors[0] <= 2 * errors[1]
    assert all(value.isfinite().all() for value in outcome(fused, x).values())


@both
def test_data_parallel_replicas(build, monkeypatch):
    """Which hold plain tensors with a history for parameters, copied where torch broadcasts between GPUs."""

    def broadcast(tensors, devices, detach):
        return [[t.clone() for t in tensors]]

    monkeypatch.setitem(replicate.__globals__, "_broadcast_coalesced_reshape", broadcast)
    model, x = build(), images()
    of_replicas = outcome(model, x, lambda x: torch.cat([replicate(model, [0])[0](part) for part in x.chunk(2)]))
    assert_same_outcome(of_replicas, outcome(model, x), model)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    layer = randomized(FusedGPSA(24, num_heads=3, attn_drop=0.2, proj_drop=0.2))
    x = torch.randn(2, 16, 24, dtype=torch.float64, requires_grad=True)
    results = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        torch.manual_seed(2)
        x.grad = None
        results.append({**outcome(layer, x, run), "x": x.grad})
    torch.testing.assert_close(*results, rtol=0, atol=0)


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
    assert_rounded(average.eval()(images()), model.eval()(images()), model)


@both
def test_compile_without_graph_breaks_or_recompilation(build):
    torch._dynamo.reset()
    model = build(depth=2, local_up_to_layer=1).float()
    # the graphs of forward and backward, run as they are: generating code for them takes minutes on a small machine
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for x in (images(4).float(), images(7).float()):
            assert_same_outcome(outcome(model, x, compiled), outcome(model, x), model)


def test_torchscript():
    """torch.jit.script compiles timm's model, not a fused one, and the same model again after unfuse."""
    model, x = timm_model().eval(), images()
    expected = model(x)
    assert_rounded(torch.jit.script(model)(x), expected, model)
    fuse(model)
    with pytest.raises(RuntimeError, match="script unfuse"):
        torch.jit.script(model)
    assert_rounded(torch.jit.script(unfuse(model))(x), expected, model)


@both
def test_the_old_onnx_export_names_the_backend_that_it_takes(build):
    model, x = build().eval().float(), images().float()
    with pytest.raises(RuntimeError, match=r'dynamo=False\) takes backend="eager" only'):
        torch.onnx.export(model, (x,), io.BytesIO(), dynamo=False)
    for block in model.blocks:
        block.attn.backend = "eager"
    torch.onnx.export(model, (x,), file := io.BytesIO(), dynamo=False)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_rounded(torch.from_numpy(out), model(x), model)


# ---- without elements, without data --------------------------------------------------------------------------------

backends = pytest.mark.parametrize("backend", ["auto", "eager", "sdpa"])


@backends
@both
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_model_without_data(build, backend, device):
    """On the CPU an empty batch."""
    batch, model = 2 if device == "meta" else 0, build().to(device)
    for block in model.blocks:
        block.attn.backend = backend
    out = model(images(batch).to(device))
    assert (out.shape, out.device.type) == ((batch, 5), device)
    out.sum().backward()
    for parameter in model.parameters():
        assert parameter.grad.shape == parameter.shape
        assert device == "meta" or not parameter.grad.any()


@backends
@pytest.mark.parametrize("kind", [FusedGPSA, SelfAttention])
def test_attention_maps_of_an_empty_batch(kind, backend):
    assert kind(12, 3, backend=backend).get_attention(torch.randn(0, 9, 12)).shape == (0, 3, 9, 9)


@pytest.mark.parametrize(("backend", "dropout_p"), [("auto", 0.1), ("eager", 0.0), ("eager", 0.1), ("sdpa", 0.0)])
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_operator_without_data(backend, device, dropout_p):
    batch = 2 if device == "meta" else 0
    with torch.device(device):
        q, k, v = torch.randn(3, batch, 2, 12, 8, requires_grad=True).unbind()
        parameters = torch.randn(2, 3, requires_grad=True), torch.randn(2, requires_grad=True)
        out = gpsa_attention(q, k, v, *parameters, (3, 4), backend=backend, dropout_p=dropout_p)
        grads = torch.autograd.grad(out.sum(), (q, *parameters))
    assert [t.shape for t in (out, *grads)] == [q.shape, q.shape, (2, 3), (2,)]


@pytest.mark.parametrize(
    "build", [partial(convit_tiny, image_size=32, **SHALLOW), partial(FusedGPSA, 24, 4), partial(SelfAttention, 24, 4)]
)
def test_reset_parameters_gives_what_the_constructor_gives(build):
    module = build(device="meta").to_empty(device="cpu")  # NaN throughout
    module.reset_parameters()
    for (name, actual), expected in zip(module.named_parameters(), build().parameters(), strict=True):
        torch.testing.assert_close(actual.mean(), expected.mean(), rtol=0, atol=0.006, msg=name)
        torch.testing.assert_close(actual.std(), expected.std(), rtol=0.2, atol=0, msg=name)


def test_reset_parameters_of_a_fused_layer():
    layer = fuse(GPSA(24, 4, locality_strength=0.5, device="meta")).to_empty(device="cpu")
    layer.reset_parameters()
    assert torch.equal(layer.pos_proj.weight, FusedGPSA(24, 4, locality_strength=0.5).pos_proj.weight)
    assert layer(torch.randn(2, 9, 24)).isfinite().all()
