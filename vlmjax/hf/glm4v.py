"""GLM-4V-9B in the layout of its own code (THUDM/glm-4v-9b): config.json, read only."""

from pathlib import Path

from vlmjax.connectors.conv_glu import ConvGLUConfig
from vlmjax.hf.cogvlm import SHARED
from vlmjax.hf.llm_config import need, read_llm
from vlmjax.hf.tower_config import eva2
from vlmjax.vlm import VLMConfig

KIND = "chatglm"
PLACEHOLDERS = ("<|endoftext|>",)
# Settings of which the decoder has one value.
FIXED = {
    "add_bias_linear": False,
    "rmsnorm": True,
    "multi_query_attention": True,
    "apply_residual_connection_post_layernorm": False,
    "post_layer_norm": True,
    "original_rope": True,
}
TEXT = {
    "vocab_size": "padded_vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "multi_query_group_num",
    "head_dim": "kv_channels",
    "rms_norm_eps": "layernorm_epsilon",
    "attention_bias": "add_qkv_bias",
    "max_position_embeddings": "seq_length",
}


def matches(raw: dict) -> bool:
    """Whether a config.json is of this system."""
    return raw.get("model_type") == KIND and "vision_config" in raw


def text(raw: dict, file: Path) -> dict:
    """The section of the decoder, in the words of transformers."""
    for name, value in FIXED.items():
        need(raw, file, name, value)
    made = {name: raw[theirs] for name, theirs in TEXT.items()}
    return made | {
        "model_type": "glm",
        "rope_theta": 10_000.0 * raw.get("rope_ratio", 1),
        "partial_rotary_factor": 0.5,
        "tie_word_embeddings": raw.get("tie_word_embeddings", False),
        "attention_dropout": raw.get("attention_dropout", 0.0),
    }


def read(raw: dict, file: Path) -> dict:
    """The fields of a `VLMConfig`."""
    scaling = raw["vision_config"]["scaling_factor"]
    return dict(
        vision=eva2(raw["vision_config"], file),
        connector=ConvGLUConfig(hidden=raw["ffn_hidden_size"], conv="out", scaling=float(scaling)),
        llm=read_llm(text(raw, file), file),
    )


def picture(raw: dict, file: Path, cfg: VLMConfig) -> dict:
    """The settings of a `data.picture.PictureConfig`."""
    side = raw["vision_config"]["image_size"]
    return dict(strategy=(dict(name="square", side=side, mode="resize"),), format=SHARED)


def template(raw: dict, file: Path, has) -> str:
    """The template of its conversations."""
    return "glm4"
