"""MiniCPM-V 2.0 and MiniCPM-Llama3-V 2.5 in the layout of their own code: config.json, read only.

2.0 names a tower of timm, 2.5 describes one. Later versions are other functions and are refused.
"""

import dataclasses
from pathlib import Path

from vlmjax.connectors.resampler import ResamplerConfig
from vlmjax.hf.llm_config import need, read_llm
from vlmjax.hf.tower_config import timm_siglip
from vlmjax.hf.vision_config import read_vision
from vlmjax.vision.vit import ViTConfig
from vlmjax.vlm import VLMConfig

KIND = "minicpmv"
PLACEHOLDERS = ("<unk>",)
# Defaults of the classes.
_ALL = {"patch_size": 14, "slice_mode": True}
_NAMED = _ALL | {"scale_resolution": 448, "max_slice_nums": 9, "drop_vision_last_layer": True}
_DESCRIBED = _ALL | {"drop_vision_last_layer": True, "slice_config": {}}
_SLICES = {"scale_resolution": 448, "max_slice_nums": 1, "patch_size": 14}
_IDEFICS2 = {"patch_size": 32}  # the rest is that of SigLIP
HEAD = 128  # size of the heads of the resampler, a constant of the code


def matches(raw: dict) -> bool:
    """Whether a config.json is of this system."""
    return raw.get("model_type") == KIND


def _named(raw: dict) -> bool:
    return "vision_encoder" in raw


def _filled(raw: dict, file: Path) -> dict:
    if _named(raw):
        return _NAMED | raw
    if str(raw.get("version", "2.5")) != "2.5":
        need(raw, file, "version", "2.5")
    if "vision_config" not in raw:
        raise ValueError(
            f"{file} has neither vision_encoder (MiniCPM-V 2.0) nor vision_config (2.5); one of "
            "them says what the tower is; use the config.json of the released model"
        )
    return _DESCRIBED | raw


def _tower(c: dict, file: Path) -> ViTConfig:
    if _named(c):
        return timm_siglip(c["vision_encoder"], file, c["drop_vision_last_layer"])
    section = _IDEFICS2 | c["vision_config"]
    need(section, file, "model_type", "idefics2")
    section["num_hidden_layers"] -= c["drop_vision_last_layer"]
    tower = read_vision(section | {"model_type": "siglip_vision_model"}, file)
    return dataclasses.replace(tower, position="bucket")


def read(raw: dict, file: Path) -> dict:
    """The fields of a `VLMConfig`."""
    c = _filled(raw, file)
    kind = "minicpm" if _named(c) else "llama"
    connector = ResamplerConfig(
        queries=c["query_num"],
        heads=c["hidden_size"] // HEAD,
        query_pos="sincos" if _named(c) else "none",
    )
    llm = read_llm({"tie_word_embeddings": False} | c | {"model_type": kind}, file)
    return dict(vision=_tower(c, file), connector=connector, llm=llm)


def picture(raw: dict, file: Path, cfg: VLMConfig) -> dict:
    """The settings of a `data.picture.PictureConfig`."""
    c = _filled(raw, file)
    need(c, file, "slice_mode", True)
    s = c if _named(c) else _SLICES | c["slice_config"]
    slices = dict(
        name="uhd",
        side=s["scale_resolution"],
        patch=s["patch_size"],
        max_slices=s["max_slice_nums"],
    )
    return dict(strategy=(slices,), format=dict(layout="slices", between="\n"))


def template(raw: dict, file: Path, has) -> str:
    """The template of its conversations."""
    return "minicpm" if _named(raw) else "llama3"
