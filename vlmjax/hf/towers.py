"""Where each parameter of a vision tower lies in a checkpoint, in the form of `hf/table.py`.

A table may have more rows than one tower has leaves (biases, layer scales, registers); `rows` takes
those of a configuration and refuses leaves without one. Keys are relative to the tower.
"""

import dataclasses
import functools
import re

import jax
from flax import nnx

from vlmjax.hf.table import Row, make_rows
from vlmjax.nn import flatten, unbind
from vlmjax.vision.convnext import ConvNeXt, ConvNeXtConfig
from vlmjax.vision.vit import ViT, ViTConfig

PATCH = "D C p q -> (C p q) D"
FUSED = ("[N]+N+N", "N+[N]+N", "N+N+[N]")  # q, k and v in one tensor


def _both(path, key, kernel="D -> D", bias="D -> D"):
    """Rows of weight and bias, of a norm where the weight has the same axes there and here."""
    source, target = kernel.split(" -> ")
    leaf = "scale" if source == target else "kernel"
    return ((f"{path}/{leaf}", f"{key}.weight", kernel), (f"{path}/bias", f"{key}.bias", bias))


def _blocks(prefix, attn_norm, mlp_norm, q, k, v, o, up="mlp.fc1", down="mlp.fc2", fused=False):
    """Rows of the blocks; q, k and v are one tensor if `fused`, in that order."""
    made = (
        *_both("attn_norm", attn_norm),
        *_both("mlp_norm", mlp_norm),
        *_both("attn/o", o, "D (N H) -> N H D"),
        *_both("mlp/up", up, "M D -> D M", "M -> M"),
        *_both("mlp/down", down, "D M -> M D"),
    )
    for name, key, part in zip("qkv", (q, k, v), FUSED if fused else "NNN", strict=True):
        made += _both(f"attn/{name}", key, f"({part} H) D -> D N H", f"({part} H) -> N H")
    return tuple((f"blocks/{path}", f"{prefix}.{key}", axes) for path, key, axes in made)


_CLIP_BLOCKS = _blocks(
    "encoder.layers.{}",
    "layer_norm1",
    "layer_norm2",
    *(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")),
)
# SigLIP, SigLIP-NaViT, DFN and CLIP as transformers saves them; 4.x puts `vision_model.` in front.
CLIP = (
    ("class_token/embedding", "embeddings.class_embedding", "D -> 1 D"),
    *_both("patch", "embeddings.patch_embedding", PATCH),
    ("position/embedding", "embeddings.position_embedding.weight", "R D -> R D"),
    *_both("embed_norm", "pre_layrnorm"),
    *_CLIP_BLOCKS,
    *_both("norm", "post_layernorm"),
)
_DINOV2 = (
    ("class_token/embedding", "embeddings.cls_token", "1 1 D -> 1 D"),
    ("registers/embedding", "embeddings.register_tokens", "1 r D -> r D"),
    *_both("patch", "embeddings.patch_embeddings.projection", PATCH),
    ("position/embedding", "embeddings.position_embeddings", "1 R D -> R D"),
    *_blocks(
        "encoder.layer.{}",
        "norm1",
        "norm2",
        *(f"attention.attention.{x}" for x in ("query", "key", "value")),
        "attention.output.dense",
    ),
    ("blocks/attn_scale/scale", "encoder.layer.{}.layer_scale1.lambda1", "D -> D"),
    ("blocks/mlp_scale/scale", "encoder.layer.{}.layer_scale2.lambda1", "D -> D"),
    *_both("norm", "layernorm"),
)
_SWIGLU = (
    *_both("blocks/mlp/gate", "encoder.layer.{}.mlp.weights_in", "[M]+M D -> D M", "[M]+M -> M"),
    *_both("blocks/mlp/up", "encoder.layer.{}.mlp.weights_in", "M+[M] D -> D M", "M+[M] -> M"),
    *_both("blocks/mlp/down", "encoder.layer.{}.mlp.weights_out", "D M -> M D"),
)
DINOV2 = {
    False: _DINOV2,
    True: tuple(row for row in _DINOV2 if not row[0].startswith("blocks/mlp/")) + _SWIGLU,
}
_QKV = ("attn.qkv",) * 3
INTERNVIT = (  # OpenGVLab
    ("class_token/embedding", "embeddings.class_embedding", "1 1 D -> 1 D"),
    *_both("patch", "embeddings.patch_embedding", PATCH),
    ("position/embedding", "embeddings.position_embedding", "1 R D -> R D"),
    *_blocks("encoder.layers.{}", "norm1", "norm2", *_QKV, "attn.proj", fused=True),
    ("blocks/attn/q_norm/scale", "encoder.layers.{}.attn.q_norm.weight", "D -> D"),
    ("blocks/attn/k_norm/scale", "encoder.layers.{}.attn.k_norm.weight", "D -> D"),
    ("blocks/attn_scale/scale", "encoder.layers.{}.ls1", "D -> D"),
    ("blocks/mlp_scale/scale", "encoder.layers.{}.ls2", "D -> D"),
)
INTERNVIT_TRANSFORMERS = (
    ("class_token/embedding", "embeddings.cls_token", "1 1 D -> 1 D"),
    *_both("patch", "embeddings.patch_embeddings.projection", PATCH),
    ("position/embedding", "embeddings.position_embeddings", "1 R D -> R D"),
    *_blocks(
        "encoder.layer.{}",
        "layernorm_before",
        "layernorm_after",
        *(f"attention.{x}_proj" for x in "qkv"),
        "attention.projection_layer",
    ),
    ("blocks/attn/q_norm/scale", "encoder.layer.{}.attention.q_norm.weight", "D -> D"),
    ("blocks/attn/k_norm/scale", "encoder.layer.{}.attention.k_norm.weight", "D -> D"),
    ("blocks/attn_scale/scale", "encoder.layer.{}.lambda_1", "D -> D"),
    ("blocks/mlp_scale/scale", "encoder.layer.{}.lambda_2", "D -> D"),
    *_both("norm", "layernorm"),  # without use_mean_pooling
)
EVA2 = (  # CogVLM2 and GLM-4V; the norms of a block are named after where others have them
    ("class_token/embedding", "patch_embedding.cls_embedding", "1 D -> 1 D"),
    *_both("patch", "patch_embedding.proj", PATCH),
    ("position/embedding", "patch_embedding.position_embedding.weight", "R D -> R D"),
    *_blocks(
        "transformer.layers.{}",
        "input_layernorm",
        "post_attention_layernorm",
        *("attention.query_key_value",) * 3,
        "attention.dense",
        fused=True,
    ),
)
TIMM = (  # SigLIP of MiniCPM-V 2.0 and Cambrian-1
    *_both("patch", "patch_embed.proj", PATCH),
    ("position/embedding", "pos_embed", "1 R D -> R D"),
    *_blocks("blocks.{}", "norm1", "norm2", *_QKV, "attn.proj", fused=True),
    *_both("norm", "norm"),
)
CONVNEXT_STEM = (  # timm
    *_both("stem", "stem.0", "D C p q -> (C p q) D"),
    *_both("stem_norm", "stem.1"),
)
CONVNEXT_STAGE = (
    *_both("down_norm", "downsample.0", "I -> I", "I -> I"),
    *_both("down", "downsample.1", "D I p q -> (p q I) D"),
    *_both("blocks/conv", "blocks.{}.conv_dw", "D 1 h w -> h w 1 D"),
    *_both("blocks/norm", "blocks.{}.norm"),
    *_both("blocks/mlp/up", "blocks.{}.mlp.fc1", "M D -> D M", "M -> M"),
    *_both("blocks/mlp/down", "blocks.{}.mlp.fc2", "D M -> M D"),
    ("blocks/layer_scale/scale", "blocks.{}.gamma", "D -> D"),
)
TABLES = {
    "clip": CLIP,
    "siglip": CLIP,
    "dinov2": DINOV2,
    "internvit": INTERNVIT,
    "internvit_transformers": INTERNVIT_TRANSFORMERS,
    "eva2": EVA2,
    "timm": TIMM,
}
# What towers hold beside: pooling heads, and what serves training only.
DROPPED = r"embeddings\.position_ids|embeddings\.mask_token|(head|attn_pool|pooler)\..*"


def rows(
    cfg: ViTConfig | ConvNeXtConfig, layout: str, prefix: str = "", root: str = "vision"
) -> list[Row]:
    """The table of one tower.

    Args:
      layout: a key of `TABLES`, or "convnext" for a `ConvNeXtConfig`.
      prefix: what the keys of the tower start with in the checkpoint.
      root: where the tower is in our tree.
    """
    shapes = _shapes(cfg)
    if layout == "convnext":
        made = _convnext_rows(cfg, prefix, root)
    elif layout in TABLES:
        table = TABLES[layout]
        table = table[cfg.gated] if isinstance(table, dict) else table
        made = make_rows(table, _vit_sizes(cfg), cfg.blocks, f"{root}/", prefix)
    else:
        raise ValueError(
            f"unknown tower layout {layout!r}; choose one of {sorted(TABLES)} or 'convnext'"
        )
    made = [row for row in made if row.path.removeprefix(f"{root}/") in shapes]
    found = {row.path.removeprefix(f"{root}/"): row.shape for row in made}
    if found != shapes:
        wrong = sorted(p for p in shapes if found.get(p) != shapes[p])
        raise ValueError(
            f"the layout {layout!r} does not hold {', '.join(wrong)} of {cfg}; choose the layout "
            "of that tower, or the fields of the tower of that layout"
        )
    return made


def unused(cfg: ViTConfig | ConvNeXtConfig, layout: str, key: str) -> bool:
    """Whether a key of a tower is known and not needed: its heads, blocks behind the features."""
    if re.fullmatch(DROPPED, key):
        return True
    if layout == "convnext" or cfg.features == "last":
        return False
    whole = dataclasses.replace(cfg, features="last")
    return any(key in row.keys for row in rows(whole, layout))


def kind_of(cfg: ViTConfig | ConvNeXtConfig) -> str:
    """The family of a tower, where a layout has names for several."""
    if isinstance(cfg, ConvNeXtConfig):
        return "convnext"
    if cfg.order == "post":
        return "eva2"
    if cfg.layer_scale:
        return "dinov2" if cfg.position.startswith("bicubic") else "internvit"
    return "clip" if cfg.embed_norm else "siglip"


@functools.lru_cache(maxsize=64)
def _shapes(cfg) -> dict[str, tuple]:
    """path -> shape of each leaf of a tower."""
    make = ConvNeXt if isinstance(cfg, ConvNeXtConfig) else ViT
    params = jax.eval_shape(lambda: unbind(make(cfg, rngs=nnx.Rngs(0)))[1])
    return {path: x.shape for path, x in flatten(params).items()}


def _vit_sizes(cfg: ViTConfig) -> dict[str, int]:
    return {
        "D": cfg.width,
        "M": cfg.mlp,
        "N": cfg.heads,
        "H": cfg.head_dim,
        "C": 3,
        "p": cfg.patch,
        "q": cfg.patch,
        "R": cfg.side**2 + (cfg.prefix > 0),
        "r": cfg.prefix - 1,
    }


def _convnext_rows(cfg: ConvNeXtConfig, prefix: str, root: str) -> list[Row]:
    stem = {"D": cfg.widths[0], "C": 3, "p": cfg.patch, "q": cfg.patch}
    made = make_rows(CONVNEXT_STEM, stem, 0, f"{root}/", prefix)
    for i, (width, depth) in enumerate(zip(cfg.widths, cfg.depths, strict=True)):
        sizes = {"D": width, "M": cfg.ratio * width, "I": cfg.widths[i - 1], "p": 2, "q": 2}
        sizes |= {"h": cfg.kernel, "w": cfg.kernel}
        key, path = f"{prefix}stages.{i}.", f"{root}/stage_{i}/"
        made += make_rows(CONVNEXT_STAGE, sizes, depth, path, key)
    return made
