"""torch's scaled_dot_product_attention for the content, the separable product for the position.

Runs on any device and compiles nothing. On the CPU in eager mode :func:`forward` and :func:`backward` call torch's
flash attention directly and write the gradients in closed form, which saves the passes over memory that autograd would
spend on the blend. Everywhere else, and under a compiler, it is plain PyTorch (:func:`compose`).

The rows of both maps sum to one: what the tokens of v have in common comes out as it went in, and no gradient depends
on it. For a call with gradients it is taken off first and put back last. Left in, it would cancel in differences of
sums, but for their rounding, which is much the same for tokens that are alike and so adds up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpsa_kernels.backends.base import Backend, Call, Forward, Gradients, Saved, strided_channels
from gpsa_kernels.separable import axis_factors, axis_factors_backward, separable_product
from gpsa_kernels.tensors import accumulation_dtype, as_output, empty_output, known

_FEW_TOKENS = 16  # in a row shorter than a CPU's vector, torch's flash attention loses NaN
_WORKSPACE_ELEMENTS = 2**20  # 4 MiB of float32 a buffer, enough that Python does not show


def _factors_and_gate(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(call.q.dtype)
    ax, ay = axis_factors(call.pos_weight.to(dtype), call.grid_size)
    return ax, ay, torch.sigmoid(call.gate.to(dtype))


def _in_common(v: Tensor) -> Tensor:
    """(B, H, 1, D): the v nearest to 0 of each channel where all are within a factor of two, so that no difference from
    it is rounded (Sterbenz's lemma); elsewhere 0."""
    low, high = torch.aminmax(v.detach(), dim=2, keepdim=True)
    return torch.where(high < 2 * low, low, torch.where(low > 2 * high, high, 0))


def _split(v: Tensor) -> tuple[Tensor, Tensor | None]:
    """v less what its tokens have in common, and that, None where it is nothing."""
    common = _in_common(v)
    return (v - common, common) if common.any() else (v, None)


def _content_map(call: Call) -> Tensor:
    dtype = accumulation_dtype(call.q.dtype)
    return (call.scale * (call.q.to(dtype) @ call.k.to(dtype).mT)).softmax(-1)


def compose(call: Call) -> Tensor:
    ax, ay, g = _factors_and_gate(call)
    v, common = call.v, None
    if torch.is_grad_enabled():
        common = _in_common(v)
        v = v - common
    if known(call.q.size(2) <= _FEW_TOKENS):
        content = _content_map(call) @ v.to(g.dtype)
    else:
        content = F.scaled_dot_product_attention(call.q, call.k, v, scale=call.scale).to(g.dtype)
    position = separable_product(ax, ay, v.to(g.dtype), call.grid_size)
    out = torch.lerp(content, position, g.view(-1, 1, 1))
    return as_output((out if common is None else out + common).to(call.q.dtype))


def _content(call: Call, v: Tensor) -> tuple[Tensor, Tensor]:
    """The content branch's output, and the logsumexp where the backward pass reads one."""
    if call.q.size(2) <= _FEW_TOKENS:
        content_map = _content_map(call)
        return (content_map @ v.to(content_map.dtype)).to(v.dtype), content_map.new_zeros(call.q.shape[:3])
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(call.q, call.k, v, scale=call.scale)


def _content_backward(
    grad_out: Tensor, call: Call, v: Tensor, content: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, computed in float32: in 16 bits torch's are slower than that on every CPU."""
    dtype = accumulation_dtype(call.q.dtype)
    q, k, v, grad_out, content = (t.to(dtype) for t in (call.q, call.k, v, grad_out, content))
    if q.size(2) > _FEW_TOKENS:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, q, k, v, content, logsumexp, 0.0, False, scale=call.scale
        )
    content_map = _content_map(call)
    grad_map = grad_out @ v.mT
    grad_scores = content_map * (grad_map - (content_map * grad_map).sum(-1, keepdim=True)) * call.scale
    return grad_scores @ k, grad_scores.mT @ q, content_map.mT @ grad_out


class _Buffer(NamedTuple):
    """Three views of one (H, N, n, D) buffer that holds n batch elements.

    In this order grid rows and grid columns are both the rows of a batch of matrices, with no copy between the two.
    """

    tokens: Tensor  # (n, H, N, D)
    rows: Tensor  # (H, R, C*n*D), to contract along the grid's rows
    columns: Tensor  # (H*R, C, n*D), to contract along the grid's columns


def _slices(call: Call, count: int) -> Iterator[tuple[slice, list[_Buffer]]]:
    """The batch in slices, each with ``count`` buffers for it, which lie in the same memory for every slice.

    However large the batch, no fresh page is touched after the first slice, which on the CPU costs more than the
    arithmetic done on it.
    """
    batch, heads, tokens, dim = call.q.shape
    per_element = heads * tokens * dim
    step = max(1, min(batch, _WORKSPACE_ELEMENTS // per_element))
    memory = call.q.new_empty((count, step * per_element), dtype=accumulation_dtype(call.q.dtype))
    for start in range(0, batch, step):
        size = min(step, batch - start)
        buffers = [
            _Buffer(
                flat.view(heads, tokens, size, dim).permute(2, 0, 1, 3),
                flat.view(heads, call.rows, call.columns * size * dim),
                flat.view(heads * call.rows, call.columns, size * dim),
            )
            for flat in memory[:, : size * per_element].unbind()
        ]
        yield slice(start, start + size), buffers


def _blend(content: Tensor, position: Tensor, share: Tensor, common: Tensor | None, out: Tensor) -> None:
    """out = content + share * (position - content) + common, in position's dtype; ``out`` may be ``content``."""
    same = content.dtype == position.dtype
    blended = torch.lerp(content.to(position.dtype), position, share, out=out if same else None)
    if common is not None:
        blended += common
    if not same:
        out.copy_(blended)


def forward(call: Call, save: bool) -> Forward:
    ax, ay, g = _factors_and_gate(call)
    v, common = _split(call.v) if save else (call.v, None)
    content, logsumexp = _content(call, v)
    content = as_output(content)
    out = empty_output(call.q) if save else content  # with no backward pass to come, blend in place
    share = g.view(-1, 1, 1)
    ax = ax.repeat_interleave(call.rows, dim=0)
    for part, (x, y) in _slices(call, count=2):
        x.tokens.copy_(v[part])
        torch.bmm(ay, x.rows, out=y.rows)
        torch.bmm(ax, y.columns, out=x.columns)
        _blend(content[part], x.tokens, share, None if common is None else common[part], out=out[part])
    return Forward(out, content, logsumexp.contiguous()) if save else Forward(out, None, None)


def backward(grad_out: Tensor, call: Call, saved: Saved) -> Gradients:
    ax, ay, g = _factors_and_gate(call)
    share = g.view(-1, 1, 1)
    content, logsumexp = saved
    assert content is not None, "forward fills it"

    # Flash attention's gradients are linear in the one it is given, so its share of dO is applied to its results:
    # in place, where a scaled copy of dO would be a new tensor.
    v, _ = _split(call.v)
    grad_q, grad_k, grad_v = map(as_output, _content_backward(grad_out, call, v, content, logsumexp))
    grad_q.mul_(1 - share)
    grad_k.mul_(1 - share)

    # O_pos = Ax (Ay V), and back along the same two contractions, unscaled
    ax_backward, ay_backward = ax.transpose(1, 2).repeat_interleave(call.rows, dim=0), ay.transpose(1, 2)
    grad_ax, grad_ay = torch.zeros_like(ax_backward), torch.zeros_like(ay)
    along_content = torch.zeros_like(g)
    for part, (x, y, z) in _slices(call, count=3):
        x.tokens.copy_(v[part])
        z.tokens.copy_(grad_out[part])
        torch.bmm(ay, x.rows, out=y.rows)
        grad_ax.baddbmm_(z.columns, y.columns.transpose(1, 2))
        torch.bmm(ax_backward, z.columns, out=y.columns)
        grad_ay.baddbmm_(y.rows, x.rows.transpose(1, 2))
        torch.bmm(ay_backward, y.rows, out=x.rows)
        _blend(grad_v[part], x.tokens, share, None, out=grad_v[part])
        z.tokens.mul_(content[part])
        along_content += z.rows.sum((1, 2))

    # gate: sum of dO . (O_pos - O_content), the first half of it read off Ax and its gradient
    grad_ax = grad_ax.view(-1, call.rows, *ax.shape[1:]).sum(1)
    along_position = (ax * grad_ax).sum((1, 2))
    grad_gate = g * (1 - g) * (along_position - along_content)
    grad_pos_weight = axis_factors_backward(ax, ay, share * grad_ax, share * grad_ay)
    grads = (grad_q, grad_k, grad_v, grad_pos_weight, grad_gate)
    return Gradients(*(grad.to(t.dtype) for grad, t in zip(grads, call[:5], strict=True)))


def unsupported(call: Call) -> str | None:
    if call.has_dropout:
        return (
            "attention dropout needs one mask over both branches, "
            "and scaled_dot_product_attention keeps its mask to itself"
        )
    return strided_channels(call)


BACKEND = Backend(
    name="sdpa",
    unavailable=lambda: None,
    unsupported=unsupported,
    compose=compose,
    forward=forward,
    backward=backward,
    kernel_devices=frozenset({"cpu"}),
)
