"""The positional branch: its two tables, the separable product with them, and the gradients of the three weights.

A program holds one slab: a tile of grid rows, all grid columns, a few channels. Seen as (rows, columns * channels) it
is contracted with Ay, seen as (columns, rows * channels) with Ax; both are plain matrix products.
"""

# mypy: ignore-errors
# ruff: noqa: SIM108
# The bodies are in Triton's language, not in Python's.

import triton
import triton.language as tl

from gpsa_kernels.backends.triton.tiles import (
    LOG2_E,
    base_of,
    early_share,
    factors_of,
    gate_shares,
    output_base,
    place_of_program,
)


@triton.jit
def _axis_table(weight, weight_square, table, moments, size, tile, TILE: tl.constexpr, LENGTH: tl.constexpr):
    """softmax_j(w*d + w2*d^2), d = j - i, for a tile of rows i, with the means of d and d^2 under each row."""
    SUM: tl.constexpr = table.dtype.element_ty
    i = tile * TILE + tl.arange(0, TILE)
    j = tl.arange(0, LENGTH)
    offset = (j[None, :] - i[:, None]).to(SUM)
    valid = (i[:, None] < size) & (j[None, :] < size)
    scores = offset * (tl.load(weight).to(SUM) + tl.load(weight_square).to(SUM) * offset)
    scores = tl.where(j[None, :] < size, scores, float("-inf"))
    weights = tl.exp2((scores - tl.max(scores, axis=1)[:, None]) * LOG2_E)
    weights = weights / tl.sum(weights, axis=1)[:, None]
    tl.store(table + i[:, None].to(tl.int64) * size + j[None, :], weights, mask=valid)
    tl.store(moments + i, tl.sum(weights * offset, axis=1), mask=i < size)
    tl.store(moments + size + i, tl.sum(weights * offset * offset, axis=1), mask=i < size)


@triton.jit(do_not_specialize=["rows", "columns"])
def axis_tables(
    pos_weight,  # (H, 3)
    tables,  # launch.Tables, written
    rows,
    columns,
    TILE: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """A tile of rows of one head's Ax or Ay, and its moments."""
    x_tiles, y_tiles = tl.cdiv(columns, TILE), tl.cdiv(rows, TILE)
    head = (tl.program_id(0) // (x_tiles + y_tiles)).to(tl.int64)
    tile = tl.program_id(0) % (x_tiles + y_tiles)
    weight = pos_weight + head * 3
    if tile < x_tiles:
        table, moments = tables.ax + head * columns * columns, tables.moments_x + head * 2 * columns
        _axis_table(weight, weight + 2, table, moments, columns, tile, TILE, LENGTH)
    else:
        table, moments = tables.ay + head * rows * rows, tables.moments_y + head * 2 * rows
        _axis_table(weight + 1, weight + 2, table, moments, rows, tile - x_tiles, TILE, LENGTH)


@triton.jit
def _load_table(table, i, j, size):
    """Entries [i, j] of one head's table; zero outside of it."""
    return tl.load(table + i * size + j, mask=(i < size) & (j < size), other=0.0)


@triton.jit
def _slab_offsets(row, column, channel, token_stride, columns):
    """Offsets of (grid row, grid column, channel) from a pair's first element, in 64 bits."""
    return (row * columns + column).to(tl.int64) * token_stride + channel


@triton.jit
def _swap_axes(tile, OUTER: tl.constexpr, INNER: tl.constexpr, CHANNELS: tl.constexpr):
    """(outer, inner * channels) to (inner, outer * channels)."""
    tile = tl.permute(tl.reshape(tile, (OUTER, INNER, CHANNELS)), (1, 0, 2))
    return tl.reshape(tile, (INNER, OUTER * CHANNELS))


@triton.jit
def _along_rows(
    x,
    x_token,
    ay,
    moments_y,
    first_row,
    slab,
    rows,
    columns,
    POWER: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROW_TILE: tl.constexpr,
    COLUMN_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of rows of Ay x, x a slab seen as (rows, columns * channels); of its transpose, or of its derivative.

    The derivative of a softmax table A of scores w * offset^POWER is A * (offset^POWER - its mean under its row).
    """
    inner = tl.arange(0, COLUMN_TILE * CHANNELS)[None, :]
    column, channel = inner // CHANNELS, slab * CHANNELS + inner % CHANNELS
    inner_valid = (column < columns) & (channel < HEAD_DIM)
    y = first_row + tl.arange(0, ROW_TILE)[:, None]
    if POWER > 0:
        mean = tl.load(moments_y + (POWER - 1) * rows + y, mask=y < rows, other=0.0)
    total = tl.zeros((ROW_TILE, COLUMN_TILE * CHANNELS), ay.dtype.element_ty)
    for start in range(0, rows, ROW_TILE):
        source = start + tl.arange(0, ROW_TILE)
        if TRANSPOSED:
            table = _load_table(ay, source[None, :], y, rows)
        else:
            table = _load_table(ay, y, source[None, :], rows)
        offset = source[None, :] - y
        if POWER == 1:
            table *= offset - mean
        elif POWER == 2:
            table *= offset * offset - mean
        offsets = _slab_offsets(source[:, None], column, channel, x_token, columns)
        x_tile = tl.load(x + offsets, mask=(source[:, None] < rows) & inner_valid, other=0.0)
        total = tl.dot(table.to(x_tile.dtype), x_tile, total, input_precision=PRECISION, out_dtype=total.dtype)
    return total


@triton.jit(do_not_specialize=["heads", "tokens", "columns"])
def separable_product(
    x,  # (B, H, N, D), in any layout
    tables,  # launch.Tables
    gate,  # (H,), of the transpose alone
    out,  # (B, N, H, D), written
    x_strides,  # launch.Strides
    heads,
    tokens,
    columns,
    TRANSPOSED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROW_TILE: tl.constexpr,
    COLUMN_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of grid rows and a slab of channels of out = (Ay x Ax) x, or of early_share (Ay x Ax)^T x."""
    rows = tokens // columns
    slabs = tl.cdiv(HEAD_DIM, CHANNELS)
    pair, batch, head, program = place_of_program(slabs * tl.cdiv(rows, ROW_TILE), heads)
    slab, first_row = program % slabs, program // slabs * ROW_TILE
    ax, ay = factors_of(tables, head, rows, columns)
    x = base_of(x, x_strides, batch, head)

    along_rows = (x, x_strides.token, ay, None, first_row, slab, rows, columns)
    mixed = _along_rows(*along_rows, 0, TRANSPOSED, HEAD_DIM, CHANNELS, ROW_TILE, COLUMN_TILE, PRECISION)
    if TRANSPOSED:
        position_share, _ = gate_shares(gate + head, ay.dtype.element_ty)
        mixed *= early_share(position_share, tokens)
    mixed = _swap_axes(mixed.to(out.dtype.element_ty), ROW_TILE, COLUMN_TILE, CHANNELS)
    to_column, from_column = tl.arange(0, COLUMN_TILE)[:, None], tl.arange(0, COLUMN_TILE)[None, :]
    if TRANSPOSED:
        factor = _load_table(ax, from_column, to_column, columns)
    else:
        factor = _load_table(ax, to_column, from_column, columns)
    mixed = tl.dot(factor.to(mixed.dtype), mixed, input_precision=PRECISION)

    # slabs as (columns, rows * channels)
    outer = tl.arange(0, ROW_TILE * CHANNELS)[None, :]
    row, channel = first_row + outer // CHANNELS, slab * CHANNELS + outer % CHANNELS
    offsets = _slab_offsets(row, to_column, channel, heads * HEAD_DIM, columns)
    valid = (to_column < columns) & (row < rows) & (channel < HEAD_DIM)
    out = output_base(out, pair, heads, tokens, HEAD_DIM)
    tl.store(out + offsets, mixed.to(out.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["heads", "tokens", "columns", "slots", "first_slot"])
def separable_gradient(
    grad_out,  # (B, H, N, D), like v in any layout
    v,
    tables,  # launch.Tables
    gate,  # (H,)
    sums,  # (B * H, slots, 4), one slot from first_slot on written by each program
    grad_out_strides,
    v_strides,
    heads,
    tokens,
    columns,
    slots,
    first_slot,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROW_TILE: tl.constexpr,
    COLUMN_TILE: tl.constexpr,
    QUERY_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The part of one tile of query rows and one slab of channels in d pos_weight and in g (1 - g) <dO, O_pos>.

    d/dw <dO, (Ay x Ax) V> is the same product with one table differentiated, so that all of it is sums of entrywise
    products: of dO with what was mixed along x, of Ax^T dO with what was mixed along y.
    """
    SUM: tl.constexpr = tables.ay.dtype.element_ty
    rows = tokens // columns
    slabs = tl.cdiv(HEAD_DIM, CHANNELS)
    pair, batch, head, program = place_of_program(slabs * tl.cdiv(rows, ROW_TILE), heads)
    slab, first_row = program % slabs, program // slabs * ROW_TILE
    ax, ay = factors_of(tables, head, rows, columns)
    moments_x = tables.moments_x + head * 2 * columns
    moments_y = tables.moments_y + head * 2 * rows
    grad_out = base_of(grad_out, grad_out_strides, batch, head)
    v = base_of(v, v_strides, batch, head)

    # dO as (columns, rows * channels), some query columns at a time
    outer = tl.arange(0, ROW_TILE * CHANNELS)[None, :]
    row, channel = first_row + outer // CHANNELS, slab * CHANNELS + outer % CHANNELS
    outer_valid = (row < rows) & (channel < HEAD_DIM)
    key_x = tl.arange(0, COLUMN_TILE)
    spread = tl.zeros((COLUMN_TILE, ROW_TILE * CHANNELS), SUM)
    for start in range(0, columns, QUERY_COLUMNS):
        query_x = start + tl.arange(0, QUERY_COLUMNS)
        offsets = _slab_offsets(row, query_x[:, None], channel, grad_out_strides.token, columns)
        g_tile = tl.load(grad_out + offsets, mask=(query_x < columns)[:, None] & outer_valid, other=0.0)
        table = _load_table(ax, query_x[None, :], key_x[:, None], columns)
        spread = tl.dot(table.to(g_tile.dtype), g_tile, spread, input_precision=PRECISION, out_dtype=SUM)
    position_share, content_share = gate_shares(gate + head, SUM)
    early = early_share(position_share, tokens)
    late = position_share / early
    spread = _swap_axes((spread * early).to(v.dtype.element_ty), COLUMN_TILE, ROW_TILE, CHANNELS).to(SUM)

    along_rows = (v, v_strides.token, ay, moments_y, first_row, slab, rows, columns)
    mixed = _along_rows(*along_rows, 1, False, HEAD_DIM, CHANNELS, ROW_TILE, COLUMN_TILE, PRECISION)
    sum_dy = tl.sum(spread * mixed)
    mixed = _along_rows(*along_rows, 2, False, HEAD_DIM, CHANNELS, ROW_TILE, COLUMN_TILE, PRECISION)
    sum_square = late * tl.sum(spread * mixed)
    mixed = _along_rows(*along_rows, 0, False, HEAD_DIM, CHANNELS, ROW_TILE, COLUMN_TILE, PRECISION)
    sum_position = tl.sum(spread * mixed)

    mixed = _swap_axes(mixed.to(v.dtype.element_ty), ROW_TILE, COLUMN_TILE, CHANNELS)
    sum_dx = tl.zeros((), SUM)
    for start in range(0, columns, QUERY_COLUMNS):
        query_x = start + tl.arange(0, QUERY_COLUMNS)[:, None]
        offsets = _slab_offsets(row, query_x, channel, grad_out_strides.token, columns)
        g_tile = tl.load(grad_out + offsets, mask=(query_x < columns) & outer_valid, other=0.0)
        table = _load_table(ax, query_x, key_x[None, :], columns)
        dx = key_x[None, :] - query_x
        mean = tl.load(moments_x + query_x, mask=query_x < columns, other=0.0)
        by_dx = (table * (dx - mean)).to(mixed.dtype)
        sum_dx += tl.sum(g_tile.to(SUM) * tl.dot(by_dx, mixed, input_precision=PRECISION))
        mean_square = tl.load(moments_x + columns + query_x, mask=query_x < columns, other=0.0)
        by_dx_square = (table * (dx * dx - mean_square)).to(mixed.dtype)
        sum_square += position_share * tl.sum(g_tile.to(SUM) * tl.dot(by_dx_square, mixed, input_precision=PRECISION))

    slot = sums + (pair * slots + first_slot + program) * 4
    tl.store(slot, position_share * sum_dx)
    tl.store(slot + 1, late * sum_dy)
    tl.store(slot + 2, sum_square)
    tl.store(slot + 3, late * content_share * sum_position)
