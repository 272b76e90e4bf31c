"""The definition: softmax attention restricted by a mask, in plain jnp."""

import jax
import jax.numpy as jnp


def segment_mask(q_segments, kv_segments, causal, q_start=0):
    """Returns bool[B, T, S], True where a query may look.

    The same segment, not padding, and not later if causal; queries start at slot `q_start`.

    Example, segments [1, 1, 2, 0], causal:

        1 0 0 0
        1 1 0 0
        0 0 1 0
        0 0 0 0
    """
    q, k = q_segments[:, :, None], kv_segments[:, None, :]
    mask = (q == k) & (q > 0)
    if causal:
        mask &= q_start + jnp.arange(q.shape[1])[:, None] >= jnp.arange(k.shape[2])
    return mask


def rotate(x, cos, sin):
    """Rotates channel i of x[B, T, N, H] with channel i + R/2, in f32 (arXiv:2104.09864).

    Args:
      x: its channels from R on stay; its dtype is kept.
      cos, sin: f32[B, T, R / 2], of each slot.
    """
    cos, sin, half = cos[:, :, None], sin[:, :, None], cos.shape[-1]
    a, b = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
    return jnp.concatenate([turned, x[..., 2 * half :]], -1) if 2 * half < x.shape[-1] else turned


def masked_attention(q, k, v, mask):
    """Returns [B, T, N, H] in the dtype of q; logits and softmax in f32. 0 for a query without key.

    Args:
      q: [B, T, N, H], scaled by H^-0.5 here.
      k, v: [B, S, K, H]; N is a multiple of K, query head n reads kv head n // (N / K).
      mask: bool[B, T, S], True = may look.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    q = q.reshape(B, T, K, N // K, H)
    logits = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * H**-0.5
    mask = mask[:, None, None]
    logits = jnp.where(mask, logits, -1e30)
    weights = jnp.where(mask, jax.nn.softmax(logits, axis=-1), 0).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(B, T, N, H)


def plan(q_segments, kv_segments, q_start, block, causal):
    """Returns the mask; blocks do not matter here."""
    return segment_mask(q_segments, kv_segments, causal, q_start)


def attention(q, k, v, mask, spec, causal):
    """Returns `masked_attention`; the mask knows all there is to know."""
    return masked_attention(q, k, v, mask)
