"""A directory that `AutoModelForImageTextToText` and `AutoProcessor` of transformers load."""

import json
from collections.abc import Mapping
from pathlib import Path

from vlmjax.connectors.mlp import MLPConfig
from vlmjax.data.processor import ProcessorConfig
from vlmjax.data.tokenizer import Tokenizer
from vlmjax.hf import remote_export
from vlmjax.hf.config import CONFIG, make_config
from vlmjax.hf.processor import IMAGE_TOKEN, VIDEO_TOKEN, write_processor
from vlmjax.hf.tensors import MAX_SHARD_SIZE, write_tensors
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

CARD = """---
{front}
---

# {name}

A vision-language model with the VideoLLaMA3 architecture (arXiv:2501.13106), trained with vlmjax:
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

Pictures are cut into patches of {patch}x{patch}. An image merges {image_merge}x{image_merge} of them into a token, a video
frame {video_merge}x{video_merge}, at most {max_visual_tokens} tokens in all. In training all images and frames of a sample
share that budget; transformers grants it to each image and each video, which differs for samples
above it. Regions of a video frame that did not change since the frame before are {pruned}.
"""  # noqa: E501


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
    if format == "remote" or (format is None and not fits(cfg, processor_config)):
        how = dtype, generation, model_name, card, max_position, max_shard_size
        return remote_export.save(out_dir, cfg, params, tokenizer, processor_config, *how)
    out_dir = Path(out_dir)
    ids = _token_ids(cfg, tokenizer)
    if processor_config.patch != cfg.vision.patch:
        raise ValueError(
            f"the processor cuts patches of {processor_config.patch} and the model takes "
            f"{cfg.vision.patch}; they must agree; change one of them"
        )
    tensors = export_tensors(cfg, params, dtype)
    kinds = sorted({t.dtype.name for t in tensors})
    write_tensors(out_dir, tensors, max_shard_size)
    _write(
        out_dir / CONFIG,
        make_config(cfg, ids, kinds[0] if len(kinds) == 1 else "float32", max_position),
    )
    stops = {
        "bos_token_id": ids["bos"],
        "eos_token_id": [ids["eos"], ids["pad"]],
        "pad_token_id": ids["pad"],
    }
    _write(out_dir / "generation_config.json", stops | dict(generation or {"do_sample": False}))
    write_processor(out_dir, tokenizer, processor_config)
    facts = {"parameters": sum(t.size for t in tensors), "dtype": " and ".join(kinds)}
    name = model_name or out_dir.resolve().name
    (out_dir / "README.md").write_text(_card(name, facts, processor_config, card or {}))
    return out_dir


def fits(cfg: VLMConfig, processor_config: ProcessorConfig) -> bool:
    """Whether the VideoLLaMA3 of transformers is the model."""
    v, ours = cfg.vision, processor_config.picture
    if ours is not None or not isinstance(v, ViTConfig) or cfg.connector != MLPConfig():
        return False
    sizes = dict(width=v.width, mlp=v.mlp, layers=v.layers, heads=v.heads, patch=v.patch)
    plain = ViTConfig(**sizes, act=v.act, eps=v.eps, rope_theta=v.rope_theta)
    return v == plain and (cfg.llm.expert, cfg.llm.extra_num, cfg.pool) == ("none", 0, "none")


def _card(name: str, facts: dict, config: ProcessorConfig, more: Mapping) -> str:
    """The model card; its front matter is YAML, of which JSON values are a part."""
    front = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["vlmjax", "video_llama_3"],
        **more,
    }
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
    return CARD.format(
        front="\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items()),
        name=name,
        patch=config.patch,
        image_merge=config.image_merge,
        video_merge=config.video_merge,
        max_visual_tokens=config.max_visual_tokens,
        pruned=pruned,
        **facts,
    )


def _token_ids(cfg: VLMConfig, tokenizer: Tokenizer) -> dict[str, int]:
    ids = {name: tokenizer.id(token) for name, token in SPECIAL.items()}
    if tokenizer.size > cfg.llm.vocab:
        raise ValueError(
            f"the tokenizer has {tokenizer.size} tokens and the embedding {cfg.llm.vocab} rows; "
            "every token needs a row; export with the tokenizer the model was trained with"
        )
    return ids


def _write(file: Path, content: dict):
    file.write_text(json.dumps(content, indent=2) + "\n")
