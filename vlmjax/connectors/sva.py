"""The Spatial Vision Aggregator of Cambrian-1: a grid of queries, each reading its own window of
every tower (arXiv:2406.16860).

The block stands in the connector and, with queries of the decoder's width, between its layers.
Source: `vision_sampler.py` of cambrian-mllm/cambrian.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from vlmjax.batch import UnitRule
from vlmjax.connectors import units
from vlmjax.connectors.attend import attend
from vlmjax.connectors.mlp import DenseStack
from vlmjax.connectors.specials import Specials, Table
from vlmjax.nn import Dense, LayerNorm, scan_layers, stack


@dataclasses.dataclass(frozen=True)
class SVAConfig:
    """Sizes of the aggregator.

    Attributes:
      side: rows and columns of the queries of an image.
      windows: side of the window that a query reads, for each tower.
      width: of queries, keys and values.
      eps: of the norms.
      reduce: "none", or "weighted": each feature is a sum by weights of the host, which resizes
        the maps of towers (27x27 to 24x24).
    """

    side: int = 24
    windows: tuple[int, ...] = (1, 1, 1, 4)
    width: int = 1024
    heads: int = 16
    layers: int = 3
    eps: float = 1e-5
    reduce: str = "none"
    specials: tuple[str, ...] = ("newline",)

    def __post_init__(self):
        if self.reduce not in ("none", "weighted"):
            raise ValueError(
                f"connector reduce={self.reduce!r} is unknown; choose 'none' or 'weighted'"
            )
        if self.width % self.heads:
            raise ValueError(
                f"connector width={self.width} does not divide into heads={self.heads}; change one"
            )

    @property
    def tokens(self):
        """Tokens of a unit, which is an image."""
        return self.side**2

    @property
    def unit(self):
        """How the host builds units."""
        return UnitRule("map", order="cell", out=(self.side, self.side))


class Sources(NamedTuple):
    """What the queries of an image read; made once, read by every block."""

    latents: tuple  # for each tower [B, I, Q, G, C]
    masks: tuple  # for each tower bool[B, I, Q, G], no window without True
    context: jax.Array  # [B, I, 1, C], the mean of the first tower


def _dense(fan_in, fan_out, rngs):
    return Dense((fan_in,), (fan_out,), ("embed",), ("mlp",), rngs=rngs, bias=False)


class Read(nnx.Module):
    """Attention of each query to its windows in all towers, in one softmax.

    All maps are without bias; those into heads have a norm in front, and each tower its own.
    """

    def __init__(self, cfg, *, rngs):
        self.towers, D = len(cfg.windows), cfg.width
        axes = ("embed",), ("heads", "head_dim")
        heads = (cfg.heads, D // cfg.heads)
        for name in ("q", *(f"{x}_{k}" for k in range(self.towers) for x in "kv")):
            setattr(self, f"{name}_norm", LayerNorm(D, cfg.eps, rngs=rngs))
            setattr(self, name, Dense((D,), heads, *axes, rngs=rngs, bias=False))
        self.o = Dense(heads, (D,), axes[1], axes[0], rngs=rngs, bias=False)

    def __call__(self, x, latents, masks):
        """Returns [..., Q, D] of queries [..., Q, D] and, for each tower, [..., Q, G, D]."""

        def heads(name, x):
            return getattr(self, name)(getattr(self, f"{name}_norm")(x))

        keys, values = (
            jnp.concatenate([heads(f"{x}_{k}", latents[k]) for k in range(self.towers)], -3)
            for x in "kv"
        )
        mask = jnp.concatenate(masks, -1)
        return self.o(attend(heads("q", x)[..., None, :, :], keys, values, mask)[..., 0, :, :])


class SVABlock(nnx.Module):
    """Queries of any width read every tower and are added to.

    Args:
      cfg: an `SVAConfig`; its `width` is that of the latents and of the attention.
      width: of the queries: that of the decoder for a block between its layers.
    """

    def __init__(self, cfg, width, *, rngs):
        D = cfg.width
        self.windows = cfg.windows
        self.context, self.enter = _dense(D, D, rngs), _dense(width + D, D, rngs)
        for k, side in enumerate(cfg.windows):
            if side > 1:
                setattr(self, f"pos_{k}", Table(side**2, D, 1.0, rngs=rngs))
        self.attn = Read(cfg, rngs=rngs)
        self.norm = LayerNorm(D, cfg.eps, rngs=rngs)
        self.up, self.down = _dense(D, D, rngs), _dense(D, width, rngs)

    def __call__(self, x, sources):
        """Returns [B, I, Q, width] of queries [B, I, Q, width] and `Sources`."""
        context = self.context(sources.context)
        context = jnp.broadcast_to(context, (*x.shape[:-1], context.shape[-1]))
        latents = [
            latent + getattr(self, f"pos_{k}").embedding[...].astype(latent.dtype)
            if side > 1
            else latent
            for k, (side, latent) in enumerate(zip(self.windows, sources.latents, strict=True))
        ]
        h = self.enter(jnp.concatenate([x, context.astype(x.dtype)], -1))
        h = self.norm(h + self.attn(h, latents, sources.masks))
        return x + self.down(jax.nn.gelu(self.up(h), approximate=False))


class Tower(nnx.Module):
    """Projects the features of one tower: linear, GELU, linear, norm."""

    def __init__(self, in_width, width, eps, *, rngs):
        self.proj = DenseStack((in_width, width, width), rngs=rngs)
        self.norm = LayerNorm(width, eps, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.proj(x))


class SVA(nnx.Module):
    """Maps images seen by several towers to side^2 decoder embeddings each."""

    def __init__(self, cfg, in_widths, out_width, *, rngs):
        if len(in_widths) != len(cfg.windows):
            raise ValueError(
                f"{len(in_widths)} towers for windows={cfg.windows}; give one window side for "
                "each tower"
            )
        self.cfg = cfg
        for k, in_width in enumerate(in_widths):
            setattr(self, f"tower_{k}", Tower(in_width, cfg.width, cfg.eps, rngs=rngs))
        self.query = Table(1, cfg.width, cfg.width**-0.5, rngs=rngs)
        self.blocks = stack(lambda rngs: SVABlock(cfg, cfg.width, rngs=rngs), cfg.layers, rngs=rngs)
        self.out = DenseStack((cfg.width, out_width, out_width), rngs=rngs)
        self.specials = Specials(cfg.specials, out_width, rngs=rngs)

    def __call__(self, x, mask, size=None, weights=None):
        """Returns [B, I, side^2, D]; see `sources` for the arguments, `size` is not read."""
        return self.out(self.aggregate(self.sources(x, mask, weights)))

    def sources(self, x, mask, weights=None):
        """Returns the `Sources` of images, also for the blocks between decoder layers.

        Args:
          x: for each tower [B, I, side^2 * window^2, C], one query's window after another.
          mask: for each tower a bool of that shape, False on padding around the picture; the
            features there count in the mean all the same. A window without True is all seen.
          weights: for each tower f32 of that shape, read by reduce="weighted"; the features of a
            sum then come side by side.
        """
        if self.cfg.reduce == "weighted":
            merged = [
                self._merge(k, *each) for k, each in enumerate(zip(x, mask, weights, strict=True))
            ]
            x, mask = zip(*merged, strict=True)
        cut = [
            lambda a, side=side: a.reshape(*a.shape[:2], self.cfg.side**2, side**2, *a.shape[3:])
            for side in self.cfg.windows
        ]
        latents = [getattr(self, f"tower_{k}")(f) for k, f in enumerate(x)]
        context = latents[0].mean(2, keepdims=True, dtype=jnp.float32).astype(latents[0].dtype)
        masks = [c(m) for c, m in zip(cut, mask, strict=True)]
        masks = tuple(m | ~m.any(-1, keepdims=True) for m in masks)
        latents = tuple(c(f) for c, f in zip(cut, latents, strict=True))
        return Sources(latents, masks, context)

    def _merge(self, k, x, mask, weights):
        """Returns the sums [B, I, places, C] of tower k, and which of them may be seen."""
        B, I = mask.shape[:2]
        shape = (B, I, self.cfg.tokens * self.cfg.windows[k] ** 2, -1)
        x, shown = x.reshape(*shape, x.shape[-1]), jnp.ones(mask.shape, bool).reshape(shape)
        return units.weighted(x, shown, weights.reshape(shape)), mask.reshape(shape).any(-1)

    def aggregate(self, sources):
        """Returns [B, I, side^2, width]: the queries after all blocks."""
        B, I = sources.context.shape[:2]
        query = self.query.embedding[...].astype(sources.context.dtype)
        x = jnp.broadcast_to(query, (B, I, self.cfg.tokens, query.shape[-1]))
        return scan_layers(self.blocks, lambda block, x, _: (block(x, sources), None), x)[0]
