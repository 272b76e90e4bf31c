"""MLP connectors: patches of a window averaged or laid side by side, then linear maps and GELU.

One set of fields gives the projectors of LLaVA (`mlp2x_gelu`), VideoLLaMA3 (mean of 2x2), ViP-LLaVA
(a norm in front, layers of the tower as channels), InternVL (`mlp1` after pixel shuffle) and VILA
(`mlp_downsample*`, also on the features of several scales).
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from vlmjax.batch import UnitRule
from vlmjax.connectors.specials import Specials
from vlmjax.connectors.units import REDUCE
from vlmjax.nn import ACTIVATIONS, Dense, LayerNorm


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """`layers` linear maps; the first goes from the vision width to the decoder width.

    Attributes:
      layers: maps to the decoder width.
      hidden: widths of further maps in front of them.
      norm: "none", or "layer": layer normalisation in front of every map that does not start from
        the decoder width.
      eps: of the norms.
      window: side of the window whose patches keep their place: their channels are concatenated.
        A missing patch is zeros.
      reduce: what becomes of several features in one place: "mean" of the present, "max", or
        "weighted" by weights of the host.
      order, pad: of windows, see `UnitRule`; column order is that of InternVL 1.2.
      specials: names of learned vectors for the token format, e.g. ("newline",).
    """

    layers: int = 2
    hidden: tuple[int, ...] = ()
    norm: str = "none"
    eps: float = 1e-5
    window: int = 1
    reduce: str = "mean"
    order: str = "row"
    pad: bool = True
    specials: tuple[str, ...] = ()

    def __post_init__(self):
        if self.layers < 1:
            raise ValueError(f"connector layers={self.layers} must be at least 1")
        if self.norm not in ("none", "layer"):
            raise ValueError(f"connector norm={self.norm!r} is unknown; choose 'none' or 'layer'")
        if self.reduce not in REDUCE:
            raise ValueError(
                f"connector reduce={self.reduce!r} is unknown; choose one of {sorted(REDUCE)}"
            )
        assert self.unit  # raises for a wrong window or order

    @property
    def tokens(self):
        """Tokens of a unit."""
        return 1

    @property
    def unit(self):
        """How the host builds units."""
        return UnitRule("window", side=self.window, pad=self.pad, order=self.order)


def dense_layers(widths, norms, eps, *, rngs):
    """Returns {name: layer}: `dense_i` from each width to the next, the first with a `norm_i`."""
    layers = {}
    for i, (fan_in, fan_out) in enumerate(zip(widths, widths[1:], strict=False)):
        if i < norms:
            layers[f"norm_{i}"] = LayerNorm(fan_in, eps, rngs=rngs)
        layers[f"dense_{i}"] = Dense((fan_in,), (fan_out,), ("embed",), ("mlp",), rngs=rngs)
    return layers


class DenseStack(nnx.Module):
    """Linear maps with an activation between them, under `dense_0`, `dense_1`, ..."""

    def __init__(self, widths, act="gelu", *, rngs):
        self.act = act
        for name, layer in dense_layers(widths, 0, 0.0, rngs=rngs).items():
            setattr(self, name, layer)

    def __call__(self, x):
        return run_dense(self, x, self.act)


def run_dense(module, x, act="gelu"):
    """Returns x after the `norm_i` and `dense_i` of a module, activations between them."""
    i = 0
    while hasattr(module, f"dense_{i}"):
        x = ACTIVATIONS[act](x) if i else x
        x = getattr(module, f"norm_{i}")(x) if hasattr(module, f"norm_{i}") else x
        x = getattr(module, f"dense_{i}")(x)
        i += 1
    return x


class MLP(nnx.Module):
    """Maps the features of windows to decoder embeddings, one token for each."""

    def __init__(self, cfg, in_widths, out_width, *, rngs):
        self.cfg = cfg
        widths = (cfg.window**2 * sum(in_widths), *cfg.hidden, *(out_width,) * cfg.layers)
        norms = 1 + len(cfg.hidden) if cfg.norm == "layer" else 0
        for name, layer in dense_layers(widths, norms, cfg.eps, rngs=rngs).items():
            setattr(self, name, layer)
        self.specials = Specials(cfg.specials, out_width, rngs=rngs)

    def __call__(self, x, mask, size=None, weights=None):
        """Returns [B, U, 1, D].

        Args:
          x: for each source [B, U, G, C]: towers, layers or scales whose channels are concatenated
            in each place. G is a multiple of window^2, the patches of one place side by side.
          mask: for each source bool[B, U, G].
          size: not read.
          weights: for each source f32[B, U, G], read by reduce="weighted".
        """
        y = run_dense(self, self.merge(x, mask, weights))
        return y.reshape(*y.shape[:2], 1, -1)

    def merge(self, x, mask, weights=None):
        """Returns [B, U, window^2 * sum of C], what the first norm or map gets."""
        places, reduce = self.cfg.window**2, REDUCE[self.cfg.reduce]

        def split(a):
            return a.reshape(*a.shape[:2], places, -1, *a.shape[3:])

        merged = [
            reduce(split(f), split(m), None if weights is None else split(weights[k]))
            for k, (f, m) in enumerate(zip(x, mask, strict=True))
        ]
        B, U = merged[0].shape[:2]
        return jnp.concatenate(merged, -1).reshape(B, U, -1)
