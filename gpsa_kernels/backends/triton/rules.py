"""Which form and which launch a call gets: rules over the table in ``table.py``, no search at run time."""

from __future__ import annotations

from gpsa_kernels.backends.base import Call
from gpsa_kernels.backends.triton.table import ATTENTION, POSITIONAL, Launch, PositionalLaunch

# the most columns that a slab of the positional kernels has a launch for
_LONGEST_SLAB = {width: max(columns for w, columns in POSITIONAL if w == width) for width, _ in POSITIONAL}


def padded(size: int) -> int:
    """The power of two, at least 16 for a matrix product, that holds ``size``."""
    return max(16, 1 << (size - 1).bit_length())


def head_parts(head_dim: int, kernel: str) -> tuple[int, ...]:
    """The one or two widths, powers of two, in which a tile holds ``head_dim`` channels: 48 is (32, 16).

    64 and more are two halves where that saves registers: where the weights' rows are queries.
    """
    whole = padded(head_dim)
    rest = padded(head_dim - whole // 2)
    split = rest < whole // 2 or (whole > 32 and kernel != "backward_key")
    return (whole // 2, rest) if split else (whole,)


def _width(call: Call) -> str:
    return "half" if call.q.element_size() == 2 else "float32"


def position_form(call: Call) -> str:
    """How the positional branch is computed: in "rows", "slabs" or "dense", which docs/triton.md tells apart.

    Dense are very long grids, too: a slab holds all columns, and squared offsets along the rows must fit 16 bits.
    """
    if call.has_dropout or call.columns > _LONGEST_SLAB[_width(call)] or call.rows > 256:
        return "dense"
    return "rows" if call.columns <= 16 and call.rows * call.columns <= 256 else "slabs"


def launch_class(element_size: int, form: str, capability: int) -> str:
    """The row of the launch table: by matrix instruction; one for all architectures where other work decides.

    A dense positional map, with its gathers and random numbers, wants more registers for an entry; float32 products
    ("ieee") run without tensor cores.
    """
    if element_size > 2:
        return "float32"
    if form == "dense":
        return "dense"
    return {9: "wgmma", 10: "tcgen05"}.get(capability // 10, "mma")


def attention_launch(kernel: str, call: Call, capability: int) -> Launch:
    """The launch of "forward", "backward_query" or "backward_key"; ``capability`` is 80 for sm_80."""
    row = launch_class(call.q.element_size(), position_form(call), capability)
    return ATTENTION[row, kernel, max(32, padded(call.q.size(3)))]


def positional_launch(call: Call) -> PositionalLaunch:
    """The launch of the separable product and its gradient."""
    return POSITIONAL[_width(call), padded(call.columns)]
