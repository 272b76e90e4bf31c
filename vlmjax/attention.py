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

    With `qk_norm_eps`, an RMSNorm comes after q and after k: over all heads together, or over the
    channels of each head ("head").
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
        qk_norm="width",
    ):
        q, kv = (heads, head_dim), (kv_heads, head_dim)
        self.q = Dense((width,), q, ("embed",), ("heads", "head_dim"), rngs=rngs, bias=qkv_bias)
        self.k = Dense((width,), kv, ("embed",), ("kv_heads", "head_dim"), rngs=rngs, bias=qkv_bias)
        self.v = Dense((width,), kv, ("embed",), ("kv_heads", "head_dim"), rngs=rngs, bias=qkv_bias)
        axes = ("heads", "head_dim"), ("embed",)
        self.o = Dense(q, (width,), *axes, rngs=rngs, bias=o_bias, scale=out_scale)
        self.qk_norm = "none" if qk_norm_eps is None else qk_norm
        if self.qk_norm != "none":
            of_q, of_k = (1, 1) if qk_norm == "head" else (heads, kv_heads)
            self.q_norm = RMSNorm(of_q * head_dim, qk_norm_eps, rngs=rngs)
            self.k_norm = RMSNorm(of_k * head_dim, qk_norm_eps, rngs=rngs)

    def project(self, x):
        """Returns q [B, T, N, H], k and v [B, T, K, H], without their rotary positions."""
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        elif self.qk_norm == "width":
            q, k = (
                norm(y.reshape(*y.shape[:2], -1)).reshape(y.shape)
                for norm, y in ((self.q_norm, q), (self.k_norm, k))
            )
        return q, k, v

    def __call__(self, x, attend, cache=None):
        """Returns ([B, T, D], what `attend` keeps).

        Args:
          x: [B, T, D].
          attend: function (q, k, v, cache) -> ([B, T, N, H], new cache), which applies the rotary
            positions.
          cache: of this layer, or None.
        """
        out, cache = attend(*self.project(x), cache)
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


def cached(slots, angles):
    """Returns the `attend` that appends to a cache and sees everything up to its own slot.

    A query sees slots 0 .. its own. Slots after the last written one hold leftovers that no query
    can see before they are overwritten.

    Args:
      slots: i32[B, T] of the cache for the new tokens, consecutive in each row; rotary positions
        need not be the same, tokens may share them.
      angles: f32[B, T, H/2] of the rotary positions.
    """
    start = slots[:, 0]

    def attend(q, k, v, cache):
        write = jax.vmap(
            lambda old, new, at: jax.lax.dynamic_update_slice_in_dim(
                old, new.astype(old.dtype), at, 0
            )
        )
        q, k = rotate(q, angles), rotate(k, angles)
        k, v = write(cache[0], k, start), write(cache[1], v, start)
        mask = jnp.arange(k.shape[1]) <= slots[:, :, None]
        return ref.masked_attention(q, k.astype(q.dtype), v.astype(q.dtype), mask), (k, v)

    return attend
