"""config.json of supported checkpoints to our configurations, and ours to that of transformers.

Settings that would change the function and that the model does not have are refused, never ignored.
"""

import json
from pathlib import Path

from vlmjax.connectors.mlp import MLPConfig
from vlmjax.llm.decoder import DecoderConfig
from vlmjax.vision.vit import ViTConfig
from vlmjax.vlm import VLMConfig

CONFIG = "config.json"

# What transformers fills in where a config.json is silent (it leaves out values equal to the
# defaults of the class).
VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "attention_dropout": 0.0,
}
TEXT_DEFAULTS = {
    "qwen2": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
    },
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
    },
}
ROPE_THETA = 10_000.0
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def read_config(directory) -> VLMConfig:
    """The configuration of a full checkpoint."""
    return VLMConfig(
        **{
            module: read_module_config(directory, module)
            for module in ("vision", "connector", "llm")
        }
    )


def read_max_position(directory) -> int | None:
    """The longest sequence that a full checkpoint says it takes, None if it says nothing."""
    raw = json.loads((Path(directory) / CONFIG).read_text())
    return (raw.get("text_config") or raw).get("max_position_embeddings")


def read_module_config(directory, module: str) -> ViTConfig | MLPConfig | DecoderConfig:
    """The configuration of one module (vision, connector or llm) in any supported directory."""
    file = Path(directory) / CONFIG
    if not file.is_file():
        raise ValueError(
            f"{directory} has no {CONFIG}; a checkpoint is a directory with one; point to such a "
            "directory"
        )
    sections = _sections(json.loads(file.read_text()), file)
    if module not in sections:
        raise ValueError(
            f"{file} describes {', '.join(sections)} and not {module!r}; whole models have vision, "
            "connector and llm; "
            "name a module it holds or another directory"
        )
    return PARSERS[module](sections[module], file)


def _sections(raw: dict, file: Path) -> dict[str, dict]:
    """module -> the part of config.json that describes it."""
    kind = raw.get("model_type")
    if raw.get("quantization_config"):
        raise ValueError(
            f"{file} is of a quantised model; only float weights are read; use the original "
            "checkpoint"
        )
    if kind == "video_llama_3":
        text = {"model_type": "qwen2", **raw.get("text_config", {})}
        tie = raw.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)
        return {
            "vision": raw.get("vision_config", {}),
            "connector": {},
            "llm": text | {"tie_word_embeddings": tie},
        }
    if kind == "videollama3_qwen2":
        _need(raw, file, "mm_projector_type", "mlp2x_gelu")
        if not raw.get("vision_encoder_config"):
            raise ValueError(
                f"{file} has no vision_encoder_config; sizes of the tower are read from there; "
                "copy the config.json of the encoder into that field"
            )
        return {
            "vision": raw["vision_encoder_config"],
            "connector": raw,
            "llm": raw | {"model_type": "qwen2"},
        }
    if kind == "siglip":
        return {"vision": raw.get("vision_config", {})}
    if kind in ("siglip_vision_model", "video_llama_3_vision", "videollama3_vision_encoder"):
        return {"vision": raw}
    if kind in TEXT_DEFAULTS:
        return {"llm": raw}
    raise ValueError(
        f"{file} has model_type {kind!r}; supported are video_llama_3, videollama3_qwen2, siglip, "
        "siglip_vision_model, "
        f"video_llama_3_vision, videollama3_vision_encoder, {', '.join(TEXT_DEFAULTS)}; convert "
        "the checkpoint to one of them"
    )


def _vision(section: dict, file: Path) -> ViTConfig:
    c = VISION_DEFAULTS | section
    if c["hidden_act"] not in ACTIVATIONS:
        _need(c, file, "hidden_act", " or ".join(ACTIVATIONS))
    _need(c, file, "num_channels", 3)
    _need(c, file, "attention_dropout", 0)
    patch = c["patch_size"]
    if not isinstance(patch, int):
        sides = set(patch)
        patch = sides.pop()
        if sides:
            raise ValueError(
                f"{file} has patch_size {c['patch_size']}; patches are square; use another "
                "checkpoint"
            )
    return ViTConfig(
        width=c["hidden_size"],
        mlp=c["intermediate_size"],
        layers=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        patch=patch,
        act=ACTIVATIONS[c["hidden_act"]],
        eps=c["layer_norm_eps"],
        rope_theta=_rope_theta(c, file, kinds=("axial", "default")),
    )


def _connector(section: dict, file: Path) -> MLPConfig:
    return MLPConfig(layers=2)


def _llm(section: dict, file: Path) -> DecoderConfig:
    kind = section["model_type"]
    if kind not in TEXT_DEFAULTS:
        _need(section, file, "model_type", " or ".join(TEXT_DEFAULTS))
    c = TEXT_DEFAULTS[kind] | section
    _need(c, file, "hidden_act", "silu")
    _need(c, file, "attention_dropout", 0)
    if kind == "llama":
        _need(c, file, "attention_bias", False)
        _need(c, file, "mlp_bias", False)
    if c.get("use_sliding_window") or "sliding_attention" in (c.get("layer_types") or ()):
        raise ValueError(
            f"{file} turns sliding window attention on; every layer attends fully here; use a "
            "checkpoint without it"
        )
    heads = c["num_attention_heads"]
    return DecoderConfig(
        vocab=c["vocab_size"],
        width=c["hidden_size"],
        mlp=c["intermediate_size"],
        layers=c["num_hidden_layers"],
        heads=heads,
        kv_heads=c["num_key_value_heads"] or heads,
        head_dim=c.get("head_dim") or c["hidden_size"] // heads,
        rope_theta=_rope_theta(c, file, kinds=("default",)),
        eps=c["rms_norm_eps"],
        qkv_bias=kind == "qwen2",
        tie=c["tie_word_embeddings"],
    )


PARSERS = {"vision": _vision, "connector": _connector, "llm": _llm}


def _rope_theta(c: dict, file: Path, kinds: tuple[str, ...]) -> float:
    """The base frequency: in rope_parameters (transformers 5), or beside rope_scaling (4)."""
    written = [c[name] for name in ("rope_parameters", "rope_scaling") if c.get(name)]
    rope = {"partial_rotary_factor": c.get("partial_rotary_factor", 1.0)}
    for part in written:
        rope |= part | {"rope_type": part.get("rope_type", part.get("type", "default"))}
        if rope["rope_type"] not in kinds or rope["partial_rotary_factor"] != 1.0:
            raise ValueError(
                f"{file} has rope settings {part}; supported are the types {', '.join(kinds)}, "
                "unscaled, over the whole head; use a checkpoint without rope scaling"
            )
    return float(rope.get("rope_theta", c.get("rope_theta", ROPE_THETA)))


def _need(c: dict, file: Path, name: str, value):
    if c.get(name) != value:
        raise ValueError(
            f"{file} has {name}={c.get(name)!r}; supported is {value!r}; use a checkpoint with "
            "that setting"
        )


def make_config(cfg: VLMConfig, token_ids: dict[str, int], dtype: str, max_position: int) -> dict:
    """config.json of the export, for `AutoModelForImageTextToText`.

    Args:
      token_ids: ids under the names image, video, bos, eos and pad.
      dtype: of the weights on disk.
      max_position: longest sequence readers should allow.
    """
    v, t = cfg.vision, cfg.llm
    ids = {f"{name}_token_id": token_ids[name] for name in ("bos", "eos", "pad")}
    text = {
        "model_type": "qwen2" if t.qkv_bias else "llama",
        "vocab_size": t.vocab,
        "hidden_size": t.width,
        "intermediate_size": t.mlp,
        "num_hidden_layers": t.layers,
        "num_attention_heads": t.heads,
        "num_key_value_heads": t.kv_heads,
        "head_dim": t.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": max_position,
        "rms_norm_eps": t.eps,
        "rope_theta": t.rope_theta,  # for transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": t.rope_theta},
        "tie_word_embeddings": t.tie,
        **ids,
    }
    text |= (
        {"use_sliding_window": False}
        if t.qkv_bias
        else {"attention_bias": False, "mlp_bias": False}
    )
    vision = {
        "model_type": "video_llama_3_vision",
        "hidden_size": v.width,
        "intermediate_size": v.mlp,
        "num_hidden_layers": v.layers,
        "num_attention_heads": v.heads,
        "num_channels": 3,
        "patch_size": v.patch,
        "hidden_act": {ours: theirs for theirs, ours in ACTIVATIONS.items()}[v.act],
        "layer_norm_eps": v.eps,
        "rope_parameters": {"rope_type": "axial", "rope_theta": v.rope_theta},
    }
    return {
        "architectures": ["VideoLlama3ForConditionalGeneration"],
        "model_type": "video_llama_3",
        "dtype": dtype,
        "image_token_id": token_ids["image"],
        "video_token_id": token_ids["video"],
        "tie_word_embeddings": t.tie,
        "text_config": text,
        "vision_config": vision,
        **ids,
    }
