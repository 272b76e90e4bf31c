"""Towers against golden files: the original code's outputs for its random weights.

Images of a file are packed into one row, with padding behind them.
"""

import dataclasses

import jax
import numpy as np
import pytest
from views import error, features, golden, pack, tower, view, weights

from vlmjax.hf import towers
from vlmjax.hf.table import load, store
from vlmjax.vision.convnext import ConvNeXtConfig
from vlmjax.vision.vit import PRESETS, ViTConfig


def config(preset, meta, **changes):
    """The fields of a preset with the sizes of a file."""
    names = dict(
        width=("hidden_size",),
        mlp=("intermediate_size", "swiglu_hidden"),
        layers=("num_hidden_layers",),
        heads=("num_attention_heads", "num_heads"),
        patch=("patch_size",),
        eps=("layer_norm_eps",),
    )
    sizes = {
        field: next(meta[name] for name in known if name in meta)
        for field, known in names.items()
        if any(name in meta for name in known)
    }
    sizes["side"] = meta["image_size"] // meta["patch_size"]
    return ViTConfig(**PRESETS[preset] | sizes | changes)


def check(meta, z, found):
    """Asserts that arrays by name are those of the file."""
    rel = meta["tolerance"]["rel"]
    most = {
        k.removeprefix("out/"): v for k, v in meta["tolerance"].get("rel_per_array", {}).items()
    }
    errors = {name: error(ours, z[f"out/{name}"]) for name, ours in found.items()}
    assert all(e <= most.get(name, rel) for name, e in errors.items()), errors


def ran(cfg, layout, z, images, prefix=""):
    return np.stack(features(tower(cfg, layout, weights(z, prefix)), z[f"in/{images}"], padding=5))


def test_clip():
    z, meta = golden("tower_clip")
    cfg = config("clip_l_14_336", meta["config"])
    found = {
        f"hidden_states_m{-i}": ran(
            dataclasses.replace(cfg, features=str(i)), "clip", z, "images", "vision_model."
        )
        for i in (-1, -2)
    }
    found["pooled"] = ran(cfg, "clip", z, "images", "vision_model.")[:, 0]
    check(meta, z, found)


def test_siglip():
    z, meta = golden("tower_siglip")
    cfg = config("siglip_so400m_14_384", meta["config"])
    before = dataclasses.replace(cfg, features="-2")
    found = {
        name: ran(c, "siglip", z, "images", "vision_model.")
        for name, c in {
            "last_hidden_state": cfg,
            "last_hidden_state_erf": dataclasses.replace(cfg, act="gelu"),
            "hidden_states_m2": before,
        }.items()
    }
    check(meta, z, found)


@pytest.mark.parametrize(
    "kind,changes",
    [("swiglu", {}), ("mlp", dict(mlp=60, gated=False, act="gelu"))],
)
def test_dinov2(kind, changes):
    z, meta = golden("tower_dinov2")
    cfg = config("dinov2_g_14", meta["config"], **changes)
    check(
        meta,
        z,
        {
            f"{kind}_native": ran(cfg, "dinov2", z, "images", f"{kind}."),
            f"{kind}_resized": ran(cfg, "dinov2", z, "images_resized", f"{kind}."),
        },
    )


@pytest.mark.parametrize(
    "name,preset", [("internvit_rms", "internvit_6b_v1_5"), ("internvit_ln", "internvit_300m")]
)
def test_internvit(name, preset):
    z, meta = golden(name)
    cfg = config(preset, meta["config"])
    resized = dataclasses.replace(cfg, position="bicubic")
    before = dataclasses.replace(cfg, features="-2")
    check(
        meta,
        z,
        {
            "last_hidden_state": ran(cfg, "internvit", z, "pixels"),
            "hidden_states_m2": ran(before, "internvit", z, "pixels"),
            "last_hidden_state_resized": ran(resized, "internvit", z, "pixels_resized"),
        },
    )


def test_internvit_of_internvl_1_0():
    z, meta = golden("qllama")
    cfg = config("internvit_6b_v1_0", meta["config"]["vision"])
    check(meta, z, {"vit": ran(cfg, "internvit", z, "pixels", "vision_model.")})


def test_eva2_of_cogvlm2():
    z, meta = golden("cogvlm2")
    cfg = config("eva2_clip_e", meta["config"]["vision"])
    check(meta, z, {"vision_hidden": ran(cfg, "eva2", z, "images", "model.vision.")})


def test_eva2_of_glm4v():
    """Through its adapter, written out here: the file holds nothing in between."""
    z, meta = golden("glm4v")
    cfg = config("eva2_clip_e", meta["config"]["vision"])
    w = weights(z, "vision.")
    x = ran(cfg, "eva2", z, "images", "vision.")[:, 1:].astype(np.float64)
    h, eps = cfg.side // 2, meta["config"]["adapter_norm_eps"]
    windows = x.reshape(2, h, 2, h, 2, -1)
    x = np.einsum("bipjqc,dcpq->bijd", windows, w["conv.weight"]).reshape(2, h * h, -1)
    x = (x + w["conv.bias"]) @ w["linear_proj.linear_proj.weight"].T
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    x = x * w["linear_proj.norm1.weight"] + w["linear_proj.norm1.bias"]
    x = np.asarray(jax.nn.gelu(x.astype(np.float32), approximate=False))
    gate, up = (x @ w[f"linear_proj.{n}.weight"].T for n in ("gate_proj", "dense_h_to_4h"))
    x = (np.asarray(jax.nn.silu(gate)) * up) @ w["linear_proj.dense_4h_to_h.weight"].T
    check(
        meta,
        {"out/image_features": z["out/image_features"][:, 1:-1]},
        {"image_features": x / meta["config"]["vision"]["scaling_factor"]},
    )


def test_convnext():
    z, meta = golden("convnext")
    c, images = meta["config"], z["in/images"]
    cfg = ConvNeXtConfig(
        widths=tuple(c["dims"]),
        depths=tuple(c["depths"]),
        rows=images.shape[2] // c["stem_patch"],
        columns=images.shape[3] // c["stem_patch"],
        grid=c["multi_stage_grid"],
        eps=c["norm_eps"],
    )
    model = tower(cfg, "convnext", weights(z))
    patches = pack([view(cfg, image) for image in images])
    stages = jax.jit(lambda m, p: m.stages(p))(model, patches)
    found = {f"stage_{i}": x[0].transpose(0, 3, 1, 2) for i, x in enumerate(stages)}
    whole = jax.jit(lambda m, p: m(p))(model, patches)
    found["multi_stage"] = whole.reshape(len(images), c["multi_stage_grid"] ** 2, -1)
    check(meta, z, found)


STORED = {  # of the tower of a file: what is not loaded
    ("tower_clip", "clip_l_14_336", "clip", "vision_model."): set(),
    ("tower_siglip", "siglip_so400m_14_384", "siglip", "vision_model."): {"head"},
    ("tower_dinov2", "dinov2_g_14", "dinov2", "swiglu."): set(),
    ("internvit_rms", "internvit_6b_v1_5", "internvit", ""): set(),
    ("internvit_ln", "internvit_300m", "internvit", ""): set(),
    ("cogvlm2", "eva2_clip_e", "eva2", "model.vision."): {"linear_proj", "conv", "boi", "eoi"},
}


@pytest.mark.parametrize("case", STORED, ids=lambda case: case[0])
def test_tables_read_and_write_the_same_tensors(case):
    """Fused tensors included; nothing of a tower is left over."""
    name, preset, layout, prefix = case
    z, meta = golden(name)
    cfg = config(preset, meta["config"].get("vision", meta["config"]))
    tensors, table = weights(z, prefix), towers.rows(cfg, layout)
    assert all(tensors[key].shape == row.stored_shape for row in table for key in row.keys)
    back = store(table, load(table, tensors))
    assert {key.split(".")[0] for key in tensors.keys() - back.keys()} == STORED[case]
    for key, x in back.items():
        np.testing.assert_array_equal(x, tensors[key])
