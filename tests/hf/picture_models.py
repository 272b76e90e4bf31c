"""Random tiny models of the classes of transformers that see views of a picture, in directories."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import hf_reference  # before transformers
import torch
from PIL import Image, ImageDraw
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from vlmjax.data.tokenizer import byte_tokenizer
from vlmjax.vision.pixels import CLIP, HALF, IMAGENET

CONTROLS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")
PLACEHOLDERS = ("<image>", "<video>", "<img>", "</img>", "<IMG_CONTEXT>")
TOKENIZER = byte_tokenizer((*CONTROLS, *PLACEHOLDERS))
VOCAB = TOKENIZER.size + 3


def _text(kind, width=24, heads=4, kv_heads=2, **more):
    found = hf_reference._text(kind, width, heads, kv_heads, **({"tie": False} | more))
    return found | {"vocab_size": VOCAB}


def _tower(kind, side, layers=3, width=18, heads=3, **more):
    return {
        "model_type": kind,
        "hidden_size": width,
        "intermediate_size": 29,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": side,
        "patch_size": 7,
        **more,
    }


def _pinpoints(side, *grids):
    return [[side * rows, side * columns] for rows, columns in grids]


FIVE = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
NINE = tuple((i, j) for i in range(1, 4) for j in range(1, 4))
CLIP_TOWER = _tower("clip_vision_model", 35)
SIGLIP_TOWER = _tower("siglip_vision_model", 38, layers=2)
INTERN = dict(layers=2, attention_bias=True, layer_scale_init_value=0.1)
MISTRAL = _text("mistral") | {"sliding_window": None}
RMS = dict(layers=2, norm_type="rms_norm", use_qk_norm=True, width=20, heads=5)
# name -> config, all but the ids of tokens
CONFIGS = {
    "llava pad": dict(model_type="llava", vision_config=CLIP_TOWER, text_config=_text("llama")),
    "llava crop": dict(
        model_type="llava",
        vision_config=CLIP_TOWER,
        vision_feature_layer=2,  # counted from the front
        text_config=_text("llama", tie=True),
    ),
    "llava siglip": dict(
        model_type="llava",
        vision_config=SIGLIP_TOWER,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        text_config=_text("qwen2", tie=True),
    ),
    "llava_next": dict(
        model_type="llava_next",
        vision_config=CLIP_TOWER,
        image_grid_pinpoints=_pinpoints(35, *FIVE),
        text_config=MISTRAL,
    ),
    "llava_next_video": dict(
        model_type="llava_next_video",
        vision_config=CLIP_TOWER,
        image_grid_pinpoints=_pinpoints(35, *FIVE),
        text_config=_text("llama"),
    ),
    "llava_onevision": dict(
        model_type="llava_onevision",
        vision_config=SIGLIP_TOWER | {"vision_use_head": False},
        image_grid_pinpoints=_pinpoints(38, *NINE),
        vision_aspect_ratio="anyres_max_3",
        text_config=_text("qwen2"),
    ),
    "internvl": dict(
        model_type="internvl",
        vision_config=_tower("internvl_vision", 42, **INTERN),
        text_config=_text("qwen2", tie=True),
        image_seq_length=9,
    ),
    "internvl rms": dict(
        model_type="internvl",
        vision_config=_tower("internvl_vision", 28, **RMS),
        text_config=_text("llama"),
        tie_word_embeddings=False,
        image_seq_length=4,
    ),
}
VIDEO = ("llava_next_video", "llava_onevision")
WITH_VIDEO = (*VIDEO, "internvl", "internvl rms")


def kind_of(name):
    return CONFIGS[name]["model_type"]


def side_of(name):
    return CONFIGS[name]["vision_config"]["image_size"]


def config_of(name):
    intern = kind_of(name) == "internvl"
    ids = {"image_token_index": TOKENIZER.id("<image>")}
    if intern:
        ids = {"image_token_id": TOKENIZER.id("<IMG_CONTEXT>")}
    if name in VIDEO:
        ids["video_token_index"] = TOKENIZER.id("<video>")
    config = dict(CONFIGS[name])
    return AutoConfig.for_model(config.pop("model_type"), **config, **ids)


def model_of(name):
    """The model in f32; every weight moves its output."""
    model = AutoModelForImageTextToText.from_config(config_of(name))
    return hf_reference.randomise(model, seed=len(name))


def _statistics(name):
    kind = CONFIGS[name]["vision_config"]["model_type"]
    found = {"clip_vision_model": CLIP, "internvl_vision": IMAGENET}.get(kind, HALF)
    return {f"image_{key}": list(value) for key, value in found.items()}


def image_processor(name):
    """Pillow's, of transformers."""
    side, how = side_of(name), _statistics(name)
    square = {"height": side, "width": side}
    crop = dict(size={"shortest_edge": side}, crop_size=square) | how
    pinpoints = CONFIGS[name].get("image_grid_pinpoints")
    if name == "llava pad":
        return LlavaImageProcessorPil(do_pad=True, **crop)
    if name == "llava crop":
        return CLIPImageProcessorPil(**crop)
    if name == "llava siglip":
        return SiglipImageProcessorPil(size=square, resample=3, **how)
    if name in ("llava_next", "llava_next_video"):
        return LlavaNextImageProcessorPil(image_grid_pinpoints=pinpoints, **crop)
    if name == "llava_onevision":
        return LlavaOnevisionImageProcessorPil(image_grid_pinpoints=pinpoints, size=square, **how)
    return GotOcr2ImageProcessorPil(crop_to_patches=True, max_patches=4, size=square, **how)


def frame_processor(name):
    """What the video processor of transformers does with a frame, by Pillow."""
    side, how = side_of(name), _statistics(name)
    square = {"height": side, "width": side}
    if name == "llava_next_video":
        return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square, **how)
    return SiglipImageProcessorPil(size=square, resample=3, **how)


def save(name, model, folder):
    """A directory as transformers 5 saves it (layout C), with tokenizer and image processor."""
    model.save_pretrained(folder)
    TOKENIZER.save(folder)
    image_processor(name).save_pretrained(folder)
    return folder


def picture(width, height, seed=0):
    """Gradients, shapes and text."""
    rng = np.random.default_rng(seed)
    x, y = np.linspace(0, 255, width), np.linspace(0, 255, height)
    plane = np.stack(
        [np.broadcast_to(x, (height, width)), np.broadcast_to(y[:, None], (height, width))]
    )
    pixels = np.concatenate([plane, 255 - plane[:1]]).transpose(1, 2, 0)
    image = Image.fromarray(pixels.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        at = rng.integers(0, max(width, height), 2)
        box = [*at.tolist(), *(at + rng.integers(5, 40, 2)).tolist()]
        draw.rectangle(box, fill=tuple(rng.integers(0, 256, 3).tolist()))
    draw.text((2, 2), f"Nr. {seed} of ten", fill=(255, 255, 255))
    return image


# (width, height): 1:1, 4:3, 3:4, 16:9, 9:16, 2:1, 1:3, 5:1, 1:8 and tiny
SIZES = (
    (101, 101),
    (120, 90),
    (60, 80),
    (160, 90),
    (72, 128),
    (140, 70),
    (31, 93),
    (200, 40),
    (20, 160),
    (20, 20),
)


def image(*size, seed=0):
    return {"type": "image", "image": picture(*size, seed)}


def clip(frames=3, width=61, height=44):
    shown = np.stack([np.asarray(picture(width, height, seed)) for seed in range(frames)])
    return {"type": "video", "video": shown, "timestamps": list(map(float, range(frames)))}


def user(*parts):
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}]


def reference_inputs(name, messages, tokens):
    """What a model of transformers takes: its own pixels, the tokens of ours."""
    inputs = {"input_ids": torch.tensor(tokens[None].astype(np.int64))}
    parts = [p for m in messages if not isinstance(m["content"], str) for p in m["content"]]
    images = [p["image"] for p in parts if p["type"] == "image"]
    videos = [p["video"] for p in parts if p["type"] == "video"]
    if images:
        found = image_processor(name)(
            [images] if name == "llava_onevision" else images, return_tensors="pt"
        )
        inputs |= {
            k: v
            for k, v in found.items()
            if k in ("pixel_values", "image_sizes", "batch_num_images")
        }
    if name.startswith(("llava pad", "llava crop", "llava siglip", "internvl")):
        inputs.pop("image_sizes", None)
    if videos:
        frames = [Image.fromarray(f) for f in videos[0]]
        pixels = frame_processor(name)(frames, return_tensors="pt")["pixel_values"]
        if name.startswith("internvl"):
            inputs["pixel_values"] = pixels
        else:
            inputs["pixel_values_videos"] = pixels[None]
    return inputs
