"""Blockwise attention that visits only block pairs sharing a segment: work follows sum of n_i^2.

Portable jax for any backend. A packed row of S slots is cut into blocks. `plan` lists, on the
device, the pairs (query block, key block) that have work; forward and backward are loops over that
list whose trip count is data, so the compiled program is one while its work is whatever the
segments need. Softmax statistics are kept online as in FlashAttention (arXiv:2205.14135); logits
exist for one pair at a time.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vlmjax.kernels.attention.intervals import needed_pairs

NEG = -1e30


class Plan(NamedTuple):
    """The work of one packed layout, shared by all layers that use it."""

    q_segments: jax.Array  # i32[B, T], T a multiple of the block
    kv_segments: jax.Array  # i32[B, S]
    q_start: jax.Array  # i32[B]
    pairs: jax.Array  # i32[B, n*m, 2] (query block, key block), the first `count` are real
    count: jax.Array  # i32[B]


def plan(q_segments, kv_segments, q_start, block, causal):
    """Returns the `Plan` of packed rows.

    Args:
      q_segments: i32[B, T], 1, 2, ... in order with padding (0) at the end.
      kv_segments: i32[B, S].
      q_start: i32[], the slot of the row where the queries start.
      block: slots in a block.
      causal: whether queries see only earlier keys.
    """
    q_segments, kv_segments = (
        jnp.pad(x, ((0, 0), (0, -x.shape[1] % block))) for x in (q_segments, kv_segments)
    )
    needed = needed_pairs(q_segments, kv_segments, q_start, block, causal)
    B, n, m = needed.shape
    listed = jax.vmap(lambda row: jnp.nonzero(row, size=n * m, fill_value=0))(needed)
    return Plan(
        q_segments,
        kv_segments,
        jnp.broadcast_to(jnp.asarray(q_start, jnp.int32), (B,)),
        jnp.stack(listed, -1).astype(jnp.int32),
        needed.sum((1, 2), dtype=jnp.int32),
    )


def _blocks(x, S, block, kv_heads):
    """[B, T, N, H] -> [B, n, K, block * N/K, H], zero-padded to S; heads of a group become rows."""
    B, T, N, H = x.shape
    x = jnp.pad(x, ((0, 0), (0, S - T), (0, 0), (0, 0)))
    x = x.reshape(B, S // block, block, kv_heads, N // kv_heads, H)
    return jnp.moveaxis(x, 3, 2).reshape(B, S // block, kv_heads, -1, H)


def _unblocks(x, T, heads, block):
    """The inverse of `_blocks`."""
    B, n, K, _, H = x.shape
    x = jnp.moveaxis(x.reshape(B, n, K, block, heads // K, H), 2, 3)
    return x.reshape(B, n * block, heads, H)[:, :T]


def _for_each_pair(work, body, carry):
    """Runs carry = body(row, i, j, carry) for every listed pair of every row."""

    def one_row(row, carry):
        def one_pair(p, carry):
            i, j = work.pairs[row, p]
            return body(row, i, j, carry)

        return jax.lax.fori_loop(0, work.count[row], one_pair, carry)

    return jax.lax.fori_loop(0, work.pairs.shape[0], one_row, carry)


def _pair_logits(q, k, b, i, j, work, block, causal):
    """Returns (logits f32[K, R, block], mask) of one pair; R = block * N/K query rows."""
    K, R, H = q.shape
    s = jnp.einsum("krh,ksh->krs", q, k, preferred_element_type=jnp.float32) * H**-0.5
    slot = jnp.arange(block)
    sq = jax.lax.dynamic_slice_in_dim(work.q_segments[b], i * block, block)
    sk = jax.lax.dynamic_slice_in_dim(work.kv_segments[b], j * block, block)
    mask = (sq[:, None] == sk) & (sq[:, None] > 0)
    if causal:
        mask &= (work.q_start[b] + i * block + slot)[:, None] >= j * block + slot
    mask = jnp.repeat(mask, R // block, axis=0)
    return s, mask


def _add(x, row, i, value):
    return x.at[row, i].add(value.astype(x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attention(q, k, v, work, spec, causal):
    """Returns [B, T, N, H]: the same function as `ref.masked_attention` under `ref.segment_mask`.

    Args:
      q: [B, T, N, H].
      k, v: [B, T, K, H].
      work: the `Plan` made with the same block and causal.
      spec: an `api.AttentionSpec`.
      causal: static.
    """
    return _forward(q, k, v, work, spec, causal)[0]


def _forward(q, k, v, work, spec, causal):
    (_, T, N, H), K, block = q.shape, k.shape[2], spec.block
    qb = _blocks(q, work.q_segments.shape[1], block, K)
    kb, vb = (_blocks(x, work.kv_segments.shape[1], block, K) for x in (k, v))
    rows = qb.shape[:-1]

    def body(b, i, j, carry):
        out, top, total = carry
        s, mask = _pair_logits(qb[b, i], kb[b, j], b, i, j, work, block, causal)
        new_top = jnp.maximum(top[b, i], jnp.where(mask, s, NEG).max(-1))
        p = jnp.where(mask, jnp.exp(s - new_top[..., None]), 0)
        shrink = jnp.exp(top[b, i] - new_top)
        o = jnp.einsum(
            "krs,ksh->krh", p.astype(v.dtype), vb[b, j], preferred_element_type=jnp.float32
        )
        return (
            out.at[b, i].set(out[b, i] * shrink[..., None] + o),
            top.at[b, i].set(new_top),
            total.at[b, i].set(total[b, i] * shrink + p.sum(-1)),
        )

    f32 = jnp.float32
    carry = jnp.zeros((*rows, H), f32), jnp.full(rows, NEG, f32), jnp.zeros(rows, f32)
    out, top, total = _for_each_pair(work, body, carry)
    total = jnp.where(total > 0, total, 1)
    lse = checkpoint_name(top + jnp.log(total), "attention")
    out = checkpoint_name(
        _unblocks(out / total[..., None], T, N, block).astype(q.dtype), "attention"
    )
    return out, (q, k, v, work, out, lse)


def _backward(spec, causal, residuals, g):
    q, k, v, work, out, lse = residuals
    (_, T, N, H), (_, S, K, _), block = q.shape, k.shape, spec.block
    slots = work.q_segments.shape[1]
    qb, gb = (_blocks(x, slots, block, K) for x in (q, g))
    kb, vb = (_blocks(x, work.kv_segments.shape[1], block, K) for x in (k, v))
    delta = jnp.einsum(
        "...rh,...rh->...r",
        gb.astype(jnp.float32),
        _blocks(out, slots, block, K).astype(jnp.float32),
    )

    def body(b, i, j, carry):
        dq, dk, dv = carry
        s, mask = _pair_logits(qb[b, i], kb[b, j], b, i, j, work, block, causal)
        p = jnp.where(mask, jnp.exp(s - lse[b, i][..., None]), 0)
        dp = jnp.einsum("krh,ksh->krs", gb[b, i], vb[b, j], preferred_element_type=jnp.float32)
        ds = (p * (dp - delta[b, i][..., None]) * H**-0.5).astype(q.dtype)
        mm = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        return (
            _add(dq, b, i, mm("krs,ksh->krh", ds, kb[b, j])),
            _add(dk, b, j, mm("krs,krh->ksh", ds, qb[b, i])),
            _add(dv, b, j, mm("krs,krh->ksh", p.astype(g.dtype), gb[b, i])),
        )

    carry = tuple(jnp.zeros(x.shape, jnp.float32) for x in (qb, kb, vb))
    dq, dk, dv = _for_each_pair(work, body, carry)
    return (
        _unblocks(dq, T, N, block).astype(q.dtype),
        _unblocks(dk, S, K, block).astype(k.dtype),
        _unblocks(dv, S, K, block).astype(v.dtype),
        None,
    )


attention.defvjp(_forward, _backward)
