"""The vision transformer: packed patches of images of any size in, one feature per slot out.

One body serves every tower; what they differ in are fields of `ViTConfig`, and `PRESETS` has a row
for each. A row of a batch holds views (images, frames, tiles) one after another, and a patch sees
its own view only. Where a tower has a class token and registers, their slots lie in front of the
patches of each view:

    view      1   1   1   1   1   1  |  2   2   2  |  0         0 is padding
    slot     cls  p   p   p   p   p  | cls  p   p  |  -
    row      -1   0   0   0   1   1  | -1   0   1  |  0         -1 - k at slot k of the prefix
    column    0   0   1   2   0   1  |  0   0   0  |  0

Sources: transformers (`modeling_video_llama_3.py` for 2-D RoPE, `modeling_{clip,siglip,idefics2,
dinov2,dinov2_with_registers}.py`), `modeling_intern_vit.py` of OpenGVLab/InternVL, `visual.py` of
CogVLM2 (EVA2-CLIP-E).
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
from flax import nnx

from vlmjax.attention import Attention, packed
from vlmjax.batch import TowerForm
from vlmjax.nn import MLP, Dense, LayerNorm, RMSNorm, Scale, Table, scan_layers, stack
from vlmjax.rope import angles_2d
from vlmjax.sharding import layout_of
from vlmjax.vision import position
from vlmjax.vision.pixels import CLIP, HALF, IMAGENET, normalise

NORMS = {"layer": LayerNorm, "rms": RMSNorm}
CHOICES = {
    "norm": tuple(NORMS),
    "order": ("pre", "post"),
    "position": ("rope2d", *position.TABLES),
}


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """A ViT.

    Attributes:
      width, mlp, layers, heads: sizes; a head has width / heads channels.
      features: "last" = what leaves the tower; "-1", "-2", ... = what leaves the last block, the
        one before it, ..., without the final norm. Blocks behind that are not built.
      patch: pixels on a side of a patch.
      act: key of `nn.ACTIVATIONS`, of the MLP.
      gated: whether the MLP is down(act(gate(x)) * up(x)).
      norm: "layer" or "rms".
      eps: of every norm.
      order: "pre" = x + f(norm(x)), "post" = x + norm(f(x)).
      layer_scale: initial scale of the branches of a block; 0 = there is none.
      qk_norm: RMSNorm of queries and keys over the full width.
      qkv_bias, patch_bias: whether queries, keys and values, and the patch embedding have a bias.
      embed_norm: whether there is a norm in front of the blocks.
      final_norm: whether there is one behind them.
      prefix: slots in front of each view: 0, 1 for a class token, 1 + r with r registers.
      position: "rope2d" by row and column; or a learned table of side x side, and where the prefix
        is not empty one row more for the class token: "table" looks up whole rows and columns,
        "bucket" whole buckets of them, as many as the table has for a view of any size (NaViT),
        "bicubic" samples it where they lie between, as torch resizes, "bicubic_antialias" does so
        with torch's antialias=True (which needs every view whole).
      side: of the table.
      rope_theta: of "rope2d".
      mean, std: of the pixels of each channel, between 0 and 1.
    """

    width: int
    mlp: int
    layers: int
    heads: int
    features: str = "last"
    patch: int = 14
    act: str = "gelu_tanh"
    gated: bool = False
    norm: str = "layer"
    eps: float = 1e-6
    order: str = "pre"
    layer_scale: float = 0.0
    qk_norm: bool = False
    qkv_bias: bool = True
    patch_bias: bool = True
    embed_norm: bool = False
    final_norm: bool = True
    prefix: int = 0
    position: str = "rope2d"
    side: int = 0
    rope_theta: float = 1e4
    mean: tuple = HALF["mean"]
    std: tuple = HALF["std"]

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"vision {name}={getattr(self, name)!r} is unknown; choose one of {allowed}"
                )
        turned = self.position == "rope2d"
        if self.width % self.heads or (turned and self.head_dim % 4):
            raise ValueError(
                f"vision width={self.width} with heads={self.heads} is not allowed: the head size "
                "width / heads must be whole, and a multiple of 4 for 2-D RoPE; change width or "
                "heads"
            )
        if (self.side > 0) == turned or (turned and self.prefix):
            raise ValueError(
                f"vision position={self.position!r} with side={self.side}, prefix={self.prefix} is "
                "not allowed: a table needs its side in patches, 2-D RoPE has neither a table nor "
                "a place for a class token"
            )
        if self.features != "last" and not (
            re.fullmatch(r"-[1-9]\d*", str(self.features)) and self.blocks > 0
        ):
            raise ValueError(
                f"vision features={self.features!r} is unknown; choose 'last', or '-1' to "
                f"'-{self.layers}' for what leaves one of the {self.layers} blocks"
            )

    @property
    def head_dim(self):
        return self.width // self.heads

    @property
    def patch_dim(self):
        """Values in a patch row."""
        return 3 * self.patch**2

    @property
    def blocks(self):
        """Blocks that are built: those behind the features are not."""
        return self.layers if self.features == "last" else self.layers + 1 + int(self.features)

    @property
    def form(self):
        """What the host knows of it: "table" takes whole places, "bicubic" those between."""
        places = {"rope2d": "grid", "table": "table", "bucket": "bucket"}
        return TowerForm(self.patch, self.prefix, places.get(self.position, "table"), self.side)

    @property
    def out_width(self):
        """Channels of a feature."""
        return self.width

    def out_grid(self, rows, columns):
        """Returns the rows and columns of the slots behind the prefix, of a view of such patches.

        A view has prefix + rows * columns slots.
        """
        return rows, columns


_SO400M = dict(width=1152, mlp=4304, layers=27, heads=16)
_CLIP = dict(
    CLIP,
    act="quick_gelu",
    eps=1e-5,
    patch_bias=False,
    embed_norm=True,
    prefix=1,
    position="table",
)
_INTERNVIT = dict(
    IMAGENET, act="gelu", layer_scale=0.1, final_norm=False, prefix=1, position="table", side=32
)
_INTERNVIT_6B = dict(
    _INTERNVIT, width=3200, mlp=12800, heads=25, norm="rms", qk_norm=True, qkv_bias=False
)
_DINOV2 = dict(IMAGENET, act="gelu", layer_scale=1.0, prefix=1, position="bicubic", side=37)
_DINOV2_L = dict(_DINOV2, width=1024, mlp=4096, layers=24, heads=16)

# Whole towers; the systems that take the output of an earlier block say so by `features`.
PRESETS = {
    # VideoLLaMA3: the body of SigLIP without its table.
    "siglip_so400m_14": _SO400M,
    # As in transformers; timm and open_clip run the same weights with act="gelu".
    "siglip_so400m_14_384": dict(_SO400M, position="table", side=27),
    # Idefics2 and MiniCPM-Llama3-V 2.5: whole buckets of the table, whatever the size of a view.
    "siglip_navit": dict(_SO400M, position="bucket", side=70),
    # MiniCPM-V 2.0, by timm: the last block dropped, the final norm kept.
    "siglip_minicpm_v_2": dict(
        _SO400M, layers=26, act="gelu", position="bicubic_antialias", side=27
    ),
    "clip_l_14_336": dict(_CLIP, width=1024, mlp=4096, layers=24, heads=16, side=24),
    "dfn5b_h_14_378": dict(_CLIP, width=1280, mlp=5120, layers=32, heads=16, side=27),
    "internvit_6b_v1_0": dict(_INTERNVIT_6B, layers=48, side=16),
    "internvit_6b_v1_5": dict(_INTERNVIT_6B, layers=45),
    "internvit_300m": dict(_INTERNVIT, width=1024, mlp=4096, layers=24, heads=16),
    "dinov2_l_14": _DINOV2_L,
    "dinov2_l_14_reg4": dict(_DINOV2_L, prefix=5, position="bicubic_antialias"),
    "dinov2_g_14": dict(_DINOV2, width=1536, mlp=4096, layers=40, heads=24, act="silu", gated=True),
    # CogVLM2 at 1344 pixels; GLM-4V (1120) has side=80, CogVLM (490) side=35.
    "eva2_clip_e": dict(
        CLIP,
        width=1792,
        mlp=15360,
        layers=63,
        heads=16,
        act="gelu",
        order="post",
        final_norm=False,
        prefix=1,
        position="table",
        side=96,
    ),
}


class Block(nnx.Module):
    """Transformer layer; its norms stand in front of its branches or behind them."""

    def __init__(self, cfg, *, rngs):
        heads, scale = (cfg.heads, cfg.heads, cfg.head_dim), (2 * cfg.layers) ** -0.5
        make = dict(
            rngs=rngs, out_scale=scale
        )  # what 2 L branches add up to stays of the size of one
        norm, qk_norm_eps = NORMS[cfg.norm], cfg.eps if cfg.qk_norm else None
        how = dict(qkv_bias=cfg.qkv_bias, o_bias=True, qk_norm_eps=qk_norm_eps)
        self.order = cfg.order
        self.attn_norm = norm(cfg.width, cfg.eps, rngs=rngs)
        self.attn = Attention(cfg.width, *heads, **how, **make)
        self.mlp_norm = norm(cfg.width, cfg.eps, rngs=rngs)
        self.mlp = MLP(cfg.width, cfg.mlp, cfg.act, gated=cfg.gated, bias=True, **make)
        scaled, size = cfg.layer_scale > 0, (cfg.width, cfg.layer_scale)
        self.attn_scale = Scale(*size, rngs=rngs) if scaled else None
        self.mlp_scale = Scale(*size, rngs=rngs) if scaled else None

    def __call__(self, x, attend):
        x = self.add(x, lambda x: self.attn(x, attend)[0], self.attn_norm, self.attn_scale)
        return self.add(x, self.mlp, self.mlp_norm, self.mlp_scale)

    def add(self, x, branch, norm, scale):
        y = branch(norm(x)) if self.order == "pre" else norm(branch(x))
        return x + (y if scale is None else scale(y))


class ViT(nnx.Module):
    """Patch embedding, class token and registers, positions, blocks, final norm."""

    def __init__(self, cfg, *, rngs):
        self.cfg, width = cfg, cfg.width
        patch = (cfg.patch_dim,), (width,), ("patch",), ("embed",)
        norm = NORMS[cfg.norm]
        self.patch = Dense(*patch, rngs=rngs, bias=cfg.patch_bias)
        self.blocks = stack(lambda rngs: Block(cfg, rngs=rngs), cfg.blocks, rngs=rngs)
        self.class_token = Table(1, width, rngs=rngs) if cfg.prefix else None
        self.registers = Table(cfg.prefix - 1, width, rngs=rngs) if cfg.prefix > 1 else None
        rows = cfg.side**2 + (cfg.prefix > 0)
        self.position = Table(rows, width, rngs=rngs) if cfg.side else None
        self.embed_norm = norm(width, cfg.eps, rngs=rngs) if cfg.embed_norm else None
        ends = cfg.final_norm and cfg.features == "last"
        self.norm = norm(width, cfg.eps, rngs=rngs) if ends else None

    def __call__(self, patches, *, dtype=jnp.float32, attention, remat="none"):
        """Returns [B, P, D], arbitrary at padding.

        Args:
          patches: a `batch.Patches`; its coordinates are in patches of the view for "rope2d", of
            the table otherwise: patch i of n lies at (i + 0.5) * side / n - 0.5 when a table is
            resized.
          dtype: of the computation.
          attention: an `AttentionSpec`.
          remat: a key of `nn.REMAT`.
        """
        cfg, (pixels, segments, coords) = self.cfg, patches
        turned = cfg.position == "rope2d"
        angles = angles_2d(coords, cfg.head_dim, cfg.rope_theta) if turned else None
        layout = layout_of("vision", *segments.shape)
        how = dict(size=cfg.head_dim, causal=False, spec=attention, layout=layout)
        attend = packed(segments, angles, **how)

        def layer(block, x, _):
            return layout.constrain(block(x, attend)), None

        x = self.patch(normalise(pixels, cfg.mean, cfg.std).astype(dtype))
        x = layout.constrain(self.embed(x, segments, coords))
        x, _ = scan_layers(self.blocks, layer, x, remat=remat)
        return x if self.norm is None else self.norm(x)

    def embed(self, x, segments, coords):
        """Returns embedded patches [B, P, D] with the prefix in its slots, and positions."""
        row = coords[..., :1]
        if self.cfg.prefix:
            made = [m.embedding[...] for m in (self.class_token, self.registers) if m is not None]
            x = jnp.where(row > -1, x, _pick(-1 - row[..., 0], jnp.concatenate(made), x.dtype))
        if self.position is not None:
            table = self.position.embedding[...]
            x = x + position.sample(table, self.cfg.position, segments, coords).astype(x.dtype)
        return x if self.embed_norm is None else self.embed_norm(x)


def _pick(index, table, dtype):
    """Returns table[index], a product so that its gradient is one; 0 for an index outside."""
    hot = jax.nn.one_hot(index.astype(jnp.int32), len(table), dtype=dtype)
    return jnp.matmul(hot, table.astype(dtype), precision="highest")
