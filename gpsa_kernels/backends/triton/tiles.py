"""What the kernels share: which program does what, tiles of rows, the dropout mask, the positional map in registers.

A pair is a batch element and a head, counted as batch * heads + head. A tile of rows of one pair is a tuple of one or
two parts, (rows, PARTS[0]) and (rows, PARTS[1]), whose widths are powers of two as Triton wants them: 48 channels are
32 + 16 and not 64 with a quarter of every load, product and register wasted.

Sums, statistics and tables are float32 (float64 for float64 inputs).
"""

# mypy: ignore-errors
# The bodies are in Triton's language, not in Python's: an `if` on a constant picks code, `a if c else b` a value.

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
_ROW = tl.constexpr(16)  # columns of a grid row in position_product


@triton.jit
def place_of_program(parts, heads):
    """This program's pair, in 64 bits, its batch element and its head; and which of the pair's programs it is."""
    pair = (tl.program_id(0) // parts).to(tl.int64)
    return pair, pair // heads, pair % heads, tl.program_id(0) % parts


@triton.jit
def base_of(x, strides, batch, head):
    """The first element of one pair."""
    return x + batch * strides.batch + head * strides.head


@triton.jit
def output_base(pointer, pair, heads, tokens, HEAD_DIM: tl.constexpr):
    """The first element of one pair in the memory layout (B, N, H, D)."""
    return pointer + (pair // heads) * tokens * heads * HEAD_DIM + (pair % heads) * HEAD_DIM


@triton.jit
def factors_of(tables, head, rows, columns):
    """Ax (C, C) and Ay (R, R) of a head."""
    return tables.ax + head * columns * columns, tables.ay + head * rows * rows


@triton.jit
def _load_part(pointers, valid, START: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    channel = START + tl.arange(0, WIDTH)[None, :]
    if START + WIDTH > HEAD_DIM:
        valid = valid & (channel < HEAD_DIM)
    return tl.load(pointers + channel, mask=valid, other=0.0)


@triton.jit
def load_rows(x, row, stride, count, HEAD_DIM: tl.constexpr, PARTS: tl.constexpr):
    """Rows of one pair, zeros where row >= count. Offsets in 64 bits, whatever the stride."""
    pointers = x + row[:, None].to(tl.int64) * stride
    valid = (row < count)[:, None]
    parts = (_load_part(pointers, valid, 0, PARTS[0], HEAD_DIM),)
    if len(PARTS) == 2:
        parts += (_load_part(pointers, valid, PARTS[0], PARTS[1], HEAD_DIM),)
    return parts


@triton.jit
def _store_part(pointers, valid, part, START: tl.constexpr, HEAD_DIM: tl.constexpr):
    channel = START + tl.arange(0, part.shape[1])[None, :]
    if START + part.shape[1] > HEAD_DIM:
        valid = valid & (channel < HEAD_DIM)
    tl.store(pointers + channel, part.to(pointers.dtype.element_ty), mask=valid)


@triton.jit
def store_rows(x, row, stride, count, parts, HEAD_DIM: tl.constexpr):
    """The inverse of load_rows, rounding to the memory's dtype."""
    pointers = x + row[:, None].to(tl.int64) * stride
    valid = (row < count)[:, None]
    _store_part(pointers, valid, parts[0], 0, HEAD_DIM)
    if len(parts) == 2:
        _store_part(pointers, valid, parts[1], parts[0].shape[1], HEAD_DIM)


@triton.jit
def zeros_like_rows(x, SUM: tl.constexpr):
    """A tile to add to, as large as another."""
    return [tl.zeros(part.shape, SUM) for part in x]


@triton.jit
def products(a, b, PRECISION: tl.constexpr):
    """a b^T: the inner products of two tiles' rows, (rows of a, rows of b)."""
    total = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    if len(a) == 2:
        total = tl.dot(a[1], tl.trans(b[1]), total, input_precision=PRECISION, out_dtype=total.dtype)
    return total


@triton.jit
def add_weighted(total, weights, x, PRECISION: tl.constexpr):
    """total + weights x, the weights (rows of total, rows of x) rounded to x's dtype."""
    weights = weights.to(x[0].dtype)
    parts = (tl.dot(weights, x[0], total[0], input_precision=PRECISION, out_dtype=total[0].dtype),)
    if len(x) == 2:
        parts += (tl.dot(weights, x[1], total[1], input_precision=PRECISION, out_dtype=total[1].dtype),)
    return parts


@triton.jit
def scale_rows(x, factor):
    """Every row of a tile times its own factor (or all times one)."""
    return [part * factor for part in x]


@triton.jit
def blend_rows(a, share_a, b, share_b):
    """share_a a + share_b b, of two tiles."""
    parts = (a[0] * share_a + b[0] * share_b,)
    if len(a) == 2:
        parts += (a[1] * share_a + b[1] * share_b,)
    return parts


@triton.jit
def row_products(a, b, SUM: tl.constexpr):
    """The inner product of each row of a with the same row of b."""
    total = tl.sum(a[0].to(SUM) * b[0].to(SUM), axis=1)
    if len(a) == 2:
        total += tl.sum(a[1].to(SUM) * b[1].to(SUM), axis=1)
    return total


@triton.jit
def gate_shares(gate, SUM: tl.constexpr):
    """g and 1 - g, a sigmoid each: the difference would have no digits left as g -> 1."""
    logit = tl.load(gate).to(SUM)
    return 1.0 / (1.0 + tl.exp(-logit)), 1.0 / (1.0 + tl.exp(logit))


@triton.jit
def early_share(position_share, tokens):
    """The share of g that dO carries when, mixed by a transposed table, it is rounded to 16 bits.

    All of it, so that what can overflow in float16 is of the size of dV, not of dV / g; but at least 1/N, with which
    nothing overflows, so that small gradients do not underflow. What is left of g follows in the dtype of sums.
    """
    return tl.maximum(position_share, 1.0 / tokens)


@triton.jit
def dropout_factors(seed, pair, query, key, dropout_p, keep_scale, SUM: tl.constexpr):
    """0 where an attention entry is dropped, else keep_scale = 1/(1-p): one draw for each (pair, query, key).

    Factors and not a mask: Triton 3.6 fails to bring a tile of booleans into the layout of a matrix operand.
    """
    query, key = tl.broadcast(query, key)
    pair_low, pair_high = pair.to(tl.int32), (pair >> 32).to(tl.int32)
    bits, _, _, _ = tl.philox(tl.load(seed), query, key, pair_low, pair_high)
    return (tl.uint_to_uniform_float(bits) >= dropout_p).to(SUM) * keep_scale


@triton.jit
def position_tile(ax, ay, query, key, tokens, columns):
    """The positional map of a tile, Ay[y_i, y_j] * Ax[x_i, x_j], from one head's two tables."""
    rows = tokens // columns
    valid = (query < tokens) & (key < tokens)
    along_y = (query // columns).to(tl.int64) * rows + key // columns
    along_x = (query % columns).to(tl.int64) * columns + key % columns
    return tl.load(ay + along_y, mask=valid, other=0.0) * tl.load(ax + along_x, mask=valid, other=0.0)


@triton.jit
def position_product(
    total,
    x,
    x_token,
    ax,
    ay,
    token,
    tokens,
    columns,
    TRANSPOSED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """total + rows of the positional map (or of its transpose) times one pair's x, two grid rows of x at a time.

    The factor along x is the same for every grid row, so two rows of the map cost a selection and a multiplication an
    entry. Not pipelined: that would copy the factors along y asynchronously, four bytes at a time.
    """
    rows = tokens // columns
    valid = token < tokens
    place = tl.arange(0, 2 * _ROW)
    column, second = place % _ROW, place // _ROW
    if TRANSPOSED:
        along_x, along_y, step = ax + token[:, None] % columns + column[None, :] * columns, ay + token // columns, rows
    else:
        along_x = ax + token[:, None] % columns * columns + column[None, :]
        along_y, step = ay + token // columns * rows, 1
    weights_x = tl.load(along_x, mask=valid[:, None] & (column < columns)[None, :], other=0.0)
    for row in tl.range(0, rows, 2, num_stages=1):
        first_y = tl.load(along_y + row * step, mask=valid, other=0.0)
        second_y = tl.load(along_y + (row + 1) * step, mask=valid & (row + 1 < rows), other=0.0)
        weights = weights_x * tl.where((second == 0)[None, :], first_y[:, None], second_y[:, None])
        x_row = tl.where(column < columns, (row + second) * columns + column, tokens)
        x_tile = load_rows(x, x_row, x_token, tokens, HEAD_DIM, PARTS)
        total = add_weighted(total, weights, x_tile, PRECISION)
    return total
