"""Pallas TPU kernels: attention over a run-time list of block pairs, forward and backward.

The pairs of blocks that share a segment are listed on the device and prefetched into scalar memory;
the grid is as long as the list, so one compiled program does the work that its segments need and no
other. Arrays stay [rows, heads * head size] as the projections make them: a grid step takes a block
of rows of a group of heads and cuts the heads out in VMEM, so nothing is transposed in HBM. Logits
never leave VMEM. Softmax is online and in base 2, as in FlashAttention (arXiv:2205.14135); the
backward pass is one kernel of five products, which adds to dq in HBM by its own copies.
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
LANES = 128
VMEM_BYTES = 64 * 2**20
INTERPRET = False


def _heads(q_heads, kv_heads, size):
    """Returns how many (query, key-value) heads a grid step takes.

    Whole lanes of the [rows, heads * size] arrays, and a few heads to pay for the step.
    """
    group = q_heads // kv_heads
    for kv in range(1, kv_heads):
        if kv_heads % kv == 0 and kv * size % LANES == 0 and kv * group >= 4:
            return kv * group, kv
    return q_heads, kv_heads


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
        """The columns of query head h."""
        return slice(h * self.size, (h + 1) * self.size)

    def kv_head(self, h):
        """The columns of the key-value head that query head h reads."""
        return self.head(h * self.kv_heads // self.heads)

    @property
    def scale(self):
        return self.size**-0.5


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
    pairs, start, q, k, v, q_segments, k_segments, out, lse, bias, acc, top, total, *, s
):
    entry = pairs(pl.program_id(2))

    @pl.when(entry & FIRST != 0)
    def _():
        acc[...] = jnp.zeros_like(acc)
        top[...] = jnp.full_like(top, NEG)
        total[...] = jnp.zeros_like(total)

    @pl.when(entry & WORK != 0)
    def _():
        bias[...] = _bias(s, entry, start, q_segments, k_segments)
        for h in range(s.heads):
            row = slice(h, h + 1)
            logits = _dot(k[:, s.kv_head(h)], q[:, s.head(h)], (1, 1))
            logits = logits * (s.scale * math.log2(math.e)) + bias[...]
            old = top[row]
            new = jnp.maximum(old, logits.max(0, keepdims=True))
            p, shrink = jnp.exp2(logits - new), jnp.exp2(old - new)
            total[row] = total[row] * shrink + p.sum(0, keepdims=True)
            top[row] = new
            at = s.head(h)
            acc[at] = acc[at] * shrink + _dot(v[:, s.kv_head(h)], p.astype(v.dtype), (0, 0))

    @pl.when(entry & LAST != 0)
    def _():
        alive = top[...] > NEG / 2  # padding sees no key
        sums = jnp.where(alive, total[...], 1)
        share = jnp.where(alive, 1 / sums, 0)
        for h in range(s.heads):
            acc[s.head(h)] *= share[h : h + 1]
        out[...] = acc[...].T.astype(out.dtype)
        lse[...] = jnp.where(alive, top[...] + jnp.log2(sums), 0)


def _backward_kernel(
    pairs, start, q, k, v, q_segments, k_segments, out, lse, g,
    dq, dk, dv, bias, columns, dk_acc, dv_acc, dq_new, dq_old, sems, *, s,
):  # fmt: skip
    step = pl.program_id(2)
    entry = pairs(step)
    reading, writing = sems.at[0], sems.at[1]

    def dq_block(entry):
        width = s.heads * s.size
        columns = pl.ds(pl.multiple_of(pl.program_id(1) * width, width), width)
        rows = pl.ds(pl.multiple_of(query_of(entry) * s.block, s.block), s.block)
        return dq.at[pl.program_id(0), rows, columns]

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

    @pl.when(entry & WORK == 0)
    def _():
        after_the_write_before()

    @pl.when(entry & WORK != 0)
    def _():
        bias[...] = _bias(s, entry, start, q_segments, k_segments)
        columns[...] = (g[...].astype(jnp.float32) * out[...].astype(jnp.float32)).T
        for h in range(s.heads):
            if h == s.heads // 2:
                after_the_write_before()
                pl.when(entry & NEW == 0)(read.start)
            at, kv_at, kv = s.head(h), s.kv_head(h), h * s.kv_heads // s.heads
            qh, kh, vh, gh = q[:, at], k[:, kv_at], v[:, kv_at], g[:, at]
            logits = _dot(kh, qh, (1, 1)) * (s.scale * math.log2(math.e)) + bias[...]
            p = jnp.exp2(logits - lse[h : h + 1])
            delta = columns[at].sum(0, keepdims=True)
            ds = (p * (_dot(vh, gh, (1, 1)) - delta)).astype(q.dtype)
            dv_acc[kv] += _dot(p.astype(g.dtype), gh, (1, 0))
            dk_acc[kv] += _dot(ds, qh, (1, 0))
            columns[at] = _dot(kh, ds, (0, 0)) * s.scale

        dq_new[...] = columns[...].T

        @pl.when(entry & NEW == 0)
        def _():
            read.wait()
            dq_new[...] += dq_old[...]

        write(step).start()
        pl.when(step == pl.num_programs(2) - 1)(write(step).wait)

    @pl.when(entry & LAST != 0)
    def _():
        for ref, acc, scale in ((dk, dk_acc, s.scale), (dv, dv_acc, 1.0)):
            heads = [acc[h] * scale for h in range(s.kv_heads)]
            ref[...] = jnp.concatenate(heads, 1).astype(ref.dtype)


def _flat(x, slots):
    """[B, T, N, H] -> [B * slots, N * H], zero-padded."""
    B, T, N, H = x.shape
    x = jnp.pad(x.reshape(B, T, N * H), ((0, 0), (0, slots - T), (0, 0)))
    return x.reshape(B * slots, N * H)


Q, KV, Q_ROW, KV_ROW, LSE = range(5)


def _specs(s, pairs):
    """Returns the block specs of Q, KV, Q_ROW, KV_ROW, LSE."""

    def spec(shape, index):
        return pl.BlockSpec(shape, lambda core, g, p, *refs: index(g, pairs(core, refs)(p)))

    wide, kv_wide = s.heads * s.size, s.kv_heads * s.size
    return (
        spec((s.block, wide), lambda g, entry: (query_of(entry), g)),
        spec((s.block, kv_wide), lambda g, entry: (key_of(entry), g)),
        spec((1, s.block), lambda g, entry: (0, query_of(entry))),
        spec((1, s.block), lambda g, entry: (0, key_of(entry))),
        spec((None, s.heads, s.block), lambda g, entry: (g, 0, query_of(entry))),
    )


def _cost(s, products):
    """Returns the `CostEstimate` when segments have the expected length."""
    keys = s.m * s.block
    seen = min(s.segment or keys, keys)
    slots = s.rows * s.n * s.block * min(seen + s.block, keys) / (2 if s.causal else 1)
    heads = s.groups * s.heads
    pairs = slots / s.block**2
    blocks = s.block * s.size * 2 * (heads * (products + 1) // 2 + 2 * s.groups * s.kv_heads)
    return pl.CostEstimate(
        flops=int(2 * products * slots * s.size * heads),
        transcendentals=int(slots * heads),
        bytes_accessed=int(pairs * blocks),
    )


def _call(kernel, s, work, start, inputs, outputs, scratch, products, name):
    """Runs a kernel over (groups of heads, listed pairs).

    Args:
      inputs: (array, index of its spec in `_specs`) of each.
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

    def body(*refs):
        start = refs[2][0] if listed else 0
        kernel(pairs(pl.program_id(0), refs), start, *refs[len(prefetch) :], s=s)

    specs = {**dict(enumerate(_specs(s, pairs))), None: pl.BlockSpec(memory_space=pltpu.HBM)}
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetch),
            grid=(cores, s.groups, steps),
            in_specs=[specs[i] for _, i in inputs],
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
    )(*prefetch, *(x for x, _ in inputs))


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
    s, block = _sizes(q, k, work, spec, causal), spec.block
    inputs = _inputs(q, k, v, work)
    slots, f32 = inputs[0][0].shape[0], jnp.float32
    out, lse = _call(
        _forward_kernel,
        s,
        work.by_query,
        work.q_start[:1],
        inputs,
        [
            (jax.ShapeDtypeStruct(inputs[0][0].shape, q.dtype), Q),
            (jax.ShapeDtypeStruct((s.groups, s.heads, slots), f32), LSE),
        ],
        [((block, block), f32), ((s.heads * s.size, block), f32), *[((s.heads, block), f32)] * 2],
        2,
        "segment_attention_forward",
    )
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention")
    B, T, N, H = q.shape
    return out.reshape(B, -1, N, H)[:, :T], (q, k, v, work, out, lse)


def _backward(spec, causal, residuals, g):
    q, k, v, work, out, lse = residuals
    s, block = _sizes(q, k, work, spec, causal), spec.block
    inputs = _inputs(q, k, v, work)
    f32, width = jnp.float32, s.heads * s.size
    dq, dk, dv = _call(
        _backward_kernel,
        s,
        work.by_key,
        work.q_start[:1],
        [*inputs, (out, Q), (lse, LSE), (_flat(g, work.q_segments.shape[1]), Q)],
        [(jax.ShapeDtypeStruct((work.met.shape[1], *inputs[0][0].shape), f32), None)]
        + [(jax.ShapeDtypeStruct(x.shape, x.dtype), i) for x, i in inputs[1:3]],
        [
            ((block, block), f32),
            ((width, block), f32),
            *[((s.kv_heads, block, s.size), f32)] * 2,
            *[((block, width), f32)] * 2,
            pltpu.SemaphoreType.DMA((2,)),
        ],
        5,
        "segment_attention_backward",
    )

    def back(x, like):
        B, T, N, H = like.shape
        return x.reshape(B, -1, N, H)[:, :T].astype(like.dtype)

    # Query blocks that a part does not meet were never written.
    met = jnp.repeat(work.met.swapaxes(0, 1).reshape(dq.shape[0], -1), block, axis=1)
    dq = jnp.where(met[..., None], dq, 0).sum(0)
    return back(dq, q), back(dk, k), back(dv, v), None


attention.defvjp(_forward, _backward)
