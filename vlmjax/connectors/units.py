"""Units: the patches, or visual tokens, that are gathered together and what may become of them."""

import jax
import jax.numpy as jnp


def gather(features, units):
    """Returns ([B, U, G, C], bool[B, U, G]): the features of each unit, and which may be seen.

    Args:
      features: [B, P, C].
      units: i32[B, U, G] slots; -1 = none, which gives zeros; -2 - slot gives the features of the
        slot with False in the mask (see `batch.UnitRule`).
    """
    B, U, G = units.shape
    index = jnp.where(units < -1, -2 - units, jnp.maximum(units, 0)).reshape(B, U * G, 1)
    x = jnp.take_along_axis(features, index, axis=1).reshape(B, U, G, -1)
    return jnp.where((units != -1)[..., None], x, 0), units >= 0


def mean(x, mask, weights=None):
    """Returns [..., C]: the mean of [..., G, C] over the present, in f32; of none, 0.

    For a 2x2 window this is the bilinear downsampling of VideoLLaMA3, bit for bit in bf16.
    """
    total = jnp.where(mask[..., None], x.astype(jnp.float32), 0).sum(-2)
    count = jnp.maximum(mask.sum(-1, keepdims=True), 1)
    return (total / count).astype(x.dtype)


def maximum(x, mask, weights=None):
    """Returns [..., C]: the largest of each channel of [..., G, C] over the present; of none, 0."""
    lowest = jnp.finfo(x.dtype).min
    top = jnp.where(mask[..., None], x, lowest).max(-2)
    return jnp.where(mask.any(-1, keepdims=True), top, 0)


def weighted(x, mask, weights):
    """Returns [..., C]: the sum over G of weights f32[..., G] times [..., G, C], in f32."""
    if weights is None:
        raise ValueError("reduce='weighted' needs weights f32[B, U, G]; the host has to make them")
    weights = jnp.where(mask, weights, 0)[..., None]
    return (weights * x.astype(jnp.float32)).sum(-2).astype(x.dtype)


REDUCE = {"mean": mean, "max": maximum, "weighted": weighted}


def pool(tokens, index, weights=None, kind="mean"):
    """Returns [B, W, D]: visual tokens pooled after the connector.

    Args:
      tokens: [B, V, D].
      index: i32[B, W, G] which tokens make up each new one, -1 = none.
      weights: f32[B, W, G] for "weighted": bilinear or area resizing.
      kind: a key of `REDUCE`.
    """
    with jax.named_scope("pool"):
        return REDUCE[kind](*gather(tokens, index), weights)
