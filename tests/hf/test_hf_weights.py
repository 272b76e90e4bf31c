"""Checkpoints of every layout in, the transformers layout out: bit-equal and strict."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hf_reference import VARIANTS, reference_model
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import bfloat16, device, equal
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    SiglipConfig,
    SiglipModel,
    SiglipVisionModel,
    VideoLlama3Config,
)

from vlmjax import hf, vlm
from vlmjax.connectors.mlp import MLPConfig
from vlmjax.data.processor import ProcessorConfig
from vlmjax.data.tokenizer import byte_tokenizer
from vlmjax.hf.config import make_config
from vlmjax.hf.tensors import MAX_SHARD_SIZE, SINGLE, split_shards
from vlmjax.hf.weights import export_tensors
from vlmjax.llm.decoder import DecoderConfig
from vlmjax.llm.presets import PRESETS as DECODERS
from vlmjax.vision.vit import PRESETS as TOWERS
from vlmjax.vision.vit import ViTConfig

TIED, UNTIED = "qwen2 4/2 tied", "qwen2 3/3 untied"


@pytest.fixture
def directory(tmp_path):
    """Makes a transformers directory of a variant."""

    def make(variant, dtype=None):
        out = tmp_path / "reference"
        reference_model(variant).to(dtype).save_pretrained(out)
        return out

    return make


def _tensors(path):
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            found |= {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    return found


def _export(out, cfg, params, **options):
    return hf.save_pretrained(out, cfg, params, byte_tokenizer(), ProcessorConfig(), **options)


def _assert_trees_equal(a, b):
    a, b = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (a, b))
    assert a.keys() == b.keys()
    for path in a:
        assert np.array_equal(a[path], b[path]), jax.tree_util.keystr(path)


def _rewrite(source, out, rename, change_config):
    """Copies a checkpoint under other key names and another config.json."""
    out.mkdir()
    tensors = {rename(key): value for key, value in load_file(source / SINGLE).items()}
    save_file({k: v for k, v in tensors.items() if k}, out / SINGLE)
    config = change_config(json.loads((source / "config.json").read_text()))
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("variant", VARIANTS)
def test_import_and_export_are_bit_equal(variant, directory, tmp_path):
    source = directory(variant)
    cfg, params = hf.read_config(source), hf.load_params(source)
    out = _export(tmp_path / "out", cfg, params, max_shard_size=40_000)
    want, got = _tensors(source), _tensors(out)
    assert want.keys() == got.keys()
    assert all(equal(want[k], got[k]) and want[k].dtype == got[k].dtype for k in want)
    assert len(list(out.glob("*.safetensors"))) > 2
    model, report = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = model.state_dict()
    assert all(equal(value, state[key]) for key, value in want.items())
    assert hf.read_config(out) == cfg


def test_the_tree_is_that_of_the_model(directory):
    source = directory(UNTIED)
    cfg, params = hf.read_config(source), hf.load_params(source)
    model = jax.eval_shape(lambda: vlm.unbind(vlm.VLM(cfg, rngs=nnx.Rngs(0)))[1])
    _assert_trees_equal(*(jax.tree.map(lambda x: np.array(x.shape), t) for t in (params, model)))


def test_bf16_stays_bf16_and_rounds_like_torch(directory, tmp_path):
    source = directory(TIED)
    cfg = hf.read_config(source)
    half = _export(tmp_path / "half", cfg, hf.load_params(source), dtype="bfloat16")
    want, got = _tensors(source), _tensors(half)
    assert all(equal(want[k].to(bfloat16), got[k]) for k in want)
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"
    params = hf.load_params(half)
    assert all(x.dtype == ml_dtypes.bfloat16 for x in jax.tree.leaves(params))
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(hf.load_params(half, cfg, "float32")))
    on_device = jax.tree.map(jax.numpy.asarray, params)
    again = _tensors(_export(tmp_path / "again", cfg, on_device))
    assert all(equal(got[k], again[k]) for k in got)


def _hub_config(config):
    vision = config["vision_config"] | {"model_type": "videollama3_vision_encoder"}
    text = config["text_config"]
    theta = text.pop("rope_parameters")["rope_theta"]
    return text | {
        "model_type": "videollama3_qwen2",
        "rope_theta": theta,
        "vision_encoder": None,
        "vision_encoder_config": vision,
        "mm_projector_type": "mlp2x_gelu",
        "use_token_compression": True,
    }


def _hub_key(key, encoder="model.vision_encoder."):
    key = key.replace("model.vision_model.", encoder)
    key = key.replace("model.projector.", "model.mm_projector.")
    return key.replace("model.language_model.", "model.")


@pytest.mark.parametrize("variant", [TIED, UNTIED])
@pytest.mark.parametrize(
    "encoder", ["model.vision_encoder.", "model.vision_encoder.vision_encoder."]
)
def test_trust_remote_code_and_training_layouts(variant, encoder, directory, tmp_path):
    source = directory(variant)
    other = _rewrite(source, tmp_path / "hub", lambda k: _hub_key(k, encoder), _hub_config)
    assert hf.read_config(other) == hf.read_config(source)
    params = hf.load_params(source)
    _assert_trees_equal(hf.load_params(other), params)
    cfg = hf.read_config(source)
    for module in ("vision", "connector", "llm"):
        _assert_trees_equal(hf.load_module(module, other, cfg), params[module])


def _siglip(tmp_path, name):
    """A SigLIP directory of the tower in the tied variant: the whole model or only the tower."""
    text = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    text |= dict(vocab_size=9, bos_token_id=0, eos_token_id=0)
    vision = VARIANTS[TIED][1] | dict(patch_size=14, image_size=42)
    whole = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    model = whole if name == "whole" else SiglipVisionModel(whole.config.vision_config)
    model.save_pretrained(tmp_path / name)
    if name == "transformers 4":
        source, out = tmp_path / name, tmp_path / "four"
        return _rewrite(source, out, lambda k: f"vision_model.{k}", lambda c: c)
    return tmp_path / name


@pytest.mark.parametrize("name", ["whole", "transformers 4", "transformers 5"])
def test_a_bare_siglip_starts_the_tower_without_its_position_table(name, directory, tmp_path):
    cfg = hf.read_config(directory(TIED))
    siglip = _siglip(tmp_path, name)
    stored = load_file(siglip / SINGLE)
    assert any("position_embedding" in key for key in stored)
    assert hf.read_module_config(siglip, "vision") == cfg.vision
    tree = hf.load_module("vision", siglip, cfg)
    prefix = "" if name == "transformers 5" else "vision_model."
    kernel = stored[f"{prefix}encoder.layers.1.mlp.fc1.weight"]
    assert np.array_equal(tree["blocks"]["mlp"]["up"]["kernel"][1], kernel.T)
    assert len(jax.tree.leaves(tree)) == 20
    with pytest.raises(ValueError, match="holds vision and not llm"):
        hf.load_module("llm", siglip, cfg)


def test_a_bare_navit_tower(directory, tmp_path):
    source = directory(TIED)
    cfg = hf.read_config(source)
    prefix = "model.vision_model."
    tower = _rewrite(
        source,
        tmp_path / "navit",
        lambda k: k.removeprefix(prefix) if k.startswith(prefix) else "",
        lambda c: c["vision_config"] | {"model_type": "videollama3_vision_encoder"},
    )
    want = hf.load_module("vision", source, cfg)
    _assert_trees_equal(hf.load_module("vision", tower, cfg), want)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_bare_decoder(variant, tmp_path):
    full = reference_model(variant)
    bare = AutoModelForCausalLM.from_config(full.config.text_config)
    bare.model.load_state_dict(full.model.language_model.state_dict())
    bare.lm_head.load_state_dict(full.lm_head.state_dict())
    full.save_pretrained(tmp_path / "full")
    bare.save_pretrained(tmp_path / "bare")
    cfg = hf.read_config(tmp_path / "full")
    assert hf.read_module_config(tmp_path / "bare", "llm") == cfg.llm
    want = hf.load_module("llm", tmp_path / "full", cfg)
    _assert_trees_equal(hf.load_module("llm", tmp_path / "bare", cfg), want)


def test_every_missing_unexpected_and_misshaped_key_is_in_one_error(directory):
    source = directory(UNTIED)
    stored = load_file(source / SINGLE)
    del stored["model.projector.readout.2.bias"], stored["model.language_model.norm.weight"]
    stored |= {"model.extra": np.zeros(2, np.float32), "other": np.zeros(2, np.float32)}
    norm = "model.vision_model.encoder.layers.1.layer_norm1.bias"
    stored[norm] = np.zeros(7, np.float32)
    stored["lm_head.weight"] = stored["lm_head.weight"][:-1].copy()
    save_file(stored, source / SINGLE)
    with pytest.raises(ValueError) as error:
        hf.load_params(source)
    text = str(error.value)
    missing, unexpected, wrong = text.splitlines()[1:]
    assert missing.startswith("  missing (2): ") and "readout.2.bias" in missing
    assert unexpected.startswith("  unexpected (2): ") and "model.extra" in unexpected
    assert wrong.startswith("  mis-shaped (2): ") and f"{norm} [7] instead of [60]" in wrong
    with pytest.raises(ValueError, match=r"missing \(1\): model.projector.readout.2.bias"):
        hf.load_module("connector", source, hf.read_config(source))


def test_a_tied_model_takes_a_head_only_if_it_is_the_embedding(directory):
    source = directory(TIED)
    stored = load_file(source / SINGLE)
    stored["lm_head.weight"] = stored["model.language_model.embed_tokens.weight"].copy()
    save_file(stored, source / SINGLE)
    assert "head" not in hf.load_params(source)["llm"]
    stored["lm_head.weight"][3, 4] += 1
    save_file(stored, source / SINGLE)
    with pytest.raises(ValueError, match="lm_head.weight differs from the embedding"):
        hf.load_params(source)


def test_settings_that_shapes_do_not_show_are_compared(directory):
    source = directory(TIED)
    cfg = hf.read_config(source)
    vision = ViTConfig(width=24, mlp=41, layers=2, heads=3)
    with pytest.raises(ValueError, match="vision.heads is 2 there and 3 here"):
        hf.load_module("vision", source, vlm.VLMConfig(vision, cfg.connector, cfg.llm))


def test_export_refuses_parameters_that_do_not_fit(directory, tmp_path):
    source = directory(TIED)
    cfg, params = hf.read_config(source), hf.load_params(source)
    params["llm"]["blocks"]["attn"]["q"]["lora_a"] = np.zeros((2, 3), np.float32)
    params["vision"]["norm"]["bias"] = np.zeros(5, np.float32)
    del params["llm"]["norm"]
    with pytest.raises(ValueError) as error:
        _export(tmp_path / "out", cfg, params)
    for part in ("llm/norm/scale", "q/lora_a", "vision/norm/bias [5] instead of [24]"):
        assert part in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "decoder, parameters, shards",
    [("qwen2_5_1_5b", 1_959_993_584, 1), ("qwen2_5_7b", 8_044_744_944, 4)],
)
def test_full_size_keys_and_shapes_against_transformers(decoder, parameters, shards):
    tower = ViTConfig(**TOWERS["siglip_so400m_14"])
    cfg = vlm.VLMConfig(tower, MLPConfig(), DecoderConfig(**DECODERS[decoder]))
    params = jax.eval_shape(lambda: vlm.unbind(vlm.VLM(cfg, rngs=nnx.Rngs(0)))[1])
    tensors = export_tensors(cfg, params, "bfloat16")
    assert sum(t.size for t in tensors) == parameters
    assert len(split_shards(tensors, MAX_SHARD_SIZE)) == shards
    ids = dict(image=151655, video=151656, bos=151643, eos=151645, pad=151643)
    config = VideoLlama3Config.from_dict(make_config(cfg, ids, "bfloat16", 32768))
    with device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    want = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if cfg.llm.tie:
        del want["lm_head.weight"]
    assert {t.name: t.shape for t in tensors} == want
