"""Random tiny models of the classes of transformers that see views of a picture, in directories."""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import hf_reference  # before transformers
import torch
from PIL import Image, ImageDraw
from safetensors.numpy import load_file, save_file
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
        inputs["pixel_values_videos"] = pixels[None]
    return inputs


def rewrite(source, out, rename, change):
    """Copies a directory under other keys and another config.json; no key stays behind."""
    out.mkdir()
    tensors = {}
    for key, value in load_file(source / "model.safetensors").items():
        tensors |= rename(key, value)
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, out / "model.safetensors")
    config = change(json.loads((source / "config.json").read_text()))
    (out / "config.json").write_text(json.dumps(config))
    for file in source.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            (out / file.name).write_bytes(file.read_bytes())
    return out


def _swap(key, *pairs):
    for before, after in pairs:
        if key.startswith(before):
            return after + key.removeprefix(before)
    return key


_CORE = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("image_newline", "model.image_newline"),
)
_ORIGINAL = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("image_newline", "model.image_newline"),
    ("vision_tower.", "model.vision_tower.vision_tower.vision_model."),
)
# Layout -> beginnings of keys, in layout C and there.
LLAVA_KEYS = {
    "A": (("vision_tower.", "vision_tower.vision_model."),),
    "B": (*_CORE, ("vision_tower.", "model.vision_tower.vision_model.")),
    "memory": (*_CORE, ("vision_tower.", "model.vision_tower.")),
    "D": _ORIGINAL,
}
INTERNVL_KEYS = {"B": (*_CORE, ("vision_tower.", "model.vision_tower."))}
INTERNVIT_KEYS = (
    ("embeddings.cls_token", "embeddings.class_embedding"),
    ("embeddings.position_embeddings", "embeddings.position_embedding"),
    ("embeddings.patch_embeddings.projection.", "embeddings.patch_embedding."),
)
INTERNVIT_LAYER = {
    "attention.projection_layer.": "attn.proj.",
    "attention.q_norm.": "attn.q_norm.",
    "attention.k_norm.": "attn.k_norm.",
    "layernorm_before.": "norm1.",
    "layernorm_after.": "norm2.",
    "lambda_1": "ls1",
    "lambda_2": "ls2",
}
MLP1 = {"layer_norm": "0", "linear_1": "1", "linear_2": "3"}
INTERNLM2 = {
    "model.embed_tokens.": "model.tok_embeddings.",
    "lm_head.": "output.",
    "self_attn.o_proj.": "attention.wo.",
    "input_layernorm.": "attention_norm.",
    "post_attention_layernorm.": "ffn_norm.",
    "mlp.gate_proj.": "feed_forward.w1.",
    "mlp.up_proj.": "feed_forward.w3.",
    "mlp.down_proj.": "feed_forward.w2.",
}


def other_layout(name, layout, source, out):
    """Copies a directory of layout C as another one."""
    kind = kind_of(name)
    if kind == "internvl" and layout == "D":
        return _internvl_original(source, out)
    keys = (INTERNVL_KEYS if kind == "internvl" else LLAVA_KEYS)[layout]
    change = _llava_original_config if layout == "D" else lambda c: c
    return rewrite(source, out, lambda k, v: {_swap(k, *keys): v}, change)


def _llava_original_config(config):
    """That of the repositories, the tower beside it because its name says no sizes."""
    vision, siglip = (
        dict(config["vision_config"]),
        "siglip" in config["vision_config"]["model_type"],
    )
    vision["num_hidden_layers"] += siglip  # the last of which the code deletes
    text = config["text_config"]
    kinds = {"llama": "llava_llama", "mistral": "llava_mistral", "qwen2": "llava_qwen"}
    made = text | {
        "model_type": kinds[text["model_type"]],
        "vision_config": vision,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2 if siglip else config["vision_feature_layer"],
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
    }
    if "image_grid_pinpoints" in config:
        made |= {
            "image_aspect_ratio": config.get("vision_aspect_ratio", "anyres"),
            "image_grid_pinpoints": [[w, h] for h, w in config["image_grid_pinpoints"]],
            "mm_patch_merge_type": "spatial_unpad",
        }
    if "vision_aspect_ratio" in config:
        made["mm_spatial_pool_mode"] = "bilinear"
    return made


def _internvl_original(source, out):
    """As OpenGVLab saves it: fused attention of the tower, InternLM2 where it is a Llama."""
    stored = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    text = config["text_config"]
    groups, internlm2 = text["num_key_value_heads"], text["model_type"] == "llama"

    def one(key, value):
        part, rest = key.split(".", 1)
        if part == "multi_modal_projector":
            name, leaf = rest.split(".")
            return {f"mlp1.{MLP1[name]}.{leaf}": value}
        if part == "language_model":
            return _internlm2(rest, value) if internlm2 else {key: value}
        rest = _swap(rest, *INTERNVIT_KEYS).replace("encoder.layer.", "encoder.layers.")
        for before, after in INTERNVIT_LAYER.items():
            rest = rest.replace(before, after)
        for which in "qkv":
            if f"attention.{which}_proj" in rest:
                fused = [stored[key.replace(f"{which}_proj", f"{x}_proj")] for x in "qkv"]
                rest = rest.replace(f"attention.{which}_proj", "attn.qkv")
                value = np.concatenate(fused)
        return {f"vision_model.{rest}": value}

    def _internlm2(rest, value):
        for which in "qkv":
            if f"self_attn.{which}_proj" in rest:
                key = f"language_model.{rest}"
                parts = [stored[key.replace(f"{which}_proj", f"{x}_proj")] for x in "qkv"]
                width, head = parts[0].shape[1], parts[1].shape[0] // groups
                parts = [p.reshape(groups, -1, head, width) for p in parts]
                name = rest.replace(f"self_attn.{which}_proj", "attention.wqkv")
                return {f"language_model.{name}": np.concatenate(parts, 1).reshape(-1, width)}
        for before, after in INTERNLM2.items():
            rest = rest.replace(before, after)
        return {f"language_model.{rest}": value}

    vision = config["vision_config"]
    made = {
        "model_type": "internvl_chat",
        "vision_config": vision
        | {
            "model_type": "intern_vit_6b",
            "qkv_bias": vision["attention_bias"],
            "qk_normalization": vision["use_qk_norm"],
        },
        "llm_config": text | ({"model_type": "internlm2", "bias": False} if internlm2 else {}),
        "select_layer": -1,
        "ps_version": "v2",
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "max_dynamic_patch": 4,
        "template": "internlm2-chat",
    }
    return rewrite(source, out, one, lambda c: made)
