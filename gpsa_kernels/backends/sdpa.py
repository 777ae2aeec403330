"""torch's scaled_dot_product_attention for the content, the separable product for the position.

Runs on any device and compiles nothing. On the CPU in eager mode :func:`forward` and :func:`backward` call torch's
flash attention directly and write the gradients in closed form, which saves the passes over memory that autograd would
spend on the blend. Everywhere else, and under a compiler, it is plain PyTorch (:func:`compose`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpsa_kernels.backends.base import Backend, Call, Forward, Gradients, Saved, strided_channels
from gpsa_kernels.separable import axis_factors, axis_factors_backward, separable_product
from gpsa_kernels.tensors import accumulation_dtype, as_output, empty_output

_WORKSPACE_ELEMENTS = 2**20  # 4 MiB of float32 a buffer, enough that Python does not show


def _factors_and_gate(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(call.q.dtype)
    ax, ay = axis_factors(call.pos_weight.to(dtype), call.grid_size)
    return ax, ay, torch.sigmoid(call.gate.to(dtype))


def compose(call: Call) -> Tensor:
    ax, ay, g = _factors_and_gate(call)
    content = F.scaled_dot_product_attention(call.q, call.k, call.v, scale=call.scale).to(g.dtype)
    position = separable_product(ax, ay, call.v.to(g.dtype), call.grid_size)
    return as_output(torch.lerp(content, position, g.view(-1, 1, 1)).to(call.q.dtype))


class _Buffer(NamedTuple):
    """Three views of one (H, N, n, D) buffer that holds n batch elements.

    In this order grid rows and grid columns are both the rows of a batch of matrices, with no copy between the two.
    """

    tokens: Tensor  # (n, H, N, D)
    rows: Tensor  # (H, R, C*n*D), to contract along the grid's rows
    columns: Tensor  # (H*R, C, n*D), to contract along the grid's columns


class _Workspace:
    """Buffers for a slice of the batch, used again for every slice.

    However large the batch, no fresh page is touched after the first slice, which on the CPU costs more than the
    arithmetic done on it.
    """

    def __init__(self, q: Tensor, grid_size: tuple[int, int], count: int) -> None:
        batch, self.heads, self.tokens, self.dim = q.shape
        self.grid_size = grid_size
        per_element = self.heads * self.tokens * self.dim
        step = max(1, min(batch, _WORKSPACE_ELEMENTS // per_element))
        self.batches = [slice(start, min(start + step, batch)) for start in range(0, batch, step)]
        self._flat = q.new_empty((count, step * per_element), dtype=accumulation_dtype(q.dtype)).unbind()

    def buffers(self, part: slice) -> list[_Buffer]:
        (rows, columns), size = self.grid_size, part.stop - part.start
        views = []
        for flat in self._flat:
            flat = flat[: self.heads * self.tokens * size * self.dim]
            views.append(
                _Buffer(
                    flat.view(self.heads, self.tokens, size, self.dim).permute(2, 0, 1, 3),
                    flat.view(self.heads, rows, columns * size * self.dim),
                    flat.view(self.heads * rows, columns, size * self.dim),
                )
            )
        return views


def _blend(content: Tensor, position: Tensor, share: Tensor, out: Tensor) -> None:
    """out = content + share * (position - content), in position's dtype; ``out`` may be ``content``."""
    if content.dtype == position.dtype:
        torch.lerp(content, position, share, out=out)
    else:
        out.copy_(torch.lerp(content.to(position.dtype), position, share))


def forward(call: Call, save: bool) -> Forward:
    ax, ay, g = _factors_and_gate(call)
    content, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        call.q, call.k, call.v, scale=call.scale
    )
    content = as_output(content)
    out = empty_output(call.q) if save else content  # with no backward pass to come, blend in place
    share = g.view(-1, 1, 1)
    ax = ax.repeat_interleave(call.rows, dim=0)
    workspace = _Workspace(call.q, call.grid_size, count=2)
    for part in workspace.batches:
        x, y = workspace.buffers(part)
        x.tokens.copy_(call.v[part])
        torch.bmm(ay, x.rows, out=y.rows)
        torch.bmm(ax, y.columns, out=x.columns)
        _blend(content[part], x.tokens, share, out=out[part])
    if not save:
        return Forward(out, None, None)
    return Forward(out, content, logsumexp.contiguous())


def backward(grad_out: Tensor, call: Call, saved: Saved) -> Gradients:
    ax, ay, g = _factors_and_gate(call)
    share = g.view(-1, 1, 1)
    content, _ = saved
    assert content is not None, "forward fills it"

    # Flash attention's gradients are linear in the one it is given, so its share of dO is applied to its results:
    # in place, where a scaled copy of dO would be a new tensor.
    grad_q, grad_k, grad_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, call.q, call.k, call.v, *saved, 0.0, False, scale=call.scale
    )
    grad_q, grad_k, grad_v = as_output(grad_q), as_output(grad_k), as_output(grad_v)
    grad_q.mul_((1 - share).to(grad_q.dtype))
    grad_k.mul_((1 - share).to(grad_k.dtype))

    # O_pos = Ax (Ay V), and back along the same two contractions, unscaled
    ax_backward, ay_backward = ax.transpose(1, 2).repeat_interleave(call.rows, dim=0), ay.transpose(1, 2)
    grad_ax, grad_ay = torch.zeros_like(ax_backward), torch.zeros_like(ay)
    along_content = torch.zeros_like(g)
    workspace = _Workspace(call.q, call.grid_size, count=3)
    for part in workspace.batches:
        x, y, z = workspace.buffers(part)
        x.tokens.copy_(call.v[part])
        z.tokens.copy_(grad_out[part])
        torch.bmm(ay, x.rows, out=y.rows)
        grad_ax.baddbmm_(z.columns, y.columns.transpose(1, 2))
        torch.bmm(ax_backward, z.columns, out=y.columns)
        grad_ay.baddbmm_(y.rows, x.rows.transpose(1, 2))
        torch.bmm(ay_backward, y.rows, out=x.rows)
        _blend(grad_v[part], x.tokens, share, out=grad_v[part])
        z.tokens.mul_(content[part])
        along_content += z.rows.sum((1, 2))

    # gate: sum of dO . (O_pos - O_content), the first half of it read off Ax and its gradient
    grad_ax = grad_ax.view(-1, call.rows, *ax.shape[1:]).sum(1)
    along_position = (ax * grad_ax).sum((1, 2))
    grad_gate = g * (1 - g) * (along_position - along_content)
    grad_pos_weight = axis_factors_backward(ax, ay, share * grad_ax, share * grad_ay)
    return Gradients(grad_q, grad_k, grad_v, grad_pos_weight.to(call.pos_weight.dtype), grad_gate.to(call.gate.dtype))


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
