"""torch's counter of floating-point operations counts the registered operators."""

import subprocess
import sys

from reference import inputs
from torch.utils.flop_counter import FlopCounterMode

from gpsa_kernels import gpsa_attention
from gpsa_kernels.separable import axis_factors, separable_product


def test_flops_are_those_of_the_products_that_torch_counts():
    """Backward computes the scores and the product along the grid's rows again; autograd has them saved."""
    rows, columns = 2, 5
    q, k, v, pos_weight, gate = inputs(3, 2, (rows, columns), 7)
    ax, ay = (t.detach().requires_grad_() for t in axis_factors(pos_weight, (rows, columns)))
    with FlopCounterMode(display=False) as again:
        _ = q @ k.mT
        _ = ay @ v.detach().unflatten(2, (rows, columns)).flatten(3)
    with FlopCounterMode(display=False) as forward:
        content = (q @ k.mT).softmax(-1) @ v
        position = separable_product(ax, ay, v, (rows, columns))
    with FlopCounterMode(display=False) as backward:
        (content + position).sum().backward()

    with FlopCounterMode(display=False) as ours:
        out = gpsa_attention(q, k, v, pos_weight, gate, (rows, columns), backend="sdpa")
    assert ours.get_total_flops() == forward.get_total_flops() > 0
    with FlopCounterMode(display=False) as ours:
        out.sum().backward()
    assert ours.get_total_flops() == backward.get_total_flops() + again.get_total_flops()


def test_the_import_says_nothing_where_there_is_no_triton():
    command = "import sys; sys.modules['triton'] = None; import gpsa_kernels"
    assert subprocess.check_output([sys.executable, "-c", command], stderr=subprocess.STDOUT) == b""
