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

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vlmjax.kernels.attention.tpu_kernels import (
    BATCH,
    SUBLANES,
    Sizes,
    backward_kernel,
    forward_kernel,
    split,
)
from vlmjax.kernels.attention.worklist import FIRST, key_of, plan, query_of

__all__ = ["attention", "plan"]

VMEM_BYTES = 64 * 2**20
HEADS = 16  # of a grid step
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
            row, column = split(of(entry), s.rows, count)
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
    return Sizes(block, q.shape[0], n, m, K // kv_heads, heads, kv_heads, H, causal, spec.segment)


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
        forward_kernel,
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
        backward_kernel,
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
