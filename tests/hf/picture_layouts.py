"""Directories of layout C as other layouts keep them."""

import json

import numpy as np
from picture_models import kind_of
from safetensors.numpy import load_file, save_file


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
