"""Cambrian-1 in the layout of its repository (cambrian-mllm/cambrian): config.json, read only.

Its config.json names the towers, which are frozen and in no released checkpoint: `tower_config`
knows their sizes, and their weights are looked for in DIR/vision, DIR/vision_2, ... A ConvNeXt and
a SigLIP (whose GELU is exact there) are directories of open_clip with open_clip_model.safetensors,
CLIP and DINOv2 those of transformers.
"""

import dataclasses
import math
from pathlib import Path

from vlmjax.connectors.sva import SVAConfig
from vlmjax.hf.llm_config import need, read_llm
from vlmjax.hf.pixels import mean_colour
from vlmjax.hf.tower_config import named
from vlmjax.vision.vit import ViTConfig
from vlmjax.vlm import VLMConfig

TOWERS = "mm_vision_tower_aux_list"
TOKENS = "mm_vision_tower_aux_token_len_list"
KINDS = ("cambrian_llama", "llava_llama")
PLACEHOLDERS = ("<image>", "<|reserved_special_token_0|>", "<unk>")
# What models that were made from it add, and that changes the function.
OTHERS = ("highres", "is_st_sampler", "frame_pos", "connect_layer")
HEADS = 16  # a constant of the code


def matches(raw: dict) -> bool:
    """Whether a config.json is of this system; some call themselves LLaVA."""
    return TOWERS in raw


def _towers(raw: dict, file: Path):
    """[(tower, side of its views)] of each encoder."""
    layer = raw.get("mm_vision_select_layer", -2)
    pairs = zip(raw[TOWERS], raw[TOKENS], strict=True)
    return [named(name, file, layer, tokens) for name, tokens in pairs]


def _side(tokens: int, name: str, file: Path) -> int:
    if math.isqrt(tokens) ** 2 != tokens:
        raise ValueError(f"{file} has {name}={tokens}; tokens lie on squares; correct the number")
    return math.isqrt(tokens)


def read(raw: dict, file: Path) -> dict:
    """The fields of a `VLMConfig`."""
    if raw.get("model_type") not in KINDS:
        need(raw, file, "model_type", " or ".join(KINDS))
    need(raw, file, "mm_projector_type", "sva")
    need(raw, file, "num_query_group", 1)
    need(raw, file, "mm_vision_select_feature", "patch")
    need(raw, file, "query_num_list", [raw["image_token_len"]])
    for name in OTHERS:
        if raw.get(name):
            need(raw, file, name, None)
    towers = [tower for tower, _ in _towers(raw, file)]
    side = _side(raw["image_token_len"], "image_token_len", file)
    windows = tuple(_side(tokens, TOKENS, file) // side for tokens in raw[TOKENS])
    connector = SVAConfig(
        side=side,
        windows=windows,
        width=raw["vision_hidden_size"],
        heads=HEADS,
        layers=raw["connector_depth"],
        reduce="weighted" if any(_resample(raw, file)) else "none",
    )
    llm = read_llm({"tie_word_embeddings": False} | raw | {"model_type": "llama"}, file)
    if not raw["connector_only"]:
        llm = dataclasses.replace(
            llm,
            **{
                f"extra_{name}": raw[f"{key}_of_vision_sampler_layers"]
                for name, key in (("num", "num"), ("start", "start"), ("stride", "stride"))
            },
        )
    return dict(vision=tuple(towers), connector=connector, llm=llm)


def _resample(raw: dict, file: Path) -> tuple:
    """How the map of each tower becomes one of the stated number of tokens."""
    made = []
    for (tower, side), tokens in zip(_towers(raw, file), raw[TOKENS], strict=True):
        grid = _side(tokens, TOKENS, file)
        same = not isinstance(tower, ViTConfig) or side // tower.patch == grid
        made.append(() if same else ("bilinear", (grid, grid)))
    return tuple(made)


def picture(raw: dict, file: Path, cfg: VLMConfig) -> dict:
    """The settings of a `data.picture.PictureConfig`, as the inference code has them."""
    need(raw, file, "image_aspect_ratio", "pad")
    views = tuple(
        dict(name="square", side=side, mode="pad", fill=mean_colour(tower.mean))
        for tower, side in _towers(raw, file)
    )
    made = dict(
        strategy=views,
        format=dict(layout="square", unpad="original", newline="row"),
    )
    resample = _resample(raw, file)
    return made | (dict(resample=resample) if any(resample) else {})


def template(raw: dict, file: Path, has) -> str:
    """The template of its conversations, by the tokens of its decoder."""
    if has("<|start_header_id|>"):
        return "cambrian_llama3"
    return "cambrian_chatml" if has("<|im_start|>") else "vicuna"
