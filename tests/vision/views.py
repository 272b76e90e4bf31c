"""Images cut and packed for a tower, and towers with the weights of somebody else."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vlmjax.batch import Patches
from vlmjax.hf import towers
from vlmjax.hf.table import load
from vlmjax.kernels.attention.api import AttentionSpec
from vlmjax.nn import bind, unbind
from vlmjax.vision.convnext import ConvNeXt, ConvNeXtConfig
from vlmjax.vision.vit import ViT

GOLDENS = Path(os.environ.get("VLMJAX_GOLDENS", Path(__file__).parents[1] / "goldens"))
REF = AttentionSpec("ref")


def golden(name):
    """Returns (arrays, meta) of a golden file."""
    z = np.load(GOLDENS / f"{name}.npz")
    return z, json.loads(str(z["meta"]))


def weights(z, prefix=""):
    """Returns {key behind the prefix: array}."""
    start = f"w/{prefix}"
    return {k.removeprefix(start): z[k] for k in z.files if k.startswith(start)}


def tower(cfg, layout, tensors, prefix=""):
    """Returns the tower of a configuration with weights by key."""
    make, made = ConvNeXt if isinstance(cfg, ConvNeXtConfig) else ViT, {}

    def shapes():
        made["graphdef"], params = unbind(make(cfg, rngs=nnx.Rngs(0)))
        return params

    jax.eval_shape(shapes)
    params = load(towers.rows(cfg, layout, prefix), tensors)["vision"]
    return bind(made["graphdef"], jax.tree.map(jnp.asarray, params))


def cut(image, patch):
    """Returns (rows [h * w, C * p * p], (h, w)) of an image [C, H, W]; what does not fit is cut."""
    C, H, W = image.shape
    h, w = H // patch, W // patch
    x = image[:, : h * patch, : w * patch].reshape(C, h, patch, w, patch)
    return x.transpose(1, 3, 0, 2, 4).reshape(h * w, -1), (h, w)


def view(cfg, image):
    """Returns (pixels, coords) of the slots of one view, prefix in front."""
    rows, (h, w) = cut(image, cfg.patch)
    prefix = getattr(cfg, "prefix", 0)
    coords = np.stack(np.mgrid[:h, :w], -1).reshape(-1, 2).astype(np.float32)
    if getattr(cfg, "position", "").startswith("bicubic"):
        coords = (coords + 0.5) * cfg.side / np.array([h, w], np.float32) - 0.5
    front = np.stack([-1 - np.arange(prefix), np.zeros(prefix)], -1)
    pixels = np.concatenate([np.full((prefix, rows.shape[1]), 7, rows.dtype), rows])
    return pixels, np.concatenate([front, coords]).astype(np.float32)


def pack(views, padding=0):
    """Returns `Patches` of one row: views in order, then padding of arbitrary content."""
    sizes = [len(pixels) for pixels, _ in views]
    pixels, coords = (np.concatenate(x) for x in zip(*views, strict=True))
    segments = np.concatenate([np.repeat(np.arange(len(sizes)) + 1, sizes), np.zeros(padding)])
    pixels = np.concatenate([pixels, np.full((padding, pixels.shape[1]), 3, pixels.dtype)])
    coords = np.concatenate([coords, np.full((padding, 2), 1, coords.dtype)])
    return Patches(pixels[None], segments[None].astype(np.int32), coords[None])


def features(model, images, padding=0):
    """Returns what leaves the tower, an array [slots, D] for each image."""
    views = [view(model.cfg, image) for image in images]
    out = jax.jit(lambda m, p: m(p, attention=REF))(model, pack(views, padding))[0]
    ends = np.cumsum([len(pixels) for pixels, _ in views])
    return np.split(np.asarray(out), [*ends])[: len(views)]


def error(ours, theirs):
    """Returns the largest difference, relative to the largest value."""
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())
