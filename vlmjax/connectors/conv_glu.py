"""The adapter of CogVLM2 and GLM-4V: a 2x2 convolution, a norm, a gated MLP.

The tokens of an image stand between two learned vectors, `boi` and `eoi`. Source: `visual.py` of
the released checkpoints.
"""

import dataclasses

import jax
from flax import nnx

from vlmjax.batch import UnitRule
from vlmjax.connectors.specials import Specials
from vlmjax.nn import MLP, Dense, LayerNorm


@dataclasses.dataclass(frozen=True)
class ConvGLUConfig:
    """Sizes of the adapter.

    Attributes:
      hidden: width of the gated MLP.
      conv: output of the convolution: "in" keeps the vision width (CogVLM2), "out" goes to the
        decoder width (GLM-4V).
      window: side and stride of the convolution; 1 = none (CogVLM).
      scaling: tokens and special vectors are divided by it.
      eps: of the norm.
    """

    hidden: int
    conv: str = "in"
    window: int = 2
    scaling: float = 1.0
    eps: float = 1e-5
    specials: tuple[str, ...] = ("boi", "eoi")

    def __post_init__(self):
        if self.conv not in ("in", "out"):
            raise ValueError(f"connector conv={self.conv!r} is unknown; choose 'in' or 'out'")

    @property
    def tokens(self):
        """Tokens of a unit."""
        return 1

    @property
    def unit(self):
        """How the host builds units."""
        return UnitRule("window", side=self.window, pad=False)


class ConvGLU(nnx.Module):
    """Maps windows to decoder embeddings, one token for each."""

    def __init__(self, cfg, in_widths, out_width, *, rngs):
        self.cfg = cfg
        width, places = sum(in_widths), cfg.window**2
        to = {"in": width, "out": out_width}[cfg.conv] if places > 1 else width
        embed = ("embed",)
        if places > 1:
            self.conv = Dense((places * width,), (to,), embed, ("mlp",), rngs=rngs)
        self.dense = Dense((to,), (out_width,), embed, ("mlp",), rngs=rngs, bias=False)
        self.norm = LayerNorm(out_width, cfg.eps, rngs=rngs)
        self.mlp = MLP(out_width, cfg.hidden, "silu", rngs=rngs, gated=True, bias=False)
        self.specials = Specials(cfg.specials, out_width, rngs=rngs, scale=1 / cfg.scaling)

    def __call__(self, x, mask, size=None, weights=None):
        """Returns [B, U, 1, D] of one source [B, U, window^2, C]; nothing else is read."""
        (x,) = x
        x = x.reshape(*x.shape[:2], -1)
        x = self.dense(self.conv(x) if self.cfg.window > 1 else x)
        x = self.mlp(jax.nn.gelu(self.norm(x), approximate=False))
        return (x / self.cfg.scaling).reshape(*x.shape[:2], 1, -1)
