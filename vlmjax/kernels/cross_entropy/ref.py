"""The definition of the token loss, in plain jnp."""

import jax
import jax.numpy as jnp


def token_nll(hidden, head, targets, mask):
    """Returns f32[B, T]: -log softmax(hidden . head)[target] where mask is True, else 0.

    Args:
      hidden: [B, T, D].
      head: [D, V], cast to the dtype of hidden; logits are accumulated in f32.
      targets: i32[B, T].
      mask: bool[B, T].
    """
    logits = jnp.einsum(
        "btd,dv->btv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.where(mask, jax.nn.logsumexp(logits, axis=-1) - picked, 0)
