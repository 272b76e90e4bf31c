"""A tiny random model of transformers, saved once, and the objects that use it."""

import dataclasses

import hf_reference
import numpy as np
import pytest

from vlmjax import hf
from vlmjax.data.processor import Processor, ProcessorConfig
from vlmjax.data.tokenizer import byte_tokenizer
from vlmjax.generate.chat import Chat
from vlmjax.vlm import Compute

VARIANT = "qwen2 4/2 tied"
SETTINGS = ProcessorConfig(min_visual_tokens=1, max_visual_tokens=400, max_length=600)


@pytest.fixture(scope="session")
def reference():
    """The torch model with the placeholders of the byte tokenizer."""
    tokenizer = byte_tokenizer()
    ids = {f"{kind}_token_id": tokenizer.id(f"<|{kind}_pad|>") for kind in ("image", "video")}
    return hf_reference.reference_model(VARIANT, **ids)


@pytest.fixture(scope="session")
def weights(reference, tmp_path_factory):
    """(VLMConfig, params) of the reference; "ref" attention compiles fast."""
    folder = tmp_path_factory.mktemp("reference")
    reference.save_pretrained(folder)
    config = dataclasses.replace(hf.read_config(folder), compute=Compute(attention="ref"))
    return config, hf.load_params(folder)


@pytest.fixture(scope="session")
def vlm(weights):
    return Chat(*weights, Processor(SETTINGS, byte_tokenizer()))


@pytest.fixture(scope="session")
def prompts(vlm):
    """Samples of different lengths: no image, one, three, a video."""

    def image(*shape, seed):
        pixels = np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
        return {"type": "image", "image": pixels}

    clip = np.repeat(image(28, 56, seed=7)["image"][None], 2, 0)
    clip[1, :, 28:] = 9
    contents = (
        "hi",
        [image(28, 42, seed=1), {"type": "text", "text": "what is it?"}],
        "say something about nothing",
        [image(14, 14, seed=2), image(70, 28, seed=3), image(42, 42, seed=4)],
        [
            {"type": "video", "video": clip, "timestamps": [0, 1]},
            {"type": "text", "text": "then?"},
        ],
    )
    return [vlm.processor.prompt([{"role": "user", "content": c}]) for c in contents]
