"""Tiny random decoders against transformers: import, logits, and the export loaded back."""

import dataclasses
import json

import hf_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from decoder_case import logits
from flax import nnx
from transformers import AutoConfig, AutoModelForCausalLM

from vlmjax import hf, nn
from vlmjax.hf.decoders import decoder_rows, written_kind
from vlmjax.hf.llm_config import make_llm
from vlmjax.hf.tensors import write_tensors
from vlmjax.hf.weights import table_tensors
from vlmjax.llm.decoder import Decoder
from vlmjax.vlm import VLMConfig

TOLERANCE = 2e-5
COMMON = dict(
    vocab_size=57,
    hidden_size=36,
    intermediate_size=47,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)
SHORT, LONG = [1.0, 1.5, 2.0], [2.0, 3.5, 9.0]
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": SHORT,
    "long_factor": LONG,
    "original_max_position_embeddings": 8,
}
# name -> (model_type, settings)
MODELS = {
    "llama": ("llama", dict(rms_norm_eps=1e-5)),
    "llama with biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "llama, linear scaling": (
        "llama",
        dict(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}),
    ),
    "mistral": ("mistral", dict(sliding_window=None, head_dim=10)),
    "mistral, wide window": ("mistral", dict(sliding_window=64)),
    "qwen2": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("qwen3", dict(head_dim=10)),
    "qwen3 with biases": ("qwen3", dict(head_dim=8, attention_bias=True)),
    "phi3": ("phi3", dict()),
    "phi3, short context": (
        "phi3",
        dict(rope_parameters=LONGROPE, original_max_position_embeddings=8),
    ),
    "phi3, long context": (
        "phi3",
        dict(rope_parameters=LONGROPE, original_max_position_embeddings=8),
    ),
    "glm": ("glm", dict(head_dim=12)),
    "glm without biases": ("glm", dict(head_dim=8, attention_bias=False)),
    "granite": (
        "granite",
        dict(
            embedding_multiplier=12.0,
            attention_multiplier=0.3,
            residual_multiplier=0.22,
            logits_scaling=9.0,
            attention_bias=True,
        ),
    ),
}


def _reference(name, directory):
    kind, settings = MODELS[name]
    config = AutoConfig.for_model(kind, **COMMON | settings)
    model = hf_reference.randomise(AutoModelForCausalLM.from_config(config))
    model.save_pretrained(directory)
    return model


def _scores(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def _error(a, b):
    return np.abs(np.asarray(a) - b).max() / np.abs(b).max()


@pytest.mark.parametrize("name", MODELS)
def test_in_and_out(name, tmp_path):
    reference = _reference(name, tmp_path / "in")
    read = hf.read_module_config(tmp_path / "in", "llm")
    n = 7
    if "long context" in name:  # transformers chooses by length, here it is a setting
        read, n = dataclasses.replace(read, rope_factors="long"), 13
    tokens = np.random.default_rng(0).integers(0, 57, (2, n))
    want = _scores(reference, tokens)
    params = hf.load_module("llm", tmp_path / "in", VLMConfig(None, None, read))
    graphdef, shapes = nn.unbind(jax.eval_shape(lambda: Decoder(read, rngs=nnx.Rngs(0))))
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes)
    model = nn.bind(graphdef, jax.tree.map(jnp.asarray, params))
    run = jax.jit(lambda m: logits(m, m.embed(tokens, jnp.float32), np.ones_like(tokens)))
    assert _error(run(model), want) < TOLERANCE

    rows = decoder_rows(read, written_kind(read))
    write_tensors(tmp_path / "out", table_tensors(rows, {"llm": params}))
    config = make_llm(read, 64) | {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    loaded, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found.values()), found
    assert _error(_scores(loaded.eval(), tokens), want) < 1e-6
    ours = {t.name: t.make() for t in table_tensors(rows, {"llm": params})}
    if config["model_type"] == MODELS[name][0]:
        stored = reference.state_dict()
        assert all(np.array_equal(value, stored[key].numpy()) for key, value in ours.items())


def test_every_class_of_transformers_is_written_as_itself(tmp_path):
    for name, want in (
        ("mistral", "llama"),
        ("phi3", "llama"),
        ("phi3, long context", "phi3"),
        ("glm", "glm"),
        ("granite", "granite"),
        ("qwen3 with biases", "qwen3"),
    ):
        kind, settings = MODELS[name]
        AutoConfig.for_model(kind, **COMMON | settings).save_pretrained(tmp_path)
        cfg = hf.read_module_config(tmp_path, "llm")
        assert make_llm(cfg, 64)["model_type"] == want
