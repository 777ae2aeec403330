"""The forward kernel: one tile of queries against all keys, with an online softmax, and the gated blend at its end."""

# mypy: ignore-errors
# The bodies are in Triton's language, not in Python's.

import triton
import triton.language as tl

from gpsa_kernels.backends.triton.tiles import (
    LN_2,
    LOG2_E,
    add_rows,
    add_weighted,
    dropout_factors,
    gate_shares,
    load_rows,
    output_base,
    position_product,
    position_tile,
    products,
    scale_rows,
    store_rows,
    zero_rows,
)


@triton.jit(do_not_specialize=["heads", "tokens", "columns"])
def attention_forward(
    q,  # (B, H, N, D), like k and v by strides of its own
    k,
    v,
    gate,  # (H,)
    ax,  # (H, C, C)
    ay,  # (H, R, R)
    seed,  # (1,), None without dropout
    out,  # (B, N, H, D), written
    content,  # (B, N, H, D), written; None where there is no backward pass
    logsumexp,  # (B, H, N), written; None likewise
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
    FIRST: tl.constexpr,  # channels of a tile's parts
    REST: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    POSITION: tl.constexpr,  # "rows", "slabs" or "dense", see rules.position_form
    COLUMN_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    SUM: tl.constexpr,
):
    """out = (1 - g) softmax(scale Q K^T) V + g R V for a tile of query rows of one pair."""
    tiles = tl.cdiv(tokens, QUERY_TILE)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = pair // heads, pair % heads
    query = (tl.program_id(0) % tiles) * QUERY_TILE + tl.arange(0, QUERY_TILE)
    first_keys = tl.arange(0, KEY_TILE)
    rows = tokens // columns
    ax += head * columns * columns
    ay += head * rows * rows
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head

    q_tile = load_rows(q, query, q_token, tokens, HEAD_DIM, FIRST, REST)
    # largest scores so far, in units of log 2; finite, as all scores of the first tile may be -inf
    row_max = tl.full((QUERY_TILE,), -3.0e38, SUM)
    row_sum = tl.zeros((QUERY_TILE,), SUM)
    content_sum = zero_rows(QUERY_TILE, FIRST, REST, SUM)
    position_sum = zero_rows(QUERY_TILE, FIRST, REST, SUM)
    for start in range(0, tokens, KEY_TILE):
        key = start + first_keys
        k_tile = load_rows(k, key, k_token, tokens, HEAD_DIM, FIRST, REST)
        v_tile = load_rows(v, key, v_token, tokens, HEAD_DIM, FIRST, REST)

        # (queries, keys), in units of log 2, so that the exponential is one instruction
        scores = products(q_tile, k_tile, PRECISION, SUM) * (scale * LOG2_E)
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
            position_sum = add_weighted(position_sum, position, v_tile, PRECISION, SUM)
        content_sum = add_weighted(scale_rows(content_sum, rescale[:, None]), weights, v_tile, PRECISION, SUM)

    content_sum = scale_rows(content_sum, (1.0 / row_sum)[:, None])
    out = output_base(out, pair, heads, tokens, HEAD_DIM)
    if POSITION == "rows":
        position_sum = position_product(
            *(v, v_token, ax, ay, query, tokens, columns, False, HEAD_DIM, FIRST, REST, QUERY_TILE, COLUMN_TILE),
            *(PRECISION, SUM),
        )
    elif POSITION == "slabs":  # left there by separable_product
        position_sum = load_rows(out, query, heads * HEAD_DIM, tokens, HEAD_DIM, FIRST, REST)
    position_share, content_share = gate_shares(gate + head, SUM)
    mixed = add_rows(scale_rows(content_sum, content_share), scale_rows(position_sum, position_share))
    store_rows(out, query, heads * HEAD_DIM, tokens, mixed, HEAD_DIM)
    if content is not None:
        content = output_base(content, pair, heads, tokens, HEAD_DIM)
        store_rows(content, query, heads * HEAD_DIM, tokens, content_sum, HEAD_DIM)
        tl.store(logsumexp + pair * tokens + query, row_max * LN_2 + tl.log(row_sum), mask=query < tokens)
