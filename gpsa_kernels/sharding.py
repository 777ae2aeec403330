"""DTensors: each rank runs the operator on its own shard of the batch or of the heads, in which it is local.

``torch.distributed.tensor``, which not every build of torch has, is loaded by whoever makes a DTensor, never by us.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpsa_kernels.backends import Call

_TENSORS = 5  # of a call: q, k, v, pos_weight, gate
_BATCH, _HEADS = 0, 1


def are_distributed(*tensors: Tensor) -> bool:
    """Whether any of these is a DTensor. A compiler sees through DTensors by itself."""
    if torch.compiler.is_compiling():
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(t, module.DTensor) for t in tensors)


def on_shards(run: Callable[[Call], Tensor], call: Call) -> Tensor:
    """``run(call)`` of DTensors, as a DTensor: ``run`` is given each rank's shards as plain tensors.

    Along each dimension of the mesh the batch is sharded where q, k or v comes so, the heads where anything does and
    they divide; else everything is gathered. With the batch sharded each rank's gradients of ``pos_weight`` and
    ``gate`` are partial sums. Raises where some of the tensors are no DTensors or on another mesh, and with dropout.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    tensors: dict[str, Any] = dict(zip(Call._fields, call[:_TENSORS], strict=False))
    for name, t in tensors.items():
        if not isinstance(t, DTensor):
            raise TypeError(f"{name} must be a DTensor, as another is, got {type(t).__name__}")
    mesh = tensors["q"].device_mesh
    for name, t in tensors.items():
        if t.device_mesh != mesh:
            raise ValueError(f"{name} must be on q's mesh {mesh}, got {t.device_mesh}")
    if call.has_dropout:
        raise RuntimeError(f"dropout_p must be 0 for DTensors, whose shards cannot share a mask, got {call.dropout_p}")

    _, heads, tokens, head_dim = call.q.shape
    split: list[int | None] = []
    whole = heads  # on each rank
    for size, *placements in zip(mesh.shape, *(t.placements for t in tensors.values()), strict=True):
        if Shard(_BATCH) in placements[:3]:
            split.append(_BATCH)
        elif (Shard(_HEADS) in placements[:3] or Shard(0) in placements[3:]) and whole % size == 0:
            split.append(_HEADS)
            whole //= size
        else:
            split.append(None)
    of_calls = [Replicate() if dim is None else Shard(dim) for dim in split]
    of_heads = [Shard(0) if dim == _HEADS else Replicate() for dim in split]
    sums = [Partial() if dim == _BATCH else placement for dim, placement in zip(split, of_heads, strict=True)]
    wanted = [(of_calls, of_calls)] * 3 + [(of_heads, sums)] * 2
    shards = [
        t.redistribute(placements=placements).to_local(grad_placements=gradients)
        for t, (placements, gradients) in zip(tensors.values(), wanted, strict=True)
    ]
    out = run(Call(*shards, *call[_TENSORS:]))
    stride = (tokens * heads * head_dim, head_dim, heads * head_dim, 1)  # of tensors.empty_output
    return DTensor.from_local(out, mesh, of_calls, run_check=False, shape=call.q.shape, stride=stride)
