"""LLaVA in the layout of its own repositories (liuhaotian, lmms-lab): config.json, read only.

Their config.json names the tower instead of describing it; `TOWERS` knows those of released models,
and a `vision_config` in the file, as transformers writes it for the tower alone, serves for others.
"""

import re
from pathlib import Path

from vlmjax.connectors.mlp import MLPConfig
from vlmjax.hf.llm_config import need, read_llm
from vlmjax.hf.pixels import mean_colour, need_view, statistics
from vlmjax.hf.vision_config import read_vision, settings
from vlmjax.vision.vit import ViTConfig

_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_SO400M = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
TOWERS = {
    "openai/clip-vit-large-patch14-336": _CLIP,
    "openai/clip-vit-large-patch14": _CLIP | {"image_size": 224},
    "google/siglip-so400m-patch14-384": _SO400M,
}
# model_type -> that of the decoder; the first LLaVA called itself as transformers does now.
DECODERS = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
}
NEWLINES = {"grid": "row", "frame": "frame", "one_token": "end", "no_token": "none"}
POOLS = {"average": "weighted", "bilinear": "weighted", "max": "max"}


def is_original(raw: dict) -> bool:
    """Whether a config.json is of this layout."""
    return raw.get("model_type") in DECODERS and "mm_projector_type" in raw


def _tower(raw: dict, file: Path) -> dict:
    """The section of the tower."""
    name = raw.get("mm_vision_tower")
    if raw.get("vision_config"):
        return raw["vision_config"]
    if name not in TOWERS:
        raise ValueError(
            f"{file} has mm_vision_tower={name!r}, whose sizes are not known here; known are "
            f"{sorted(TOWERS)}; put the vision_config of the tower into the file"
        )
    return TOWERS[name]


def read(raw: dict, file: Path, sections: tuple[dict, dict]) -> dict:
    """The fields of a `VLMConfig`; arguments are those of `llava.read`."""
    tower = _tower(raw, file)
    siglip = settings(tower)["model_type"] == "siglip_vision_model"
    # The code deletes the last block of SigLIP whatever mm_vision_select_layer says.
    layer = -2 if siglip else raw.get("mm_vision_select_layer", -2)
    if not siglip and raw.get("mm_vision_select_feature") is not None:
        need(raw, file, "mm_vision_select_feature", "patch")
    depth = re.fullmatch(r"mlp(\d+)x_gelu", raw["mm_projector_type"] or "linear")
    if not depth and raw["mm_projector_type"] != "linear":
        need(raw, file, "mm_projector_type", "linear or mlp2x_gelu, or another number")
    if raw.get("mm_resampler_type") is not None:
        need(raw, file, "mm_resampler_type", None)
    merge, layers = _merge(raw, file), int(depth[1]) if depth else 1
    newline = merge == "spatial_unpad" or (_pool(raw, file) and _newline(raw, file) != "none")
    llm = {"tie_word_embeddings": False} | raw | {"model_type": DECODERS[raw["model_type"]]}
    return dict(
        vision=read_vision(tower, file, layer, statistics(sections[0])),
        connector=MLPConfig(layers=layers, specials=("newline",) if newline else ()),
        llm=read_llm(llm, file),
        pool=_pools(raw, file),
    )


def picture(raw: dict, file: Path, sections: tuple[dict, dict], vision: ViTConfig) -> dict:
    """The settings of a `data.picture.PictureConfig`."""
    side = settings(_tower(raw, file))["image_size"]
    plain = "crop" if vision.prefix else "resize"
    if sections[0]:
        plain = need_view(sections[0], file, side)
    fill = mean_colour(vision.mean)
    square = dict(name="square", side=side, fill=fill)
    merge, aspect = _merge(raw, file), raw.get("image_aspect_ratio")
    made = dict(strategy=(square | {"mode": "pad" if aspect == "pad" else plain},))
    if _anyres(raw):
        anyres = dict(name="anyres", side=side, pinpoints=_pinpoints(raw, side, file))
        made["strategy"] = (anyres | {"reading": "original"},)
        made["frame"] = (square | {"mode": plain},)
        if raw["model_type"] == "llava_qwen":  # as it was trained on several images
            made["several"] = (square | {"mode": "pad"},)
        made["format"] = {
            "flat": {},
            "spatial": dict(layout="tiles"),
            "spatial_unpad": dict(layout="tiles", unpad="original", newline="row"),
        }[merge]
        if most := re.fullmatch(r"anyres_max_(\d+)", aspect):
            made["format"] = made["format"] | {"max_tiles": int(most[1])}
    made["frame_format"] = dict(layout="frames")
    if pool := _pool(raw, file):
        stride = raw.get("mm_spatial_pool_stride") or 2
        made["frame_format"] |= dict(pool=pool, stride=stride, newline=_newline(raw, file))
    return made


def _anyres(raw):
    return "anyres" in (raw.get("image_aspect_ratio") or "")


def _merge(raw, file):
    """How the views of an image become one sequence."""
    merge = raw.get("mm_patch_merge_type") or "flat"
    aspect = raw.get("image_aspect_ratio")
    known = aspect in (None, "square", "pad", "anyres")
    if not known and not re.fullmatch(r"anyres_max_\d+", aspect):
        need(raw, file, "image_aspect_ratio", "square, pad, anyres or anyres_max_9")
    if merge not in ("flat", "spatial", "spatial_unpad"):
        need(raw, file, "mm_patch_merge_type", "flat, spatial or spatial_unpad")
    if "max" in (aspect or "") and merge != "spatial_unpad":
        need(raw, file, "mm_patch_merge_type", "spatial_unpad")  # with a cap
    return merge


def _pool(raw, file):
    """How frames are pooled behind the projector, None if they are not."""
    pool = raw.get("mm_spatial_pool_mode")
    if pool is None and raw.get("mm_spatial_pool_stride"):
        pool = "bilinear"
    if pool is not None and pool not in POOLS:
        need(raw, file, "mm_spatial_pool_mode", " or ".join(POOLS))
    return pool


def _pools(raw, file):
    """`VLMConfig.pool`."""
    pool = POOLS.get(_pool(raw, file), "none")
    if "max" in (raw.get("image_aspect_ratio") or ""):
        if pool == "max":
            need(raw, file, "mm_spatial_pool_mode", "average or bilinear")  # with a cap
        return "weighted"
    return pool


def _newline(raw, file):
    place = raw.get("mm_newline_position") or "one_token"
    if place not in NEWLINES:
        need(raw, file, "mm_newline_position", " or ".join(NEWLINES))
    return NEWLINES[place] if "unpad" in _merge(raw, file) else "none"


def _pinpoints(raw, side, file):
    """(width, height) of each canvas; "(1x1),...,(6x6)" are all from the first to the last."""
    given = raw.get("image_grid_pinpoints")
    if isinstance(given, str) and "x" in given:
        grids = [tuple(map(int, g)) for g in re.findall(r"\((\d+)x(\d+)\)", given)]
        (a, b), (c, d) = grids[0], grids[-1]
        return tuple((i * side, j * side) for i in range(a, c + 1) for j in range(b, d + 1))
    if not isinstance(given, list):
        need(raw, file, "image_grid_pinpoints", "a list of (width, height), or (1x1),...,(6x6)")
    return tuple(map(tuple, given))
