"""The perceiver resampler of MiniCPM-V: learned queries read a view of any size once.

Keys carry the 2-D sine-cosine position of their patch in the view, values do not. Source:
`resampler.py` of MiniCPM-V 2.0 and MiniCPM-Llama3-V 2.5.
"""

import dataclasses
import math

import jax.numpy as jnp
from flax import nnx

from vlmjax.batch import UnitRule
from vlmjax.connectors.attend import CrossAttention
from vlmjax.connectors.specials import Specials, Table
from vlmjax.nn import Dense, LayerNorm


@dataclasses.dataclass(frozen=True)
class ResamplerConfig:
    """Sizes of a resampler; it works at the decoder's width.

    Attributes:
      queries: tokens of a view.
      heads: of the attention.
      query_pos: "sincos" adds to the queries the positions of a square grid (2.0), "none" nothing
        (2.5).
      eps: of the norms.
    """

    queries: int = 64
    heads: int = 32
    query_pos: str = "none"
    eps: float = 1e-6
    specials: tuple[str, ...] = ()

    def __post_init__(self):
        if self.query_pos not in ("none", "sincos"):
            raise ValueError(
                f"connector query_pos={self.query_pos!r} is unknown; choose 'none' or 'sincos'"
            )
        if self.query_pos == "sincos" and math.isqrt(self.queries) ** 2 != self.queries:
            raise ValueError(
                f"queries={self.queries} is not a square, which query_pos='sincos' lays them out "
                "on; change queries, or query_pos to 'none'"
            )

    @property
    def tokens(self):
        """Tokens of a unit."""
        return self.queries

    @property
    def unit(self):
        """How the host builds units."""
        return UnitRule("map")


def sincos(row, column, width):
    """Returns f32[..., width]: sines and cosines of the column, then of the row.

    Frequencies are 10000^(-k / (width / 4)).
    """
    freq = 10000.0 ** (-jnp.arange(width // 4, dtype=jnp.float32) / (width // 4))
    x, y = (at[..., None].astype(jnp.float32) * freq for at in (column, row))
    return jnp.concatenate([jnp.sin(x), jnp.cos(x), jnp.sin(y), jnp.cos(y)], -1)


def sincos_table(number, width):
    """Returns f32[number, width]: the positions of a square grid in reading order."""
    side, at = math.isqrt(number), jnp.arange(number)
    return sincos(at // side, at % side, width)


class Resampler(nnx.Module):
    """Maps views to `queries` decoder embeddings each."""

    def __init__(self, cfg, in_widths, out_width, *, rngs):
        (in_width,), D = in_widths, out_width
        if D % cfg.heads or D % 4:
            raise ValueError(
                f"a decoder of width {D} does not divide into heads={cfg.heads} and four parts of "
                "a position; change heads"
            )
        self.cfg = cfg
        self.query = Table(cfg.queries, D, 0.02, rngs=rngs)
        self.kv = Dense((in_width,), (D,), ("embed",), ("mlp",), rngs=rngs, bias=False)
        self.q_norm = LayerNorm(D, cfg.eps, rngs=rngs)
        self.kv_norm = LayerNorm(D, cfg.eps, rngs=rngs)
        self.attn = CrossAttention(D, D, D, (cfg.heads, D // cfg.heads), rngs=rngs)
        self.norm = LayerNorm(D, cfg.eps, rngs=rngs)
        self.out = Dense((D,), (D,), ("embed",), ("mlp",), rngs=rngs, bias=False)
        self.specials = Specials(cfg.specials, D, rngs=rngs)

    def __call__(self, x, mask, size, weights=None):
        """Returns [B, U, Q, D].

        Args:
          x: ([B, U, G, C],), patches of each view in reading order, absent ones at the end.
          mask: (bool[B, U, G],).
          size: i32[B, U, 2] rows and columns of each view.
          weights: not read.
        """
        (x,), (mask,) = x, mask
        values = self.kv_norm(self.kv(x))
        at, columns = jnp.arange(x.shape[2]), jnp.maximum(size[..., 1:], 1)
        pos = sincos(at // columns, at % columns, values.shape[-1])
        queries = self.q_norm(self.query.embedding[...].astype(x.dtype))
        if self.cfg.query_pos == "sincos":
            queries = queries + sincos_table(*queries.shape).astype(x.dtype)
        queries = jnp.broadcast_to(queries, (*x.shape[:2], *queries.shape))
        y = self.attn(queries, values + pos.astype(x.dtype), values, mask)
        return self.out(self.norm(y))
