"""QLLaMA, the middleware of InternVL 1.0: learned queries in a Llama that reads the patches.

In every `every`-th layer, beginning with the first, the queries attend to the vision features
between self-attention and MLP. Here the queries come alone, which gives what they are in the
image-text passes where they do not see the text. Source: `modeling_qllama.py` of
OpenGVLab/InternVL (arXiv:2312.14238).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from vlmjax.attention import Attention
from vlmjax.batch import UnitRule
from vlmjax.connectors.attend import CrossAttention
from vlmjax.connectors.mlp import DenseStack
from vlmjax.connectors.specials import Specials, Table
from vlmjax.kernels.attention import ref
from vlmjax.nn import MLP, RMSNorm, bind, scan_layers, stack, unbind
from vlmjax.rope import angles_1d, rotate


@dataclasses.dataclass(frozen=True)
class QFormerConfig:
    """Sizes of the Llama and of its cross-attention.

    Attributes:
      every: layers from one cross-attention to the next.
      prefix: slots in front of the patches that are read too, here the class token.
      out_layers: linear maps to the decoder width; 0 needs equal widths.
    """

    queries: int = 96
    width: int = 4096
    mlp: int = 11008
    layers: int = 32
    heads: int = 32
    every: int = 2
    rope_theta: float = 1e4
    eps: float = 1e-6
    prefix: int = 1
    out_layers: int = 2
    specials: tuple[str, ...] = ()

    def __post_init__(self):
        if self.layers % self.every:
            raise ValueError(
                f"connector layers={self.layers} is not a multiple of every={self.every}; the "
                "layers between two cross-attentions are stacked in equal groups"
            )
        if self.width % (2 * self.heads):
            raise ValueError(
                f"connector width={self.width} does not divide into heads={self.heads} of an even "
                "size; change one of them"
            )

    @property
    def tokens(self):
        """Tokens of a unit."""
        return self.queries

    @property
    def unit(self):
        """How the host builds units."""
        return UnitRule("map", prefix=self.prefix)


class Block(nnx.Module):
    """Llama layer; `between` is what happens after self-attention."""

    def __init__(self, cfg, *, rngs):
        heads = (cfg.heads, cfg.heads, cfg.width // cfg.heads)
        make = dict(rngs=rngs, out_scale=(2 * cfg.layers) ** -0.5)
        self.attn_norm = RMSNorm(cfg.width, cfg.eps, rngs=rngs)
        self.attn = Attention(cfg.width, *heads, qkv_bias=False, o_bias=False, **make)
        self.mlp_norm = RMSNorm(cfg.width, cfg.eps, rngs=rngs)
        self.mlp = MLP(cfg.width, cfg.mlp, "silu", gated=True, bias=False, **make)

    def __call__(self, x, attend, between=lambda x: x):
        x = between(x + self.attn(self.attn_norm(x), attend)[0])
        return x + self.mlp(self.mlp_norm(x))


class Cross(nnx.Module):
    """x + attention of x to vision features, both normalised; no positions."""

    def __init__(self, cfg, in_width, *, rngs):
        D, heads = cfg.width, (cfg.heads, cfg.width // cfg.heads)
        self.q_norm = RMSNorm(D, cfg.eps, rngs=rngs)
        self.kv_norm = RMSNorm(in_width, cfg.eps, rngs=rngs)
        self.attn = CrossAttention(D, in_width, D, heads, rngs=rngs, bias=False)

    def __call__(self, x, features, mask):
        keys = self.kv_norm(features)
        return x + self.attn(self.q_norm(x), keys, keys, mask)


class QFormer(nnx.Module):
    """Maps views to `queries` embeddings each: those of the last layer, through an MLP."""

    def __init__(self, cfg, in_widths, out_width, *, rngs):
        (in_width,) = in_widths
        if not cfg.out_layers and out_width != cfg.width:
            raise ValueError(
                f"out_layers=0 hands out width {cfg.width}, the decoder has {out_width}; set "
                "out_layers to 1 or more"
            )
        self.cfg = cfg
        self.query = Table(cfg.queries, cfg.width, 0.02, rngs=rngs)
        self.blocks = stack(lambda rngs: Block(cfg, rngs=rngs), cfg.layers, rngs=rngs)
        num = cfg.layers // cfg.every
        self.cross = stack(lambda rngs: Cross(cfg, in_width, rngs=rngs), num, rngs=rngs)
        self.norm = RMSNorm(cfg.width, cfg.eps, rngs=rngs)
        if cfg.out_layers:
            self.out = DenseStack((cfg.width, *(out_width,) * cfg.out_layers), rngs=rngs)
        self.specials = Specials(cfg.specials, out_width, rngs=rngs)

    def __call__(self, x, mask, size=None, weights=None):
        """Returns [B, U, Q, D] of one source [B, U, G, C] with its mask; nothing else is read."""
        hidden = self.hidden(x, mask)
        return self.out(hidden) if self.cfg.out_layers else hidden

    def hidden(self, x, mask):
        """Returns [B, U, Q, width] after the final norm, what the stage-2 losses read."""
        (x,), (mask,) = x, mask
        B, U, G, C = x.shape
        queries = self.query.embedding[...].astype(x.dtype)
        queries = jnp.broadcast_to(queries, (B * U, *queries.shape))
        y = self.run(queries, x.reshape(B * U, G, C), mask.reshape(B * U, G), self.attend())
        return self.norm(y).reshape(B, U, *y.shape[1:])

    def attend(self):
        """Returns the self-attention of queries alone: all see all, at positions 0, 1, ..."""
        cfg = self.cfg
        angles = angles_1d(jnp.arange(cfg.queries)[None], cfg.width // cfg.heads, cfg.rope_theta)

        def attend(q, k, v, cache):
            seen = jnp.ones((1, q.shape[1], k.shape[1]), bool)
            return ref.masked_attention(rotate(q, angles), rotate(k, angles), v, seen), cache

        return attend

    def run(self, x, features, mask, attend):
        """Returns [R, T, width] before the final norm.

        Args:
          x: [R, T, width]; its first `queries` positions read the features.
          features: [R, G, C].
          mask: bool[R, G].
          attend: self-attention of the blocks, as in `attention.Attention`.
        """
        cfg, Q = self.cfg, self.cfg.queries
        graphdef, params = unbind(self.blocks)

        def read(cross, x):
            head = cross(x[:, :Q], features, mask)
            return head if x.shape[1] == Q else jnp.concatenate([head, x[:, Q:]], 1)

        def group(cross, x, params):
            first, rest = (jax.tree.map(lambda p, s=s: p[s], params) for s in (0, slice(1, None)))
            x = bind(graphdef, first)(x, attend, lambda x: read(cross, x))
            if cfg.every > 1:
                rest = bind(graphdef, rest)
                x, _ = scan_layers(rest, lambda block, x, _: (block(x, attend), None), x)
            return x, None

        groups = jax.tree.map(lambda p: p.reshape(-1, cfg.every, *p.shape[1:]), params)
        return scan_layers(self.cross, group, x, groups)[0]
