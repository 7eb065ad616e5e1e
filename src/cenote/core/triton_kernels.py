# mypy: ignore-errors
"""Triton kernels of absorbed pooling; `cenote.core.fused_pool` starts them. Needs the package triton.

A set is cut into chunks. A program owns one chunk and up to `BLOCK_Q` queries, walks over the chunk in tiles of `BLOCK_N` whole
tokens, and holds its sums over the tokens, `[BLOCK_Q, BLOCK_D]` in float32, in registers: each tile is read once and used
for the scores and for the sums. Sets of several chunks are joined by their maxima and masses (`join_chunks`).

Tokens are `x[set * set_stride + n * row_stride + d]`, of a ragged batch `x[(offsets[set] + n) * row_stride + d]`. `NORM_KEYS`,
`NORM_VALUES`: scores, sums take `(x_n - mean(x_n)) / sqrt(var(x_n) + eps)` in place of `x_n`.
"""

import triton
import triton.language as tl


@triton.jit
def _chunk(chunk_id, offsets, first_chunk, chunk_set, tokens, chunk, chunks_per_set, RAGGED: tl.constexpr):
    """`(set, number of the chunk in it, how many there are, row of its first token, first and last token)` of a chunk."""
    if RAGGED:
        owner = tl.load(chunk_set + chunk_id).to(tl.int64)
        begin = tl.load(offsets + owner)
        length = tl.load(offsets + owner + 1) - begin
        first = tl.load(first_chunk + owner)
        number = chunk_id - first
        count = tl.load(first_chunk + owner + 1) - first
    else:
        owner = (chunk_id // chunks_per_set).to(tl.int64)
        begin = owner * tokens
        length = tokens
        number = chunk_id % chunks_per_set
        count = chunks_per_set
    start = number * chunk
    stop = tl.minimum(start + chunk, length)
    return owner, number, count, begin, start, stop


@triton.jit
def _tile(
    x, base, n, stop, row_stride, mask, begin, dim, eps, BLOCK_D: tl.constexpr, NORM: tl.constexpr, MASK: tl.constexpr
):
    """`(which tokens are real, tokens, normalised tokens, 1/sigma)` of one tile; what is not real is read as 0."""
    d = tl.arange(0, BLOCK_D)
    real = n < stop
    if MASK:
        real = real & (tl.load(mask + begin + n, mask=real, other=0) != 0)
    tile = tl.load(
        x + base + n.to(tl.int64)[:, None] * row_stride + d[None, :], mask=real[:, None] & (d < dim)[None, :], other=0.0
    )
    if NORM:
        wide = tile.to(tl.float32)
        mean = tl.sum(wide, 1) / dim
        centred = tl.where((d < dim)[None, :], wide - mean[:, None], 0.0)
        inverse_std = tl.math.rsqrt(tl.sum(centred * centred, 1) / dim + eps)
        normalised = (centred * inverse_std[:, None]).to(tile.dtype)
    else:
        inverse_std = tl.zeros_like(n).to(tl.float32)
        normalised = tile
    return real, tile, normalised, inverse_std


@triton.jit
def _scores(q, keys, real, bias, begin, n, scale, BIAS: tl.constexpr, PRECISION: tl.constexpr):
    """`scale q . k + bias` as `[queries, tokens]`, -inf where no token is."""
    s = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale
    if BIAS:
        s += tl.load(bias + begin + n, mask=real, other=0.0).to(tl.float32)[None, :]
    return tl.where(real[None, :], s, float("-inf"))


@triton.jit
def forward(
    x,
    q,
    bias,
    mask,
    offsets,
    first_chunk,
    chunk_set,
    y,
    lse,
    part,
    part_top,
    part_mass,
    set_stride,
    row_stride,
    q_set_stride,
    batch,
    queries,
    dim,
    tokens,
    chunk,
    chunks_per_set,
    q_blocks,
    scale,
    eps,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RAGGED: tl.constexpr,
    SEVERAL: tl.constexpr,
    MASK: tl.constexpr,
    BIAS: tl.constexpr,
    NORM_KEYS: tl.constexpr,
    NORM_VALUES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`y = sum_n softmax_n(s)_n v_n` and the logsumexp of `s`, of one chunk by online softmax.

    `SEVERAL`: sets may have several chunks, whose parts `join_chunks` joins.
    """
    # the blocks of queries of one chunk are neighbours, so that they find its tokens in the cache
    chunk_id = tl.program_id(0) // q_blocks
    if RAGGED:  # noqa: SIM102 (what is not ragged must not be compiled)
        if chunk_id >= tl.load(first_chunk + batch):
            return
    owner, _number, count, begin, start, stop = _chunk(
        chunk_id, offsets, first_chunk, chunk_set, tokens, chunk, chunks_per_set, RAGGED
    )
    rows = (tl.program_id(0) % q_blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    inside = (rows < queries)[:, None] & (d < dim)[None, :]
    flat = rows[:, None] * dim + d[None, :]
    query = tl.load(q + owner * q_set_stride + flat, mask=inside, other=0.0)
    base = begin * row_stride if RAGGED else owner * set_stride

    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_Q], tl.float32)
    total = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for at in range(start, stop, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        real, tile, normalised, _ = _tile(
            x, base, n, stop, row_stride, mask, begin, dim, eps, BLOCK_D, NORM_KEYS or NORM_VALUES, MASK
        )
        s = _scores(query, normalised if NORM_KEYS else tile, real, bias, begin, n, scale, BIAS, PRECISION)
        now = tl.maximum(top, tl.max(s, 1))
        finite = tl.where(now == float("-inf"), 0.0, now)
        shrink = tl.exp(top - finite)
        w = tl.exp(s - finite[:, None])
        mass = mass * shrink + tl.sum(w, 1)
        total = total * shrink[:, None] + tl.dot(
            w.to(tile.dtype), normalised if NORM_VALUES else tile, input_precision=PRECISION
        )
        top = now

    if (not SEVERAL) or count == 1:
        out = total / tl.where(mass > 0, mass, 1.0)[:, None]
        tl.store(y + owner * queries * dim + flat, out.to(y.dtype.element_ty), mask=inside)
        log = tl.where(mass > 0, top + tl.log(tl.where(mass > 0, mass, 1.0)), 0.0)
        tl.store(lse + owner * queries + rows, log, mask=rows < queries)
    else:
        piece = chunk_id.to(tl.int64) * queries
        tl.store(part + piece * dim + flat, total, mask=inside)
        tl.store(part_top + piece + rows, top, mask=rows < queries)
        tl.store(part_mass + piece + rows, mass, mask=rows < queries)


@triton.jit
def join_chunks(
    y,
    lse,
    part,
    part_top,
    part_mass,
    first_chunk,
    queries,
    dim,
    chunks_per_set,
    BLOCK_D: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """One query of one set, from its chunks."""
    owner = (tl.program_id(0) // queries).to(tl.int64)
    row = tl.program_id(0) % queries
    if RAGGED:
        first = tl.load(first_chunk + owner)
        count = tl.load(first_chunk + owner + 1) - first
    else:
        first = owner * chunks_per_set
        count = chunks_per_set
    if count == 1:
        return
    d = tl.arange(0, BLOCK_D)
    top = tl.full([1], float("-inf"), tl.float32)
    mass = tl.zeros([1], tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    for i in range(count):
        piece = (first + i).to(tl.int64) * queries + row
        its_top = tl.load(part_top + piece)
        now = tl.maximum(top, its_top)
        finite = tl.where(now == float("-inf"), 0.0, now)
        shrink, share = tl.exp(top - finite), tl.exp(its_top - finite)
        mass = mass * shrink + tl.load(part_mass + piece) * share
        total = total * shrink + tl.load(part + piece * dim + d, mask=d < dim, other=0.0) * share
        top = now
    out = total / tl.where(mass > 0, mass, 1.0)
    tl.store(y + (owner * queries + row) * dim + d, out.to(y.dtype.element_ty), mask=d < dim)
    log = tl.where(mass > 0, top + tl.log(tl.where(mass > 0, mass, 1.0)), 0.0)
    tl.store(lse + owner * queries + row + tl.arange(0, 1), log)


@triton.jit
def backward_queries(
    x,
    q,
    bias,
    mask,
    offsets,
    first_chunk,
    chunk_set,
    lse,
    gy,
    delta,
    gq,
    set_stride,
    row_stride,
    q_set_stride,
    chunk_count,
    batch,
    queries,
    dim,
    tokens,
    chunk,
    chunks_per_set,
    q_blocks,
    programs,
    scale,
    eps,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RAGGED: tl.constexpr,
    MASK: tl.constexpr,
    BIAS: tl.constexpr,
    NORM_KEYS: tl.constexpr,
    NORM_VALUES: tl.constexpr,
    PER_SET: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`gq = scale sum_n ds_n k_n` with `ds_n = p_n (gy . v_n - delta)`, `p_n = exp(s_n - lse)`; `delta = gy . y - glse`.

    Queries that all sets share: each program takes every `programs`-th chunk and keeps one sum for all of them. A query per
    set: one program and one sum per chunk.
    """
    program = tl.program_id(0) // q_blocks
    rows = (tl.program_id(0) % q_blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    inside = (rows < queries)[:, None] & (d < dim)[None, :]
    flat = rows[:, None] * dim + d[None, :]
    last = chunk_count
    if RAGGED:
        last = tl.load(first_chunk + batch).to(tl.int32)
    query = tl.load(q + flat, mask=inside, other=0.0)
    total = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for chunk_id in range(program, last, programs):
        owner, _number, _count, begin, start, stop = _chunk(
            chunk_id, offsets, first_chunk, chunk_set, tokens, chunk, chunks_per_set, RAGGED
        )
        if PER_SET:
            query = tl.load(q + owner * q_set_stride + flat, mask=inside, other=0.0)
        upstream = tl.load(gy + owner * queries * dim + flat, mask=inside, other=0.0)
        log = tl.load(lse + owner * queries + rows, mask=rows < queries, other=0.0)
        shift = tl.load(delta + owner * queries + rows, mask=rows < queries, other=0.0)
        base = begin * row_stride if RAGGED else owner * set_stride
        for at in range(start, stop, BLOCK_N):
            n = at + tl.arange(0, BLOCK_N)
            real, tile, normalised, _ = _tile(
                x, base, n, stop, row_stride, mask, begin, dim, eps, BLOCK_D, NORM_KEYS or NORM_VALUES, MASK
            )
            keys = normalised if NORM_KEYS else tile
            s = _scores(query, keys, real, bias, begin, n, scale, BIAS, PRECISION)
            p = tl.exp(s - log[:, None])
            gw = tl.dot(upstream, tl.trans(normalised if NORM_VALUES else tile), input_precision=PRECISION)
            gs = p * (gw - shift[:, None])
            total += tl.dot(gs.to(tile.dtype), keys, input_precision=PRECISION)
    tl.store(gq + program.to(tl.int64) * queries * dim + flat, total * scale, mask=inside)


@triton.jit
def _through_norm(g, normalised, inverse_std, dim, BLOCK_D: tl.constexpr):
    """The gradient of a token from that of its normalised form."""
    inside = (tl.arange(0, BLOCK_D) < dim)[None, :]
    wide = normalised.to(tl.float32)
    mean = tl.sum(g, 1) / dim
    along = tl.sum(g * wide, 1) / dim
    return tl.where(inside, inverse_std[:, None] * (g - mean[:, None] - wide * along[:, None]), 0.0)


@triton.jit
def backward_tokens(
    x,
    q,
    bias,
    mask,
    offsets,
    first_chunk,
    chunk_set,
    lse,
    gy,
    delta,
    gx,
    gbias,
    set_stride,
    row_stride,
    q_set_stride,
    batch,
    queries,
    dim,
    tokens,
    chunk,
    chunks_per_set,
    q_blocks,
    scale,
    eps,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RAGGED: tl.constexpr,
    MASK: tl.constexpr,
    BIAS: tl.constexpr,
    NORM_KEYS: tl.constexpr,
    NORM_VALUES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`gx_n = sum_h (p_nh gy_h + scale ds_nh q_h)` and `gbias_n = sum_h ds_nh` of the tokens of a chunk; `gx` is contiguous."""
    chunk_id = tl.program_id(0)
    if RAGGED:  # noqa: SIM102 (what is not ragged must not be compiled)
        if chunk_id >= tl.load(first_chunk + batch):
            return
    owner, _number, _count, begin, start, stop = _chunk(
        chunk_id, offsets, first_chunk, chunk_set, tokens, chunk, chunks_per_set, RAGGED
    )
    d = tl.arange(0, BLOCK_D)
    base = begin * row_stride if RAGGED else owner * set_stride
    for at in range(start, stop, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        real, tile, normalised, inverse_std = _tile(
            x, base, n, stop, row_stride, mask, begin, dim, eps, BLOCK_D, NORM_KEYS or NORM_VALUES, MASK
        )
        keys = normalised if NORM_KEYS else tile
        values = normalised if NORM_VALUES else tile
        g_keys = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        g_values = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        g_bias = tl.zeros([BLOCK_N], tl.float32)
        for block in range(q_blocks):
            rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
            inside = (rows < queries)[:, None] & (d < dim)[None, :]
            flat = rows[:, None] * dim + d[None, :]
            query = tl.load(q + owner * q_set_stride + flat, mask=inside, other=0.0)
            upstream = tl.load(gy + owner * queries * dim + flat, mask=inside, other=0.0)
            log = tl.load(lse + owner * queries + rows, mask=rows < queries, other=0.0)
            shift = tl.load(delta + owner * queries + rows, mask=rows < queries, other=0.0)
            s = _scores(query, keys, real, bias, begin, n, scale, BIAS, PRECISION)
            # rows beyond the last query meet gradients of 0
            p = tl.where((rows < queries)[:, None], tl.exp(s - log[:, None]), 0.0)
            gw = tl.dot(upstream, tl.trans(values), input_precision=PRECISION)
            gs = p * (gw - shift[:, None])
            g_bias += tl.sum(gs, 0)
            g_keys += tl.dot(tl.trans(gs * scale).to(tile.dtype), query, input_precision=PRECISION)
            if NORM_KEYS == NORM_VALUES:
                g_keys += tl.dot(tl.trans(p).to(tile.dtype), upstream, input_precision=PRECISION)
            else:
                g_values += tl.dot(tl.trans(p).to(tile.dtype), upstream, input_precision=PRECISION)
        if NORM_KEYS:
            g_keys = _through_norm(g_keys, normalised, inverse_std, dim, BLOCK_D)
        if NORM_VALUES and not NORM_KEYS:
            g_values = _through_norm(g_values, normalised, inverse_std, dim, BLOCK_D)
        g = g_keys
        if NORM_KEYS != NORM_VALUES:
            g = g_keys + g_values
        place = (begin + n).to(tl.int64)
        # padded slots get zeros
        there = n < stop
        g = tl.where(real[:, None], g, 0.0)
        tl.store(
            gx + place[:, None] * dim + d[None, :],
            g.to(gx.dtype.element_ty),
            mask=there[:, None] & (d < dim)[None, :],
        )
        if BIAS:
            tl.store(gbias + place, tl.where(real, g_bias, 0.0), mask=there)
