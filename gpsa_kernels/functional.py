"""The public function: checks its arguments, picks a backend, calls it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gpsa_kernels.arguments import as_number, as_pair, check_backend, check_tensors
from gpsa_kernels.auto import choose
from gpsa_kernels.backends import BACKENDS, Backend, Call
from gpsa_kernels.derivatives import first_order
from gpsa_kernels.operators import attention
from gpsa_kernels.sharding import are_distributed, on_shards
from gpsa_kernels.tensors import autocast_inputs, without_autocast

_LARGEST_SCALE = torch.finfo(torch.float32).max


def gpsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    gate: Tensor,
    grid_size: tuple[int, int],
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Gated positional self-attention (ConViT, arXiv 2103.10697, section 3).

    For every batch element and head, with g = sigmoid(gate), d the offset key minus query on the grid::

        out_i = sum_j [ (1-g) softmax_j(scale * q_i.k_j) + g softmax_j(w0*dx + w1*dy + w2*(dx^2+dy^2)) ] v_j

    Softmax statistics, the positional factors, the gate and all sums are kept in float32 (float64 for float64 inputs).

    Args:
        q: (B, H, N, D) queries; float32, float64, float16 or bfloat16. Any strides, last dimension contiguous.
        k: (B, H, N, D) keys, like q.
        v: (B, H, N, D) values, like q.
        pos_weight: (H, 3) weights of dx, dy and dx^2 + dy^2 in grid steps, i.e. ``pos_proj.weight``; any
            floating dtype.
        gate: (H,) gate logits, any floating dtype.
        grid_size: (rows, columns) of the token grid, numbered row by row; rows * columns = N.
        scale: factor of the content scores, D ** -0.5 if None.
        dropout_p: probability with which entries of the mixed attention map are dropped, one mask for both branches.
            As in ``scaled_dot_product_attention`` it acts whenever it is not 0.
        backend: "auto", as :mod:`gpsa_kernels.auto` chooses, or a name out of ``gpsa_kernels.BACKENDS``. "eager" has
            all derivatives, the others first ones by ``backward()``; in forward mode and inside a transform of
            torch.func "auto" is "eager".

    Returns:
        (B, H, N, D) in q's dtype (the autocast dtype under autocast), laid out so that
        ``out.transpose(1, 2).reshape(B, N, H * D)`` is a view.

    Raises:
        TypeError: an argument is not of the type or dtype above.
        ValueError: shapes, devices, grid, scale, dropout_p or the backend's name do not fit.
        RuntimeError: the backend asked for by name cannot run this call; the message says why. Also, unless the backend
            is "eager", when a gradient of the result is differentiated again.
    """
    check_tensors(q, k, v, pos_weight, gate)
    rows, columns = as_pair("grid_size", grid_size)
    if rows < 1 or columns < 1 or rows * columns != q.shape[2]:
        wanted = f"(rows, columns) with rows * columns = {q.shape[2]} tokens"
        raise ValueError(f"grid_size must be {wanted}, got {grid_size!r}")
    if scale is None:
        scale = q.shape[3] ** -0.5
    elif type(scale) is not float:
        scale = as_number("scale", scale)
    if not abs(scale) <= _LARGEST_SCALE:  # false for nan, too; math.isfinite breaks the graph of torch.compile
        largest = f" of at most {_LARGEST_SCALE:.1e}, float32's largest" if math.isfinite(scale) else ""
        raise ValueError(f"scale must be a finite number{largest}, got {scale}")
    if type(dropout_p) is not float:
        dropout_p = as_number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be a probability in [0, 1], got {dropout_p}")

    call = Call(q, k, v, pos_weight, gate, None, rows, columns, scale, dropout_p)
    chosen = select_backend(call, backend)
    if q.device.type in chosen.kernel_devices and not _traced(chosen, q.dtype):
        if call.has_dropout:
            call = call._replace(seed=torch.randint(-(2**63), 2**63 - 1, (1,), device=q.device))
        return attention(call, chosen)
    assert chosen.compose is not None, f"backend {chosen.name!r} has no kernels for {q.device.type}"
    if are_distributed(q, k, v, pos_weight, gate):
        return on_shards(lambda call: gpsa_attention(*call[:5], grid_size, scale=scale, backend=chosen.name), call)
    q, k, v = autocast_inputs(q, k, v)
    if not chosen.all_derivatives:
        q, k, v, pos_weight, gate = first_order(q, k, v, pos_weight, gate)
    with without_autocast(q.device.type):
        return chosen.compose(Call(q, k, v, pos_weight, gate, None, rows, columns, scale, dropout_p))


def _traced(backend: Backend, dtype: torch.dtype) -> bool:
    """Whether a compiler is at work that does better with plain PyTorch than with an opaque operator."""
    if torch.compiler.is_compiling():
        # torch 2.11 compiles its float64 CPU flash attention to a call whose dtypes do not match
        return backend.compose is not None and dtype != torch.float64
    if torch._C._is_tracing() and torch.onnx.is_in_onnx_export():
        raise RuntimeError('torch.onnx.export(dynamo=False) takes backend="eager" only; dynamo=True takes every other')
    return False


def select_backend(call: Call, name: str = "auto") -> Backend:
    """The backend that :func:`gpsa_attention` uses for a call; raises as it does where one asked for by name cannot."""
    if name == "auto":
        return choose(call)
    check_backend(name)
    chosen = BACKENDS[name]
    reason = chosen.unavailable() or chosen.unsupported(call)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run this call: {reason}")
    return chosen
