"""Learned vectors: those a connector asks with, and those that stand among the tokens."""

import jax.numpy as jnp
from flax import nnx

from vlmjax.nn import param


class Table(nnx.Module):
    """Learned vectors `embedding` f32[number, width]: queries, positions."""

    def __init__(self, number, width, std, *, rngs):
        self.embedding = param(rngs, (number, width), (None, "embed"), fan_in=1, scale=std)


class Special(nnx.Module):
    """One vector `embedding` f32[D], drawn with standard deviation D^-0.5."""

    def __init__(self, width, *, rngs):
        self.embedding = param(rngs, (width,), ("embed",), fan_in=width)


class Specials(nnx.Module):
    """Vectors among the tokens that come from no patch, each under its name: newline, boi, eoi.

    They follow the visual tokens; the token format puts them in place.

    Args:
      names: in the order in which they come.
      width: D of the decoder.
      scale: what they are multiplied with (GLM-4V).
    """

    def __init__(self, names, width, *, rngs, scale=1.0):
        if len(set(names)) < len(names):
            raise ValueError(f"specials={names} names a vector twice; each has its own name")
        self.names, self.width, self.scale = names, width, scale
        for name in names:
            setattr(self, name, Special(width, rngs=rngs))

    def __call__(self, dtype=jnp.float32):
        """Returns [n, D]."""
        if not self.names:
            return jnp.zeros((0, self.width), dtype)
        vectors = jnp.stack([getattr(self, name).embedding[...] for name in self.names])
        return (vectors * self.scale).astype(dtype)
