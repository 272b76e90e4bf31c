"""LLaVA of transformers: config.json and processor files to our configurations, and back.

Four classes: llava (1.5, Interleave), llava_next (AnyRes), llava_next_video (frames pooled before
the projector) and llava_onevision (a cap on the tokens of AnyRes, frames pooled after the
projector). Videos of the first two, which know none: each frame is one view.
"""

import dataclasses
import re
from pathlib import Path

from vlmjax.connectors.mlp import MLPConfig
from vlmjax.data.picture import Show
from vlmjax.hf.llava_original import TOWERS
from vlmjax.hf.llm_config import need, read_llm
from vlmjax.hf.pixels import make_section, mean_colour, need_view, statistics
from vlmjax.hf.vision_config import make_vision, read_vision, settings
from vlmjax.vision.vit import ViTConfig
from vlmjax.vlm import VLMConfig

# What the classes fill in where a config.json is silent.
_SIGLIP = TOWERS["google/siglip-so400m-patch14-384"] | {"num_hidden_layers": 26}
_ALL = {
    "vision_config": TOWERS["openai/clip-vit-large-patch14-336"],
    "text_config": {"model_type": "llama"},
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "tie_word_embeddings": False,
    "image_token_index": 32000,
}
_NEXT = _ALL | {
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
}
_ONEVISION = {
    "vision_config": _SIGLIP,
    "text_config": {"model_type": "qwen2"},
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
    "vision_aspect_ratio": "anyres_max_9",
    "image_grid_pinpoints": [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)],
    "image_token_index": 151646,
    "video_token_index": 151647,
}
DEFAULTS = {
    "llava": _ALL,
    "llava_next": _NEXT,
    "llava_next_video": _NEXT
    | {
        "image_token_index": 32001,
        "video_token_index": 32000,
        "spatial_pool_mode": "average",
        "spatial_pool_stride": 2,
    },
    "llava_onevision": _ALL | _ONEVISION,
}
NAMES = {
    "llava": "Llava",
    "llava_next": "LlavaNext",
    "llava_next_video": "LlavaNextVideo",
    "llava_onevision": "LlavaOnevision",
}


def _filled(raw: dict) -> dict:
    c = DEFAULTS[raw["model_type"]] | raw
    for name in ("vision_config", "text_config"):
        kind = DEFAULTS[raw["model_type"]][name]["model_type"]
        c[name] = {"model_type": kind} | c[name]
    return c


def read(raw: dict, file: Path, sections: tuple[dict, dict]) -> dict:
    """The fields of a `VLMConfig`.

    Args:
      raw: config.json.
      file: it.
      sections: of `pixels.read_sections`.
    """
    c = _filled(raw)
    kind = raw["model_type"]
    need(c, file, "projector_hidden_act", "gelu")
    need(c, file, "multimodal_projector_bias", True)
    section = c["vision_config"]
    vision = read_vision(section, file, c["vision_feature_layer"], statistics(sections[0]))
    # A class token is no visual token here, and nothing else is dropped.
    need(c, file, "vision_feature_select_strategy", "default" if vision.prefix else "full")
    connector = MLPConfig(
        specials=() if kind == "llava" else ("newline",),
        reduce="weighted" if kind == "llava_next_video" else "mean",
    )
    tie = c["tie_word_embeddings"]
    if kind != "llava_next":
        tie = tie or c["text_config"].get("tie_word_embeddings", False)
    llm = read_llm(c["text_config"] | {"tie_word_embeddings": tie}, file)
    pool = "weighted" if kind == "llava_onevision" else "none"
    return dict(vision=vision, connector=connector, llm=llm, pool=pool)


def placeholders(raw: dict) -> dict[str, int]:
    """The ids of the tokens that stand for images and videos."""
    c = _filled(raw)
    names = {"image_token": "image_token", "video_token": "video_token"}
    found = {n: c.get(f"{k}_id", c.get(f"{k}_index")) for n, k in names.items()}
    return {name: value for name, value in found.items() if value is not None}


def picture(raw: dict, file: Path, sections: tuple[dict, dict], vision: ViTConfig) -> dict:
    """The settings of a `data.picture.PictureConfig`."""
    c, (image, video) = _filled(raw), sections
    side = settings(c["vision_config"])["image_size"]
    mode = need_view(image, file, side)
    fill = mean_colour(vision.mean)
    if raw["model_type"] == "llava":
        return dict(strategy=(dict(name="square", side=side, mode=mode, fill=fill),))
    pinpoints = tuple(map(tuple, c["image_grid_pinpoints"]))
    if tuple(map(tuple, image.get("image_grid_pinpoints", pinpoints))) != pinpoints:
        raise ValueError(
            f"{file} has other image_grid_pinpoints than the processor files beside it; they must "
            "agree; correct one of them"
        )
    tiles = dict(layout="tiles", unpad="transformers", newline="row")
    made = dict(
        strategy=(dict(name="anyres", side=side, pinpoints=pinpoints, reading="transformers"),),
        frame=(dict(name="square", side=side, mode="resize", fill=fill),),
        format=tiles,
        frame_format=dict(layout="frames"),
    )
    if raw["model_type"] == "llava_next_video":
        need(c, file, "spatial_pool_mode", "average")
        frame = need_view(video, file, side) if video else "crop"
        made |= dict(
            frame=(dict(name="square", side=side, mode=frame, fill=fill),),
            frame_resample=(("pool_average", c["spatial_pool_stride"]),),
        )
    if raw["model_type"] == "llava_onevision":
        most = re.fullmatch(r"anyres_max_(\d+)", c["vision_aspect_ratio"])
        if not most:
            need(c, file, "vision_aspect_ratio", "anyres_max_9, or another number")
        if video:
            need_view(video, file, side)
        made |= dict(
            several=(dict(name="square", side=side, mode="pad", fill=fill),),
            format=tiles | {"max_tiles": int(most[1])},
            frame_format=dict(layout="frames", pool="bilinear", newline="end"),
        )
    return made


def nearest(cfg: VLMConfig, show: Show) -> str | None:
    """The class whose form a model may have, by how it shows an image; None if there is none."""
    name = show.plan.image[0].name
    if name == "square":
        return "llava"
    if name != "anyres":
        return None
    if show.format.max_tiles:
        return "llava_onevision"
    return "llava_next_video" if cfg.form.weighted else "llava_next"


def make(kind: str, cfg: VLMConfig, show: Show, text: dict, ids: dict[str, int]) -> dict:
    """config.json.

    Args:
      kind: of `NAMES`.
      show: of the model's processor.
      text: section of the decoder.
      ids: of the placeholders `image` and `video`.
    """
    strategy, v = show.plan.image[0].settings, cfg.vision
    made = {
        "architectures": [f"{NAMES[kind]}ForConditionalGeneration"],
        "model_type": kind,
        "vision_config": make_vision(v, strategy.side),
        "text_config": text,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default" if v.prefix else "full",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": cfg.llm.tie,
        "image_token_index": ids["image"],
        "image_seq_length": v.side**2,
    }
    if kind != "llava":
        made["image_grid_pinpoints"] = [list(p) for p in heights_first(strategy).pinpoints]
    if kind in VIDEO:
        made["video_token_index"] = ids["video"]
    if kind == "llava_next_video":
        resample = show.config.frame_resample or ((),)
        made |= {
            "spatial_pool_mode": "average",
            "spatial_pool_stride": resample[0][1] if resample[0] else 1,
        }
    if kind == "llava_onevision":
        made["vision_aspect_ratio"] = f"anyres_max_{show.format.max_tiles}"
    return made


def make_pixels(kind: str, cfg: VLMConfig, show: Show) -> tuple[dict, dict]:
    """The image and the video section of the processor files; {} without videos."""
    strategy, v = show.plan.image[0].settings, cfg.vision
    side = strategy.side
    if kind == "llava":
        if strategy.mode == "pad":
            more = dict(mode="crop", do_pad=True)
            return make_section("LlavaImageProcessor", v, side, **more), {}
        name = "CLIPImageProcessor" if strategy.mode == "crop" else "SiglipImageProcessor"
        return make_section(name, v, side, strategy.mode), {}
    mode = "resize" if kind == "llava_onevision" else "crop"
    more = {
        "do_pad": True,
        "image_grid_pinpoints": [list(p) for p in heights_first(strategy).pinpoints],
    }
    image = make_section(f"{NAMES[kind]}ImageProcessor", v, side, mode, **more)
    if kind == "llava_next_video":  # has no image processor of its own
        image["image_processor_type"] = "LlavaNextImageProcessor"
    if kind not in VIDEO:
        return image, {}
    video = make_section(f"{NAMES[kind]}VideoProcessor", v, side, mode)
    return image, video | {"do_sample_frames": False}


def make_processor(kind: str, cfg: VLMConfig, show: Show, tokens: dict[str, str]) -> dict:
    """What else the processor class of transformers takes."""
    made = {
        "processor_class": f"{NAMES[kind]}Processor",
        "vision_feature_select_strategy": "default" if cfg.vision.prefix else "full",
        "image_token": tokens["image"],
    }
    if kind in VIDEO:
        made["video_token"] = tokens["video"]
    if kind == "llava_onevision":
        side = cfg.vision.side
        return made | {
            "num_image_tokens": side**2,
            "vision_aspect_ratio": f"anyres_max_{show.format.max_tiles}",
        }
    return made | {
        "patch_size": cfg.vision.patch,
        "num_additional_image_tokens": cfg.vision.prefix,
    }


VIDEO = ("llava_next_video", "llava_onevision")


def heights_first(settings):
    """AnyRes with pinpoints as (height, width), which is how transformers reads them."""
    if settings.reading == "transformers":
        return settings
    turned = tuple((h, w) for w, h in settings.pinpoints)
    return dataclasses.replace(settings, pinpoints=turned, reading="transformers")
