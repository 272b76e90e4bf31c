"""Which blocks of a packed row look at which."""

import jax.numpy as jnp


def needed_pairs(q_segments, kv_segments, q_start, block, causal):
    """Returns bool[B, n, m]: whether some query of a block may see some key of another.

    Segments are contiguous, so what a block needs is one interval, in both directions.

    Args:
      q_segments: i32[B, T], 1, 2, ... in order with padding (0) at the end; T = n * block.
      kv_segments: i32[B, S]; S = m * block.
      q_start: i32[], the slot of the row where the queries start.
      block: slots in a block.
      causal: whether queries see only earlier keys.
    """
    B, n, m = q_segments.shape[0], q_segments.shape[1] // block, kv_segments.shape[1] // block
    q_low, q_high = _ranges(q_segments.reshape(B, n, block))
    k_low, k_high = _ranges(kv_segments.reshape(B, m, block))
    # Segments are in order, so two blocks share one exactly when their ranges overlap.
    needed = (q_low[:, :, None] <= k_high[:, None]) & (k_low[:, None] <= q_high[:, :, None])
    if causal:
        needed &= (jnp.arange(n)[:, None] + 1) * block + q_start > jnp.arange(m) * block
    return needed


def _ranges(blocks):
    """Returns the first and last segment in each block; of an empty one nothing overlaps."""
    low = jnp.where(blocks > 0, blocks, jnp.iinfo(jnp.int32).max).min(-1)
    return low, blocks.max(-1)
