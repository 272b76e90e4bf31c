"""Multi-head attention with rotary positions, for the vision tower and the decoder."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from vlmjax import sharding
from vlmjax.kernels.attention import api, ref
from vlmjax.nn import Dense, RMSNorm
from vlmjax.rope import rotate


class Attention(nnx.Module):
    """o(attend(q(x), k(x), v(x))) with N query heads on K key-value heads.

    With `qk_norm_eps`, an RMSNorm over all heads together comes after q and after k.
    """

    def __init__(
        self,
        width,
        heads,
        kv_heads,
        head_dim,
        *,
        rngs,
        qkv_bias,
        o_bias,
        out_scale=1.0,
        qk_norm_eps=None,
    ):
        q, kv = (heads, head_dim), (kv_heads, head_dim)
        self.q = Dense((width,), q, ("embed",), ("heads", "head_dim"), rngs=rngs, bias=qkv_bias)
        self.k = Dense((width,), kv, ("embed",), ("kv_heads", "head_dim"), rngs=rngs, bias=qkv_bias)
        self.v = Dense((width,), kv, ("embed",), ("kv_heads", "head_dim"), rngs=rngs, bias=qkv_bias)
        axes = ("heads", "head_dim"), ("embed",)
        self.o = Dense(q, (width,), *axes, rngs=rngs, bias=o_bias, scale=out_scale)
        normed, sizes = qk_norm_eps is not None, (heads * head_dim, kv_heads * head_dim)
        self.q_norm = RMSNorm(sizes[0], qk_norm_eps, rngs=rngs) if normed else None
        self.k_norm = RMSNorm(sizes[1], qk_norm_eps, rngs=rngs) if normed else None

    def __call__(self, x, attend, cache=None):
        """Returns ([B, T, D], what `attend` keeps).

        Args:
          x: [B, T, D].
          attend: function (q, k, v, cache) -> ([B, T, N, H], new cache), which applies the rotary
            positions.
          cache: of this layer, or None.
        """
        q, k = self.q(x), self.k(x)
        if self.q_norm is not None:
            q, k = (
                norm(y.reshape(*y.shape[:2], -1)).reshape(y.shape)
                for norm, y in ((self.q_norm, q), (self.k_norm, k))
            )
        out, cache = attend(q, k, self.v(x), cache)
        return self.o(out), cache


def packed(segments, angles, *, size, causal, spec, layout):
    """Returns the `attend` of packed rows; what each device has to do is planned once.

    Args:
      segments: i32[B, S].
      angles: f32[B, S, H/2] of the rotary positions; None = without.
      size: channels of a head.
      causal: whether queries see only earlier keys.
      spec: an `AttentionSpec`.
      layout: a `sharding.Layout` of the activations. Heads are shared out; slots are too, and then
        a device gathers the keys and values of its rows, which with grouped queries are few.
    """
    how = dict(causal=causal, spec=spec.resolve(size, causal))
    plan = functools.partial(api.plan, **how)
    work = sharding.plan_attention(plan, segments, angles, layout)

    def attend(q, k, v, cache):
        out = sharding.map_attention(functools.partial(api.attention, **how), q, k, v, work, layout)
        return out, (rotate(k, angles), v) if cache is not None else None

    return attend


def cached(positions, angles):
    """Returns the `attend` that appends to a cache and sees everything up to its own position.

    Slot j of the cache holds position j, so a query sees slots 0 .. its position. Slots after the
    last written one hold leftovers that no query can see before they are overwritten.

    Args:
      positions: i32[B, T] of the new tokens, consecutive in each row.
      angles: f32[B, T, H/2] of the rotary positions.
    """
    start = positions[:, 0]

    def attend(q, k, v, cache):
        write = jax.vmap(
            lambda old, new, at: jax.lax.dynamic_update_slice_in_dim(
                old, new.astype(old.dtype), at, 0
            )
        )
        q, k = rotate(q, angles), rotate(k, angles)
        k, v = write(cache[0], k, start), write(cache[1], v, start)
        mask = jnp.arange(k.shape[1]) <= positions[:, :, None]
        return ref.masked_attention(q, k.astype(q.dtype), v.astype(q.dtype), mask), (k, v)

    return attend
