"""Tiny checkpoints as the repositories of the systems save them, with their config.json."""

import json

import numpy as np
from original_systems import (
    CLIP_NAME,
    CLIP_SECTION,
    CONVNEXT,
    DINOV2,
    TIMM,
    TIMM_NAME,
    TOKENIZER,
)
from safetensors.numpy import save_file

from vlmjax import build, hf
from vlmjax.hf import llava_original, tower_config
from vlmjax.hf.systems import rows
from vlmjax.hf.table import store
from vlmjax.nn import unflatten


def small_towers(monkeypatch):
    """Gives the towers that are known by name sizes of the tests."""
    monkeypatch.setitem(llava_original.TOWERS, CLIP_NAME, CLIP_SECTION)
    small = {
        "siglip/CLIP-ViT-SO400M-14-384": (TIMM, 16),
        "facebook/dinov2-giant": (DINOV2, 24),
        "clip-convnext-XXL": (CONVNEXT, 64),
    }
    for name, row in small.items():
        monkeypatch.setitem(tower_config.NAMED, name, row)
    timm = dict(TIMM, layers=2, position="bicubic_antialias")
    monkeypatch.setitem(tower_config.TIMM, TIMM_NAME, timm)


def random_params(cfg, seed=0):
    """Returns {path: f32 array} of a model."""
    rng = np.random.default_rng(seed)
    _, shapes, _ = build.abstract(cfg)
    return {p: rng.normal(0, 0.1, x.shape).astype(np.float32) for p, x in shapes.items()}


def tensors(system, params, modules=None):
    """Returns {key: array} of the layout."""
    modules = modules or (*system.config.encoders, "connector", "llm")
    table = rows(system.config, system.layout, modules, system.kind)
    return store(table, unflatten(params))


def write(system, out, found):
    """Writes a directory; keys are split into the folders of VILA."""
    out.mkdir(exist_ok=True)
    (out / "config.json").write_text(json.dumps(system.raw))
    for folder, raw in (system.parts or {"": None}).items():
        (out / folder).mkdir(exist_ok=True)
        begin = f"{folder}." if folder else ""
        if raw is not None:
            (out / folder / "config.json").write_text(json.dumps(raw))
        inside = {k.removeprefix(begin): v for k, v in found.items() if k.startswith(begin)}
        save_file(inside, out / folder / "model.safetensors")
    TOKENIZER.save(out / "llm" if system.parts else out)
    return out


def read(out):
    """Returns (config, params by path) of a directory."""
    cfg = hf.read_config(out)
    return cfg, hf.load_params(out, cfg)
