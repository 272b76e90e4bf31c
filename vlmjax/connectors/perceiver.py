"""The perceiver resampler of Flamingo and Idefics2: learned latents read a view layer after layer.

Keys and values are the projected patches followed by the latents themselves (arXiv:2204.14198).
Source: `modeling_idefics2.py` in transformers.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from vlmjax.batch import UnitRule
from vlmjax.connectors.attend import CrossAttention
from vlmjax.connectors.specials import Specials, Table
from vlmjax.nn import ACTIVATIONS, MLP, Dense, RMSNorm, scan_layers, stack


@dataclasses.dataclass(frozen=True)
class PerceiverConfig:
    """Sizes of a perceiver; it works at the decoder's width.

    Attributes:
      hidden: of the gated projection in front; 0 = a single linear map.
      mlp: width of the MLP of a layer; 0 = four times the decoder's.
    """

    queries: int = 64
    layers: int = 3
    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 96
    hidden: int = 0
    mlp: int = 0
    eps: float = 1e-6
    specials: tuple[str, ...] = ()

    @property
    def tokens(self):
        """Tokens of a unit."""
        return self.queries

    @property
    def unit(self):
        """How the host builds units."""
        return UnitRule("map")


class Layer(nnx.Module):
    """Latents read context and latents, then a gated MLP."""

    def __init__(self, cfg, width, *, rngs):
        heads = dict(heads=(cfg.heads, cfg.head_dim), kv_heads=(cfg.kv_heads, cfg.head_dim))
        self.attn_norm = RMSNorm(width, cfg.eps, rngs=rngs)
        self.context_norm = RMSNorm(width, cfg.eps, rngs=rngs)
        self.attn = CrossAttention(width, width, width, **heads, rngs=rngs, bias=False)
        self.mlp_norm = RMSNorm(width, cfg.eps, rngs=rngs)
        self.mlp = MLP(width, cfg.mlp or 4 * width, "silu", rngs=rngs, gated=True, bias=False)

    def __call__(self, latents, context, mask):
        queries = self.attn_norm(latents)
        keys = jnp.concatenate([self.context_norm(context), queries], -2)
        latents = latents + self.attn(queries, keys, keys, mask)
        return latents + self.mlp(self.mlp_norm(latents))


class GatedProjection(nnx.Module):
    """down(silu(gate(x)) * up(x)) from one width to another."""

    def __init__(self, in_width, hidden, out_width, *, rngs):
        shape = (in_width,), (hidden,), ("embed",), ("mlp",)
        self.gate = Dense(*shape, rngs=rngs, bias=False)
        self.up = Dense(*shape, rngs=rngs, bias=False)
        self.down = Dense((hidden,), (out_width,), ("mlp",), ("embed",), rngs=rngs, bias=False)

    def __call__(self, x):
        return self.down(ACTIVATIONS["silu"](self.gate(x)) * self.up(x))


class Perceiver(nnx.Module):
    """Maps views to `queries` decoder embeddings each."""

    def __init__(self, cfg, in_widths, out_width, *, rngs):
        (in_width,), D = in_widths, out_width
        self.cfg = cfg
        if cfg.hidden:
            self.project = GatedProjection(in_width, cfg.hidden, D, rngs=rngs)
        else:
            self.project = Dense((in_width,), (D,), ("embed",), ("mlp",), rngs=rngs, bias=False)
        self.query = Table(cfg.queries, D, 1.0, rngs=rngs)
        self.blocks = stack(lambda rngs: Layer(cfg, D, rngs=rngs), cfg.layers, rngs=rngs)
        self.norm = RMSNorm(D, cfg.eps, rngs=rngs)
        self.specials = Specials(cfg.specials, D, rngs=rngs)

    def __call__(self, x, mask, size=None, weights=None):
        """Returns [B, U, Q, D] of one source [B, U, G, C] with its mask; nothing else is read."""
        (x,), (mask,) = x, mask
        context, seen = self.project(x), jnp.ones((*mask.shape[:2], self.cfg.queries), bool)
        mask = jnp.concatenate([mask, seen], -1)
        latents = self.query.embedding[...].astype(x.dtype)
        latents = jnp.broadcast_to(latents, (*x.shape[:2], *latents.shape))

        def call(layer, y, _):
            return layer(y, context, mask), None

        return self.norm(scan_layers(self.blocks, call, latents)[0])
