"""The C-Abstractor: convolutions over a whole map, pooled to a small square of tokens.

RegNet blocks, adaptive average pooling, RegNet blocks, MLP. From Honeybee (arXiv:2312.06742), used
twice by 360VL: one copy for the map of all crops, one for the global view.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vlmjax.batch import UnitRule
from vlmjax.connectors.mlp import DenseStack
from vlmjax.connectors.specials import Specials, Table
from vlmjax.nn import Dense, LayerNorm, param, scan_layers, stack


@dataclasses.dataclass(frozen=True)
class CAbstractorConfig:
    """Sizes of a C-Abstractor.

    Attributes:
      queries: tokens of a map, a square number.
      width: of the convolutions.
      depth: blocks before the pooling, and after.
      layers: linear maps at the end.
      side: rows and columns of the position table; it is resized to maps of another size.
      eos: learned tokens that follow those of the map.
      norm: "none", or "layer" for a layer normalisation in front.
      eps: of the norms inside; that of the one in front is 1e-6.
      copies: names of independent copies. With several, source k has units of its own, which go
        through copy k; the units of all sources come out one source after another.
    """

    queries: int = 144
    width: int = 1024
    depth: int = 3
    layers: int = 2
    side: int = 24
    eos: int = 0
    norm: str = "none"
    eps: float = 1e-5
    copies: tuple[str, ...] = ("map",)
    specials: tuple[str, ...] = ()

    def __post_init__(self):
        if math.isqrt(self.queries) ** 2 != self.queries:
            raise ValueError(
                f"connector queries={self.queries} must be a square number: they are the cells of "
                "a square grid"
            )
        if self.depth < 2 or self.layers < 1:
            raise ValueError(
                f"connector depth={self.depth} must be at least 2 and layers={self.layers} at "
                "least 1"
            )
        if self.norm not in ("none", "layer"):
            raise ValueError(f"connector norm={self.norm!r} is unknown; choose 'none' or 'layer'")

    @property
    def tokens(self):
        """Tokens of a unit."""
        return self.queries + self.eos

    @property
    def unit(self):
        """How the host builds units."""
        side = math.isqrt(self.queries)
        return UnitRule("map", out=(side, side))


def pooling_bins(size, bins):
    """Returns f32[bins, size], rows that average [floor(i n / m), ceil((i + 1) n / m))."""
    matrix = np.zeros((bins, size), np.float32)
    for i in range(bins):
        start, stop = i * size // bins, -(-(i + 1) * size // bins)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix


def bicubic(size, to):
    """Returns f32[to, size]: bicubic resampling (a = -0.75) with half-pixel centres, edges held."""
    a = -0.75
    centre = (np.arange(to) + 0.5) * size / to - 0.5
    first = np.floor(centre).astype(int) - 1
    matrix = np.zeros((to, size))
    for tap in range(4):
        d = np.abs(centre - (first + tap))
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
        at = np.clip(first + tap, 0, size - 1)
        np.add.at(matrix, (np.arange(to), at), np.where(d <= 1, near, far))
    return matrix.astype(np.float32)


def resample(x, matrix):
    """Returns f32[..., to, to, C]: both axes of a square map [..., n, n, C] times f32[to, n]."""
    how = dict(precision="highest", preferred_element_type=jnp.float32)
    x = x.astype(jnp.float32)
    return jnp.einsum("ih,...hwc,jw->...ijc", jnp.asarray(matrix), x, jnp.asarray(matrix), **how)


class Depthwise(nnx.Module):
    """3x3 convolution of each channel by itself, without bias: nine shifted products, in f32."""

    def __init__(self, width, *, rngs):
        self.kernel = param(rngs, (3, 3, width), (None, None, "embed"), fan_in=9)

    def __call__(self, x):
        """Returns [R, h, w, C]."""
        R, h, w, C = x.shape
        kernel = self.kernel[...]
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).astype(jnp.float32)
        taps = [(i, j) for i in range(3) for j in range(3)]
        y = sum(padded[:, i : i + h, j : j + w] * kernel[i, j] for i, j in taps)
        return y.astype(x.dtype)


class Block(nnx.Module):
    """RegNet bottleneck: 1x1, depthwise 3x3, squeeze and excitation, 1x1, a shortcut around."""

    def __init__(self, in_width, width, eps, *, rngs):
        def dense(fan_in, fan_out, bias):
            return Dense((fan_in,), (fan_out,), ("embed",), ("mlp",), rngs=rngs, bias=bias)

        def norm():
            return LayerNorm(width, eps, rngs=rngs)

        squeezed = round(in_width / 4)  # of what enters the block, not of what is squeezed
        self.enter, self.enter_norm = dense(in_width, width, False), norm()
        self.conv, self.conv_norm = Depthwise(width, rngs=rngs), norm()
        self.squeeze, self.excite = dense(width, squeezed, True), dense(squeezed, width, True)
        self.leave, self.leave_norm = dense(width, width, False), norm()
        if in_width != width:
            self.skip, self.skip_norm = dense(in_width, width, False), norm()

    def __call__(self, x):
        """Returns [R, h, w, width] of [R, h, w, in_width]."""
        y = jax.nn.silu(self.enter_norm(self.enter(x)))
        y = jax.nn.silu(self.conv_norm(self.conv(y)))
        level = y.mean((1, 2), keepdims=True, dtype=jnp.float32).astype(y.dtype)
        y = y * jax.nn.sigmoid(self.excite(jax.nn.silu(self.squeeze(level))))
        y = self.leave_norm(self.leave(y))
        return jax.nn.silu(y + (self.skip_norm(self.skip(x)) if hasattr(self, "skip") else x))


class Stage(nnx.Module):
    """`depth` blocks; the one that changes the width, if any, is apart from the stacked ones."""

    def __init__(self, in_width, width, depth, eps, *, rngs):
        if in_width != width:
            self.first = Block(in_width, width, eps, rngs=rngs)
        equal = depth - (in_width != width)
        self.blocks = stack(lambda rngs: Block(width, width, eps, rngs=rngs), equal, rngs=rngs)

    def __call__(self, x):
        x = self.first(x) if hasattr(self, "first") else x
        return scan_layers(self.blocks, lambda block, x, _: (block(x), None), x)[0]


class Abstractor(nnx.Module):
    """One copy: maps of one size to `tokens` decoder embeddings each."""

    def __init__(self, cfg, in_width, out_width, *, rngs):
        self.cfg = cfg
        if cfg.norm == "layer":
            self.norm = LayerNorm(in_width, 1e-6, rngs=rngs)
        self.pos = Table(cfg.side**2, in_width, 0.02, rngs=rngs)
        self.before = Stage(in_width, cfg.width, cfg.depth, cfg.eps, rngs=rngs)
        self.after = Stage(cfg.width, cfg.width, cfg.depth, cfg.eps, rngs=rngs)
        self.readout = DenseStack((cfg.width, *(out_width,) * cfg.layers), "silu", rngs=rngs)
        if cfg.eos:
            self.eos = Table(cfg.eos, out_width, 0.02, rngs=rngs)

    def __call__(self, x):
        """Returns [B, U, n, D] of square maps [B, U, G, C] in reading order."""
        B, U, G, C = x.shape
        side, cfg = math.isqrt(G), self.cfg
        if side * side != G:
            raise ValueError(
                f"units of {G} patches are not square maps, which the C-Abstractor needs; change "
                "the tiles"
            )
        if cfg.norm == "layer":
            x = self.norm(x)
        pos = self.pos.embedding[...].reshape(cfg.side, cfg.side, C)
        if side != cfg.side:
            pos = resample(pos, bicubic(cfg.side, side))
        x = x.reshape(B * U, side, side, C) + pos.astype(x.dtype)
        x = self.before(x)
        x = resample(x, pooling_bins(side, math.isqrt(cfg.queries))).astype(x.dtype)
        x = self.readout(self.after(x)).reshape(B, U, cfg.queries, -1)
        if cfg.eos:
            eos = self.eos.embedding[...].astype(x.dtype)
            x = jnp.concatenate([x, jnp.broadcast_to(eos, (B, U, *eos.shape))], 2)
        return x


class CAbstractor(nnx.Module):
    """Maps the units of each source through the copy of that source."""

    def __init__(self, cfg, in_widths, out_width, *, rngs):
        if len(in_widths) != len(cfg.copies):
            raise ValueError(
                f"{len(in_widths)} sources for the copies {cfg.copies} of the C-Abstractor; each "
                "copy has one source of units"
            )
        self.cfg = cfg
        for name, in_width in zip(cfg.copies, in_widths, strict=True):
            setattr(self, name, Abstractor(cfg, in_width, out_width, rngs=rngs))
        self.specials = Specials(cfg.specials, out_width, rngs=rngs)

    def __call__(self, x, mask, size=None, weights=None):
        """Returns [B, sum of U_k, n, D].

        Args:
          x: for each copy [B, U_k, G_k, C], square maps; a missing patch is zeros.
          mask, size, weights: not read.
        """
        outputs = [getattr(self, name)(f) for name, f in zip(self.cfg.copies, x, strict=True)]
        return jnp.concatenate(outputs, 1)
