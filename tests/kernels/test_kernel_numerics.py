"""The kernels against the formula: awkward shapes, extreme values, any strides, nothing outside the tensors."""

from functools import partial

import pytest
import torch
from fuzz import STRUCTURES
from reference import NAMES, assert_same_bits, attention, inputs, literal, rounding_walks, with_gradients

from gpsa_kernels import gpsa_attention

GRIDS = [(3, 5), (2, 17), (1, 130)]


def test_shapes(target, dtype, shape):
    target.check(inputs(*shape, dtype), shape[2], saved=True)


def test_shapes_without_gradients(target, dtype, inference_shape):
    target.check(inputs(*inference_shape, dtype), inference_shape[2], gradients=False)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("head_dim", range(8, 129, 8))
def test_head_dims(target, head_dim, gradients):
    target.check(inputs(1, 1, (3, 4), head_dim, torch.float16), (3, 4), gradients=gradients)


@pytest.mark.parametrize("scale", [-0.7, 0.0, 2.0])
def test_scale(target, dtype, scale):
    target.check(inputs(1, 2, target.grids[0], 16, dtype), target.grids[0], scale, saved=True)


@pytest.mark.parametrize("factor", [30.0, 1e3])
def test_large_scores(target, dtype, factor):
    q, k, *rest = inputs(1, 2, target.grids[0], 16, dtype)
    target.check([q * factor**0.5, k * factor**0.5, *rest], target.grids[0], saved=True)


def test_scores_far_below_zero(target, dtype, grid):
    """exp(0 - logsumexp) of a key that does not exist is infinite."""
    if (target.backend, dtype) == ("sdpa", torch.float64):
        pytest.skip("the truth is rounded as much")
    q, k, *rest = inputs(1, 2, grid, 16, dtype)
    target.check([q + 9, k - 9, *rest], grid)


@pytest.mark.parametrize("logit", [100.0, 12.0, -12.0, -100.0])
def test_open_and_closed_gates(target, dtype, grid, logit):
    if dtype == torch.float64:
        pytest.skip("the formula itself, which takes 1 - g, is the less exact one here")
    *tensors, gate = inputs(1, 2, grid, 16, dtype)
    target.check([*tensors, torch.full_like(gate, logit)], grid)


@pytest.mark.parametrize("weight", [0.0, 3.0, -3.0, 30.0, -30.0])
def test_flat_and_steep_positions(target, dtype, grid, weight):
    q, k, v, pos_weight, gate = inputs(1, 2, grid, 16, dtype)
    target.check([q, k, v, torch.full_like(pos_weight, weight), gate], grid)


@pytest.mark.parametrize("logit", [-5.0, -12.0, -100.0])
def test_large_gradients_stay_finite(target, grid, logit):
    """Where (Ay x Ax)^T dO overflows in float16, but dV and all of eager's steps do not.

    The position looks at the corners of the grid alone, the content at all tokens alike.
    """
    q, k, v, pos_weight, gate = inputs(1, 2, grid, 16, torch.float16)
    tensors = [q, k, v / 64, torch.full_like(pos_weight, 3), torch.full_like(gate, logit)]
    target.check(tensors, grid, scale=0.01, loss_scale=15000)


def test_a_small_share_keeps_its_digits(target, grid):
    """At g = 2e-9, where g dO is 0 in float16, float32 parameters get gradients as exact as their terms in float16."""
    *tensors, gate = inputs(1, 2, grid, 16, torch.float16)
    tensors[3:] = tensors[3].detach().float(), torch.full_like(gate, -20, dtype=torch.float32)
    grad_out = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).half()
    truth = with_gradients(literal, [t.double() for t in tensors], grad_out.double(), grid, 0.25)
    there = [t.detach().to(target.device) for t in tensors]
    ours = target.run(there, grad_out.to(target.device), grid, scale=0.25)
    walks, eps = rounding_walks(tensors, grad_out, grid, 0.25), torch.finfo(torch.float16).eps
    for name, expected, got in list(zip(NAMES, truth, ours, strict=True))[4:]:
        error, allowed = (got.cpu().double() - expected).abs().max(), eps * (expected.abs().max() + walks[name])
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def test_a_first_tile_of_scores_of_minus_infinity(target):
    grid_size = (5, 26)
    (q, k, *rest), _ = target.given(1, 1, grid_size, 16, torch.float16)
    tensors = [q.abs() + 1, k, *rest]
    k[:, :, :64] = -torch.inf
    out = gpsa_attention(*tensors, grid_size, backend=target.backend).cpu()
    expected = literal(*(t.cpu().double() for t in tensors), grid_size, 0.25)
    assert (out.double() - expected).abs().max() <= 4 * torch.finfo(torch.float16).eps * expected.abs().max()


@pytest.mark.parametrize("grid_size", [(520, 1)])
def test_squared_offsets_that_float16_cannot_hold(target, grid_size):
    """The first of 520 rows looks at itself and at the last alike, so that d/dw2 of its map is 519² / 4."""
    (q, k, v, *_), grad_out = target.given(1, 1, grid_size, 8, torch.float16)
    tensors = [q, k, v, torch.tensor([[0.0, -519 / 64, 1 / 64]]).to(q.device), torch.zeros(1).to(q.device)]
    doubles = [t.cpu().double() for t in (*tensors, grad_out)]
    expected = with_gradients(literal, doubles[:5], doubles[5], grid_size, 8**-0.5)
    half_the_digits = torch.finfo(torch.float16).eps ** 0.5
    for name, a, b in zip(NAMES, expected, target.run(tensors, grad_out, grid_size), strict=True):
        assert (b.cpu().double() - a).norm() < half_the_digits * a.norm(), name


@pytest.mark.parametrize("structure", ["constant", "far from zero", "two regions"])
def test_tokens_alike(target, dtype, structure):
    """Rounding that is the same for every token adds up, where any other walks."""
    grid_size = target.grids[0]
    *tensors, pos_weight, gate = inputs(1, 2, grid_size, 16, dtype)
    alike = [STRUCTURES[structure](t.detach()) for t in (*tensors, tensors[0].flip(2))]
    for which in ((0, 1, 2, 3), (2,), (1, 3)):
        q, k, v, grad_out = (alike[i] if i in which else t for i, t in enumerate((*tensors, tensors[0].detach())))
        target.check([q, k, v, pos_weight, gate], grid_size, grad_out=grad_out.detach())


def surrounded(t):
    """The same values, with NaN between the tokens and around tokens and channels in memory."""
    batch, heads, tokens, dim = t.shape
    memory = t.new_full((batch, heads, 2 * tokens + 70, dim + 72), torch.nan)
    return memory[:, :, 2 : 2 + 2 * tokens : 2, 8 : 8 + dim].copy_(t)


def odd(axis, t):
    """The same values; an axis' stride, or for 3 the first byte, is not at a multiple of 16 bytes."""
    if axis == 3:
        return torch.cat((t.new_zeros(3), t.flatten()))[3:].view(t.shape)
    return torch.nn.functional.pad(t.flatten(axis + 1), (0, 4))[..., :-4].unflatten(-1, t.shape[axis + 1 :])


def packed(t):
    """The same values as one of three in (B, N, 3, H, D)."""
    return torch.stack([t.transpose(1, 2)] * 3, dim=2).permute(2, 0, 3, 1, 4)[1]


def tokens_first(t):
    return t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)


def shared(*axes):
    """The first along some axes, for all."""
    first = tuple(slice(1 if axis in axes else None) for axis in range(4))
    return lambda t: t[first].expand_as(t)


LAYOUTS = {  # of q, k, v and the gradient
    "packed": (packed, packed, packed, tokens_first),
    "surrounded": (surrounded,) * 4,
    "a row for all": (torch.clone, shared(1), shared(0), shared(0, 1, 2)),
    "a number for all": (torch.clone, shared(1), shared(0), shared(0, 1, 2, 3)),
    **{f"odd {axis}": (partial(odd, axis),) * 4 for axis in range(4)},
}
CASES = [(layout, (2, 2, grid, 16)) for layout in ("packed", "a row for all", "a number for all") for grid in GRIDS]
CASES += [("surrounded", (1, 2, *shape)) for shape in (((3, 5), 40), ((2, 17), 48), ((1, 130), 8), ((14, 14), 48))]
CASES += [(f"odd {axis}", (2, 2, (2, 17), 16)) for axis in range(4)]


@pytest.mark.parametrize(("layout", "sizes"), CASES, ids=str)
def test_layouts_change_no_bit(target, layout, sizes):
    """Nothing outside of the tensors is read, nothing of the results is left unwritten."""
    (*qkv, pos_weight, gate), grad_out = target.given(*sizes, target.widest)
    assert torch.empty(3, device=gate.device).isnan().all(), "new memory is poisoned by a fixture of the whole suite"
    *views, grad_view = (laid(t) for laid, t in zip(LAYOUTS[layout], (*qkv, grad_out), strict=True))
    assert any(view.stride() != t.stride() or view.data_ptr() % 16 for view, t in zip(views, qkv, strict=True))
    dense = [t.clone(memory_format=torch.contiguous_format) for t in views]
    expected = target.run([*dense, pos_weight, gate], grad_view.clone(memory_format=torch.contiguous_format), sizes[2])
    assert_same_bits(target.run([*views, pos_weight, gate], grad_view, sizes[2]), expected)


def test_nan_stays_in_its_batch_element(target, grid):
    tensors, grad_out = target.given(3, 2, grid, 16, target.widest)
    clean = target.run(tensors, grad_out, grid)
    for t in tensors[:3]:
        t[1] = torch.nan
    for name, a, b in zip(NAMES[:4], clean, target.run(tensors, grad_out, grid), strict=False):
        assert b[1].isnan().all(), name
        assert torch.equal(a[::2], b[::2]), name


def test_one_nan_goes_where_the_formula_takes_it(target, grid):
    """In one token's channel of q, k, v and grad_out, each in an image of its own."""
    tensors, grad_out = target.given(4, 2, grid, 16, target.widest)
    clean = target.run(tensors, grad_out, grid)
    for image, t in enumerate((*tensors[:3], grad_out)):
        t[image, 0, 7, 5] = torch.nan
    doubles = [t.cpu().double() for t in (*tensors, grad_out)]
    expected = with_gradients(literal, doubles[:5], doubles[5], grid, 0.25)
    for name, a, b, before in zip(NAMES, expected, target.run(tensors, grad_out, grid), clean, strict=True):
        assert a.isnan().any(), name
        assert torch.equal(a.isnan(), b.cpu().isnan()), name
        head = (slice(None), 1) if b.dim() == 4 else 1  # the other one, where nothing is NaN
        assert torch.equal(b[head], before[head]), name


@pytest.mark.parametrize("grid_size", [(1, 1), (1, 2), (2, 3), (3, 3)], ids=str)
def test_a_row_of_nan_stays_one_on_the_smallest_grids(target, dtype, grid_size):
    (q, *rest), _ = target.given(1, 1, grid_size, 8, dtype)
    out = gpsa_attention(torch.full_like(q, torch.nan), *rest, grid_size, backend=target.backend)
    assert out.isnan().all()


def test_empty_batch(target):
    out, *_, grad_pos_weight, grad_gate = target.run(*target.given(0, 2, (3, 5), 16, target.widest), (3, 5))
    assert out.shape == (0, 2, 15, 16)
    assert grad_pos_weight.eq(0).all()
    assert grad_gate.eq(0).all()


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("grid_size", [(3, 2), (2, 17), (1, 130)], ids=str)
def test_gradcheck(target, grid_size, dropout_p):
    if torch.float64 not in target.dtypes or (dropout_p and target.backend == "sdpa"):
        pytest.skip("these kernels do not compute in float64, or do not drop")
    function = partial(attention, grid_size=grid_size, dropout_p=dropout_p, backend=target.backend)
    assert torch.autograd.gradcheck(function, inputs(1, 2, grid_size, 8), fast_mode=True)


@pytest.mark.parametrize("frozen", range(5))
def test_one_frozen_input_changes_no_other_gradient(target, frozen):
    tensors, grad_out = target.given(1, 2, (3, 5), 16, target.widest)
    expected = target.run(tensors, grad_out, (3, 5))[1:]
    leaves = [t.detach().requires_grad_(i != frozen) for i, t in enumerate(tensors)]
    gpsa_attention(*leaves, (3, 5), backend=target.backend).backward(grad_out)
    for i, leaf in enumerate(leaves):
        assert leaf.grad is None if i == frozen else torch.equal(leaf.grad, expected[i]), NAMES[i + 1]


@pytest.mark.parametrize("other", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_parameters_of_another_dtype_keep_theirs(target, other):
    tensors, grad_out = target.given(1, 2, (3, 5), 16, torch.float16)
    tensors[3:] = [t.to(other) for t in tensors[3:]]
    assert [t.dtype for t in target.run(tensors, grad_out, (3, 5))] == [torch.float16] * 4 + [other] * 2
