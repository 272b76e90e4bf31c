"""The definition: sums of absolute differences to the frame before, in plain jnp."""

import jax.numpy as jnp


def patch_sums(frames, previous=None):
    """Returns i32[F, P]: by how much the values of each patch changed, added up.

    Args:
      frames: u8[F, P, D].
      previous: u8[P, D], the frame before the first; None = the first again, no change.
    """
    first = frames[:1] if previous is None else previous[None]
    before = jnp.concatenate([first, frames[:-1]])
    difference = jnp.maximum(frames, before) - jnp.minimum(frames, before)
    return difference.astype(jnp.int32).sum(-1)
