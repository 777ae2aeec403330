"""Models and the comparison rule that the tests of layers and models share."""

from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

SHALLOW = {"depth": 3, "local_up_to_layer": 2}


def images(batch: int = 4, height: int = 32, width: int | None = None, channels: int = 3) -> Tensor:
    shape = (batch, channels, height, width or height)
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """``model`` in float64 with noise on every parameter, so that none is at a value that hides a mistake."""
    model = model.double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def timm_convit(size: str = "tiny", image_size: int = 64, **kwargs) -> nn.Module:
    return randomized(timm.create_model(f"convit_{size}", img_size=image_size, **kwargs))


def assert_rounded(actual: Tensor, expected: Tensor, model: nn.Module, name: str = "") -> None:
    """Both are the same up to rounding, on the scale of the largest element of ``expected``.

    The longest chain of roundings from end to end, forward or backward: every block's longest sum, the MLP's 4C terms.
    """
    assert actual.shape == expected.shape, name
    assert actual.dtype == expected.dtype, name
    roundings = len(model.blocks) * 4 * model.num_features
    tolerance = roundings * torch.finfo(expected.dtype).eps * expected.abs().max()
    difference = (actual - expected).abs().max()
    assert difference <= tolerance, f"{name} differs by {difference:.1e}, allowed {tolerance:.1e}"


def outcome(model: nn.Module, images: Tensor, forward: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """What ``model`` (or ``forward``) gives, and by name the gradients of a loss that weighs all of it differently."""
    model.zero_grad(set_to_none=True)
    out = (model if forward is None else forward)(images)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    return {"out": out.detach(), **{name: parameter.grad for name, parameter in model.named_parameters()}}


def assert_same_outcome(actual: dict[str, Tensor], expected: dict[str, Tensor], model: nn.Module) -> None:
    """Of a ``model`` with fused layers, where the bias of the position has no gradient but zero."""
    assert list(actual) == list(expected)
    for name, value in actual.items():
        if name.endswith("pos_proj.bias"):
            assert torch.equal(value, torch.zeros_like(value)), name
        else:
            assert_rounded(value, expected[name], model, name)
