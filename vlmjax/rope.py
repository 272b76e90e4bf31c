"""Rotary position embedding, 1-D for the decoder and 2-D for the vision tower (arXiv:2104.09864).

Both use the rotate-half form: channel i is paired with channel i + H/2. The rotation runs in f32.
"""

import jax.numpy as jnp

from vlmjax.kernels.attention import ref


def angles_1d(positions, head_dim, theta, divisors=None):
    """Returns f32[..., H/2]: position * theta^(-2j/H) for j = 0 .. H/2 - 1.

    Args:
      divisors: f32[H/2] or f32[1] of these frequencies; None = 1.
    """
    freq = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    freq = freq if divisors is None else freq / divisors
    return positions[..., None].astype(jnp.float32) * freq


def angles_2d(coords, head_dim, theta):
    """Returns f32[..., H/2]: H/4 angles of the patch row, then H/4 of the column, same frequencies.

    Source: `VideoLlama3VisionRotaryEmbedding` in transformers.

    Args:
      coords: i32[..., 2] row and column of each patch in its own image.
    """
    row_and_column = angles_1d(coords, head_dim // 2, theta)  # [..., 2, H/4]
    return row_and_column.reshape(*coords.shape[:-1], head_dim // 2)


def rotate(x, angles):
    """Rotates x[B, T, N, H] by angles f32[B, T, H/2]; the dtype of x is kept."""
    return ref.rotate(x, jnp.cos(angles), jnp.sin(angles))
