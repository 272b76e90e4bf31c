"""The MLP connector of LLaVA-1.5 and VideoLLaMA3 (`mlp2x_gelu`): linear layers and exact GELU."""

import dataclasses

from flax import nnx

from vlmjax.nn import ACTIVATIONS, Dense


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """`layers` linear maps; the first goes from the vision width to the decoder width."""

    layers: int = 2

    def __post_init__(self):
        if self.layers < 1:
            raise ValueError(f"connector layers={self.layers} must be at least 1")


class MLP(nnx.Module):
    """Maps vision features [B, U, Dv] to decoder embeddings [B, U, D]."""

    def __init__(self, cfg, in_width, out_width, *, rngs):
        self.layers = cfg.layers
        for i in range(cfg.layers):
            width = in_width if i == 0 else out_width
            setattr(
                self, f"dense_{i}", Dense((width,), (out_width,), ("embed",), ("mlp",), rngs=rngs)
            )

    def __call__(self, x):
        for i in range(self.layers):
            x = getattr(self, f"dense_{i}")(ACTIVATIONS["gelu"](x) if i else x)
        return x
