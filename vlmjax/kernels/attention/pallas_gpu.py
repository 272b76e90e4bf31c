"""Pallas kernels in Triton for GPUs: attention that visits only keys of the own segment.

In a packed row every query sees one interval of keys: its segment, up to itself if causal. `plan`
finds these intervals on the device, and for each block of queries the interval of key tiles that
holds them; a program of the grid takes one block of one head and loops over its tiles, so work
follows the sum of n_i^2. Inside that interval is the one of tiles that all queries of the block see
whole, which are visited without a mask. Softmax is online and in base 2, as in FlashAttention-2
(arXiv:2307.08691); logits never leave the chip. The backward pass is one kernel of the same shape
for dq, and one that takes a block of keys and loops over query tiles for dk and dv; nothing is
added to memory twice, so gradients are deterministic.

jax 0.12 still has the Triton backend of Pallas but calls it deprecated; `blockwise` does the same
on any backend.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

NEG = -1e30
BLOCKS = (32, 64, 128)
ALL = slice(None)


class Plan(NamedTuple):
    """The work of one packed layout, shared by all layers that use it."""

    spans: jax.Array  # i32[B, 2, T] of each query the first key and the one after its last
    # Tiles are half a block wide. Visited are tiles [0] to [3], of which [1] to [2] need no mask.
    q_tiles: jax.Array  # i32[B, n, 4] of each query block, key tiles
    kv_tiles: jax.Array  # i32[B, m, 4] of each key block, query tiles


def plan(q_segments, kv_segments, q_start, block, causal):
    """Returns the `Plan` of packed rows.

    Args:
      q_segments: i32[B, T], 1, 2, ... in order with padding (0) at the end.
      kv_segments: i32[B, S].
      q_start: i32[], the slot of the row where the queries start.
      block: slots in a block, one of `BLOCKS`.
      causal: whether queries see only earlier keys.
    """
    if block not in BLOCKS:
        raise ValueError(
            f"attention block={block} is not one of {BLOCKS}: a GPU program keeps a block in "
            "registers; choose 128, or less for rows of few blocks"
        )
    B, T = q_segments.shape
    q = jnp.pad(q_segments, ((0, 0), (0, -T % block)))
    kv = jnp.pad(kv_segments, ((0, 0), (0, -kv_segments.shape[1] % block)))
    slots = kv.shape[1]
    kv = jnp.where(kv > 0, kv, jnp.iinfo(jnp.int32).max)
    first, stop = (_search(kv, q, side) for side in ("left", "right"))
    if causal:
        stop = jnp.clip(q_start + jnp.arange(q.shape[1]) + 1, first, stop)
    # Past every key, so that both stay sorted.
    first, stop = (jnp.where(q > 0, x, slots).astype(jnp.int32) for x in (first, stop))
    edges = jnp.broadcast_to(jnp.arange(0, slots, block), (B, slots // block))
    starts, ends = first.reshape(B, -1, block), stop.reshape(B, -1, block)
    seen_to = jnp.where(ends > starts, ends, 0).max(-1)
    return Plan(
        jnp.stack([first, stop], 1),
        _tiles(starts.min(-1), starts.max(-1), ends.min(-1), seen_to, block // 2),
        _tiles(
            _search(stop, edges, "right"),
            _search(stop, edges + block, "left"),
            _search(first, edges, "right"),
            _search(first, edges + block, "left"),
            block // 2,
        ),
    )


def _search(rows, values, side):
    """Row by row `searchsorted`: [B, S], [B, n] -> i32[B, n]."""
    return jax.vmap(functools.partial(jnp.searchsorted, side=side))(rows, values)


def _tiles(start, full_start, full_stop, stop, step):
    """Returns i32[B, n, 4]: tiles for slots [start, stop), of them those within the full part."""
    low = start // step
    high = jnp.where(stop > start, pl.cdiv(stop, step), low)
    full_low = jnp.clip(pl.cdiv(full_start, step), low, high)
    full_high = jnp.clip(full_stop // step, full_low, high)
    return jnp.stack([low, full_low, full_high, high], -1).astype(jnp.int32)


def _pieces(size):
    """Cuts a head into widths that are powers of two and at least 16: 72 -> (0, 64), (64, 16)."""
    pieces, at = [], 0
    while at < size:
        pieces.append((at, max(16, 1 << (size - at).bit_length() - 1)))
        at = sum(pieces[-1])
    return pieces


def _columns(size):
    """Returns (slice, mask or None for all) of each piece."""
    for at, width in _pieces(size):
        mask = None if at + width <= size else (at + jnp.arange(width) < size)[None]
        yield pl.ds(at, width), mask


def _load(ref, rows, size):
    """Returns the pieces [rows, width] of a head, 0 past its size."""
    return [
        plgpu.load(ref.at[rows, at], mask=mask, other=None if mask is None else 0.0)
        for at, mask in _columns(size)
    ]


def _store(ref, pieces, size):
    for (at, mask), x in zip(_columns(size), pieces, strict=True):
        plgpu.store(ref.at[:, at], x.astype(ref.dtype), mask=mask)


def _dot(a, b, contract=(1, 0)):
    """Returns the f32 product of two matrices, contracting axis contract[0] of a and [1] of b."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _inner(a, b):
    """Returns f32[block, step]: all inner products of two lists of pieces."""
    return functools.reduce(jnp.add, (_dot(x, y, (1, 1)) for x, y in zip(a, b, strict=True)))


def _add_products(acc, weights, pieces):
    return [a + _dot(weights.astype(x.dtype), x) for a, x in zip(acc, pieces, strict=True)]


class _Sizes(NamedTuple):
    """What is static about a call."""

    rows: int
    heads: int
    group: int  # query heads that read one key-value head
    size: int
    slots: int  # of queries and of keys in a row, padded to whole blocks
    keys: int
    block: int
    width: int  # of the part of a block that a program takes

    @property
    def step(self):
        """The width of a tile."""
        return self.width // 2

    @property
    def scale(self):
        return self.size**-0.5


def _sizes(q, k, block):
    (B, T, N, H), (_, S, K, _) = q.shape, k.shape
    slots, keys = (n + -n % block for n in (T, S))
    # There are no tensor cores for f32, and the registers of wider products overflow.
    width = min(block, 32) if q.dtype == jnp.float32 else block
    return _Sizes(B, N, N // K, H, slots, keys, block, width)


def _logits(a, b, s, masked, span, first_key, q_axis):
    """Returns f32[width, step] logits in base 2, `NEG` where a query may not look.

    Args:
      a, b: pieces of queries and keys, or keys and queries.
      masked: whether there is such a place.
      span: (first, stop) of the queries, which lie along q_axis.
      first_key: the slot of the first key.
    """
    logits = _inner(a, b) * (s.scale * math.log2(math.e))
    if not masked:
        return logits
    first, stop = (jnp.expand_dims(x, 1 - q_axis) for x in span)
    slot = jnp.expand_dims(first_key + jnp.arange(logits.shape[1 - q_axis]), q_axis)
    return jnp.where((slot >= first) & (slot < stop), logits, NEG)


def _for_tiles(s, tiles, visit, carry):
    """Runs carry = visit(masked, first slot, carry) for every tile of the program's block."""
    bounds = [tiles[i] * (s.block // s.width) for i in range(4)]
    for i, masked in enumerate((True, False, True)):

        def visit_tile(j, carry, masked=masked):
            return visit(masked, j * s.step, carry)

        carry = jax.lax.fori_loop(bounds[i], bounds[i + 1], visit_tile, carry)
    return carry


def _zeros(s):
    return [jnp.zeros((s.width, width), jnp.float32) for _, width in _pieces(s.size)]


def _forward_kernel(q, k, v, spans, tiles, out, lse, *, s):
    query, span = _load(q, ALL, s.size), (spans[0, :], spans[1, :])

    def visit(masked, first_key, carry):
        acc, top, total = carry
        at = pl.ds(first_key, s.step)
        logits = _logits(query, _load(k, at, s.size), s, masked, span, first_key, 0)
        new = jnp.maximum(top, logits.max(1))
        p, shrink = jnp.exp2(logits - new[:, None]), jnp.exp2(top - new)
        acc = _add_products([a * shrink[:, None] for a in acc], p, _load(v, at, s.size))
        return acc, new, total * shrink + p.sum(1)

    top, total = (jnp.full(s.width, x, jnp.float32) for x in (NEG, 0))
    acc, top, total = _for_tiles(s, tiles, visit, (_zeros(s), top, total))
    # A query whose first tiles show it nothing adds 2^0 for each key there; the first logit it
    # does see shrinks that to 0. One that sees nothing at all gives 0, and no weight backward.
    alive = span[1] > span[0]
    total = jnp.where(alive, total, 1)
    share = jnp.where(alive, 1 / total, 0)
    _store(out, [a * share[:, None] for a in acc], s.size)
    lse[...] = jnp.where(alive, top + jnp.log2(total), -NEG)


def _query_kernel(q, k, v, g, lse, delta, spans, tiles, dq, *, s):
    query, grad, span = _load(q, ALL, s.size), _load(g, ALL, s.size), (spans[0, :], spans[1, :])
    lse, delta = lse[...], delta[...]

    def visit(masked, first_key, acc):
        at = pl.ds(first_key, s.step)
        key = _load(k, at, s.size)
        p = jnp.exp2(_logits(query, key, s, masked, span, first_key, 0) - lse[:, None])
        ds = p * (_inner(grad, _load(v, at, s.size)) - delta[:, None])
        return _add_products(acc, ds, key)

    acc = _for_tiles(s, tiles, visit, _zeros(s))
    _store(dq, [a * s.scale for a in acc], s.size)


def _key_kernel(q, k, v, g, lse, delta, spans, tiles, dk, dv, *, s):
    key, value = _load(k, ALL, s.size), _load(v, ALL, s.size)
    first_key = pl.program_id(0) * s.width

    def visit(masked, first_query, carry):
        dk_acc, dv_acc = carry
        at = pl.ds(first_query, s.step)
        query, grad, span = _load(q, at, s.size), _load(g, at, s.size), (spans[0, at], spans[1, at])
        p = jnp.exp2(_logits(key, query, s, masked, span, first_key, 1) - lse[at][None])
        ds = p * (_inner(value, grad) - delta[at][None])
        return _add_products(dk_acc, ds, query), _add_products(dv_acc, p, grad)

    dk_acc, dv_acc = _for_tiles(s, tiles, visit, (_zeros(s), _zeros(s)))
    _store(dk, [a * s.scale for a in dk_acc], s.size)
    _store(dv, dv_acc, s.size)


def _specs(s, slots, group, whole):
    """Returns the block specs of arrays [B, slots, heads, H], [B, heads, slots], [B, 2, slots].

    Args:
      s: `_Sizes`.
      slots: of the row.
      group: query heads on one head of the array; the grid counts query heads.
      whole: whether a program reads the whole row, not its own block.
    """
    shape = None, slots if whole else s.width, None, sum(_pieces(s.size)[-1])

    def at(i):
        return 0 if whole else i

    return (
        pl.BlockSpec(shape, lambda i, n, b: (b, at(i), jax.lax.div(n, group), 0)),
        pl.BlockSpec((None, None, shape[1]), lambda i, n, b: (b, n, at(i))),
        pl.BlockSpec((None, 2, shape[1]), lambda i, n, b: (b, 0, at(i))),
    )


def _call(kernel, name, s, slots, inputs, in_specs, outputs, out_specs, stages):
    """Runs a kernel for every block of `slots` and query head; interpreted on a CPU.

    Args:
      inputs: arrays, the last of them tiles.
      outputs: (shape, dtype) of each.
      stages: tiles under way at a time.
    """
    parts = s.block // s.width
    tiles = pl.BlockSpec((None, None, 4), lambda i, n, b: (b, jax.lax.div(i, parts), 0))
    warps = max(4, s.width // 16)

    def run(*inputs, interpret):
        return pl.pallas_call(
            functools.partial(kernel, s=s),
            grid=(slots // s.width, s.heads, s.rows),
            in_specs=[*in_specs, tiles],
            out_specs=out_specs,
            out_shape=[jax.ShapeDtypeStruct(*output) for output in outputs],
            compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
            interpret=interpret,
            name=name,
        )(*inputs)

    on = functools.partial
    return jax.lax.platform_dependent(
        *inputs, cpu=on(run, interpret=True), default=on(run, interpret=False)
    )


def _pad(x, slots):
    return jnp.pad(x, ((0, 0), (0, slots - x.shape[1]), (0, 0), (0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attention(q, k, v, work, spec, causal):
    """Returns [B, T, N, H]: the same function as `ref.masked_attention` under `ref.segment_mask`.

    Args:
      q: [B, T, N, H].
      k, v: [B, S, K, H].
      work: the `Plan` made with the same block and causal.
      spec: an `api.AttentionSpec`.
      causal: static.
    """
    return _forward(q, k, v, work, spec, causal)[0]


def _forward(q, k, v, work, spec, causal):
    s = _sizes(q, k, spec.block)
    rows, stats, spans = _specs(s, s.slots, 1, whole=False)
    kv = _specs(s, s.keys, s.group, whole=True)[0]
    out, lse = _call(
        _forward_kernel,
        "segment_attention",
        s,
        s.slots,
        (_pad(q, s.slots), _pad(k, s.keys), _pad(v, s.keys), work.spans, work.q_tiles),
        (rows, kv, kv, spans),
        [((s.rows, s.slots, s.heads, s.size), q.dtype), ((s.rows, s.heads, s.slots), jnp.float32)],
        [rows, stats],
        stages=3,
    )
    out, lse = checkpoint_name(out[:, : q.shape[1]], "attention"), checkpoint_name(lse, "attention")
    return out, (q, k, v, work, out, lse)


def _backward(spec, causal, residuals, g):
    q, k, v, work, out, lse = residuals
    s, (_, T, _, H), (B, S, K, _) = _sizes(q, k, spec.block), q.shape, k.shape
    delta = jnp.einsum("btnh,btnh->bnt", g, out, preferred_element_type=jnp.float32)
    delta = jnp.pad(delta, ((0, 0), (0, 0), (0, s.slots - T)))
    arrays = _pad(q, s.slots), _pad(k, s.keys), _pad(v, s.keys), _pad(g, s.slots)
    inputs = *arrays, lse, delta, work.spans
    rows, stats, spans = _specs(s, s.slots, 1, whole=False)
    kv = _specs(s, s.keys, s.group, whole=True)[0]
    (dq,) = _call(
        _query_kernel,
        "segment_attention_dq",
        s,
        s.slots,
        (*inputs, work.q_tiles),
        (rows, kv, kv, rows, stats, stats, spans),
        [((s.rows, s.slots, s.heads, H), q.dtype)],
        [rows],
        stages=3,
    )
    # A program for each query head: even work, and the heads of a group are added up after.
    rows, stats, spans = _specs(s, s.slots, 1, whole=True)
    kv, kv_grad = (_specs(s, s.keys, group, whole=False)[0] for group in (s.group, 1))
    dkv = _call(
        _key_kernel,
        "segment_attention_dkv",
        s,
        s.keys,
        (*inputs, work.kv_tiles),
        (rows, kv, kv, rows, stats, stats, spans),
        [((s.rows, s.keys, s.heads, H), k.dtype if s.group == 1 else jnp.float32)] * 2,
        [kv_grad] * 2,
        stages=2,
    )
    dk, dv = (x[:, :S].reshape(B, S, K, s.group, H).sum(3).astype(k.dtype) for x in dkv)
    return dq[:, :T], dk, dv, None


attention.defvjp(_forward, _backward)
