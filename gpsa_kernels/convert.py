"""fuse and unfuse: the attention layers of an existing model, switched to the fused ones and back.

A layer is switched by changing its class, as ``torch.nn.utils.parametrize`` does. It stays the same object, with the
same parameters, submodules, hooks and place in the model, so optimizers, EMA copies, LoRA adapters and whoever else
holds a reference to it stay valid, and the way back is to change the class back.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gpsa_kernels import auto
from gpsa_kernels.arguments import as_grid, check_backend, check_integer
from gpsa_kernels.modules import Attention, FusedGPSA, SelfAttention, is_plain

_log = logging.getLogger("gpsa_kernels")
_Model = TypeVar("_Model", bound=nn.Module)


def fuse(
    model: _Model,
    *,
    backend: str = "auto",
    self_attention: bool = True,
    grid_size: tuple[int, int] | None = None,
    outputs: int = 1,
) -> _Model:
    """Switches every GPSA layer of ``model`` to :class:`FusedGPSA`, in place.

    A GPSA layer is recognised by its structure, wherever it comes from (timm, the original code, a copy of either):
    ``gating_param`` (H,), linear ``qk`` (C to 2C), ``v`` and ``proj`` (C to C), ``pos_proj`` (3 to H), ``num_heads``.
    It is switched if it also computes what FusedGPSA computes, which is tried out on a copy with random parameters; if
    not, it is left alone, with a warning that names it and says why. Fused layers stay as they are. The logger
    "gpsa_kernels" is told, at level INFO, how many layers were fused and what will run them.

    Args:
        model: any module, a GPSA layer itself included.
        backend: of the fused layers, see :func:`gpsa_kernels.gpsa_attention` and :class:`SelfAttention`.
        self_attention: whether the plain self-attention layers of a model with GPSA layers (linear ``qkv``, C to 3C,
            ``proj``, ``num_heads``, nothing else) become :class:`SelfAttention`, which computes the same.
        grid_size: (rows, columns) of the token grid for every fused layer; a square inferred from the token count if
            None.
        outputs: how many values the layers return. Of more than one the first is the attention's output, and a fused
            layer returns None for the others, for callers that drop them (DyTox's layers return 3).

    Returns:
        ``model``. Parameters, submodules, hooks, training flags and the state_dict are untouched.

    Raises:
        TypeError, ValueError: ``model`` is no module, ``backend`` unknown, ``grid_size`` no pair of positive integers,
            or ``outputs`` no positive integer.
    """
    _check_model(model)
    check_backend(backend)
    grid_size = None if grid_size is None else as_grid(grid_size)
    check_integer("outputs", outputs, least=1)
    layers = dict(model.named_modules())
    if not any(isinstance(layer, FusedGPSA) or _kind_of(layer) is FusedGPSA for layer in layers.values()):
        warnings.warn(f"{type(model).__name__} has no GPSA layer: nothing is fused", stacklevel=2)
        return model
    fused = 0
    for name, layer in layers.items():
        kind = None if isinstance(layer, Attention) else _kind_of(layer)
        if kind is None or (kind is SelfAttention and not self_attention):
            continue
        reason = _obstacle(layer, kind, outputs)
        if reason is None:
            _switch(layer, kind, outputs, backend=backend, grid_size=grid_size)
            fused += 1
        else:
            warnings.warn(f"{name or type(layer).__name__} is left as it is: {reason}", stacklevel=2)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    taken = auto.outlook(device) if backend == "auto" else backend
    _log.info("%d layers fused; on %s: %s", fused, device, taken)
    return model


def unfuse(model: _Model) -> _Model:
    """Switches the layers that :func:`fuse` has switched back to their own classes, in place, and returns ``model``.

    They keep the parameters and submodules they hold now, whatever was loaded into, moved or wrapped meanwhile. A layer
    whose class has changed since, as ``parametrize`` and ``fully_shard`` change it, is left alone, with a warning.
    """
    _check_model(model)
    for name, layer in model.named_modules():
        if "_unfused" not in vars(layer):
            continue
        fused, now = vars(layer)["_unfused"][1], type(layer)
        if now is fused:
            _switch_back(layer)
        else:
            reason = f"since fuse its class has changed from {fused.__name__} to {now.__name__}"
            warnings.warn(f"{name or now.__name__} stays fused: {reason}", stacklevel=2)
    return model


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {model if isinstance(model, type) else type(model)}")


def _dim(layer: nn.Module) -> int:
    return getattr(getattr(layer, "proj", None), "in_features", 0)


def _kind_of(layer: nn.Module) -> type[Attention] | None:
    """The fused class for a layer that is built like GPSA, or like plain self-attention."""
    dim, num_heads = _dim(layer), getattr(layer, "num_heads", None)
    children = dict(layer.named_children())
    # of an nn.Linear, or an adapter that wraps one
    sizes = {name: (getattr(m, "in_features", 0), getattr(m, "out_features", 0)) for name, m in children.items()}
    gpsa = {"qk": (dim, 2 * dim), "v": (dim, dim), "proj": (dim, dim), "pos_proj": (3, num_heads)}
    gate = getattr(layer, "gating_param", None)  # no parameter where it is pruned or parametrized
    if isinstance(gate, Tensor) and gate.shape == (num_heads,) and gpsa.items() <= sizes.items():
        return FusedGPSA
    alone = children.keys() <= {"qkv", "attn_drop", "proj", "proj_drop"} and not [*layer.parameters(recurse=False)]
    plain = {"qkv": (dim, 3 * dim), "proj": (dim, dim)}
    return SelfAttention if num_heads is not None and alone and plain.items() <= sizes.items() else None


def _template(layer: nn.Module, kind: Callable[..., Attention], **settings: Any) -> Attention:
    """A fused layer for the sizes and scale of ``layer``, without data."""
    return kind(_dim(layer), layer.num_heads, qk_scale=getattr(layer, "scale", None), device="meta", **settings)


def _switch(layer: nn.Module, kind: type[Attention], outputs: int, **settings: Any) -> None:
    if kind is SelfAttention:
        del settings["grid_size"]  # of which it has none
    # The constructor knows which attributes the fused class needs; the layer's own win, but for those asked for.
    template = vars(_template(layer, kind, **settings)) | ({"_outputs": outputs} if outputs > 1 else {})
    names = template.keys() - vars(nn.Module()).keys()
    added = {name: template[name] for name in names if name in settings or name not in vars(layer)}
    replaced = {name: vars(layer)[name] for name in added if name in vars(layer)}
    vars(layer).update(added, _unfused=(type(layer), kind, tuple(added), replaced))
    layer.__class__ = kind


def _switch_back(layer: nn.Module) -> None:
    layer_type, _, added, replaced = vars(layer).pop("_unfused")
    for name in added:
        del vars(layer)[name]
    vars(layer).update(replaced)
    layer.__class__ = layer_type
    _refresh_offsets(layer)


def _refresh_offsets(layer: nn.Module) -> None:
    """Brings the table of offsets that the original code caches as a plain attribute to where the parameters are.

    ``.to()`` misses it there; timm's is a buffer, which stays registered in the fused layer so that EMA copies find it.
    """
    table = vars(layer).get("rel_indices")
    if isinstance(table, Tensor):
        vars(layer)["rel_indices"] = table.to(next(layer.parameters()))


def _obstacle(layer: nn.Module, kind: type[Attention], outputs: int) -> str | None:
    """Why ``layer`` cannot be switched, or None."""
    if "forward" in vars(layer):
        return "its forward method was replaced on the instance"
    for name, expected in kind.bypassed.items():
        if not is_plain(getattr(layer, name, None), expected):
            return f"the fused layer does the work of {name} itself, which must be a plain nn.{expected.__name__}"
    try:
        template = _template(layer, kind)
        own = [name for name, _ in [*layer.named_parameters(recurse=False), *layer.named_children()]]
        known = {**template._parameters, **template._modules}
        unknown = [name for name in own if name.removesuffix("_orig") not in known]  # as prune names a parameter
        if unknown:
            return f"the fused layer does not know its {', '.join(unknown)}"
        return _difference(layer, kind, outputs)
    except Exception as error:  # whatever a foreign layer raises is a reason to leave it alone
        return f"a trial raised {type(error).__name__}: {error}"


@torch.no_grad()
def _difference(layer: nn.Module, kind: type[Attention], outputs: int) -> str | None:
    """How the fused layer's output differs from the layer's, or None; both are run on a copy."""
    dim = _dim(layer)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        trial = _trial_copy(layer, generator)
        inputs = [torch.empty(1, tokens, dim, device="cpu", dtype=torch.float32) for tokens in (4, 9)]
        results = [trial(x.normal_(generator=generator)) for x in inputs]
        _switch(trial, kind, outputs=1, backend="eager", grid_size=None)
        for x, result in zip(inputs, results, strict=True):
            expected, *rest = result if isinstance(result, tuple) and result else (result,)
            if not isinstance(expected, Tensor) or 1 + len(rest) != outputs:
                wanted = "a tensor" if outputs == 1 else f"{outputs} values"
                hint = f" (outputs={1 + len(rest)} takes the first of its values)" if rest else ""
                return f"its forward returns a {type(result).__name__}, not {wanted}{hint}"
            if expected.shape != x.shape:
                return f"its output has shape {tuple(expected.shape)} instead of {tuple(x.shape)}"
            # Three sums in a row, over a head's channels, the tokens and all channels, round once a term. So do the
            # positional logits, whose error grows with their size: at most 2 + 2 + 8 on a 3x3 grid, weights in [-1, 1].
            roundings = dim + x.shape[1] + dim + 12
            tolerance = roundings * torch.finfo(torch.float32).eps * expected.abs().max().item()
            difference = (trial(x) - expected).abs().max().item()
            if not difference <= tolerance:
                return f"the fused layer's output differs by {difference:.1e}, rounding explains {tolerance:.1e}"
    return None


def _trial_copy(layer: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy in float32 on the CPU, in eval mode, without hooks and with random parameters.

    Random, because those of a new layer hide differences (a bias of 0, a v that is the identity), and those on the meta
    device have no values.
    """
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    memo: dict[int, Any] = {id(getattr(m, hook)): OrderedDict() for m in layer.modules() for hook in hooks}
    # what prune computes from a parameter, in a hook, cannot be copied, and takes the parameter's place
    pruned = [vars(m)[name] for m in layer.modules() for name in vars(m) if f"{name}_orig" in m._parameters]
    computed = {id(t): torch.empty_like(t, device="cpu", dtype=torch.float32) for t in pruned}
    memo.update(computed)
    trial = copy.deepcopy(layer, memo).eval()
    if any(t.is_meta for t in (*trial.parameters(), *trial.buffers())):
        trial.to_empty(device="cpu")
    trial.to(device="cpu", dtype=torch.float32)
    _refresh_offsets(trial)
    for parameter in (*trial.parameters(), *computed.values()):
        if parameter.is_floating_point():
            # variance 1 / inputs, so that scores, gates and outputs are all of the order of 1
            bound = (3 / parameter.shape[-1]) ** 0.5 if parameter.dim() > 1 else 3**0.5
            parameter.uniform_(-bound, bound, generator=generator)
    return trial
