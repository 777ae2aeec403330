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


@backends
@pytest.mark.parametrize("build", [own, timm_fused])
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_model_without_data(build, backend, device):
    """On the CPU an empty batch."""
    batch = 2 if device == "meta" else 0
    model = build(backend, device=device)
    out = model(torch.randn(batch, 3, 32, 32, device=device))
    assert (out.shape, out.device.type) == ((batch, 1000), device)
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
