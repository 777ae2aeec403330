"""Tensors without elements and without data: empty batches, the meta device, and what gives parameters values again."""

from __future__ import annotations

import functools

import pytest
import timm
import torch
from torch import nn

from gpsa_kernels import FusedGPSA, SelfAttention, convit_tiny, fuse, gpsa_attention

SMALL = {"depth": 3, "local_up_to_layer": 2}


def own(backend="auto", **factory) -> nn.Module:
    return convit_tiny(image_size=32, backend=backend, **SMALL, **factory)


def timm_fused(backend="auto", **factory) -> nn.Module:
    return fuse(timm.create_model("convit_tiny", img_size=32, **SMALL).to(**factory), backend=backend)


backends = pytest.mark.parametrize("backend", ["auto", "eager", "sdpa"])
models = pytest.mark.parametrize("build", [own, timm_fused])
layers = pytest.mark.parametrize("kind", [FusedGPSA, SelfAttention])


def assert_zero_gradients(module: nn.Module, x: torch.Tensor, shape: tuple[int, ...]) -> None:
    out = module(x)
    assert out.shape == shape
    out.sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in module.parameters())


@backends
@layers
def test_an_empty_batch_in_a_layer(kind, backend):
    layer = kind(12, 3, backend=backend)
    assert_zero_gradients(layer, torch.randn(0, 9, 12), (0, 9, 12))
    assert layer.get_attention(torch.randn(0, 9, 12)).shape == (0, 3, 9, 9)


@backends
@models
def test_an_empty_batch_in_a_model(build, backend):
    assert_zero_gradients(build(backend), torch.randn(0, 3, 32, 32), (0, 1000))


@backends
@models
def test_a_model_on_the_meta_device(build, backend):
    model = build(backend, device="meta")
    out = model(torch.randn(2, 3, 32, 32, device="meta"))
    out.sum().backward()
    assert (out.shape, out.device.type) == ((2, 1000), "meta")
    assert all(p.grad.shape == p.shape for p in model.parameters())


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


@pytest.mark.parametrize("build", [own, functools.partial(FusedGPSA, 24, 4), functools.partial(SelfAttention, 24, 4)])
def test_reset_parameters_gives_what_the_constructor_gives(build):
    module = build(device="meta").to_empty(device="cpu")  # NaN throughout
    module.reset_parameters()
    for (name, actual), expected in zip(module.named_parameters(), build().parameters(), strict=True):
        torch.testing.assert_close(actual.mean(), expected.mean(), rtol=0, atol=0.006, msg=name)
        torch.testing.assert_close(actual.std(), expected.std(), rtol=0.2, atol=0, msg=name)


def test_reset_parameters_of_a_fused_layer():
    layer = fuse(timm.models.convit.GPSA(24, 4, locality_strength=0.5, device="meta")).to_empty(device="cpu")
    layer.reset_parameters()
    assert torch.equal(layer.pos_proj.weight, FusedGPSA(24, 4, locality_strength=0.5).pos_proj.weight)
    assert layer(torch.randn(2, 9, 24)).isfinite().all()
