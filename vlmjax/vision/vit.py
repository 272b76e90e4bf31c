"""The vision transformer: packed patches of native-resolution images in, one feature per patch out.

As in VideoLLaMA3 (arXiv:2501.13106): the SigLIP so400m body without its position table, with 2-D
RoPE, and attention inside one image or frame. Source: `modeling_video_llama_3.py` in transformers.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from vlmjax.attention import Attention, packed
from vlmjax.nn import MLP, Dense, LayerNorm, scan_layers, stack
from vlmjax.rope import angles_2d
from vlmjax.sharding import layout_of


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Sizes of a ViT. The head size is width / heads and a multiple of 4 (two axes, two halves)."""

    width: int
    mlp: int
    layers: int
    heads: int
    patch: int = 14
    act: str = "gelu_tanh"
    eps: float = 1e-6
    rope_theta: float = 1e4

    def __post_init__(self):
        if self.width % self.heads or self.head_dim % 4:
            raise ValueError(
                f"vision width={self.width} with heads={self.heads} is not allowed: the head size "
                "width / heads must be a whole multiple of 4 for 2-D RoPE; change width or heads"
            )

    @property
    def head_dim(self):
        return self.width // self.heads

    @property
    def patch_dim(self):
        """Values in a patch row."""
        return 3 * self.patch**2


PRESETS = {
    "siglip_so400m_14": dict(width=1152, mlp=4304, layers=27, heads=16, patch=14),
}


class Block(nnx.Module):
    """Pre-norm transformer layer."""

    def __init__(self, cfg, *, rngs):
        heads, scale = (cfg.heads, cfg.heads, cfg.head_dim), (2 * cfg.layers) ** -0.5
        make = dict(
            rngs=rngs, out_scale=scale
        )  # what 2 L branches add up to stays of the size of one
        self.attn_norm = LayerNorm(cfg.width, cfg.eps, rngs=rngs)
        self.attn = Attention(cfg.width, *heads, qkv_bias=True, o_bias=True, **make)
        self.mlp_norm = LayerNorm(cfg.width, cfg.eps, rngs=rngs)
        self.mlp = MLP(cfg.width, cfg.mlp, cfg.act, gated=False, bias=True, **make)

    def __call__(self, x, attend):
        x = x + self.attn(self.attn_norm(x), attend)[0]
        return x + self.mlp(self.mlp_norm(x))


class ViT(nnx.Module):
    """Patch embedding, `layers` blocks, final norm."""

    def __init__(self, cfg, *, rngs):
        self.cfg = cfg
        self.patch = Dense((cfg.patch_dim,), (cfg.width,), ("patch",), ("embed",), rngs=rngs)
        self.blocks = stack(lambda rngs: Block(cfg, rngs=rngs), cfg.layers, rngs=rngs)
        self.norm = LayerNorm(cfg.width, cfg.eps, rngs=rngs)

    def __call__(self, patches, coords, segments, *, dtype=jnp.float32, attention, remat="none"):
        """Returns [B, P, D], arbitrary at padding.

        Args:
          patches: u8[B, P, 3*p*p] raw pixels, channel-major rows.
          coords: i32[B, P, 2] row and column of each patch in its image.
          segments: i32[B, P] one number per image or frame, in order; 0 = padding at the end.
          dtype: of the computation.
          attention: an `AttentionSpec`.
          remat: a key of `nn.REMAT`.
        """
        pixels = patches.astype(jnp.float32) / 127.5 - 1  # (x / 255 - 0.5) / 0.5
        angles = angles_2d(coords, self.cfg.head_dim, self.cfg.rope_theta)
        layout = layout_of("vision", *segments.shape)
        how = dict(size=self.cfg.head_dim, causal=False, spec=attention, layout=layout)
        attend = packed(segments, angles, **how)

        def layer(block, x, _):
            return layout.constrain(block(x, attend)), None

        x = layout.constrain(self.patch(pixels.astype(dtype)))
        x, _ = scan_layers(self.blocks, layer, x, remat=remat)
        return self.norm(x)
