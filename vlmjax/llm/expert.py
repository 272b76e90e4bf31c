"""A second set of weights for chosen tokens: the visual expert of CogVLM (arXiv:2311.03079).

Which tokens is decided by the host. Only gathers, also in the backward pass.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from vlmjax.attention import Attention
from vlmjax.nn import MLP
from vlmjax.sharding import layout_of


class Expert(nnx.Module):
    """The second set of weights of a layer; its projections of queries, keys, values have biases.

    Norms are those of the layer.
    """

    def __init__(self, cfg, *, rngs, out_scale):
        make = dict(rngs=rngs, out_scale=out_scale)
        heads = (cfg.heads, cfg.kv_heads, cfg.head_dim)
        self.attn = Attention(cfg.width, *heads, qkv_bias=True, o_bias=False, **make)
        self.mlp = MLP(cfg.width, cfg.mlp, "silu", gated=True, bias=False, **make)


@jax.custom_vjp
def exchange(x, to, back):
    """Returns [B, n, ...] with x[:, to[i]] at i, 0 where that is -1.

    Its gradient is a gather too.

    Args:
      x: [B, m, ...].
      to: i32[B, n]; no entry but -1 occurs twice in a row.
      back: i32[B, m], the inverse of `to`.
    """
    at = to.reshape(*to.shape, *(1,) * (x.ndim - 2))
    return jnp.where(at >= 0, jnp.take_along_axis(x, jnp.maximum(at, 0), axis=1), 0)


exchange.defvjp(
    lambda x, to, back: (exchange(x, to, back), (to, back)),
    lambda kept, g: (exchange(g, kept[1], kept[0]), None, None),
)


def serve(routed, language, expert, x):
    """Returns language(x) with expert(x) where the expert serves; costs T + W tokens.

    Example of T=6, W=4, where it serves tokens 1, 2 and 5:

        slots   1  2  5 -1          the token in each of W places, -1 = none
        index  -1  0  1 -1 -1  2    the place of each token, -1 = the language weights serve it

    Args:
      routed: has slots i32[B, W] and index i32[B, T]; None = the expert serves nothing.
      language, expert: functions of [B, n, ...], of each token alone.
      x: [B, T, ...].
    """
    y = language(x)
    if routed is None:
        return y
    picked = exchange(x, routed.slots, routed.index)
    z = expert(layout_of("llm", *routed.slots.shape).constrain(picked))

    def put(y, z):
        at = routed.index.reshape(*routed.index.shape, *(1,) * (y.ndim - 2))
        return jnp.where(at >= 0, exchange(z, routed.index, routed.slots), y)

    return jax.tree.map(put, y, z)
