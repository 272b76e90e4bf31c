"""Towers against the classes of transformers: tiny random models, native and other sizes."""

import hf_reference
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from transformers.models.idefics2 import modeling_idefics2
from views import REF, error, features, pack, tower, view

from vlmjax.hf import towers
from vlmjax.vision.vit import PRESETS, ViTConfig

TOLERANCE = 2e-5
SIZES = dict(hidden_size=30, num_hidden_layers=2, num_attention_heads=5, patch_size=7)
MLP = dict(intermediate_size=44)
OURS = dict(width=30, mlp=44, layers=2, heads=5, patch=7, side=4)
IMAGE = dict(image_size=28)
RESIZED = dict(position="bicubic")


def reference(cls, config, directory):
    """A model in f32 under whose weights every term shows, and its tensors as it saves them."""
    model = hf_reference.randomise(cls(config))
    model.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    return model, {k.removeprefix("vision_model."): x for k, x in tensors.items()}


def images(*sizes):
    rng = np.random.default_rng(1)
    return [rng.normal(size=(3, *size)).astype(np.float32) for size in sizes]


def theirs(model, image, layer=None, **how):
    """The features of one image; of transformers' `hidden_states` where a layer is given."""
    with torch.no_grad():
        out = model(torch.tensor(image)[None], output_hidden_states=True, **how)
    return (out.last_hidden_state if layer is None else out.hidden_states[layer])[0].numpy()


def clip(preset, **config):
    config = transformers.CLIPVisionConfig(**SIZES, **MLP, **IMAGE, **config)
    return transformers.CLIPVisionModel, config, "clip", preset


def siglip(preset, **config):
    config = transformers.SiglipVisionConfig(**SIZES, **MLP, **IMAGE, **config)
    return transformers.SiglipVisionModel, config, "siglip", preset


def dinov2(preset, **config):
    registers = config.get("num_register_tokens") is not None
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    config = getattr(transformers, f"{kind}Config")(**SIZES, **IMAGE, **config)
    return getattr(transformers, f"{kind}Model"), config, "dinov2", preset


def internvl(preset, **config):
    config = transformers.InternVLVisionConfig(
        **SIZES, **MLP, image_size=[28, 28], layer_norm_eps=1e-6, **config
    )
    return transformers.InternVLVisionModel, config, "internvit_transformers", preset


# name -> (case, our further fields, those at another size or None, what to say to theirs there)
INTERPOLATE = dict(interpolate_pos_encoding=True)
CASES = {
    "clip": (clip("clip_l_14_336"), dict(features="-1"), RESIZED, INTERPOLATE),
    "clip -2": (clip("clip_l_14_336"), dict(features="-2"), RESIZED, INTERPOLATE),
    "dfn": (clip("dfn5b_h_14_378"), dict(features="-2"), None, {}),
    "siglip": (siglip("siglip_so400m_14_384"), {}, RESIZED, INTERPOLATE),
    "siglip erf -2": (
        siglip("siglip_so400m_14_384", hidden_act="gelu"),
        dict(features="-2", act="gelu"),
        RESIZED,
        INTERPOLATE,
    ),
    "dinov2": (dinov2("dinov2_l_14", mlp_ratio=2), dict(mlp=60), {}, {}),
    "dinov2 registers": (
        dinov2("dinov2_l_14_reg4", mlp_ratio=2, num_register_tokens=4),
        dict(mlp=60),
        {},
        {},
    ),
    "dinov2 registers swiglu": (
        dinov2("dinov2_g_14", mlp_ratio=2, num_register_tokens=2, use_swiglu_ffn=True),
        dict(mlp=40, prefix=3, position="bicubic_antialias"),
        {},
        {},
    ),
    "internvit 6b": (
        internvl("internvit_6b_v1_5", norm_type="rms_norm", use_qk_norm=True),
        {},
        RESIZED,
        {},
    ),
    "internvit 300m": (internvl("internvit_300m", attention_bias=True), {}, RESIZED, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_tower(name, tmp_path):
    (cls, config, layout, preset), ours, resized, how = CASES[name]
    model, tensors = reference(cls, config, tmp_path)
    cfg = ViTConfig(**PRESETS[preset] | OURS | ours)
    layer = None if cfg.features == "last" else int(cfg.features)
    read = {key for row in towers.rows(cfg, layout) for key in row.keys}
    assert not [k for k in tensors if k not in read and not towers.unused(cfg, layout, k)]
    native = images((28, 28), (28, 28))
    errors = {
        i: error(x, theirs(model, image, layer))
        for i, (x, image) in enumerate(
            zip(features(tower(cfg, layout, tensors), native), native, strict=True)
        )
    }
    if resized is not None:
        cfg = ViTConfig(**PRESETS[preset] | OURS | ours | resized)
        others = images((21, 42), (56, 14))  # one above and one below the table on each axis
        errors |= {
            image.shape: error(x, theirs(model, image, layer, **how))
            for x, image in zip(features(tower(cfg, layout, tensors), others), others, strict=True)
        }
    assert max(errors.values()) < TOLERANCE, errors


def test_navit_buckets(tmp_path):
    """Idefics2: whole rows of the table for views of any size, images padded to the largest."""
    side = 8
    config = modeling_idefics2.Idefics2VisionConfig(**SIZES, **MLP, image_size=7 * side)
    model, tensors = reference(modeling_idefics2.Idefics2VisionTransformer, config, tmp_path)
    cfg = ViTConfig(**PRESETS["siglip_navit"] | OURS | dict(side=side))
    grids, views, wanted = ((5, 3), (8, 8), (2, 6)), [], []
    for grid, image in zip(grids, images(*((7 * h, 7 * w) for h, w in grids)), strict=True):
        pixels, _ = view(cfg, image)
        bucket = [np.arange(n) * side // n for n in grid]
        coords = np.stack(np.meshgrid(*bucket, indexing="ij"), -1).reshape(-1, 2)
        views.append((pixels, coords.astype(np.float32)))
        mask = torch.ones((1, *grid), dtype=torch.bool)
        wanted.append(theirs(model, image, patch_attention_mask=mask))
    out = tower(cfg, "siglip", tensors)(pack(views, 3), attention=REF)[0]
    ends = np.cumsum([len(x) for x in wanted])
    errors = [error(x, y) for x, y in zip(np.split(out, ends), wanted, strict=False)]
    assert max(errors) < TOLERANCE, errors
