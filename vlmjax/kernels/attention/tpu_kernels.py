"""What one step of the grid does: the bodies of the TPU kernels of `pallas_tpu`.

A step has a block of queries and a block of keys in VMEM, each [heads * head size, slots].
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vlmjax.kernels.attention.worklist import FIRST, LAST, NEW, WORK, key_of, query_of

NEG = -1e30
LANES, SUBLANES = 128, 16  # of a tile of bfloat16
# Heads whose products are under way together. One after the other, each would wait for the matrix
# units and these for it: 1.7 times the cycles of the forward pass.
BATCH = 4


def _dot(a, b, contract):
    """Returns the f32 product of two matrices, contracting axis contract[0] of a and [1] of b."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


class Sizes(NamedTuple):
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


def split(block, rows, number):
    """Returns (row, block in that row) of a block numbered through all rows."""
    return (0, block) if rows == 1 else (block // number, block % number)


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


def forward_kernel(
    pairs, start, q, k, v, q_segments, k_segments, q_turn, k_turn,
    out, lse, bias, acc, top, total, queries, keys, logits, weights, shrink, *, s,
):  # fmt: skip
    """Adds a block of keys to the online softmax of a block of queries."""
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


def _dq_block(dq, entry, s):
    """Returns the part of dq in HBM, f32[cores, rows, channels, slots], that an entry adds to."""
    width, (row, column) = s.heads * s.size, split(query_of(entry), s.rows, s.n)
    channels = pl.ds(pl.multiple_of(pl.program_id(1) * width, SUBLANES), width)
    slots = pl.ds(pl.multiple_of(column * s.block, s.block), s.block)
    return dq.at[pl.program_id(0), row, channels, slots]


def backward_kernel(
    pairs, start, q, k, v, q_segments, k_segments, out, lse, g, q_turn, k_turn,
    dq, dk, dv, bias, keys, keys_t, values_t, queries, logits, d_weights, weights, d_logits,
    dk_acc, dv_acc, dq_part, dq_new, dq_old, sems, *, s,
):  # fmt: skip
    """Adds a block of queries to the gradients of a block of keys, and to its own in HBM."""
    step = pl.program_id(2)
    entry = pairs(step)
    reading, writing = sems.at[0], sems.at[1]

    def write(step):
        return pltpu.make_async_copy(dq_new, _dq_block(dq, pairs(step), s), writing)

    read = pltpu.make_async_copy(_dq_block(dq, entry, s), dq_old, reading)
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
