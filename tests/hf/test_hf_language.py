"""Decoders that start from the checkpoint of a language model that has less than they do."""

import dataclasses
import importlib

import jax
import numpy as np
import pytest
import torch
import torchvision_shim
from tiny import tiny_config

from vlmjax import build, hf, sharding
from vlmjax.train import loop

torchvision_shim.install()  # before transformers looks for torchvision
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402


def _resolved(name, arg):
    return build.resolve(importlib.import_module(f"configs.{name}").get_config(arg))


def _released(llm, folder, vocab):
    """Saves a language model of the size of a decoder; returns its (embedding, head)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=llm.width,
        intermediate_size=llm.mlp,
        num_hidden_layers=llm.layers,
        num_attention_heads=llm.heads,
        num_key_value_heads=llm.kv_heads,
        head_dim=llm.head_dim,
        rms_norm_eps=llm.eps,
        rope_parameters={"rope_type": "default", "rope_theta": llm.rope_theta},
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return model.model.embed_tokens.weight.detach().numpy(), model.lm_head.weight.detach().numpy()


def _start(run, directory, monkeypatch):
    """Returns {path: array} of stage 1 with the decoder of a directory; what is drawn is zeros."""
    _, shapes, axes = build.abstract(run.model)
    zeros = {path: np.zeros(x.shape, np.float32) for path, x in shapes.items()}
    monkeypatch.setattr(build, "random_params", lambda *_: dict(zeros))
    where = build.shardings(shapes, axes, sharding.make_mesh())
    run = dataclasses.replace(run, init={"vision": "random", "llm": f"hf:{directory}"})
    started = loop.initial_params(run, shapes, where)
    assert started.keys() == zeros.keys()
    return jax.tree.map(np.asarray, started)


@pytest.mark.parametrize(
    ("name", "arg", "fewer", "note"),
    [
        ("cambrian_1", "tiny", 0, "2 blocks of SVA between layers start at random"),
        ("cogvlm2", "tiny", 0, "the visual expert is a copy of the language weights"),
        ("internvl_1_5", "tiny", 9, "9 rows of the vocabulary are the mean of the 823 there"),
        ("llava_1_5", "tiny", 0, ""),
    ],
)
def test_stage_1_starts_from_a_released_decoder(
    name, arg, fewer, note, tmp_path, capsys, monkeypatch
):
    run = _resolved(name, arg)
    llm = run.model.llm
    vocab = llm.vocab - fewer
    embedding, head = _released(llm, tmp_path, vocab)
    params = _start(run, tmp_path, monkeypatch)
    assert note in capsys.readouterr().out
    rows, columns = params["llm/embed/embedding"], params["llm/head/kernel"]
    np.testing.assert_array_equal(rows[:vocab], embedding)
    np.testing.assert_array_equal(columns[:, :vocab], head.T)
    for k in range(vocab, llm.vocab):
        np.testing.assert_allclose(rows[k], embedding.mean(0), atol=1e-7)
        np.testing.assert_allclose(columns[:, k], head.mean(0), atol=1e-7)
    for path, x in params.items():
        if path.startswith("llm/blocks/expert/"):
            language = path.replace("expert/", "")
            np.testing.assert_array_equal(x, params[language] if language in params else 0 * x)
        loaded = path.startswith("llm/") and not path.startswith("llm/extra/")
        assert x.any() == (loaded and not path.endswith("/bias")), path


def test_a_decoder_of_more_rows_is_refused(tmp_path):
    run = _resolved("internvl_1_5", "tiny")
    _released(run.model.llm, tmp_path, run.model.llm.vocab + 1)
    with pytest.raises(ValueError, match="(?s)mis-shaped.*embed_tokens"):
        hf.load_decoder(tmp_path, run.model)


def test_an_unknown_start_says_what_there_is(tmp_path):
    run = build.resolve(tiny_config(tmp_path, init=str(tmp_path)))
    with pytest.raises(ValueError, match=r"init=hf:DIR\) or at nothing \(init=random\)"):
        loop.initial_params(run, None, None)
