"""Checkpoints of systems that transformers has no class for, against files of their own code."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import original_models as models
import pytest
from original_systems import SHARED, SYSTEMS

from vlmjax.connectors.c_abstractor import CAbstractorConfig
from vlmjax.connectors.mlp import MLPConfig
from vlmjax.connectors.resampler import ResamplerConfig
from vlmjax.connectors.sva import SVAConfig
from vlmjax.data.chat import Encoded
from vlmjax.data.picture import PictureConfig, Show, place
from vlmjax.data.sample import Sample
from vlmjax.generate.decode import Generator, score
from vlmjax.hf.systems import LAYOUTS, rows
from vlmjax.llm.decoder import DecoderConfig
from vlmjax.vision.vit import ViTConfig
from vlmjax.vlm import VLMConfig

GOLDENS = Path(os.environ.get("VLMJAX_GOLDENS", Path(__file__).parents[1] / "goldens"))


def _golden(name):
    z = np.load(GOLDENS / f"{name}.npz")
    return z, json.loads(str(z["meta"]))


def _weights(z):
    return {k.removeprefix("w/"): z[k] for k in z.files if k.startswith("w/")}


def _vit(width):
    return ViTConfig(width=width, mlp=8, layers=1, heads=1, patch=4, position="table", side=6)


def _llm(width, **more):
    sizes = dict(vocab=45, mlp=50, layers=3, heads=1, kv_heads=1, head_dim=width)
    return DecoderConfig(width=width, **sizes | dict(qkv_bias=False, tie=False) | more)


def _part(connector, width, towers, **llm):
    vision = tuple(_vit(w) for w in towers)
    sources = (0, 0) if isinstance(connector, CAbstractorConfig) else ()
    vision = vision[0] if len(vision) == 1 else vision
    return VLMConfig(vision, connector, _llm(width, **llm), sources=sources)


# Golden file: layout, modules, what its keys start with there, config of its sizes.
_CABS = CAbstractorConfig(queries=16, width=20, depth=2, side=6, copies=("ctt", "ori"))
_SVA = SVAConfig(side=4, windows=(1, 2, 3), width=32, heads=16, layers=2)
_R20 = ResamplerConfig(queries=9, heads=5, query_pos="sincos")
_R25 = ResamplerConfig(queries=5, heads=3)
PARTS = {
    "cabs": ("360vl", ("connector",), "model.", _part(_CABS, 14, (12,))),
    "sva": (
        "cambrian",
        ("connector", "llm"),
        "model.",
        _part(_SVA, 20, (10, 7, 13), extra_num=1, vocab=11),
    ),
    "resampler_minicpm20": ("minicpm-v 2.0", ("connector",), "resampler.", _part(_R20, 20, (14,))),
    "resampler_minicpm25": ("minicpm-v 2.5", ("connector",), "resampler.", _part(_R25, 24, (10,))),
    "minicpm_llm": (
        "minicpm-v 2.0",
        ("llm",),
        "",
        _part(_R20, 36, (14,), heads=6, kv_heads=6, head_dim=6),
    ),
    "vila": (
        "vila",
        ("connector",),
        "mm_projector.",
        _part(MLPConfig(window=2, norm="layer"), 10, (12,)),
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_names_and_shapes_are_those_of_the_originals(name):
    layout, modules, prefix, cfg = PARTS[name]
    weights = _weights(_golden(name)[0])
    if name == "vila":
        begin = "mlp_downsample."
        weights = {k.removeprefix(begin): v for k, v in weights.items() if k.startswith(begin)}
    table = rows(cfg, layout, modules, "llama")
    shapes = {key: row.stored_shape for row in table for key in row.keys}
    if name == "sva":  # has of the decoder only this
        shapes = {k: v for k, v in shapes.items() if "model.layers." not in k}
        del shapes["model.norm.weight"], shapes["lm_head.weight"]
    constants = LAYOUTS[layout].constants(cfg) if modules == ("connector",) else {}
    shapes |= {key: value.shape for key, value in constants.items()}
    assert shapes == {prefix + key: value.shape for key, value in weights.items()}


def _sample(cfg, ids, block, side):
    """A sample of golden tokens with one image in the slots of `block`, and its marks."""
    form = cfg.form
    picture = dict(name="square", side=side, mode="resize")
    show = Show(PictureConfig(strategy=(picture,), format=SHARED), form)
    blank = np.zeros((side, side, 3), np.uint8)
    seen = [show([blank], video=False, images=1)] if len(block) else []
    picture, entry = np.full(len(ids), -1, np.int32), np.zeros(len(ids), np.int32)
    if seen:
        picture[block], entry[block] = 0, seen[0].arrangement.entries
    encoded = Encoded(ids, np.full(len(ids), -100), picture >= 0, picture, entry)
    placement = place(seen, encoded, form) if seen else None
    items = tuple(item for s in seen for item in s.items)
    return Sample("x", ids.astype(np.int32), encoded.labels, items, picture >= 0, placement)


def _logits(cfg, params, sample, image=None):
    """f32[T, V] of a sample whose picture has these normalised pixels f32[3, h, w]."""
    generator = Generator(cfg, params)
    if image is None:
        return generator.logits(sample)
    batch, _, (n,) = generator.batch([sample], 1)
    side, patch = image.shape[1] // cfg.vision.patch, cfg.vision.patch
    cut = image.reshape(3, side, patch, side, patch).transpose(1, 3, 0, 2, 4)
    pixels = np.zeros(batch.patches[0].pixels.shape, np.float32)
    pixels[0, 1 : 1 + side**2] = cut.reshape(side**2, -1)
    batch = batch._replace(patches=(batch.patches[0]._replace(pixels=pixels),))
    return np.asarray(score(generator.graphdef, generator.params, batch)[0, :n])


def _close(got, want, meta):
    tolerance = meta["tolerance"]["rel_per_array"]["out/logits"]
    error = np.abs(got - want).max() / np.abs(want).max()
    print(f"logits differ by {error:.1e}, allowed are {tolerance:.1e}")
    assert error <= tolerance


def test_golden_cogvlm2(tmp_path):
    """The weights of the original code as a checkpoint: images, placement, logits."""
    z, meta = _golden("cogvlm2")
    c = dict(meta["config"])
    raw = {"architectures": ["CogVLMForCausalLM"], "vision_config": c.pop("vision"), **c}
    system = SimpleNamespace(raw=raw, parts={})
    out = models.write(system, tmp_path / "model", _weights(z))
    cfg, params = models.read(out)
    side = raw["vision_config"]["image_size"]
    got = np.zeros_like(z["out/logits"])
    for row, mask in enumerate(z["in/attention_mask"]):
        n = int(mask.sum())
        block = z["in/token_type_ids"][row, :n].nonzero()[0]
        sample = _sample(cfg, z["in/input_ids"][row, :n], block, side)
        if len(block):
            assert np.array_equal(sample.placement.positions, z["out/position_ids"][row, :n])
        image = z["in/images"][row] if len(block) else None
        got[row, :n] = _logits(cfg, params, sample, image)
    _close(got, z["out/logits"], meta)


def _chatglm(weights, layers):
    """The decoder of a golden file, in the layout of transformers, as ChatGLM fuses it."""
    for i in range(layers):
        before, after = f"llm.model.layers.{i}.", f"transformer.encoder.layers.{i}."
        for leaf in ("weight", "bias"):
            qkv = [weights[f"{before}self_attn.{x}_proj.{leaf}"] for x in "qkv"]
            yield f"{after}self_attention.query_key_value.{leaf}", np.concatenate(qkv)
        for theirs, ours in (
            ("self_attn.o_proj", "self_attention.dense"),
            ("mlp.gate_up_proj", "mlp.dense_h_to_4h"),
            ("mlp.down_proj", "mlp.dense_4h_to_h"),
            ("input_layernorm", "input_layernorm"),
            ("post_attention_layernorm", "post_attention_layernorm"),
        ):
            yield f"{after}{ours}.weight", weights[f"{before}{theirs}.weight"]
    for theirs, ours in (
        ("model.embed_tokens", "embedding.word_embeddings"),
        ("model.norm", "encoder.final_layernorm"),
        ("lm_head", "output_layer"),
    ):
        yield f"transformer.{ours}.weight", weights[f"llm.{theirs}.weight"]


def test_golden_glm4v(tmp_path):
    """The same for GLM-4V, whose golden decoder is fused first."""
    z, meta = _golden("glm4v")
    c, weights = meta["config"], _weights(z)
    found = {f"transformer.{k}": v for k, v in weights.items() if k.startswith("vision.")}
    found |= dict(_chatglm(weights, c["num_hidden_layers"]))
    vision = c["vision"]
    raw = SYSTEMS["glm4v"].raw | {
        "vision_config": vision,
        "ffn_hidden_size": c["ffn_hidden_size"],
        "hidden_size": c["hidden_size"],
        "kv_channels": c["head_dim"],
        "multi_query_group_num": c["num_key_value_heads"],
        "num_attention_heads": c["num_attention_heads"],
        "num_layers": c["num_hidden_layers"],
        "padded_vocab_size": c["vocab_size"],
        "rope_ratio": 1,
    }
    out = models.write(SimpleNamespace(raw=raw, parts={}), tmp_path / "model", found)
    cfg, params = models.read(out)
    got = np.zeros_like(z["out/logits"])
    for row, ids in enumerate(z["in/input_ids"]):
        start = int((ids == c["boi_token_id"]).argmax())
        number = got.shape[1] - len(ids) + 3  # the marks stand for so many
        ids = np.concatenate([ids[:start], np.zeros(number, ids.dtype), ids[start + 3 :]])
        sample = _sample(cfg, ids, start + np.arange(number), vision["image_size"])
        assert np.array_equal(sample.placement.positions, z["out/position_ids"][row])
        got[row] = _logits(cfg, params, sample, z["in/images"][row])
    _close(got, z["out/logits"], meta)
