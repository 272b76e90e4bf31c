"""config.json of supported checkpoints to our configurations, and ours to that of transformers.

Settings that would change the function and that the model does not have are refused, never ignored.
"""

import json
from pathlib import Path

from vlmjax.connectors.mlp import MLPConfig
from vlmjax.hf import remote
from vlmjax.hf.llm_config import TEXT_DEFAULTS, make_llm, need, read_llm, rope_theta
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
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def read_config(directory) -> VLMConfig:
    """The configuration of a full checkpoint."""
    if remote.is_remote(directory):
        return remote.read_config(directory)
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
    if remote.is_remote(directory):
        return getattr(remote.read_config(directory), module)
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
        need(raw, file, "mm_projector_type", "mlp2x_gelu")
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
        need(c, file, "hidden_act", " or ".join(ACTIVATIONS))
    need(c, file, "num_channels", 3)
    need(c, file, "attention_dropout", 0)
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
        rope_theta=rope_theta(c, file, kinds=("axial", "default")),
    )


def _connector(section: dict, file: Path) -> MLPConfig:
    return MLPConfig(layers=2)


PARSERS = {"vision": _vision, "connector": _connector, "llm": read_llm}


def make_config(cfg: VLMConfig, token_ids: dict[str, int], dtype: str, max_position: int) -> dict:
    """config.json of the export, for `AutoModelForImageTextToText`.

    Args:
      token_ids: ids under the names image, video, bos, eos and pad.
      dtype: of the weights on disk.
      max_position: longest sequence readers should allow.
    """
    v, t = cfg.vision, cfg.llm
    ids = {f"{name}_token_id": token_ids[name] for name in ("bos", "eos", "pad")}
    text = make_llm(t, max_position) | ids
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
