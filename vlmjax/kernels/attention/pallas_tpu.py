"""Pallas TPU kernels: attention over a run-time list of block pairs, forward and backward.

The pairs of blocks that share a segment are listed on the device and prefetched into scalar memory;
the grid is as long as the list, so one compiled program does the work that its segments need and no
other. Arrays are [heads * head size, slots]: with slots along lanes a head of 72 channels fills its
tiles and is cut out without moving lanes, and XLA makes projections in that layout at no cost. The
rotary positions are applied here, so queries and keys cross HBM once. Logits never leave VMEM.
Softmax is online and in base 2, as in FlashAttention (arXiv:2205.14135); the backward pass is one
kernel of five products, which adds to dq in HBM by its own copies.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vlmjax.kernels.attention.worklist import FIRST, LAST, NEW, WORK, key_of, plan, query_of

__all__ = ["attention", "plan"]

NEG = -1e30
LANES, SUBLANES = 128, 16  # of a tile of bfloat16
VMEM_BYTES = 64 * 2**20
HEADS = 16  # of a grid step
# Heads whose products are under way together. One after the other, each would wait for the matrix
# units and these for it: 1.7 times the cycles of the forward pass.
BATCH = 4
INTERPRET = False


def _heads(q_heads, kv_heads, size):
    """Returns how many (query, key-value) heads a grid step takes.

    As many as pay for the step and leave room in VMEM, in whole tiles of [heads * size, slots].
    """
    group, fits = q_heads // kv_heads, [kv_heads]
    if q_heads > HEADS:
        fits += [
            kv
            for kv in range(1, HEADS // group + 1)
            if kv_heads % kv == 0 and kv * size % SUBLANES == 0
        ]
    return fits[-1] * group, fits[-1]


def _dot(a, b, contract):
    """Returns the f32 product of two matrices, contracting axis contract[0] of a and [1] of b."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


class _Sizes(NamedTuple):
    """What is static about a call; `heads` and `kv_heads` are those of a grid step."""

    block: int
    rows: int
    n: int  # query blocks of a row
    m: int  # key blocks of a row
    groups: int
    heads: int
    kv_heads: int
    size: int
    causal: bool
    segment: int

    def head(self, h):
        """The channels of query or key-value head h."""
        return slice(h * self.size, (h + 1) * self.size)

    def kv_head(self, h):
        """The key-value head that query head h reads."""
        return h * self.kv_heads // self.heads

    def batches(self):
        """Returns lists of (number in its list, head) of heads that are worked on together."""
        return [
            list(enumerate(range(first, min(first + BATCH, self.heads))))
            for first in range(0, self.heads, BATCH)
        ]

    @property
    def scale(self):
        return self.size**-0.5

    @property
    def log2_scale(self):
        """That of queries whose logits are a power of two's."""
        return self.scale * math.log2(math.e)


def _turn(x, cos, sin, back=False):
    """Rotates the first channels of x[H, slots] in f32, as `ref.rotate`; `back` is the inverse."""
    x = x.astype(jnp.float32)
    if cos is None:
        return x
    cos, sin = cos[...], -sin[...] if back else sin[...]
    half = cos.shape[0]
    a, b = x[:half], x[half : 2 * half]
    rest = [x[2 * half :]] if 2 * half < len(x) else []
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, *rest], 0)


def _column(row):
    """i32[1, block] -> i32[block, 1]."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def _bias(s, entry, q_start, q_segments, k_segments):
    """Returns f32[keys, queries] of a pair of blocks: 0 where a query may look, else `NEG`."""
    mask = (q_segments[...] == _column(k_segments[...])) & (q_segments[...] > 0)
    if s.causal:
        slot = functools.partial(jax.lax.broadcasted_iota, jnp.int32, (s.block, s.block))
        q_slot = query_of(entry) % s.n * s.block + q_start + slot(1)
        mask &= q_slot >= key_of(entry) % s.m * s.block + slot(0)
    return jnp.where(mask, 0.0, NEG)


def _forward_kernel(
    pairs, start, q, k, v, q_segments, k_segments, q_turn, k_turn,
    out, lse, bias, acc, top, total, queries, keys, logits, weights, shrink, *, s,
):  # fmt: skip
    entry = pairs(pl.program_id(2))

    @pl.when(entry & FIRST != 0)
    def _():
        acc[...] = jnp.zeros_like(acc)
        top[...] = jnp.full_like(top, NEG)
        total[...] = jnp.zeros_like(total)
        for h in range(s.heads):
            queries[h] = (_turn(q[s.head(h)], *q_turn) * s.log2_scale).astype(q.dtype)

    @pl.when(entry & WORK != 0)
    def _():
        bias[...] = _bias(s, entry, start, q_segments, k_segments)
        for kv in range(s.kv_heads):
            keys[kv] = _turn(k[s.head(kv)], *k_turn).astype(k.dtype).T
        for heads in s.batches():
            for i, h in heads:
                logits[i] = _dot(keys[s.kv_head(h)], queries[h], (1, 0)) + bias[...]
            for i, h in heads:
                new = jnp.maximum(top[h], logits[i].max(0, keepdims=True))
                p, shrink[i] = jnp.exp2(logits[i] - new), jnp.exp2(top[h] - new)
                total[h] = total[h] * shrink[i] + p.sum(0, keepdims=True)
                top[h] = new
                weights[i] = p.astype(v.dtype)
            for i, h in heads:
                at, kv_at = s.head(h), s.head(s.kv_head(h))
                acc[at] = acc[at] * shrink[i] + _dot(v[kv_at], weights[i], (1, 0))

    @pl.when(entry & LAST != 0)
    def _():
        alive = top[...] > NEG / 2  # padding sees no key
        sums = jnp.where(alive, total[...], 1)
        share = jnp.where(alive, 1 / sums, 0)
        for h in range(s.heads):
            acc[s.head(h)] *= share[h]
        out[...] = acc[...].astype(out.dtype)
        lse[...] = jnp.where(alive, top[...] + jnp.log2(sums), 0)


def _backward_kernel(
    pairs, start, q, k, v, q_segments, k_segments, out, lse, g, q_turn, k_turn,
    dq, dk, dv, bias, keys, keys_t, values_t, queries, logits, d_weights, weights, d_logits,
    dk_acc, dv_acc, dq_part, dq_new, dq_old, sems, *, s,
):  # fmt: skip
    step = pl.program_id(2)
    entry = pairs(step)
    reading, writing = sems.at[0], sems.at[1]

    def dq_block(entry):
        width, (row, column) = s.heads * s.size, _split(query_of(entry), s.rows, s.n)
        channels = pl.ds(pl.multiple_of(pl.program_id(1) * width, SUBLANES), width)
        slots = pl.ds(pl.multiple_of(column * s.block, s.block), s.block)
        return dq.at[pl.program_id(0), row, channels, slots]

    def write(step):
        return pltpu.make_async_copy(dq_new, dq_block(pairs(step)), writing)

    read = pltpu.make_async_copy(dq_block(entry), dq_old, reading)
    before = jnp.maximum(step - 1, 0)

    def after_the_write_before():
        """One write is under way at most, and none while its block may be read again."""

        @pl.when((step > 0) & (pairs(before) & WORK != 0))
        def _():
            write(before).wait()

    @pl.when(entry & FIRST != 0)
    def _():
        dk_acc[...] = jnp.zeros_like(dk_acc)
        dv_acc[...] = jnp.zeros_like(dv_acc)
        for kv in range(s.kv_heads):
            turned = _turn(k[s.head(kv)], *k_turn).astype(k.dtype)
            keys[kv], keys_t[kv], values_t[kv] = turned, turned.T, v[s.head(kv)].T

    @pl.when(entry & WORK == 0)
    def _():
        after_the_write_before()

    @pl.when(entry & WORK != 0)
    def _():
        bias[...] = _bias(s, entry, start, q_segments, k_segments)
        for heads in s.batches():
            for i, h in heads:
                at, kv = s.head(h), s.kv_head(h)
                queries[i] = (_turn(q[at], *q_turn) * s.log2_scale).astype(q.dtype)
                logits[i] = _dot(keys_t[kv], queries[i], (1, 0))
                d_weights[i] = _dot(values_t[kv], g[at], (1, 0))
            for i, h in heads:
                at = s.head(h)
                p = jnp.exp2(logits[i] + bias[...] - lse[h])
                delta = g[at].astype(jnp.float32) * out[at].astype(jnp.float32)
                weights[i] = p.astype(g.dtype)
                d_logits[i] = (p * (d_weights[i] - delta.sum(0, keepdims=True))).astype(q.dtype)
            for i, h in heads:
                at, kv = s.head(h), s.kv_head(h)
                dv_acc[s.head(kv)] += _dot(g[at], weights[i], (1, 1))
                dk_acc[s.head(kv)] += _dot(queries[i], d_logits[i], (1, 1))
                dq_turned = _dot(keys[kv], d_logits[i], (1, 0)) * s.scale
                dq_part[at] = _turn(dq_turned, *q_turn, back=True)
            if heads[0][1] == 0:
                after_the_write_before()
                pl.when(entry & NEW == 0)(read.start)

        @pl.when(entry & NEW != 0)
        def _():
            dq_new[...] = dq_part[...]

        @pl.when(entry & NEW == 0)
        def _():
            read.wait()
            dq_new[...] = dq_part[...] + dq_old[...]

        write(step).start()
        pl.when(step == pl.num_programs(2) - 1)(write(step).wait)

    @pl.when(entry & LAST != 0)
    def _():
        for kv in range(s.kv_heads):
            at = s.head(kv)
            # The queries were scaled for logits in base 2.
            dk_acc[at] = _turn(dk_acc[at] * math.log(2), *k_turn, back=True)
        dk[...] = dk_acc[...].astype(dk.dtype)
        dv[...] = dv_acc[...].astype(dv.dtype)


def _split(block, rows, number):
    """Returns (row, block in that row) of a block numbered through all rows."""
    return (0, block) if rows == 1 else (block // number, block % number)


def _flat(x, slots):
    """[B, T, N, H] -> [B, N * H, slots], zero-padded."""
    B, T, N, H = x.shape
    return jnp.pad(x.reshape(B, T, N * H).swapaxes(1, 2), ((0, 0), (0, 0), (0, slots - T)))


Q, KV, Q_ROW, KV_ROW, LSE, Q_TURN, KV_TURN = range(7)


def _specs(s, pairs, half):
    """Returns the block specs of Q, KV, Q_ROW, KV_ROW, LSE, Q_TURN, KV_TURN."""

    def spec(shape, index):
        return pl.BlockSpec(shape, lambda core, g, p, *refs: index(g, pairs(core, refs)(p)))

    def channels(number, of, count, group):
        def index(g, entry):
            row, column = _split(of(entry), s.rows, count)
            return row, g if group else 0, column

        return spec((None, number, s.block), index)

    return (
        channels(s.heads * s.size, query_of, s.n, True),
        channels(s.kv_heads * s.size, key_of, s.m, True),
        spec((1, s.block), lambda g, entry: (0, query_of(entry))),
        spec((1, s.block), lambda g, entry: (0, key_of(entry))),
        spec((None, s.heads, 1, s.block), lambda g, entry: (g, 0, 0, query_of(entry))),
        channels(half, query_of, s.n, False),
        channels(half, key_of, s.m, False),
    )


def _cost(s, products):
    """Returns the `CostEstimate` when segments have the expected length."""
    keys = s.m * s.block
    seen = min(s.segment or keys, keys)
    slots = s.rows * s.n * s.block * min(seen + s.block, keys) / (2 if s.causal else 1)
    heads, kv_heads = s.groups * s.heads, s.groups * s.kv_heads
    pairs = slots / s.block**2
    flops, moved = pair_cost(heads, kv_heads, s.size, s.block, products)
    return pl.CostEstimate(
        flops=int(pairs * flops),
        transcendentals=int(slots * heads),
        bytes_accessed=int(pairs * moved),
    )


def pair_cost(heads, kv_heads, size, block, products):
    """Returns (FLOPs, bytes) of a pair of blocks: 2 products forward, 5 backward."""
    moved = block * size * 2 * (heads * (products + 1) // 2 + 2 * kv_heads)
    return 2 * products * block**2 * size * heads, moved


def _call(kernel, s, work, start, inputs, turns, outputs, scratch, products, name):
    """Runs a kernel over (groups of heads, listed pairs).

    Args:
      inputs: (array, index of its spec in `_specs`) of each.
      turns: of queries and of keys, (cos, sin) f32[B, R / 2, slots] each, or (None, None) for none.
      outputs: (shape and dtype, index of its spec, None for an array left in HBM) of each.
      scratch: (shape, dtype) of each, and semaphores.
      products: of each pair of blocks and head.
    """
    listed = not callable(work.pairs)
    prefetch = (work.pairs.reshape(-1), work.parts[0], start) if listed else ()
    cores = work.parts.shape[1] - 1 if listed else len(work.parts) - 1
    ends = work.parts[0] if listed else work.parts
    steps = functools.reduce(
        jnp.maximum if listed else max, [ends[c + 1] - ends[c] for c in range(cores)]
    )

    def pairs(core, refs):
        """Returns the function from a step of a core to its entry."""
        read = refs[0].__getitem__ if listed else work.pairs
        if cores == 1:
            return read
        first, end = (refs[1][core + k] if listed else ends[1] * (core + k) for k in (0, 1))

        def entry(p):
            # Past the end of its part a core stays at its last blocks and does nothing.
            mine = read(jnp.minimum(first + p, end - 1))
            return jnp.where(first + p < end, mine, mine & (FIRST - 1))

        return entry

    tables = [
        (table, spec)
        for turn, spec in zip(turns, (Q_TURN, KV_TURN), strict=True)
        for table in turn
        if table is not None
    ]

    def body(*refs):
        start, first = refs[2][0] if listed else 0, pairs(pl.program_id(0), refs)
        own, rest = refs[len(prefetch) :][: len(inputs)], refs[len(prefetch) + len(inputs) :]
        given = (rest[0:2], rest[2:4]) if tables else ((None, None), (None, None))
        kernel(first, start, *own, *given, *rest[len(tables) :], s=s)

    half = tables[0][0].shape[1] if tables else 0
    specs = {**dict(enumerate(_specs(s, pairs, half))), None: pl.BlockSpec(memory_space=pltpu.HBM)}
    operands = [*inputs, *tables]
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetch),
            grid=(cores, s.groups, steps),
            in_specs=[specs[i] for _, i in operands],
            out_specs=[specs[i] for _, i in outputs],
            scratch_shapes=[pltpu.VMEM(*x) if isinstance(x, tuple) else x for x in scratch],
        ),
        out_shape=[x for x, _ in outputs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=_cost(s, products),
        interpret=INTERPRET,
        name=name,
    )(*prefetch, *(x for x, _ in operands))


def _sizes(q, k, work, spec, causal):
    (_, _, N, H), K = q.shape, k.shape[2]
    (heads, kv_heads), block = _heads(N, K, H), spec.block
    n, m = work.q_segments.shape[1] // block, work.kv_segments.shape[1] // block
    return _Sizes(block, q.shape[0], n, m, K // kv_heads, heads, kv_heads, H, causal, spec.segment)


def _inputs(q, k, v, work):
    """Returns the flat arrays that both kernels read, each with its spec."""
    T, S = work.q_segments.shape[1], work.kv_segments.shape[1]
    q_segments, kv_segments = work.q_segments.reshape(1, -1), work.kv_segments.reshape(1, -1)
    wide = (_flat(q, T), Q), (_flat(k, S), KV), (_flat(v, S), KV)
    return *wide, (q_segments, Q_ROW), (kv_segments, KV_ROW)


def _padded(turns, work):
    """Returns the tables of queries and keys padded as these are."""
    if turns is None:
        return (None, None), (None, None)
    sizes = work.q_segments.shape[1], work.kv_segments.shape[1]
    return [
        [jnp.pad(x, ((0, 0), (0, 0), (0, size - x.shape[2]))) for x in turn]
        for turn, size in zip(turns, sizes, strict=True)
    ]


def _back(x, like):
    """[B, N * H, slots] -> the shape and dtype of `like`, [B, T, N, H]."""
    return x[:, :, : like.shape[1]].swapaxes(1, 2).reshape(like.shape).astype(like.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def attention(q, k, v, work, turns, spec, causal):
    """Returns [B, T, N, H]: the same function as `ref.masked_attention` under `ref.segment_mask`.

    Args:
      q: [B, T, N, H].
      k, v: [B, S, K, H].
      work: the `Plan` made with the same block and causal.
      turns: (cos, sin) of queries and of keys, f32[B, R / 2, T] and [B, R / 2, S], with which
        `ref.rotate` turns them first; None: they are not.
      spec: an `api.AttentionSpec`.
      causal: static.
    """
    return _forward(q, k, v, work, turns, spec, causal)[0]


def _forward(q, k, v, work, turns, spec, causal):
    s, block = _sizes(q, k, work, spec, causal), spec.block
    inputs, f32 = _inputs(q, k, v, work), jnp.float32
    out, lse = _call(
        _forward_kernel,
        s,
        work.by_query,
        work.q_start[:1],
        inputs,
        _padded(turns, work),
        [
            (jax.ShapeDtypeStruct(inputs[0][0].shape, q.dtype), Q),
            (jax.ShapeDtypeStruct((s.groups, s.heads, 1, work.q_segments.size), f32), LSE),
        ],
        [
            ((block, block), f32),
            ((s.heads * s.size, block), f32),
            *[((s.heads, 1, block), f32)] * 2,
            ((s.heads, s.size, block), q.dtype),
            ((s.kv_heads, block, s.size), q.dtype),
            ((BATCH, block, block), f32),
            ((BATCH, block, block), q.dtype),
            ((BATCH, 1, block), f32),
        ],
        2,
        "segment_attention_forward",
    )
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention")
    return _back(out, q), (q, k, v, work, turns, out, lse)


def _backward(spec, causal, residuals, g):
    q, k, v, work, turns, out, lse = residuals
    s, block = _sizes(q, k, work, spec, causal), spec.block
    inputs, f32 = _inputs(q, k, v, work), jnp.float32
    wide, narrow = s.heads * s.size, s.kv_heads * s.size
    dq, dk, dv = _call(
        _backward_kernel,
        s,
        work.by_key,
        work.q_start[:1],
        [*inputs, (out, Q), (lse, LSE), (_flat(g, work.q_segments.shape[1]), Q)],
        _padded(turns, work),
        [(jax.ShapeDtypeStruct((work.met.shape[1], *inputs[0][0].shape), f32), None)]
        + [(jax.ShapeDtypeStruct(x.shape, x.dtype), i) for x, i in inputs[1:3]],
        [
            ((block, block), f32),
            ((s.kv_heads, s.size, block), k.dtype),
            *[((s.kv_heads, block, s.size), k.dtype)] * 2,
            ((BATCH, s.size, block), q.dtype),
            *[((BATCH, block, block), f32)] * 2,
            *[((BATCH, block, block), q.dtype)] * 2,
            *[((narrow, block), f32)] * 2,
            *[((wide, block), f32)] * 3,
            pltpu.SemaphoreType.DMA((2,)),
        ],
        5,
        "segment_attention_backward",
    )

    # Query blocks that a part does not meet were never written.
    met = jnp.repeat(work.met, block, axis=2)[:, :, None]
    dq = sum(jnp.where(met[:, core], dq[core], 0) for core in range(len(dq)))
    return _back(dq, q), _back(dk, k), _back(dv, v), None, None


attention.defvjp(_forward, _backward)
