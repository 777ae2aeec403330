"""The kernels against the formula: awkward shapes, extreme values, any strides, nothing outside the tensors."""

from __future__ import annotations

import pytest
import torch
from fuzz import STRUCTURES
from reference import (
    NAMES,
    assert_a_small_share_keeps_its_digits,
    assert_as_exact_as_eager,
    assert_large_gradients_stay_finite,
    assert_what_backward_reads_is_exact,
    inputs,
    literal,
    with_gradients,
)

from gpsa_kernels import gpsa_attention


def check(tensors, grid_size, target, **kwargs):
    assert_as_exact_as_eager(gpsa_attention, tensors, grid_size, device=target.device, backend=target.backend, **kwargs)


def check_what_backward_reads(tensors, grid_size, target, scale):
    there = [t.detach().to(target.device) for t in tensors]
    settings = (None, *grid_size, scale, 0.0, target.backend, True)
    _, *saved = torch.ops.gpsa.attention_forward(*there, *settings)
    assert_what_backward_reads_is_exact(*saved, tensors, grid_size, scale)


def test_shapes(target, dtype, shape):
    *_, grid_size, head_dim = shape
    tensors = inputs(*shape, dtype)
    check(tensors, grid_size, target)
    check_what_backward_reads(tensors, grid_size, target, head_dim**-0.5)


def test_shapes_without_gradients(target, dtype, inference_shape):
    check(inputs(*inference_shape, dtype), inference_shape[2], target, gradients=False)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("head_dim", range(8, 129, 8))
def test_head_dims(target, head_dim, gradients):
    check(inputs(1, 1, (3, 4), head_dim, torch.float16), (3, 4), target, gradients=gradients)


@pytest.mark.parametrize("scale", [-0.7, 0.0, 2.0])
def test_scale(target, dtype, scale):
    grid_size = target.grids[0]
    tensors = inputs(1, 2, grid_size, 16, dtype)
    check(tensors, grid_size, target, scale=scale)
    check_what_backward_reads(tensors, grid_size, target, scale)


@pytest.mark.parametrize("logit", [100.0, 12.0, -12.0, -100.0])
def test_open_and_closed_gates(target, dtype, grid, logit):
    if dtype == torch.float64:
        pytest.skip("the formula itself, which takes 1 - g, is the less exact one here")
    *tensors, gate = inputs(1, 2, grid, 16, dtype)
    check([*tensors, torch.full_like(gate, logit)], grid, target)


@pytest.mark.parametrize("logit", [-5.0, -12.0, -100.0])
def test_large_gradients_stay_finite(target, grid, logit):
    assert_large_gradients_stay_finite(gpsa_attention, grid, logit, device=target.device, backend=target.backend)


def test_a_small_share_keeps_its_digits(target, grid):
    assert_a_small_share_keeps_its_digits(gpsa_attention, grid, device=target.device, backend=target.backend)


@pytest.mark.parametrize("weight", [0.0, 3.0, -3.0, 30.0, -30.0])
def test_flat_and_steep_positions(target, dtype, grid, weight):
    q, k, v, pos_weight, gate = inputs(1, 2, grid, 16, dtype)
    check([q, k, v, torch.full_like(pos_weight, weight), gate], grid, target)


@pytest.mark.parametrize("factor", [30.0, 1e3])
def test_large_scores(target, dtype, factor):
    q, k, *rest = inputs(1, 2, target.grids[0], 16, dtype)
    tensors = [q * factor**0.5, k * factor**0.5, *rest]
    check(tensors, target.grids[0], target)
    check_what_backward_reads(tensors, target.grids[0], target, 0.25)


def test_scores_far_below_zero(target, dtype, grid):
    """exp(0 - logsumexp) of a key that does not exist is infinite."""
    q, k, *rest = inputs(1, 2, grid, 16, dtype)
    check([q + 9, k - 9, *rest], grid, target)


def test_a_first_tile_of_scores_of_minus_infinity(target):
    grid_size = (5, 26)
    q, k, *rest = (t.detach() for t in inputs(1, 1, grid_size, 16, torch.float16))
    q, k = q.abs() + 1, k.clone()
    k[:, :, :64] = -torch.inf
    there = [t.to(target.device) for t in (q, k, *rest)]
    out = gpsa_attention(*there, grid_size, backend=target.backend).cpu()
    expected = literal(*(t.double() for t in (q, k, *rest)), grid_size, 0.25)
    assert (out.double() - expected).abs().max() <= 4 * torch.finfo(torch.float16).eps * expected.abs().max()


@pytest.mark.parametrize("grid_size", [(520, 1)])
def test_squared_offsets_that_float16_cannot_hold(target, grid_size):
    """The first of 520 rows looks at itself and at the last alike, so that d/dw2 of its map is 519² / 4."""
    q, k, v, *_ = inputs(1, 1, grid_size, 8, torch.float16)
    pos_weight, gate = torch.tensor([[0.0, -519 / 64, 1 / 64]]), torch.zeros(1)
    grad_out = torch.randn(q.shape).half()
    there = [t.detach().to(target.device) for t in (q, k, v, pos_weight, gate)]
    found = with_gradients(gpsa_attention, there, grad_out.to(target.device), grid_size, backend=target.backend)
    doubles = [t.double() for t in (q, k, v, pos_weight, gate)]
    expected = with_gradients(literal, doubles, grad_out.double(), grid_size, 8**-0.5)
    half_the_digits = torch.finfo(torch.float16).eps ** 0.5
    for name, a, b in zip(NAMES, expected, found, strict=True):
        assert (b.cpu().double() - a).norm() < half_the_digits * a.norm(), name


def _poisoned(t: torch.Tensor) -> torch.Tensor:
    """The same values, with NaN between the tokens and around tokens and channels in memory."""
    batch, heads, tokens, dim = t.shape
    memory = t.new_full((batch, heads, 2 * tokens + 70, dim + 72), torch.nan)
    view = memory[:, :, 2 : 2 + 2 * tokens : 2, 8 : 8 + dim]
    view.copy_(t)
    return view


def _run(target, tensors, grad_out, grid_size):
    """[out, dq, dk, dv, d pos_weight, d gate], the inputs' strides kept."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = gpsa_attention(*leaves, grid_size, backend=target.backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


def _on_device(target, batch, heads, grid_size, head_dim, dtype):
    tensors = [t.detach().to(target.device) for t in inputs(batch, heads, grid_size, head_dim, dtype)]
    return tensors, torch.randn(tensors[0].shape, dtype=torch.float32).to(target.device, dtype)


@pytest.mark.parametrize(
    ("grid_size", "head_dim"), [((3, 5), 40), ((2, 17), 48), ((1, 130), 8), ((14, 14), 48)], ids=str
)
def test_nothing_outside_the_tensors_is_read_or_left_unwritten(target, widest, grid_size, head_dim):
    tensors, grad_out = _on_device(target, 1, 2, grid_size, head_dim, widest)
    clean = _run(target, tensors, grad_out, grid_size)
    tensors[:3] = map(_poisoned, tensors[:3])
    assert torch.empty(3, device=target.device).isnan().all(), "new memory is poisoned by a fixture of the whole suite"
    for name, a, b in zip(NAMES, clean, _run(target, tensors, _poisoned(grad_out), grid_size), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("grid_size", [(3, 5), (2, 17), (1, 130)], ids=str)
def test_any_strides(target, widest, grid_size):
    tensors, grad_out = _on_device(target, 2, 2, grid_size, 16, widest)
    packed = torch.stack([t.transpose(1, 2) for t in tensors[:3]], dim=2)  # (B, N, 3, H, D)
    views = [*packed.permute(2, 0, 3, 1, 4).unbind(), *tensors[3:]]
    token_first = grad_out.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    expected = _run(target, tensors, grad_out, grid_size)
    for name, a, b in zip(NAMES, expected, _run(target, views, token_first, grid_size), strict=True):
        assert torch.equal(a, b), name


def _odd(t: torch.Tensor, axis: int) -> torch.Tensor:
    """The same values; an axis' stride, or for 3 the first byte, is not at a multiple of 16 bytes."""
    if axis == 3:
        return torch.cat((t.new_zeros(3), t.flatten()))[3:].view(t.shape)
    return torch.nn.functional.pad(t.flatten(axis + 1), (0, 4))[..., :-4].unflatten(-1, t.shape[axis + 1 :])


@pytest.mark.parametrize("axis", range(4))
def test_rows_at_odd_addresses(target, widest, axis):
    grid_size = target.grids[0]
    tensors, grad_out = _on_device(target, 2, 2, grid_size, 16, widest)
    *odd, odd_grad = (_odd(t, axis) for t in (*tensors[:3], grad_out))
    assert odd[0].data_ptr() % 16 if axis == 3 else odd[0].stride(axis) % 8
    expected = _run(target, tensors, grad_out, grid_size)
    for name, a, b in zip(NAMES, expected, _run(target, [*odd, *tensors[3:]], odd_grad, grid_size), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("grid_size", [(3, 5), (2, 17), (1, 130)], ids=str)
def test_expanded_inputs_and_gradient(target, widest, grid_size):
    tensors, grad_out = _on_device(target, 2, 2, grid_size, 16, widest)
    tensors[1] = tensors[1][:, :1].expand_as(tensors[1])  # one head's keys for all heads
    tensors[2] = tensors[2][:1].expand_as(tensors[2])  # one image's values for the whole batch
    dense = [t.contiguous() for t in tensors]
    for one in (grad_out[:1, :1, :1], torch.ones((), dtype=widest, device=target.device)):
        expanded = one.expand_as(grad_out)
        expected = _run(target, dense, expanded.contiguous(), grid_size)
        for name, a, b in zip(NAMES, expected, _run(target, tensors, expanded, grid_size), strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("grid_size", [(3, 5), (2, 17), (1, 130)], ids=str)
def test_runs_are_bitwise_equal(target, widest, grid_size):
    tensors, grad_out = _on_device(target, 2, 2, grid_size, 16, widest)
    first = _run(target, tensors, grad_out, grid_size)
    assert all(map(torch.equal, first, _run(target, tensors, grad_out, grid_size)))


def test_nan_stays_in_its_batch_element(target, widest, grid):
    tensors, grad_out = _on_device(target, 3, 2, grid, 16, widest)
    clean = _run(target, tensors, grad_out, grid)
    for t in tensors[:3]:
        t[1] = torch.nan
    for name, a, b in zip(NAMES[:4], clean, _run(target, tensors, grad_out, grid), strict=False):
        assert b[1].isnan().all(), name
        assert torch.equal(a[::2], b[::2]), name


def test_one_nan_goes_where_the_formula_takes_it(target, widest, grid):
    """In one token's channel of q, k, v and grad_out, each in an image of its own."""
    tensors, grad_out = _on_device(target, 4, 2, grid, 16, widest)
    clean = _run(target, tensors, grad_out, grid)
    for image, t in enumerate((*tensors[:3], grad_out)):
        t[image, 0, 7, 5] = torch.nan
    doubles = [t.cpu().double() for t in (*tensors, grad_out)]
    expected = with_gradients(literal, doubles[:5], doubles[5], grid, 0.25)
    for name, a, b, before in zip(NAMES, expected, _run(target, tensors, grad_out, grid), clean, strict=True):
        assert a.isnan().any(), name
        assert torch.equal(a.isnan(), b.cpu().isnan()), name
        head = (slice(None), 1) if b.dim() == 4 else 1  # the other one, where nothing is NaN
        assert torch.equal(b[head], before[head]), name


@pytest.mark.parametrize("grid_size", [(1, 1), (1, 2), (2, 3), (3, 3)], ids=str)
def test_a_row_of_nan_stays_one_on_the_smallest_grids(target, dtype, grid_size):
    q, *rest = (t.detach().to(target.device) for t in inputs(1, 1, grid_size, 8, dtype))
    out = gpsa_attention(torch.full_like(q, torch.nan), *rest, grid_size, backend=target.backend)
    assert out.isnan().all()


@pytest.mark.parametrize("structure", ["constant", "far from zero", "two regions"])
def test_tokens_alike(target, dtype, structure):
    """Rounding that is the same for every token adds up, where any other walks."""
    grid_size = target.grids[0]
    *tensors, pos_weight, gate = inputs(1, 2, grid_size, 16, dtype)
    alike = [STRUCTURES[structure](t.detach()) for t in (*tensors, tensors[0].flip(2))]
    for which in ((0, 1, 2, 3), (2,), (1, 3)):
        q, k, v, grad_out = (alike[i] if i in which else t for i, t in enumerate((*tensors, tensors[0].detach())))
        check([q, k, v, pos_weight, gate], grid_size, target, grad_out=grad_out.detach())


def test_empty_batch(target, widest):
    tensors, grad_out = _on_device(target, 0, 2, (3, 5), 16, widest)
    out, *_, grad_pos_weight, grad_gate = _run(target, tensors, grad_out, (3, 5))
    assert out.shape == (0, 2, 15, 16)
    assert grad_pos_weight.eq(0).all()
    assert grad_gate.eq(0).all()


def test_merging_the_heads_is_a_view(target, dtype):
    tensors, _ = _on_device(target, 2, 3, (3, 5), 16, dtype)
    assert gpsa_attention(*tensors, (3, 5), backend=target.backend).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(("grid_size", "head_dim"), [((3, 2), 8), ((2, 17), 8), ((1, 130), 8)], ids=str)
def test_gradcheck(target, grid_size, head_dim):
    if torch.float64 not in target.dtypes:
        pytest.skip("these kernels do not compute in float64")
    tensors = inputs(1, 2, grid_size, head_dim)
    assert torch.autograd.gradcheck(
        lambda *t: gpsa_attention(*t, grid_size, backend=target.backend), tensors, fast_mode=True
    )


def test_every_gradient_in_float64(target):
    if torch.float64 not in target.dtypes:
        pytest.skip("these kernels do not compute in float64")
    check(inputs(2, 3, (4, 6), 24), (4, 6), target)


@pytest.mark.parametrize("frozen", range(5))
def test_one_frozen_input_changes_no_other_gradient(target, widest, frozen):
    tensors, grad_out = _on_device(target, 1, 2, (3, 5), 16, widest)
    expected = _run(target, tensors, grad_out, (3, 5))[1:]
    leaves = [t.detach().requires_grad_(i != frozen) for i, t in enumerate(tensors)]
    gpsa_attention(*leaves, (3, 5), backend=target.backend).backward(grad_out)
    for i, leaf in enumerate(leaves):
        if i == frozen:
            assert leaf.grad is None
        else:
            assert torch.equal(leaf.grad, expected[i]), NAMES[i + 1]


@pytest.mark.parametrize("other", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_parameters_of_another_dtype_keep_theirs(target, other):
    tensors, grad_out = _on_device(target, 1, 2, (3, 5), 16, torch.float16)
    tensors[3:] = [t.to(other) for t in tensors[3:]]
    results = _run(target, tensors, grad_out, (3, 5))
    assert [t.dtype for t in results] == [torch.float16] * 4 + [other] * 2


def test_inputs_are_left_alone(target, widest):
    tensors, grad_out = _on_device(target, 1, 2, (3, 5), 16, widest)
    copies = [t.clone() for t in (*tensors, grad_out)]
    _run(target, tensors, grad_out, (3, 5))
    assert all(map(torch.equal, copies, (*tensors, grad_out)))
