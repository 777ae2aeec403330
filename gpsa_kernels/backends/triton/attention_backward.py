"""The backward kernels of attention: one over tiles of queries for dQ, one over tiles of keys for dK and dV.

Each output element is summed by one program in a fixed order, so there are no atomics and every run gives the same
bits. The query kernel runs first and leaves delta = rowsum(dO * O_content) for the key kernel.
"""

# mypy: ignore-errors
# The bodies are in Triton's language, not in Python's.

import triton
import triton.language as tl

from gpsa_kernels.backends.triton.tiles import (
    LOG2_E,
    add_rows,
    add_weighted,
    dropout_factors,
    early_share,
    gate_shares,
    load_rows,
    output_base,
    position_product,
    position_tile,
    products,
    row_products,
    scale_rows,
    store_rows,
    zero_rows,
)


@triton.jit(do_not_specialize=["heads", "tokens", "columns", "slots"])
def attention_backward_query(
    grad_out,  # (B, H, N, D), like q, k and v by strides of its own
    q,
    k,
    v,
    content,  # (B, N, H, D)
    logsumexp,  # (B, H, N)
    gate,  # (H,)
    ax,  # (H, C, C)
    ay,  # (H, R, R)
    moments_x,  # (H, 2, C), means of dx and dx^2 under Ax
    moments_y,  # (H, 2, R), the same for y
    seed,  # (1,), None without dropout
    grad_q,  # (B, N, H, D), written
    delta,  # (B, H, N), written
    sums,  # (B * H, slots, 4), one slot written by each program
    g_batch,
    g_head,
    g_token,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    heads,
    tokens,
    columns,
    slots,
    scale,
    dropout_p,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    POSITION: tl.constexpr,
    COLUMN_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    SUM: tl.constexpr,
):
    """dQ and delta of a tile of query rows of one pair, and their slot of the parameters' sums."""
    tiles = tl.cdiv(tokens, QUERY_TILE)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = pair // heads, pair % heads
    tile = tl.program_id(0) % tiles
    query = tile * QUERY_TILE + tl.arange(0, QUERY_TILE)
    first_keys = tl.arange(0, KEY_TILE)
    grad_out += batch * g_batch + head * g_head
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head

    q_tile = load_rows(q, query, q_token, tokens, HEAD_DIM, FIRST, REST)
    g_tile = load_rows(grad_out, query, g_token, tokens, HEAD_DIM, FIRST, REST)
    content = output_base(content, pair, heads, tokens, HEAD_DIM)
    content_tile = load_rows(content, query, heads * HEAD_DIM, tokens, HEAD_DIM, FIRST, REST)
    row_delta = row_products(g_tile, content_tile, SUM)
    tl.store(delta + pair * tokens + query, row_delta, mask=query < tokens)
    row_logsumexp = tl.load(logsumexp + pair * tokens + query, mask=query < tokens, other=0.0) * LOG2_E

    if POSITION == "dense":
        rows = tokens // columns
        ax += head * columns * columns
        ay += head * rows * rows
        moments_x += head * 2 * columns + query % columns
        moments_y += head * 2 * rows + query // columns
        mean_dx = tl.load(moments_x, mask=query < tokens, other=0.0)
        mean_dy = tl.load(moments_y, mask=query < tokens, other=0.0)
        mean_square = tl.load(moments_x + columns, mask=query < tokens, other=0.0)
        mean_square += tl.load(moments_y + rows, mask=query < tokens, other=0.0)
    sum_dx = tl.zeros((QUERY_TILE,), SUM)
    sum_dy = tl.zeros((QUERY_TILE,), SUM)
    sum_square = tl.zeros((QUERY_TILE,), SUM)
    sum_position = tl.zeros((QUERY_TILE,), SUM)

    grad_q_sum = zero_rows(QUERY_TILE, FIRST, REST, SUM)
    for start in range(0, tokens, KEY_TILE):
        key = start + first_keys
        k_tile = load_rows(k, key, k_token, tokens, HEAD_DIM, FIRST, REST)
        v_tile = load_rows(v, key, v_token, tokens, HEAD_DIM, FIRST, REST)

        scores = products(q_tile, k_tile, PRECISION, SUM) * (scale * LOG2_E)
        scores = tl.where(key[None, :] < tokens, scores, float("-inf"))
        weights = tl.exp2(scores - row_logsumexp[:, None])
        grad_weights = products(g_tile, v_tile, PRECISION, SUM)
        if seed is not None:
            grad_weights *= dropout_factors(seed, pair, query[:, None], key[None, :], dropout_p, keep_scale, SUM)
        grad_scores = weights * (grad_weights - row_delta[:, None])
        grad_q_sum = add_weighted(grad_q_sum, grad_scores, k_tile, PRECISION, SUM)

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
    grad_out,  # (B, H, N, D), like q, k and v by strides of its own
    q,
    k,
    v,
    logsumexp,  # (B, H, N), like delta
    delta,
    gate,  # (H,)
    ax,  # (H, C, C)
    ay,  # (H, R, R)
    seed,  # (1,), None without dropout
    grad_k,  # (B, N, H, D), written, like grad_v
    grad_v,
    g_batch,
    g_head,
    g_token,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    heads,
    tokens,
    columns,
    scale,
    dropout_p,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    POSITION: tl.constexpr,
    COLUMN_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    SUM: tl.constexpr,
):
    """dK and dV of a tile of keys of one pair."""
    tiles = tl.cdiv(tokens, KEY_TILE)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = pair // heads, pair % heads
    key = (tl.program_id(0) % tiles) * KEY_TILE + tl.arange(0, KEY_TILE)
    first_queries = tl.arange(0, QUERY_TILE)
    rows = tokens // columns
    ax += head * columns * columns
    ay += head * rows * rows
    grad_out += batch * g_batch + head * g_head
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    position_share, content_share = gate_shares(gate + head, SUM)

    k_tile = load_rows(k, key, k_token, tokens, HEAD_DIM, FIRST, REST)
    v_tile = load_rows(v, key, v_token, tokens, HEAD_DIM, FIRST, REST)
    grad_k_sum = zero_rows(KEY_TILE, FIRST, REST, SUM)
    grad_v_sum = zero_rows(KEY_TILE, FIRST, REST, SUM)
    for start in range(0, tokens, QUERY_TILE):
        query = start + first_queries
        q_tile = load_rows(q, query, q_token, tokens, HEAD_DIM, FIRST, REST)
        g_tile = load_rows(grad_out, query, g_token, tokens, HEAD_DIM, FIRST, REST)
        # queries that do not exist get weight exp(-inf) = 0
        row_logsumexp = tl.load(logsumexp + pair * tokens + query, mask=query < tokens, other=float("inf")) * LOG2_E
        row_delta = tl.load(delta + pair * tokens + query, mask=query < tokens, other=0.0)

        # transposed tiles, (keys, queries), so that both sums are plain products
        scores = products(k_tile, q_tile, PRECISION, SUM) * (scale * LOG2_E)
        weights = tl.exp2(scores - row_logsumexp[None, :])
        grad_weights = products(v_tile, g_tile, PRECISION, SUM)
        mixed = weights
        if POSITION == "dense":
            position = position_tile(ax, ay, query[None, :], key[:, None], tokens, columns)
            mixed = weights * content_share + position * position_share
            if seed is not None:
                factors = dropout_factors(seed, pair, query[None, :], key[:, None], dropout_p, keep_scale, SUM)
                mixed *= factors
                grad_weights *= factors
        grad_v_sum = add_weighted(grad_v_sum, mixed, g_tile, PRECISION, SUM)
        grad_scores = weights * (grad_weights - row_delta[None, :])
        grad_k_sum = add_weighted(grad_k_sum, grad_scores, q_tile, PRECISION, SUM)

    grad_k = output_base(grad_k, pair, heads, tokens, HEAD_DIM)
    grad_v = output_base(grad_v, pair, heads, tokens, HEAD_DIM)
    store_rows(grad_k, key, heads * HEAD_DIM, tokens, scale_rows(grad_k_sum, scale * content_share), HEAD_DIM)
    if POSITION != "dense":
        if POSITION == "rows":
            position_sum = position_product(
                *(grad_out, g_token, ax, ay, key, tokens, columns, True, HEAD_DIM, FIRST, REST, KEY_TILE, COLUMN_TILE),
                *(PRECISION, SUM),
            )
        else:  # left there by separable_product
            position_sum = load_rows(grad_v, key, heads * HEAD_DIM, tokens, HEAD_DIM, FIRST, REST)
            position_share /= early_share(position_share, tokens)
        grad_v_sum = add_rows(scale_rows(grad_v_sum, content_share), scale_rows(position_sum, position_share))
    store_rows(grad_v, key, heads * HEAD_DIM, tokens, grad_v_sum, HEAD_DIM)
