"""csrc/register.cpp on CPU tensors, beside what tests/kernels shows of it: what it copies, casts and refuses."""

import ctypes
import re

import emulation
import pytest
import torch
from torch import Tensor

from gpsa_kernels.backends import cuda
from gpsa_kernels.backends.base import Call, Saved


def tensors(count: int, dim: int = 8) -> tuple[Tensor, ...]:
    """Views of one projection's result, and so in rows of (B, N, H, D)."""
    return torch.randn(2, 12, count, 2, dim).bfloat16().permute(2, 0, 3, 1, 4).unbind()


UNREADABLE = {
    "an odd first element": lambda: tensors(4, 16)[0][..., 4:12],
    "rows of an odd length": lambda: tensors(4, 12)[0][..., :8],
    "channels apart": lambda: tensors(4)[0].mT.contiguous().mT,
    "one row for all": lambda: tensors(4)[0][:, :, :1, :1].expand(2, 2, 12, 8),
}


def step(call: Call, grad_out: Tensor) -> tuple[list[Tensor], list[bool]]:
    """The result and all gradients; whether q, k, v, pos_weight, gate and grad_out were read where they lie."""
    given = (ctypes.c_void_p * 6).in_dll(emulation.operators(), "given")
    addresses = [t.data_ptr() for t in (*call[:5], grad_out)]
    out, *saved = cuda.forward(call, True)
    in_place = [a == b for a, b in zip(given, addresses, strict=True)]
    grads = cuda.backward(grad_out, call, Saved(*saved))
    assert [a == b for a, b in zip(given[:5], addresses, strict=False)] == in_place[:5]
    return [out, *grads], [*in_place[:5], given[5] == addresses[5]]


@pytest.mark.parametrize("row_blocks", [0, -1], ids=["tiled", "whole image"])
@pytest.mark.parametrize("odd", [None, *UNREADABLE])
def test_only_what_cannot_be_read_as_it_lies_is_copied(odd, row_blocks):
    q, k, v, grad_out = (UNREADABLE[odd]() for _ in range(4)) if odd else tensors(4)
    call = Call(q, k, v, torch.randn(2, 3), torch.randn(2), torch.tensor([7]), 3, 4, 0.5, 0.25)
    with emulation.using(row_blocks=row_blocks):
        results, in_place = step(call, grad_out)
        readable = call._replace(q=q.contiguous(), k=k.contiguous(), v=v.contiguous())
        expected, _ = step(readable, grad_out.contiguous())
    assert in_place == [not odd] * 3 + [True] * 2 + [not odd]
    assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize("dtypes", ["bfloat16 bfloat16", "float16 float32", "float64 bfloat16", "float32 float16"])
def test_gradients_of_parameters_are_theirs_in_float32_rounded_once(dtypes):
    of_weights, of_gates = (getattr(torch, dtype) for dtype in dtypes.split())
    q, k, v, grad_out = tensors(4)
    pos_weight, gate = torch.randn(3, 2, dtype=of_weights).T, torch.randn(2).to(of_gates)
    call = Call(q, k, v, pos_weight, gate, None, 3, 4, 0.5, 0.0)
    with emulation.using():
        results, in_place = step(call, grad_out)
        expected, _ = step(call._replace(pos_weight=pos_weight.float().contiguous(), gate=gate.float()), grad_out)
    assert in_place == [True] * 3 + [False, of_gates == torch.float32, True]
    for like, got, exact in zip((pos_weight, gate), results[4:], expected[4:], strict=True):
        assert got.is_contiguous()
        assert got.dtype == like.dtype
        assert torch.equal(got, exact.to(like.dtype))


# what a kernel would do damage with: arguments of both operators, then of either
TOKENS, OTHER_TOKENS = torch.zeros(2, 3, 6, 8).half(), torch.zeros(2, 3, 6, 8).bfloat16()
REFUSED = [
    ({"q": TOKENS[0]}, "q must have 4 dimensions, got 3"),
    ({"q": TOKENS.float()}, "q must be float16 or bfloat16"),
    ({"rows": 3}, "rows * columns must be the 6 tokens of q, got 3 * 3"),
    ({"rows": -2, "columns": -3}, "rows * columns must be the 6 tokens of q, got -2 * -3"),
    ({"k": OTHER_TOKENS}, "k must have q's dtype"),
    ({"k": TOKENS[:1]}, "k must have q's size 2 in dimension 0, got 1"),
    ({"v": TOKENS[:, :, :5]}, "v must have q's size 6 in dimension 2, got 5"),
    ({"v": TOKENS[0]}, "v must have 4 dimensions, got 3"),
    ({"pos_weight": torch.zeros(3, 2)}, "pos_weight must have 9 elements, got 6"),
    ({"gate": torch.zeros(2)}, "gate must have 3 elements, got 2"),
    ({"gate": torch.zeros(3, device="meta")}, "gate must be on q's device"),
    ({"dropout_p": 0.5}, "dropout needs a seed"),
    ({"dropout_p": 0.5, "seed": torch.zeros(1)}, "seed must be one int64"),
    ({"dropout_p": 0.5, "seed": torch.zeros(1, device="meta").long()}, "seed must be on q's device"),
    ({"grad_out": OTHER_TOKENS}, "grad_out must have q's dtype"),
    ({"grad_out": TOKENS[:1]}, "grad_out must have q's size 2 in dimension 0, got 1"),
    ({"logsumexp": torch.zeros(2, 3, 5)}, "logsumexp must have 36 elements, got 30"),
]


@pytest.mark.parametrize(("changed", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_would_do_damage_is_refused(changed, message):
    given = Call(TOKENS, TOKENS, TOKENS, torch.zeros(3, 3), torch.zeros(3), None, 2, 3, 1.0, 0.0)._asdict()
    backward = {"grad_out": TOKENS, "content": None, "logsumexp": torch.zeros(2, 3, 6)}
    with emulation.using():
        if not changed.keys() & backward.keys():
            with pytest.raises(RuntimeError, match=re.escape(message)):
                torch.ops.gpsa_cuda.forward(**given | {"save": True} | changed)
        with pytest.raises(RuntimeError, match=re.escape(message)):
            torch.ops.gpsa_cuda.backward(**given | backward | changed)
