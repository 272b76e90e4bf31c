"""InternVL of transformers and of OpenGVLab: config.json to our configurations, and back.

The class of transformers is InternVL 1.5 and later. The order of the tokens of 1.2 (ps_version v1)
is read from checkpoints of OpenGVLab; no class has it.
"""

from pathlib import Path

from vlmjax.connectors.mlp import MLPConfig
from vlmjax.data.picture import Show
from vlmjax.hf.llm_config import need, read_llm
from vlmjax.hf.pixels import make_section, need_view, statistics
from vlmjax.hf.vision_config import make_vision, read_vision, settings
from vlmjax.vision.vit import ViTConfig
from vlmjax.vlm import VLMConfig

KIND, ORIGINAL = "internvl", "internvl_chat"
_ALL = {"downsample_ratio": 0.5, "projector_hidden_act": "gelu"}
DEFAULTS = _ALL | {
    "vision_config": {},
    "text_config": {},
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "image_token_id": 151667,
}
ORIGINAL_DEFAULTS = _ALL | {
    "select_layer": -1,
    "ps_version": "v1",
    "dynamic_image_size": False,
    "use_thumbnail": False,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 6,
    "pad2square": False,
}
MARKS = ("<img>", "</img>")
CONTEXT, VIDEO = "<IMG_CONTEXT>", "<video>"


def _vision(raw: dict) -> dict:
    kind = "internvl_vision" if raw["model_type"] == KIND else "intern_vit_6b"
    return {"model_type": kind} | raw.get("vision_config", {})


def read(raw: dict, file: Path, sections: tuple[dict, dict]) -> dict:
    """The fields of a `VLMConfig`; arguments are those of `llava.read`."""
    original = raw["model_type"] == ORIGINAL
    c = (ORIGINAL_DEFAULTS if original else DEFAULTS) | raw
    need(c, file, "projector_hidden_act", "gelu")
    if 1 / c["downsample_ratio"] % 1:
        need(c, file, "downsample_ratio", "0.5, or 1 over another whole number")
    layer = c["select_layer" if original else "vision_feature_layer"]
    # -1 is what leaves the tower, which for InternViT is the last block.
    vision = read_vision(_vision(c), file, None if layer == -1 else layer, statistics(sections[0]))
    column = original and c["ps_version"] == "v1"
    connector = MLPConfig(
        window=round(1 / c["downsample_ratio"]),
        norm="layer",
        order="column" if column else "row",
    )
    if vision.side % connector.window:
        need(c, file, "downsample_ratio", f"1 over a divisor of {vision.side} patches")
    if original:
        text = c.get("llm_config") or {}
        text = text | {"model_type": text.get("model_type", "internlm2")}
        tie = text.get("tie_word_embeddings", False)
    else:
        need(c, file, "vision_feature_select_strategy", "default")
        text = {"model_type": "qwen2"} | c["text_config"]
        tie = raw.get("tie_word_embeddings", text.get("tie_word_embeddings", True))
    return dict(
        vision=vision,
        connector=connector,
        llm=read_llm(text | {"tie_word_embeddings": tie}, file),
    )


def placeholders(raw: dict) -> dict[str, int]:
    """The ids of the tokens that stand for images and videos."""
    return {} if raw["model_type"] == ORIGINAL else {"image_token": _token(raw)}


def _token(raw):
    return raw.get("image_token_id", raw.get("image_token_index", DEFAULTS["image_token_id"]))


def picture(raw: dict, file: Path, sections: tuple[dict, dict], vision: ViTConfig) -> dict:
    """The settings of a `data.picture.PictureConfig`."""
    side, image = settings(_vision(raw))["image_size"], sections[0]
    tiles = {
        "min_tiles": image.get("min_patches", 1),
        "max_tiles": image.get("max_patches", 12),
        "whole": "last",
    }
    if raw["model_type"] == ORIGINAL:
        c = ORIGINAL_DEFAULTS | raw
        need(c, file, "pad2square", False)
        if c.get("force_image_size", side) != side:
            need(c, file, "force_image_size", side)
        tiles = {
            "min_tiles": c["min_dynamic_patch"],
            "max_tiles": c["max_dynamic_patch"],
            "whole": "last" if c["use_thumbnail"] else "none",
        }
        if not c["dynamic_image_size"]:
            tiles = None
    else:
        need_view({"do_center_crop": False, **image}, file, side)
    one = dict(name="square", side=side, mode="resize")
    return dict(
        strategy=(dict(name="dynamic", side=side, **tiles) if tiles else one,),
        frame=(one,),
        format=dict(control=MARKS),
        frame_format=dict(layout="numbered"),
    )


def nearest(cfg: VLMConfig, show: Show) -> str | None:
    """The class whose form a model may have, by how it shows an image; None if it is another."""
    return KIND if show.plan.image[0].name == "dynamic" else None


def _tokens_of_a_view(cfg: VLMConfig) -> int:
    return (cfg.vision.side // cfg.connector.window) ** 2


def make(kind: str, cfg: VLMConfig, show: Show, text: dict, ids: dict[str, int]) -> dict:
    """config.json; arguments are those of `llava.make`."""
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": kind,
        "vision_config": make_vision(cfg.vision, show.plan.image[0].settings.side),
        "text_config": text,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "downsample_ratio": 1 / cfg.connector.window,
        "image_token_id": ids["image"],
        "image_seq_length": _tokens_of_a_view(cfg),
        "tie_word_embeddings": cfg.llm.tie,
    }


def make_pixels(kind: str, cfg: VLMConfig, show: Show) -> tuple[dict, dict]:
    """The image and the video section of the processor files."""
    s = show.plan.image[0].settings
    more = dict(crop_to_patches=True, min_patches=s.min_tiles, max_patches=s.max_tiles)
    image = make_section("GotOcr2ImageProcessor", cfg.vision, s.side, **more)
    return image, make_section("InternVLVideoProcessor", cfg.vision, s.side)


def make_processor(kind: str, cfg: VLMConfig, show: Show, tokens: dict[str, str]) -> dict:
    """What else the processor class of transformers takes."""
    return {"processor_class": "InternVLProcessor", "image_seq_length": _tokens_of_a_view(cfg)}


def named_tokens(tokens: dict[str, str]) -> dict[str, str]:
    """What that class asks the tokenizer for."""
    return {
        "start_image_token": MARKS[0],
        "end_image_token": MARKS[1],
        "context_image_token": tokens["image"],
        "video_token": tokens["video"],
    }
