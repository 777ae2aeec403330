"""The behaviour of the kernels, one suite for all of them: what runs it is a parameter, the target.

On a GPU the targets are the backends that have kernels for it. Without one they are the CUDA kernels on their emulator,
and with ``TRITON_INTERPRET=1`` Triton's in its interpreter: Triton reads the variable when it is imported, so one
process either interprets or compiles. Of what is said about numbers the backends in plain PyTorch are targets, too.
"""

import math
from itertools import chain, product
from typing import NamedTuple

import emulation
import pytest
import torch
from reference import SEED, assert_as_exact_as_eager, assert_what_backward_reads_is_exact, attention, inputs

from gpsa_kernels import BACKENDS, gpsa_attention
from gpsa_kernels.backends import cuda
from gpsa_kernels.backends.triton import INTERPRETED
from gpsa_kernels.check.exactness import kept_by_dropout

Shape = tuple[int, int, tuple[int, int], int]  # batch, heads, grid_size, head_dim


class Target(NamedTuple):
    """A backend with kernels, a device they run on, and what is asked of them there.

    Attributes:
        grids: of one tile and of several, with short axes and with long ones.
        shapes: the tokens that its tiles divide badly; every head_dim and every form of the position that it has.
        inference_shapes: of calls without gradients, where they run other kernels.
        dropout_shapes: of both, with attention dropout.
    """

    backend: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    grids: list[tuple[int, int]]
    shapes: list[Shape]
    inference_shapes: list[Shape]
    dropout_shapes: list[Shape]

    @property
    def widest(self):
        """The dtype in which it computes most exactly."""
        return self.dtypes[0]

    def given(self, batch, heads, grid_size, head_dim, dtype):
        """Inputs of a shape and dtype on the target's device, and a gradient of the output."""
        tensors = [t.detach().to(self.device) for t in inputs(batch, heads, grid_size, head_dim, dtype)]
        return tensors, torch.randn(tensors[0].shape).to(self.device, dtype)

    def run(self, tensors, grad_out, grid_size, **kwargs):
        """[out, dq, dk, dv, d pos_weight, d gate], the inputs' strides kept; to merge out's heads is a view."""
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = gpsa_attention(*leaves, grid_size, backend=self.backend, **kwargs)
        assert out.transpose(1, 2).is_contiguous()
        return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]

    def check(self, tensors, grid_size, scale=None, dropout_p=0.0, saved=False, **kwargs):
        """Holds a result and all gradients to the rule of exactness; with ``saved`` what backward reads, too."""
        q, settings, mask, seed = tensors[0], {"backend": self.backend}, None, None
        if dropout_p:
            settings["dropout_p"] = dropout_p
            mask = kept_by_dropout(attention, *q.shape[:2], grid_size, q.dtype, self.device, **settings)
        settings |= {"device": self.device, "scale": scale, "mask": mask, **kwargs}
        assert_as_exact_as_eager(attention, tensors, grid_size, **settings)
        if saved and self.backend not in _PLAIN:
            if dropout_p:
                torch.manual_seed(SEED)  # as attention() and then gpsa_attention() draw it
                seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=self.device)
            there = [t.detach().to(self.device) for t in tensors]
            scale = q.size(-1) ** -0.5 if scale is None else scale
            kept = torch.ops.gpsa.attention_forward(*there, seed, *grid_size, scale, dropout_p, self.backend, True)
            assert_what_backward_reads_is_exact(*kept[1:], tensors, grid_size, scale, mask, dropout_p)


# fmt: off
_TRITON = {
    "grids": [(3, 6), (2, 17)],
    "shapes": [
        (1, 2, (1, 1), 8), (2, 1, (3, 5), 16), (1, 1, (1, 16), 40), (1, 2, (17, 1), 8), (1, 1, (9, 7), 48),
        (1, 1, (8, 8), 128), (1, 1, (5, 13), 64), (1, 1, (14, 14), 48), (1, 1, (197, 1), 32), (1, 2, (2, 17), 48),
        (1, 1, (17, 16), 24), (1, 1, (1, 65), 8), (1, 1, (1, 130), 16), (1, 1, (258, 1), 8),
    ],
    "inference_shapes": [(1, 2, (3, 5), 16)],
    "dropout_shapes": [(2, 2, (5, 13), 72), (1, 1, (1, 1), 8)],
}
_WHOLE_IMAGE = {
    "grids": [(3, 6), (2, 16), (16, 2)],
    "shapes": [
        (1, 2, (1, 1), 8), (2, 1, (3, 5), 16), (1, 1, (1, 16), 40), (1, 2, (16, 1), 24), (1, 1, (9, 7), 48),
        (2, 2, (8, 8), 32), (1, 1, (5, 13), 64), (1, 2, (14, 14), 48), (1, 1, (14, 14), 64), (1, 1, (16, 13), 56),
        (1, 1, (15, 16), 32), (1, 1, (16, 16), 48), (1, 1, (16, 16), 64),
    ],
    "inference_shapes": [
        (1, 1, (8, 8), 128), (1, 1, (13, 5), 72), (1, 1, (1, 197), 128), (1, 1, (197, 1), 32), (1, 1, (32, 8), 64),
        (1, 1, (4, 64), 56), (1, 1, (16, 16), 104),
    ],
    "dropout_shapes": [
        (1, 1, (1, 1), 8), (2, 2, (3, 6), 16), (1, 1, (1, 17), 40), (1, 1, (17, 3), 64), (1, 2, (14, 14), 48),
        (1, 1, (32, 8), 32), (1, 1, (9, 13), 24), (1, 1, (13, 9), 64), (1, 1, (16, 14), 48), (1, 1, (15, 17), 56),
    ],
}
_TILED = {
    "grids": [(5, 14), (2, 67), (67, 2)],
    "shapes": [
        (1, 2, (1, 1), 8), (2, 1, (3, 5), 40), (1, 1, (13, 5), 64), (1, 2, (8, 8), 128), (2, 1, (7, 50), 32),
        (1, 1, (257, 1), 48), (1, 1, (1, 300), 96), (1, 1, (300, 1), 64), (1, 1, (18, 21), 128), (1, 1, (24, 24), 48),
    ],
    "inference_shapes": [(1, 1, (13, 5), 64)],
    "dropout_shapes": [
        (2, 2, (5, 14), 16), (1, 2, (9, 21), 48), (1, 1, (1, 70), 128), (1, 1, (67, 1), 64), (1, 1, (13, 24), 40),
    ],
}
_ANY_HEAD_DIM = {
    "grids": [(3, 6), (2, 17)],
    "shapes": [
        *((2, 2, grid_size, 16) for grid_size in ((1, 1), (1, 2), (7, 9), (8, 8), (13, 5), (1, 197), (197, 1))),
        *((1, 2, (4, 6), head_dim) for head_dim in (1, 5, 24, 40, 64, 72, 128)),
        (7, 3, (3, 5), 8), (2, 9, (14, 14), 48),
    ],
    "inference_shapes": [(1, 2, (3, 5), 16), (1, 2, (5, 13), 5)],
}
# fmt: on
_ALL = {name: list(dict.fromkeys(chain(*(one[name] for one in (_TRITON, _WHOLE_IMAGE, _TILED))))) for name in _TRITON}
# of each form of Triton's position and of each family of the CUDA kernels; and with dropout
_SMOKE = {(1, 1, (14, 14), 48), (1, 1, (17, 16), 24), (1, 1, (1, 130), 16), (2, 2, (5, 13), 72)}

_HALVES = (torch.float16, torch.bfloat16)
_GPU_DTYPES = {"triton": (torch.float32, *_HALVES), "cuda": _HALVES}
_PLAIN = {"eager": [(2, 2, (5, 13), 72), (1, 1, (1, 1), 8)], "sdpa": []}  # and the shapes that they run with dropout
_EMULATED = {"emulated-whole-image": _WHOLE_IMAGE, "emulated-tiled": _TILED}


def _targets() -> list[Target]:
    if INTERPRETED:  # float64 for exact gradient checks; its bfloat16 is wrong
        return [Target("triton", "cpu", (torch.float64, torch.float32, torch.float16), **_TRITON)]
    names = [name for name in _GPU_DTYPES if BACKENDS[name].unavailable() is None]
    on_gpu = [Target(name, "cuda", _GPU_DTYPES[name], **_ALL) for name in names]
    return on_gpu or [Target(name, "cpu", _HALVES, **cases) for name, cases in _EMULATED.items()]


TARGETS = _targets()
_EVERY = (torch.float64, torch.float32, *_HALVES)
PLAIN = [
    Target(name, "cpu", _EVERY, **_ANY_HEAD_DIM, dropout_shapes=shapes)
    for name, shapes in _PLAIN.items()
    if TARGETS[0].backend in _EMULATED
]
_VARIED = {name[:-1]: name for name in ("dtypes", *_TRITON)}


def pytest_generate_tests(metafunc):
    """Every target, with each of its dtypes, grids or shapes where a test asks for one."""
    names = [name for name in _VARIED if name in metafunc.fixturenames]
    cases = []
    plain = {"test_kernel_numerics": PLAIN, "test_kernel_dropout": [t for t in PLAIN if t.dropout_shapes]}
    for target in TARGETS + plain.get(metafunc.module.__name__, []):
        for values in product(*(getattr(target, _VARIED[name]) for name in names)):
            label = "-".join([target.backend, *(str(value).removeprefix("torch.") for value in values)])
            marks = [pytest.mark.smoke] if _SMOKE.intersection(values) else []
            cases.append(pytest.param(target, *values, id=label, marks=marks))
    metafunc.parametrize(("target", *names), cases)


@pytest.fixture(autouse=True)
def _emulated(request, target):
    """The emulated kernels as a backend, for grids that the target is about."""
    if target.backend not in _EMULATED:
        yield
        return
    tiled = target.backend == "emulated-tiled"
    if not tiled and math.prod(request.node.callspec.params.get("grid_size", (1, 1))) > cuda._WHOLE_IMAGE_TOKENS:
        pytest.skip("the whole-image kernels serve images of up to 256 tokens")
    with emulation.using(name=target.backend, **{"row_blocks": 0} if tiled else {}):
        yield
