"""The formula, literally: plain PyTorch that can be differentiated in every way PyTorch knows."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from gpsa_kernels.backends.base import Backend, Call
from gpsa_kernels.formula import attention_map
from gpsa_kernels.tensors import accumulation_dtype, as_output


def compose(call: Call) -> Tensor:
    dtype = accumulation_dtype(call.q.dtype)
    q, k, v = call.q.to(dtype), call.k.to(dtype), call.v.to(dtype)
    attention = attention_map(q, k, call.pos_weight, call.gate, call.grid_size, call.scale)
    return as_output((F.dropout(attention, call.dropout_p) @ v).to(call.q.dtype))


BACKEND = Backend(
    name="eager", unavailable=lambda: None, unsupported=lambda call: None, compose=compose, all_derivatives=True
)
