"""config.json of supported checkpoints to our configurations, and ours to that of transformers.

Settings that would change the function and that the model does not have are refused, never ignored.
"""

import dataclasses
from pathlib import Path

from vlmjax.connectors.mlp import MLPConfig
from vlmjax.hf import internvl, llava, llava_original, originals, remote
from vlmjax.hf.llm_config import TEXT_DEFAULTS, make_llm, need, read_llm
from vlmjax.hf.pixels import read_json, read_sections
from vlmjax.hf.tower_config import dinov2
from vlmjax.hf.vision_config import ACTIVATIONS, SILENT, VISION_DEFAULTS, read_vision
from vlmjax.llm.decoder import DecoderConfig
from vlmjax.vision.vit import ViTConfig
from vlmjax.vlm import VLMConfig

CONFIG = "config.json"


def read_config(directory) -> VLMConfig:
    """The configuration of a full checkpoint."""
    parts = _parts(directory)
    for name in ("vision", "connector", "llm"):
        _need_part(parts, name, directory)
    return VLMConfig(**parts)


def read_max_position(directory) -> int | None:
    """The longest sequence that a full checkpoint says it takes, None if it says nothing."""
    raw = read_raw(directory)
    if originals.find(raw):
        return originals.max_position(raw, Path(directory) / CONFIG)
    text = raw.get("text_config") or raw.get("llm_config") or raw
    return text.get("max_position_embeddings")


def read_module_config(directory, module: str) -> ViTConfig | MLPConfig | DecoderConfig:
    """The configuration of one module (vision, connector, llm) in any supported directory.

    A further encoder (vision_2, ...) is that of a model with several, or the only one there is.
    """
    parts = _parts(directory)
    part, _, number = module.partition("_")
    _need_part(parts, part, directory)
    found = parts[part]
    return found[int(number or 1) - 1] if isinstance(found, tuple) else found


def tower_names(directory) -> dict[str, str]:
    """Module -> the name of its tower, where config.json names towers."""
    return originals.tower_names(read_raw(directory))


def read_raw(directory) -> dict:
    """The content of config.json."""
    file = Path(directory) / CONFIG
    if not file.is_file():
        raise ValueError(
            f"{directory} has no {CONFIG}; a checkpoint is a directory with one; point to such a "
            "directory"
        )
    return read_json(file)


def system_of(raw: dict):
    """The module that knows the pictures of a checkpoint; None for VideoLLaMA3, for parts and for
    `originals`."""
    if llava_original.is_original(raw):
        return llava_original
    kind = raw.get("model_type")
    if kind in (internvl.KIND, internvl.ORIGINAL):
        return internvl
    return llava if kind in llava.DEFAULTS else None


def _need_part(parts: dict, name: str, directory):
    if name not in parts:
        raise ValueError(
            f"{Path(directory) / CONFIG} describes {', '.join(parts)} and not {name!r}; whole "
            "models have vision, connector and llm; name a module it holds or another directory"
        )


def _parts(directory) -> dict:
    """The fields of a `VLMConfig` that config.json describes."""
    if remote.is_remote(directory):
        cfg = remote.read_config(directory)
        return {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg)}
    file, raw = Path(directory) / CONFIG, read_raw(directory)
    kind = raw.get("model_type")
    if raw.get("quantization_config"):
        raise ValueError(
            f"{file} is of a quantised model; only float weights are read; use the original "
            "checkpoint"
        )
    if original := originals.find(raw):
        return original.read(raw, file)
    if system := system_of(raw):
        return system.read(raw, file, read_sections(Path(directory)))
    if kind in VIDEOLLAMA3:
        return VIDEOLLAMA3[kind](raw, file)
    if kind in BARE_TOWERS:
        return {"vision": _bare_tower(raw, file)}
    if kind == "dinov2":
        return {"vision": dinov2(raw, file)}
    if kind in TEXT_DEFAULTS:
        return {"llm": read_llm(raw, file)}
    known = (*llava.DEFAULTS, *llava_original.DECODERS, internvl.KIND, internvl.ORIGINAL)
    known += (*originals.NAMES, "dinov2")
    raise ValueError(
        f"{file} has model_type {kind!r}; supported are "
        f"{', '.join(dict.fromkeys((*VIDEOLLAMA3, *known, *BARE_TOWERS, *TEXT_DEFAULTS)))}; "
        "convert the checkpoint to one of them"
    )


def _video_llama_3(raw: dict, file: Path) -> dict:
    text = {"model_type": "qwen2", **raw.get("text_config", {})}
    tie = raw.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)
    return {
        "vision": _turned(raw.get("vision_config", {}), file),
        "connector": MLPConfig(layers=2),
        "llm": read_llm(text | {"tie_word_embeddings": tie}, file),
    }


def _videollama3_qwen2(raw: dict, file: Path) -> dict:
    need(raw, file, "mm_projector_type", "mlp2x_gelu")
    if not raw.get("vision_encoder_config"):
        raise ValueError(
            f"{file} has no vision_encoder_config; sizes of the tower are read from there; "
            "copy the config.json of the encoder into that field"
        )
    return {
        "vision": _turned(raw["vision_encoder_config"], file),
        "connector": MLPConfig(layers=2),
        "llm": read_llm(raw | {"model_type": "qwen2"}, file),
    }


def _turned(section: dict, file: Path) -> ViTConfig:
    """The tower of VideoLLaMA3, with 2-D RoPE."""
    return read_vision(section | {"model_type": "video_llama_3_vision"}, file)


VIDEOLLAMA3 = {"video_llama_3": _video_llama_3, "videollama3_qwen2": _videollama3_qwen2}
# A bare SigLIP is what VideoLLaMA3 starts from; its table of positions loads where one is wanted.
TURNED = ("siglip", "siglip_vision_model", "video_llama_3_vision", "videollama3_vision_encoder")
BARE_TOWERS = (*TURNED, *(k for k in (*SILENT, *VISION_DEFAULTS) if k not in TURNED))


def _bare_tower(raw: dict, file: Path) -> ViTConfig:
    section = raw.get("vision_config", {}) if raw["model_type"] in SILENT else raw
    if raw["model_type"] in TURNED:
        return _turned(section, file)
    return read_vision({"model_type": raw["model_type"]} | section, file)


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
