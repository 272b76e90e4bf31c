"""A directory that `AutoModelForImageTextToText` and `AutoProcessor` of transformers load."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vlmjax.connectors.mlp import MLPConfig
from vlmjax.data.derive import choose_template
from vlmjax.data.processor import ProcessorConfig
from vlmjax.data.tokenizer import Tokenizer
from vlmjax.hf import internvl, remote_export
from vlmjax.hf.classes import Fit, find_class
from vlmjax.hf.config import CONFIG, make_config
from vlmjax.hf.processor import (
    IMAGE_TOKEN,
    VIDEO_TOKEN,
    write_picture_processor,
    write_processor,
)
from vlmjax.hf.systems import LAYOUTS
from vlmjax.hf.tensors import MAX_SHARD_SIZE, Tensor, write_tensors
from vlmjax.hf.weights import export_tensors
from vlmjax.vision.vit import ViTConfig
from vlmjax.vlm import VLMConfig

SPECIAL = {
    "image": IMAGE_TOKEN,
    "video": VIDEO_TOKEN,
    "bos": "<|endoftext|>",
    "eos": "<|im_end|>",
    "pad": "<|endoftext|>",
}

HEAD = """---
{front}
---

# {name}

A vision-language model with the {architecture} architecture, trained with vlmjax:
{parameters:,} parameters, {dtype}.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}", dtype="auto")
processor = AutoProcessor.from_pretrained("{name}")  # needs torchvision
image = {{"type": "image", "path": "picture.png"}}
question = {{"type": "text", "text": "What is this?"}}
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": [image, question]}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
output = model.generate(**inputs, max_new_tokens=128)
print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```
"""
NATIVE = """
Pictures are cut into patches of {patch}x{patch}. An image merges {image_merge}x{image_merge} of them into a token, a video
frame {video_merge}x{video_merge}, at most {max_visual_tokens} tokens in all. In training all images and frames of a sample
share that budget; transformers grants it to each image and each video, which differs for samples
above it. Regions of a video frame that did not change since the frame before are {pruned}.
"""  # noqa: E501
ARCHITECTURES = {
    "video_llama_3": "VideoLLaMA3 (arXiv:2501.13106)",
    "llava": "LLaVA-1.5 (arXiv:2310.03744)",
    "llava_next": "LLaVA-NeXT",
    "llava_next_video": "LLaVA-NeXT-Video",
    "llava_onevision": "LLaVA-OneVision (arXiv:2408.03326)",
    "internvl": "InternVL 1.5 (arXiv:2404.16821)",
}


def save_pretrained(
    out_dir,
    cfg: VLMConfig,
    params: Mapping,
    tokenizer: Tokenizer,
    processor_config: ProcessorConfig,
    dtype=None,
    generation: Mapping | None = None,
    model_name: str | None = None,
    card: Mapping | None = None,
    max_position: int = 32768,
    max_shard_size: int = MAX_SHARD_SIZE,
    format: str | None = None,
) -> Path:
    """Writes a complete transformers directory, weights tensor by tensor.

    Args:
      params: nested dict of numpy or jax arrays.
      dtype: of the weights on disk; None keeps each as it is.
      generation: entries of generation_config.json beside the token ids; greedy when absent.
      model_name: heading of the model card; the name of the directory when absent.
      card: more front matter for the model card, such as license or base_model.
      max_position: longest sequence that readers should allow.
      max_shard_size: in bytes.
      format: "transformers" for a class of transformers, "remote" for our own code beside the
        weights (see `hf.remote_export`); None = a class of transformers where one fits.
    """
    if format not in (None, "transformers", "remote"):
        raise ValueError(f"format={format!r} is unknown; use 'transformers', 'remote' or None")
    out_dir = Path(out_dir)
    decided = _decide(format, cfg, processor_config, tokenizer, max_position)
    if decided is None:
        how = dtype, generation, model_name, card, max_position, max_shard_size
        return remote_export.save(out_dir, cfg, params, tokenizer, processor_config, *how)
    ids, fit = decided
    tensors = export_tensors(cfg, params, dtype, fit.layout if fit else "videollama3")
    kinds = sorted({t.dtype.name for t in tensors})
    kind = kinds[0] if len(kinds) == 1 else "float32"
    if fit:
        tensors += _identity(cfg, fit, np.dtype(tensors[0].dtype))
        config = _with_ids(fit.config, ids, kind)
    else:
        config = make_config(cfg, ids, kind, max_position)
    write_tensors(out_dir, tensors, max_shard_size)
    _write(out_dir / CONFIG, config)
    stops = {"bos_token_id": ids["bos"], "eos_token_id": ids["stops"], "pad_token_id": ids["pad"]}
    stops = {name: value for name, value in stops.items() if value is not None}
    _write(out_dir / "generation_config.json", stops | dict(generation or {"do_sample": False}))
    if fit:
        _write_pictures(out_dir, cfg, tokenizer, processor_config, fit)
        text = "\n".join(["", *fit.notes, ""]) if fit.notes else ""
    else:
        write_processor(out_dir, tokenizer, processor_config)
        text = _native(processor_config)
    facts = {"parameters": sum(t.size for t in tensors), "dtype": " and ".join(kinds)}
    name = model_name or out_dir.resolve().name
    front = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["vlmjax", config["model_type"]],
        **(card or {}),
    }
    head = HEAD.format(
        front="\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items()),
        name=name,
        architecture=ARCHITECTURES[config["model_type"]],
        **facts,
    )
    (out_dir / "README.md").write_text(head + text)
    return out_dir


def _decide(format, cfg, settings: ProcessorConfig, tokenizer: Tokenizer, max_position: int):
    """(token ids, `_fit`) for a class of transformers, None for our own code."""
    if tokenizer.size > cfg.llm.vocab:
        raise ValueError(
            f"the tokenizer has {tokenizer.size} tokens and the embedding {cfg.llm.vocab} rows; "
            "every token needs a row; export with the tokenizer the model was trained with"
        )
    if settings.picture is None and settings.patch != cfg.vision.patch:
        raise ValueError(
            f"the processor cuts patches of {settings.patch} and the model takes "
            f"{cfg.vision.patch}; they must agree; change one of them"
        )
    if format == "remote":
        return None
    try:
        _fit(cfg, settings, dict.fromkeys(("image", "video"), 0), max_position)
    except ValueError as reason:
        if format == "transformers":
            raise
        print(f"no class of transformers computes this model, so our own code goes along: {reason}")
        return None
    ids = _token_ids(tokenizer, settings)
    return ids, _fit(cfg, settings, ids, max_position)


def _fit(cfg, settings: ProcessorConfig, ids: dict, max_position: int) -> Fit | None:
    """The class of transformers that computes a model, None for its VideoLLaMA3.

    Raises:
      ValueError: there is none.
    """
    if settings.picture is not None:
        return find_class(cfg, settings, ids, max_position)
    v = cfg.vision
    if isinstance(v, ViTConfig) and cfg.connector == MLPConfig():
        sizes = dict(width=v.width, mlp=v.mlp, layers=v.layers, heads=v.heads, patch=v.patch)
        plain = ViTConfig(**sizes, act=v.act, eps=v.eps, rope_theta=v.rope_theta)
        if v == plain and (cfg.llm.expert, cfg.llm.extra_num, cfg.pool) == ("none", 0, "none"):
            return None
    raise ValueError(
        "pictures in native size are those of VideoLLaMA3, whose class in transformers has a "
        "SigLIP with 2-D RoPE and an MLP of two layers; this model differs: export it with "
        "format='remote'"
    )


def _native(config: ProcessorConfig) -> str:
    """What the card says of pictures in native size."""
    pruned = "kept"
    if config.compression:
        ours, theirs = (config.threshold, config.min_kept), (0.1, 1)  # fixed in transformers
        same = "as in transformers" if ours == theirs else f"where transformers uses {theirs}"
        pruned = f"dropped (DiffFP, threshold and fewest tokens {ours}, {same})"
        if config.prune == "before_encoder":
            pruned += (
                " before the\nvision tower, as this model was trained. transformers drops them "
                "after it, so its answers about\nvideos differ: use vlmjax for videos, which reads "
                "this setting from `processor_config.json`"
            )
    return NATIVE.format(
        patch=config.patch,
        image_merge=config.image_merge,
        video_merge=config.video_merge,
        max_visual_tokens=config.max_visual_tokens,
        pruned=pruned,
    )


def _identity(cfg: VLMConfig, fit: Fit, dtype: np.dtype) -> list[Tensor]:
    """The norm of CLIP and SigLIP behind the blocks, which no feature passes."""
    if fit.kind == internvl.KIND:
        return []
    prefix, shape = LAYOUTS[fit.layout].prefixes["vision"], (cfg.vision.width,)
    return [
        Tensor(f"{prefix}post_layernorm.{name}", dtype, shape, lambda m=make: m(shape, dtype))
        for name, make in (("weight", np.ones), ("bias", np.zeros))
    ]


def _with_ids(config: dict, ids: dict, dtype: str) -> dict:
    """config.json with the ids of text tokens and the dtype of the weights."""
    found = {f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad")}
    found = {name: value for name, value in found.items() if value is not None}
    return config | {"dtype": dtype, "text_config": config["text_config"] | found, **found}


def _write_pictures(out_dir, cfg, tokenizer, config: ProcessorConfig, fit: Fit):
    tokens = {"image": config.image_token, "video": config.video_token}
    processor = fit.system.make_processor(fit.kind, cfg, fit.show, tokens)
    named = {}
    if fit.kind == internvl.KIND:  # a video has a token of its own in text, none in the sequence
        tokens["video"] = internvl.VIDEO if tokenizer.has(internvl.VIDEO) else tokens["video"]
        named = internvl.named_tokens(tokens)
    write_picture_processor(out_dir, tokenizer, config, fit.sections, processor, named)


def _token_ids(tokenizer: Tokenizer, config: ProcessorConfig) -> dict:
    """Ids under the names image, video, bos, eos, pad (None without one) and stops."""
    if config.picture is None:
        ids = {name: tokenizer.id(token) for name, token in SPECIAL.items()}
        return ids | {"stops": [ids["eos"], ids["pad"]]}
    template, known = choose_template(config, tokenizer), tokenizer.hf
    taken = {*template.controls, *template.stops, *internvl.MARKS}
    for name in ("image_token", "video_token"):
        token = getattr(config, name)
        if token in taken or tokenizer.id(token) not in tokenizer.reserved:
            raise ValueError(
                f"processor {name}={token!r} says something else in conversations, or is ordinary "
                "text; transformers needs a special token of its own where pictures are; give one"
            )
    stops = [tokenizer.id(token) for token in template.stops if tokenizer.has(token)]
    eos = stops[0] if stops else known.eos_token_id
    pad = eos if known.pad_token_id is None else known.pad_token_id
    ids = {"image": tokenizer.id(config.image_token), "video": tokenizer.id(config.video_token)}
    return ids | {"bos": known.bos_token_id, "eos": eos, "pad": pad, "stops": stops or [eos]}


def _write(file: Path, content: dict):
    file.write_text(json.dumps(content, indent=2) + "\n")
