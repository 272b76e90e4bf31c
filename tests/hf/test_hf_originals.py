"""Checkpoints of systems that transformers has no class for: names, settings, bits, refusals."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import original_models as models
import pytest
from original_systems import SYSTEMS
from PIL import Image

import vlmjax
from vlmjax import hf
from vlmjax.hf.systems import LAYOUTS
from vlmjax.nn import flatten

GOLDENS = Path(os.environ.get("VLMJAX_GOLDENS", Path(__file__).parents[1] / "goldens"))
NAMES = list(SYSTEMS)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    models.small_towers(monkeypatch)


def _same(got, want):
    got = flatten(got)
    assert got.keys() == want.keys()
    for path, value in want.items():
        assert np.array_equal(got[path], value), path


@pytest.mark.parametrize("name", NAMES)
def test_directories_are_read_bit_equal(name, tmp_path):
    system = SYSTEMS[name]
    params = models.random_params(system.config)
    out = models.write(system, tmp_path / "model", models.tensors(system, params))
    cfg, loaded = models.read(out)
    assert cfg == system.config
    _same(loaded, params)
    tokenizer, settings = hf.load_processor(out)
    assert settings.picture == system.picture
    assert (settings.template, settings.image_token) == (system.template, system.token)
    assert settings.max_frames == (6 if name.startswith("vila") else 8)
    assert tokenizer.size == cfg.llm.vocab
    assert hf.read_max_position(out) == 96
    for module in (*cfg.encoders, "connector", "llm"):
        part = {p.partition("/")[2]: v for p, v in params.items() if p.split("/")[0] == module}
        _same(hf.load_module(module, out, cfg), part)


# Four towers take their time to compile.
SLOW = [pytest.param(n, marks=pytest.mark.long) if n == "cambrian" else n for n in NAMES]


@pytest.mark.parametrize("name", SLOW)
def test_directories_answer(name, tmp_path):
    system = SYSTEMS[name]
    raw = system.raw | {"max_position_embeddings": 1024, "seq_length": 1024}
    parts = {k: v | {"max_position_embeddings": 1024} for k, v in system.parts.items()}
    system = dataclasses.replace(system, raw=raw, parts=parts)
    params = models.random_params(system.config)
    out = models.write(system, tmp_path / "model", models.tensors(system, params))
    vlm = vlmjax.from_pretrained(out)
    pixels = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    picture = {"type": "image", "image": Image.fromarray(pixels)}
    words = {"type": "text", "text": "a"}
    messages = [
        {"role": "user", "content": [picture, words]},
        {"role": "assistant", "content": "b"},
    ]
    logits = vlm.logits(messages)
    assert logits.shape[1] == system.config.llm.vocab and np.isfinite(logits).all()
    # Little of it arrives behind the system message of Cambrian, but what arrives is no noise.
    np.testing.assert_array_equal(vlm.logits(messages), logits)
    picture["image"] = Image.fromarray(255 - pixels)
    assert np.abs(vlm.logits(messages)[-1] - logits[-1]).max() > 1e-6 * np.abs(logits).max()


@pytest.mark.parametrize("name", NAMES)
def test_all_that_does_not_fit_is_one_error(name, tmp_path):
    system = SYSTEMS[name]
    found = models.tensors(system, models.random_params(system.config))
    keys = sorted(found)
    llm = [k for k in keys if "input_layernorm" in k and "vision" not in k]
    norm, tall = llm[0], llm[1]
    del found[norm]
    found[tall] = np.zeros(3, np.float32)
    begin = "llm." if system.parts else ""
    found[f"{begin}model.surprise"] = np.zeros(3, np.float32)
    out = models.write(system, tmp_path / "model", found)
    with pytest.raises(ValueError, match="does not fit") as error:
        hf.load_params(out)
    assert f"missing (1): {norm}" in str(error.value)
    assert f"unexpected (1): {begin}model.surprise" in str(error.value)
    assert f"mis-shaped (1): {tall} [3]" in str(error.value)


def test_towers_that_a_checkpoint_lacks(tmp_path):
    """Frozen ones are read from directories inside it; without, the error says which."""
    system = SYSTEMS["cambrian"]
    params = models.random_params(system.config)
    stored = models.tensors(system, params, ("vision_2", "connector", "llm"))
    out = models.write(system, tmp_path / "model", stored)
    with pytest.raises(ValueError) as error:
        hf.load_params(out)
    for text in (
        "vision (siglip/CLIP-ViT-SO400M-14-384), vision_3 (facebook/dinov2-giant-res20), vision_4",
        "--config.init.vision=hf:DIR --config.init.vision_3=hf:DIR --config.init.vision_4=hf:DIR",
    ):
        assert text in str(error.value)
    whole = models.tensors(system, params)
    trunk = "visual.trunk."
    bare = {"vision": trunk, "vision_3": "", "vision_4": trunk}
    files = dict.fromkeys(bare, "open_clip_model.safetensors")
    files["vision_3"] = "model.safetensors"
    more = {
        "vision": {"text.ln_final.weight": 0, "logit_scale": 0, f"{trunk}attn_pool.q.bias": 0},
        "vision_3": {"embeddings.mask_token": 0},
        "vision_4": {"ln_final.bias": 0, "visual.head.proj.weight": 0, f"{trunk}head.norm.bias": 0},
    }
    for i, (module, prefix) in zip((0, 2, 3), bare.items(), strict=True):
        begin = f"model.vision_tower_aux_list.{i}.vision_tower."
        found = {prefix + k.removeprefix(begin): v for k, v in whole.items() if k.startswith(begin)}
        found |= {key: np.zeros(2, np.float32) for key in more[module]}
        (out / module).mkdir()
        models.save_file(found, out / module / files[module])
    raw = {
        "model_type": "dinov2",
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "mlp_ratio": 20 / 12,
        "image_size": 24,
        "patch_size": 4,
    }
    (out / "vision_3" / "config.json").write_text(json.dumps(raw))
    assert hf.read_module_config(out / "vision_3", "vision_3") == system.config.vision[2]
    _same(hf.load_params(out), params)
    (out / "vision_3" / "config.json").write_text(json.dumps(raw | {"layer_norm_eps": 1e-5}))
    with pytest.raises(ValueError, match=r"vision_3\.eps is 1e-05 there and 1e-06 here"):
        hf.load_params(out)


def test_constants_that_are_stored(tmp_path):
    """The table of MiniCPM-V 2.0 may be stored, and must be the one that we compute."""
    system = SYSTEMS["minicpm-v 2.0"]
    params = models.random_params(system.config)
    found = models.tensors(system, params)
    ((key, table),) = LAYOUTS[system.layout].constants(system.config).items()
    table = np.asarray(table)
    assert key == "resampler.pos_embed"
    out = models.write(system, tmp_path / "model", found | {key: table.astype(np.float16)})
    _same(hf.load_params(out), params)
    models.write(system, out, found | {key: table + 0.1})
    with pytest.raises(ValueError, match=r"resampler\.pos_embed differs from the table"):
        hf.load_params(out)


def test_frequencies_of_old_checkpoints(tmp_path):
    for name, key in (
        ("cogvlm2", "model.layers.1.self_attn.rotary_emb.inv_freq"),
        ("glm4v", "transformer.rotary_pos_emb.inv_freq"),
    ):
        system = SYSTEMS[name]
        params = models.random_params(system.config)
        found = models.tensors(system, params) | {key: np.zeros(4, np.float32)}
        _same(hf.load_params(models.write(system, tmp_path / name, found)), params)


REFUSED = [
    ("360vl", {"proj_2": False}, "proj_2=False; supported is True"),
    ("360vl", {"mm_projector_type": "linear"}, "supported is 'c-abs'"),
    ("360vl", {"mm_vision_tower": "/data/clip"}, "mm_vision_tower='/data/clip'"),
    ("360vl", {"visual_projector_config": None}, "copy the content of qihoo360/360VL-8B"),
    ("cambrian", {"model_type": "phi3"}, "model_type='phi3'; supported is 'cambrian_llama or"),
    ("cambrian", {"num_query_group": 2}, "num_query_group=2; supported is 1"),
    ("cambrian", {"highres": True}, "highres=True; supported is None"),
    ("cambrian", {"mm_vision_tower_aux_list": ["apple/dfn"] * 4}, "the tower 'apple/dfn'"),
    ("cambrian", {"mm_vision_tower_aux_list": ["clip-convnext-XXL"] * 4}, "its last stage only"),
    ("cogvlm2", {"num_multi_query_heads": None}, "CogVLM, which is another function"),
    ("cogvlm2", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("glm4v", {"original_rope": False}, "original_rope=False; supported is True"),
    ("glm4v", {"add_bias_linear": True}, "add_bias_linear=True; supported is False"),
    ("minicpm-v 2.5", {"version": "2.6"}, "version='2.6'; supported is '2.5'"),
    ("minicpm-v 2.0", {"vision_encoder": "eva02"}, "vision_encoder='eva02'"),
    ("vila", {"dynamic_s2": True}, "dynamic_s2=True; supported is None"),
    ("vila s2", {"s2_resize_output_to_scale_idx": 1}, "s2_resize_output_to_scale_idx=1"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED)
def test_settings_that_are_refused(name, change, message, tmp_path):
    system = dataclasses.replace(SYSTEMS[name], raw=SYSTEMS[name].raw | change)
    out = models.write(system, tmp_path / "model", {"a": np.zeros(1, np.float32)})
    with pytest.raises(ValueError) as error:
        hf.read_config(out)
    assert message in str(error.value)


VIEWS = [
    ("cambrian", {"image_aspect_ratio": "square"}, "supported is 'pad'"),
    ("cogvlm2", {"template_version": "base"}, "template_version='base'"),
    ("minicpm-v 2.5", {"slice_mode": False}, "slice_mode=False"),
    ("vila", {"image_aspect_ratio": "dynamic"}, "image_aspect_ratio='dynamic'"),
]


@pytest.mark.parametrize(("name", "change", "message"), VIEWS)
def test_views_that_are_refused(name, change, message, tmp_path):
    system = dataclasses.replace(SYSTEMS[name], raw=SYSTEMS[name].raw | change)
    out = models.write(system, tmp_path / "model", {"a": np.zeros(1, np.float32)})
    with pytest.raises(ValueError) as error:
        hf.load_processor(out)
    assert message in str(error.value)
