"""Random tiny reference models of transformers, with weights under which every term shows."""

import os

import pytest
import torchvision_shim

TORCHVISION = torchvision_shim.install()  # before transformers looks for torchvision
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
from transformers import AutoModelForImageTextToText, VideoLlama3Config  # noqa: E402
from transformers.utils import logging  # noqa: E402

logging.set_verbosity_error()
logging.disable_progress_bar()

needs_torchvision = pytest.mark.skipif(
    not TORCHVISION,
    reason="transformers' video processor needs it: pip install --no-deps torchvision==0.28.0",
)

VOCAB = 271  # a byte tokenizer and a few rows that no token uses
VISION = dict(hidden_size=24, intermediate_size=41, num_hidden_layers=2, num_attention_heads=2)
WIDE_VISION = dict(hidden_size=60, intermediate_size=35, num_hidden_layers=3, num_attention_heads=5)


def _text(kind, width, heads, kv_heads, tie, **more):
    return {
        "model_type": kind,
        "vocab_size": VOCAB,
        "hidden_size": width,
        "intermediate_size": width + 11,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6 if kind == "qwen2" else 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6 if kind == "qwen2" else 5e5},
        "tie_word_embeddings": tie,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **more,
    }


# name -> (text_config, vision_config)
VARIANTS = {
    "qwen2 4/2 tied": (_text("qwen2", 32, 4, 2, True), VISION),
    "qwen2 3/3 untied": (_text("qwen2", 42, 3, 3, False), WIDE_VISION),
    "qwen2 6/1 of 10 tied": (_text("qwen2", 36, 6, 1, True, head_dim=10), VISION),
    "llama 8/2 untied": (_text("llama", 48, 8, 2, False), VISION),
    "llama 6/3 tied": (_text("llama", 36, 6, 3, True), WIDE_VISION),
}


def reference_config(name, image_token_id=0, video_token_id=1):
    text, vision = VARIANTS[name]
    return VideoLlama3Config(
        text_config=dict(text),
        vision_config=vision | {"patch_size": 14},
        image_token_id=image_token_id,
        video_token_id=video_token_id,
    )


def reference_model(name, seed=0, **ids):
    """A VideoLlama3ForConditionalGeneration in f32 with random norms and biases."""
    model = AutoModelForImageTextToText.from_config(reference_config(name, **ids))
    return randomise(model, seed)


def randomise(model, seed=0):
    """Gives every parameter values that move the output: kernels keep scale, norms are not 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1:
                is_scale = name.endswith("weight")
                p.copy_(is_scale + 0.3 * noise)
            elif "embed_tokens" in name:
                p.copy_(noise)
            else:
                p.copy_(1.5 * noise / p[0].numel() ** 0.5)
    return model.eval()
