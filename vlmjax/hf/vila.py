"""VILA-1.5 in the layout of its repository (NVlabs/VILA): a directory for each part, read only.

    DIR/config.json   llm/   vision_tower/   mm_projector/     the latter with a config.json each

A video is its frames one after another, a line break behind the last; the original code has one
behind each, which frames that are given as images have here, too. Templates are told by the control
tokens of the decoder, which is unverified for those of 8B and 40B.
"""

import json
import re
from pathlib import Path

from vlmjax.connectors.mlp import MLPConfig
from vlmjax.hf.llm_config import need, read_llm
from vlmjax.hf.pixels import mean_colour, statistics
from vlmjax.hf.tensors import FOLDERS
from vlmjax.hf.vision_config import read_vision, settings
from vlmjax.vision.vit import ViTConfig
from vlmjax.vlm import VLMConfig

MARKS = ("llm_cfg", "vision_tower_cfg", "mm_projector_cfg")
PLACEHOLDERS = ("<image>", "<unk>", "<|reserved_special_token_0|>")
DOWNSAMPLE = ("mlp_downsample", "mlp_downsample_2x2_fix")
# What NVILA adds, and that changes the function.
OTHERS = ("dynamic_s2", "ps3", "image_encoder", "video_encoder")


def matches(raw: dict) -> bool:
    """Whether a config.json is of this system."""
    return all(name in raw for name in MARKS)


def part(file: Path, folder: str) -> dict:
    """The config.json of one part."""
    inner = file.parent / folder / file.name
    if not inner.is_file():
        raise ValueError(
            f"{file} is of a model in the parts {', '.join(FOLDERS)}, and there is no {inner}; "
            "copy the whole directory of the released model"
        )
    raw = json.loads(inner.read_text())
    if raw.get("quantization_config"):
        need(raw, inner, "quantization_config", None)
    return raw


def text(raw: dict, file: Path) -> dict:
    """The section of the decoder."""
    return part(file, "llm")


def _connector(raw: dict, file: Path) -> MLPConfig:
    kind = part(file, "mm_projector").get("mm_projector_type")
    reduce = "weighted" if raw.get("s2") else "mean"
    if kind in DOWNSAMPLE:
        return MLPConfig(window=2, norm="layer", reduce=reduce)
    depth = 1 if kind == "linear" else int(re.sub(r"mlp(\d+)x_gelu|.+", r"\1", kind or "") or 0)
    if not depth:
        need({"mm_projector_type": kind}, file, "mm_projector_type", " or ".join(DOWNSAMPLE))
    return MLPConfig(layers=depth, reduce=reduce)


def _vision(raw: dict, file: Path) -> ViTConfig:
    section, layer = part(file, "vision_tower"), raw.get("mm_vision_select_layer", -2)
    if section.get("model_type") == "intern_vit_6b" and layer == -1:
        layer = None  # what leaves it
    pixels = file.parent / "vision_tower" / "preprocessor_config.json"
    stated = statistics(json.loads(pixels.read_text())) if pixels.is_file() else None
    vision = read_vision(section, file.parent / "vision_tower" / file.name, layer, stated)
    # A class token is no visual token here; without one, both settings keep all.
    if vision.prefix:
        need(raw, file, "mm_vision_select_feature", "patch")
    return vision


def read(raw: dict, file: Path) -> dict:
    """The fields of a `VLMConfig`."""
    for name in OTHERS:
        if raw.get(name):
            need(raw, file, name, None)
    llm = {"tie_word_embeddings": False} | text(raw, file)
    made = dict(
        vision=_vision(raw, file),
        connector=_connector(raw, file),
        llm=read_llm(llm, file.parent / "llm" / file.name),
    )
    return made | (dict(sources=(0,) * len(_scales(raw, file))) if raw.get("s2") else {})


def _scales(raw: dict, file: Path) -> tuple[int, ...]:
    given = raw.get("s2_scales")
    scales = tuple(map(int, given.split(","))) if isinstance(given, str) else tuple(given or ())
    side = settings(part(file, "vision_tower"))["image_size"]
    if not scales or scales[0] != side:
        need(raw, file, "s2_scales", f"{side} and its multiples")
    need({"s2_max_split_size": side} | raw, file, "s2_max_split_size", side)
    need({"s2_resize_output_to_scale_idx": 0} | raw, file, "s2_resize_output_to_scale_idx", 0)
    return scales


def picture(raw: dict, file: Path, cfg: VLMConfig) -> dict:
    """The settings of a `data.picture.PictureConfig`."""
    side = settings(part(file, "vision_tower"))["image_size"]
    frames = dict(frame_format=dict(between="\n"))  # each frame is an image in the text
    if raw.get("s2"):
        need(raw, file, "image_aspect_ratio", "resize")
        scales, grid = _scales(raw, file), cfg.vision.side
        larger = (("area", (grid, grid)),) * (len(scales) - 1)
        return dict(
            strategy=(dict(name="s2", side=side, scales=scales),),
            stitch="tiles",
            resample=((), *larger),
            **frames,
        )
    mode = raw.get("image_aspect_ratio")
    if mode not in ("resize", "pad"):
        need(raw, file, "image_aspect_ratio", "resize or pad")
    view = dict(name="square", side=side, mode=mode)
    return dict(strategy=(view | {"fill": mean_colour(cfg.vision.mean)},), **frames)


def template(raw: dict, file: Path, has) -> str:
    """The template of its conversations, by the tokens of its decoder."""
    if has("<|start_header_id|>"):
        return "vila_llama3"
    return "llava_chatml" if has("<|im_start|>") else "vicuna"
