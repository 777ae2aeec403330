"""The attention kernels: forward and dQ over tiles of queries, dK and dV over tiles of keys.

Each element is summed by one program in a fixed order: no atomics, and every run gives the same bits. The kernel of dQ
runs first and leaves delta = rowsum(dO * O_content) for that of dK and dV.
"""

# mypy: ignore-errors
# The bodies are in Triton's language, not in Python's.

import triton
import triton.language as tl

from gpsa_kernels.backends.triton.tiles import (
    LN_2,
    LOG2_E,
    add_weighted,
    base_of,
    blend_rows,
    dropout_factors,
    early_share,
    factors_of,
    gate_shares,
    load_rows,
    output_base,
    place_of_program,
    position_product,
    position_tile,
    products,
    row_products,
    scale_rows,
    store_rows,
    zeros_like_rows,
)


@triton.jit(do_not_specialize=["heads", "tokens", "columns"])
def attention_forward(
    q,  # (B, H, N, D), like k and v in any layout
    k,
    v,
    gate,  # (H,)
    tables,  # launch.Tables
    seed,  # (1,), None without dropout
    out,  # (B, N, H, D), written
    content,  # (B, N, H, D), written; None where there is no backward pass
    logsumexp,  # (B, H, N), written; None likewise
    q_strides,  # launch.Strides
    k_strides,
    v_strides,
    heads,
    tokens,
    columns,
    scale,
    dropout_p,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,  # widths of a tile's parts
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    POSITION: tl.constexpr,  # "rows", "slabs" or "dense", see rules.position_form
    PRECISION: tl.constexpr,  # of products of float32: "ieee" or "tf32"
):
    """out = (1 - g) softmax(scale Q K^T) V + g R V for a tile of query rows of one pair."""
    pair, batch, head, tile = place_of_program(tl.cdiv(tokens, QUERY_TILE), heads)
    query = tile * QUERY_TILE + tl.arange(0, QUERY_TILE)
    SUM: tl.constexpr = tables.ax.dtype.element_ty
    ax, ay = factors_of(tables, head, tokens // columns, columns)
    q = base_of(q, q_strides, batch, head)
    k = base_of(k, k_strides, batch, head)
    v = base_of(v, v_strides, batch, head)

    q_tile = load_rows(q, query, q_strides.token, tokens, HEAD_DIM, PARTS)
    # largest scores so far, in units of log 2; finite, as all scores of the first tile may be -inf
    row_max = tl.full((QUERY_TILE,), -3.0e38, SUM)
    row_sum = tl.zeros((QUERY_TILE,), SUM)
    content_sum = zeros_like_rows(q_tile, SUM)
    position_sum = zeros_like_rows(q_tile, SUM)
    for start in range(0, tokens, KEY_TILE):
        key = start + tl.arange(0, KEY_TILE)
        k_tile = load_rows(k, key, k_strides.token, tokens, HEAD_DIM, PARTS)
        v_tile = load_rows(v, key, v_strides.token, tokens, HEAD_DIM, PARTS)

        # (queries, keys), in units of log 2, so that the exponential is one instruction
        scores = products(q_tile, k_tile, PRECISION) * (scale * LOG2_E)
        scores = tl.where(key[None, :] < tokens, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        rescale = tl.exp2(row_max - new_max)
        weights = tl.exp2(scores - new_max[:, None])
        row_max = new_max
        row_sum = row_sum * rescale + tl.sum(weights, axis=1)
        if POSITION == "dense":
            position = position_tile(ax, ay, query[:, None], key[None, :], tokens, columns)
            if seed is not None:
                factors = dropout_factors(seed, pair, query[:, None], key[None, :], dropout_p, keep_scale, SUM)
                weights *= factors
                position *= factors
            position_sum = add_weighted(position_sum, position, v_tile, PRECISION)
        content_sum = add_weighted(scale_rows(content_sum, rescale[:, None]), weights, v_tile, PRECISION)

    content_sum = scale_rows(content_sum, (1.0 / row_sum)[:, None])
    out = output_base(out, pair, heads, tokens, HEAD_DIM)
    if POSITION == "rows":
        position_sum = position_product(
            position_sum, v, v_strides.token, ax, ay, query, tokens, columns, False, HEAD_DIM, PARTS, PRECISION
        )
    elif POSITION == "slabs":  # left there by separable_product
        position_sum = load_rows(out, query, heads * HEAD_DIM, tokens, HEAD_DIM, PARTS)
    position_share, content_share = gate_shares(gate + head, SUM)
    mixed = blend_rows(content_sum, content_share, position_sum, position_share)
    store_rows(out, query, heads * HEAD_DIM, tokens, mixed, HEAD_DIM)
    if content is not None:
        content = output_base(content, pair, heads, tokens, HEAD_DIM)
        store_rows(content, query, heads * HEAD_DIM, tokens, content_sum, HEAD_DIM)
        tl.store(logsumexp + pair * tokens + query, row_max * LN_2 + tl.log(row_sum), mask=query < tokens)


@triton.jit(do_not_specialize=["heads", "tokens", "columns", "slots"])
def attention_backward_query(
    grad_out,  # (B, H, N, D), like q, k and v in any layout
    q,
    k,
    v,
    content,  # (B, N, H, D)
    logsumexp,  # (B, H, N)
    gate,  # (H,)
    tables,  # launch.Tables
    seed,  # (1,), None without dropout
    grad_q,  # (B, N, H, D), written
    delta,  # (B, H, N), written
    sums,  # (B * H, slots, 4), one slot written by each program
    grad_out_strides,
    q_strides,
    k_strides,
    v_strides,
    heads,
    tokens,
    columns,
    slots,
    scale,
    dropout_p,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    POSITION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dQ and delta of a tile of query rows of one pair, and their slot of the parameters' sums."""
    pair, batch, head, tile = place_of_program(tl.cdiv(tokens, QUERY_TILE), heads)
    query = tile * QUERY_TILE + tl.arange(0, QUERY_TILE)
    SUM: tl.constexpr = tables.ax.dtype.element_ty
    grad_out = base_of(grad_out, grad_out_strides, batch, head)
    q = base_of(q, q_strides, batch, head)
    k = base_of(k, k_strides, batch, head)
    v = base_of(v, v_strides, batch, head)

    q_tile = load_rows(q, query, q_strides.token, tokens, HEAD_DIM, PARTS)
    g_tile = load_rows(grad_out, query, grad_out_strides.token, tokens, HEAD_DIM, PARTS)
    content = output_base(content, pair, heads, tokens, HEAD_DIM)
    content_tile = load_rows(content, query, heads * HEAD_DIM, tokens, HEAD_DIM, PARTS)
    row_delta = row_products(g_tile, content_tile, SUM)
    tl.store(delta + pair * tokens + query, row_delta, mask=query < tokens)
    row_logsumexp = tl.load(logsumexp + pair * tokens + query, mask=query < tokens, other=0.0) * LOG2_E

    if POSITION == "dense":
        rows = tokens // columns
        ax, ay = factors_of(tables, head, rows, columns)
        moments_x = tables.moments_x + (head * 2 * columns + query % columns)
        moments_y = tables.moments_y + (head * 2 * rows + query // columns)
        mean_dx = tl.load(moments_x, mask=query < tokens, other=0.0)
        mean_dy = tl.load(moments_y, mask=query < tokens, other=0.0)
        mean_square = tl.load(moments_x + columns, mask=query < tokens, other=0.0)
        mean_square += tl.load(moments_y + rows, mask=query < tokens, other=0.0)
    sum_dx = tl.zeros_like(row_delta)
    sum_dy = tl.zeros_like(row_delta)
    sum_square = tl.zeros_like(row_delta)
    sum_position = tl.zeros_like(row_delta)

    grad_q_sum = zeros_like_rows(q_tile, SUM)
    for start in range(0, tokens, KEY_TILE):
        key = start + tl.arange(0, KEY_TILE)
        k_tile = load_rows(k, key, k_strides.token, tokens, HEAD_DIM, PARTS)
        v_tile = load_rows(v, key, v_strides.token, tokens, HEAD_DIM, PARTS)

        scores = products(q_tile, k_tile, PRECISION) * (scale * LOG2_E)
        scores = tl.where(key[None, :] < tokens, scores, float("-inf"))
        weights = tl.exp2(scores - row_logsumexp[:, None])
        grad_weights = products(g_tile, v_tile, PRECISION)
        if seed is not None:
            grad_weights *= dropout_factors(seed, pair, query[:, None], key[None, :], dropout_p, keep_scale, SUM)
        grad_q_sum = add_weighted(grad_q_sum, weights * (grad_weights - row_delta[:, None]), k_tile, PRECISION)

        if POSITION == "dense":
            # dR/dw = R * (offset - its mean under R): one pass gives the weights' gradients, without cancellation
            position = position_tile(ax, ay, query[:, None], key[None, :], tokens, columns) * grad_weights
            dx = (key % columns)[None, :] - (query % columns)[:, None]
            dy = (key // columns)[None, :] - (query // columns)[:, None]
            sum_dx += tl.sum(position * (dx - mean_dx[:, None]), axis=1)
            sum_dy += tl.sum(position * (dy - mean_dy[:, None]), axis=1)
            sum_square += tl.sum(position * (dx * dx + dy * dy - mean_square[:, None]), axis=1)
            sum_position += tl.sum(position, axis=1)

    # the content's share of the gate and the scale act on the sums: small shares do not underflow in 16 bits
    position_share, content_share = gate_shares(gate + head, SUM)
    grad_q = output_base(grad_q, pair, heads, tokens, HEAD_DIM)
    store_rows(grad_q, query, heads * HEAD_DIM, tokens, scale_rows(grad_q_sum, scale * content_share), HEAD_DIM)

    slot = sums + (pair * slots + tile) * 4
    tl.store(slot, position_share * tl.sum(sum_dx, axis=0))
    tl.store(slot + 1, position_share * tl.sum(sum_dy, axis=0))
    tl.store(slot + 2, position_share * tl.sum(sum_square, axis=0))
    tl.store(slot + 3, position_share * content_share * tl.sum(sum_position - row_delta, axis=0))


@triton.jit(do_not_specialize=["heads", "tokens", "columns"])
def attention_backward_key(
    grad_out,  # (B, H, N, D), like q, k and v in any layout
    q,
    k,
    v,
    logsumexp,  # (B, H, N), like delta
    delta,
    gate,  # (H,)
    tables,  # launch.Tables
    seed,  # (1,), None without dropout
    grad_k,  # (B, N, H, D), written, like grad_v
    grad_v,
    grad_out_strides,
    q_strides,
    k_strides,
    v_strides,
    heads,
    tokens,
    columns,
    scale,
    dropout_p,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    POSITION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dK and dV of a tile of keys of one pair."""
    pair, batch, head, tile = place_of_program(tl.cdiv(tokens, KEY_TILE), heads)
    key = tile * KEY_TILE + tl.arange(0, KEY_TILE)
    SUM: tl.constexpr = tables.ax.dtype.element_ty
    ax, ay = factors_of(tables, head, tokens // columns, columns)
    grad_out = base_of(grad_out, grad_out_strides, batch, head)
    q = base_of(q, q_strides, batch, head)
    k = base_of(k, k_strides, batch, head)
    v = base_of(v, v_strides, batch, head)
    position_share, content_share = gate_shares(gate + head, SUM)

    k_tile = load_rows(k, key, k_strides.token, tokens, HEAD_DIM, PARTS)
    v_tile = load_rows(v, key, v_strides.token, tokens, HEAD_DIM, PARTS)
    grad_k_sum = zeros_like_rows(k_tile, SUM)
    grad_v_sum = zeros_like_rows(v_tile, SUM)
    for start in range(0, tokens, QUERY_TILE):
        query = start + tl.arange(0, QUERY_TILE)
        q_tile = load_rows(q, query, q_strides.token, tokens, HEAD_DIM, PARTS)
        g_tile = load_rows(grad_out, query, grad_out_strides.token, tokens, HEAD_DIM, PARTS)
        # queries that do not exist get weight exp(-inf) = 0
        row_logsumexp = tl.load(logsumexp + pair * tokens + query, mask=query < tokens, other=float("inf")) * LOG2_E
        row_delta = tl.load(delta + pair * tokens + query, mask=query < tokens, other=0.0)

        # transposed tiles, (keys, queries), so that both sums are plain products
        weights = tl.exp2(products(k_tile, q_tile, PRECISION) * (scale * LOG2_E) - row_logsumexp[None, :])
        grad_weights = products(v_tile, g_tile, PRECISION)
        mixed = weights
        if POSITION == "dense":
            position = position_tile(ax, ay, query[None, :], key[:, None], tokens, columns)
            mixed = weights * content_share + position * position_share
            if seed is not None:
                factors = dropout_factors(seed, pair, query[None, :], key[:, None], dropout_p, keep_scale, SUM)
                mixed *= factors
                grad_weights *= factors
        grad_v_sum = add_weighted(grad_v_sum, mixed, g_tile, PRECISION)
        grad_k_sum = add_weighted(grad_k_sum, weights * (grad_weights - row_delta[None, :]), q_tile, PRECISION)

    grad_k = output_base(grad_k, pair, heads, tokens, HEAD_DIM)
    grad_v = output_base(grad_v, pair, heads, tokens, HEAD_DIM)
    store_rows(grad_k, key, heads * HEAD_DIM, tokens, scale_rows(grad_k_sum, scale * content_share), HEAD_DIM)
    if POSITION != "dense":
        if POSITION == "rows":
            along = (grad_out, grad_out_strides.token, ax, ay, key, tokens, columns)
            position_sum = position_product(zeros_like_rows(v_tile, SUM), *along, True, HEAD_DIM, PARTS, PRECISION)
        else:  # left there by separable_product
            position_sum = load_rows(grad_v, key, heads * HEAD_DIM, tokens, HEAD_DIM, PARTS)
            position_share /= early_share(position_share, tokens)
        grad_v_sum = blend_rows(grad_v_sum, content_share, position_sum, position_share)
    store_rows(grad_v, key, heads * HEAD_DIM, tokens, grad_v_sum, HEAD_DIM)
