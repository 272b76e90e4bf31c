"""Towers of the original repositories: from sections of a config.json, or from the name there."""

import dataclasses
import math
import re
from pathlib import Path

from vlmjax.hf.llava_original import TOWERS as SECTIONS
from vlmjax.hf.llm_config import need
from vlmjax.hf.vision_config import read_vision
from vlmjax.vision.convnext import PRESETS as CONVNEXT
from vlmjax.vision.convnext import ConvNeXtConfig
from vlmjax.vision.pixels import CLIP, IMAGENET
from vlmjax.vision.vit import PRESETS as VIT
from vlmjax.vision.vit import ViTConfig

_SIGLIP = dict(VIT["siglip_so400m_14_384"], act="gelu")  # by timm
# Beginning of a name -> (fields of the tower, side of its views in pixels).
NAMED = {
    "siglip/CLIP-ViT-SO400M-14-384": (_SIGLIP, 384),
    "timm/ViT-SO400M-14-SigLIP-384": (_SIGLIP, 384),
    "facebook/dinov2-giant": (VIT["dinov2_g_14"], 518),
    "facebook/dinov2-large": (VIT["dinov2_l_14"], 518),
    "clip-convnext-XXL": (CONVNEXT["convnext_xxl"], 1024),
}
# Of timm -> fields of the whole tower.
TIMM = {
    "vit_so400m_patch14_siglip_384.webli": dict(VIT["siglip_minicpm_v_2"], layers=27),
}
_DINOV2 = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
    "layer_norm_eps": 1e-6,
    "image_size": 224,
    "patch_size": 14,
    "num_channels": 3,
    "qkv_bias": True,
    "layerscale_value": 1.0,
    "drop_path_rate": 0.0,
    "use_swiglu_ffn": False,
}


def eva2(section: dict, file: Path) -> ViTConfig:
    """EVA2-CLIP-E of CogVLM2 and GLM-4V."""
    fixed = {"hidden_act": "gelu", "dropout_prob": 0.0, "in_channels": 3}
    for name, value in fixed.items():
        need(fixed | section, file, name, value)
    side = section["image_size"] // section["patch_size"]
    need(section, file, "num_positions", side**2 + 1)
    return ViTConfig(
        **CLIP,
        width=section["hidden_size"],
        mlp=section["intermediate_size"],
        layers=section["num_hidden_layers"],
        heads=section["num_heads"],
        patch=section["patch_size"],
        eps=section["layer_norm_eps"],
        act="gelu",
        order="post",
        final_norm=False,
        prefix=1,
        position="table",
        side=side,
    )


def dinov2(raw: dict, file: Path) -> ViTConfig:
    """DINOv2 of transformers."""
    c = _DINOV2 | raw
    for name in ("attention_probs_dropout_prob", "hidden_dropout_prob", "drop_path_rate"):
        need(c, file, name, 0)
    need(c, file, "num_channels", 3)
    need(c, file, "hidden_act", "gelu")
    mlp, gated = int(c["hidden_size"] * c["mlp_ratio"]), c["use_swiglu_ffn"]
    if gated:  # two thirds, a multiple of 8
        mlp = (int(mlp * 2 / 3) + 7) // 8 * 8
    return ViTConfig(
        **IMAGENET,
        width=c["hidden_size"],
        mlp=mlp,
        layers=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        patch=c["patch_size"],
        eps=c["layer_norm_eps"],
        act="silu" if gated else "gelu",
        gated=gated,
        qkv_bias=c["qkv_bias"],
        layer_scale=c["layerscale_value"],
        prefix=1,
        position="bicubic",
        side=c["image_size"] // c["patch_size"],
    )


def timm_siglip(name: str, file: Path, drop: bool) -> ViTConfig:
    """The tower of MiniCPM-V 2.0, without its last block if `drop`."""
    if name not in TIMM:
        raise ValueError(
            f"{file} has vision_encoder={name!r}, whose sizes are not known here; known are "
            f"{sorted(TIMM)}; use a checkpoint with one of them"
        )
    tower = ViTConfig(**TIMM[name])
    return dataclasses.replace(tower, layers=tower.layers - drop)


def named(name: str, file: Path, layer: int, tokens: int) -> tuple[ViTConfig | ConvNeXtConfig, int]:
    """(a tower of Cambrian-1, side of its views) of a name in `mm_vision_tower_aux_list`.

    Args:
      name: may end in -resN (side of a view) and for a ConvNeXt in -multi-stage.
      layer: hidden state that is taken of a CLIP; others give what leaves them.
      tokens: that its features are resized to, which a ConvNeXt does itself.
    """
    if name in SECTIONS:
        return read_vision(SECTIONS[name], file, layer), SECTIONS[name]["image_size"]
    base = max((known for known in NAMED if name.startswith(known)), key=len, default=None)
    options = re.fullmatch(r"(-res(\d+))?(-multi-stage)?", name[len(base or "") :])
    if base is None or not options:
        raise ValueError(
            f"{file} names the tower {name!r}, whose sizes are not known here; known are "
            f"{sorted((*SECTIONS, *NAMED))}, with -resN or -multi-stage behind some; use a "
            "checkpoint with such towers"
        )
    fields, side = NAMED[base]
    side = int(options[2] or side)
    if "depths" not in fields:
        return ViTConfig(**fields), side
    if not options[3]:
        raise ValueError(
            f"{file} names the tower {name!r}, which gives its last stage only; supported is "
            "-multi-stage; use a checkpoint with that"
        )
    places = side // fields.get("patch", 4)
    grid = dict(rows=places, columns=places, grid=math.isqrt(tokens))
    return ConvNeXtConfig(**fields | grid), side
