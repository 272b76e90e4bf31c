"""The true FLOP count of a multimodal batch, and MFU.

FLOPs are multiplies and adds (2 for each weight and token) of real slots only, never of padding:

    vision   patches x 2 x weights
             +  4 x layers x heads x head size x sum over images or frames of n_i^2
             the stages of a ConvNeXt have a quarter of the patches of the stage before
    connector  visual tokens (after pruning, before pooling) x 2 x weights
             what a connector of whole maps does to patches rather than tokens is left out
    llm      tokens x 2 x weights of the blocks
             +  2 x layers x heads x head size x sum over samples of n_i^2   (causal: half)
    head     supervised tokens x 2 x width x vocabulary

A token that an expert of the decoder serves goes through its weights instead of those it would go
through otherwise, which are as many: it is counted once, although both are computed for it.

Each part is counted as often as training needs it: once forward; once more when a gradient has to
pass through it, to something trained before it or inside it; and once more, weights only, when it
is trained. The first product of the first trained module needs no gradient of its input and counts
one less. Attention has no weights and counts 3 or 1. What remat recomputes is not counted. So a
frozen decoder behind a trained connector counts 2, a frozen tower in front 1, a trained module 3.
MFU = FLOPs / (seconds x peak of all chips).
"""

import functools
import re

import jax

from vlmjax import build

PEAK = {  # dense bf16 FLOP/s of a chip, from the vendors' data sheets
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(devices):
    """Returns the peak of all devices together in FLOP/s; None if one is not in `PEAK` (a CPU)."""
    peaks = [
        next((v for k, v in PEAK.items() if d.device_kind.startswith(k)), None) for d in devices
    ]
    return None if None in peaks else sum(peaks)


@functools.lru_cache(maxsize=64)
def kernels(cfg):
    """Returns {path: entries} of the weights of products in a `VLMConfig`'s model."""
    shapes = build.abstract(cfg)[1]
    return {path: x.size for path, x in shapes.items() if path.endswith("/kernel")}


def _weights(cfg, module):
    """Entries of the kernels under `module/`; those of the k-th stage of a ConvNeXt over 4^k."""
    found = ((p, n) for p, n in kernels(cfg).items() if p.startswith(f"{module}/"))
    stages = ((re.match(r"\w+/stage_(\d+)/", path), number) for path, number in found)
    return sum(number / 4 ** (int(stage[1]) if stage else 0) for stage, number in stages)


def _tower(cfg, name, tower, patches, pairs):
    """Returns what `forward_flops` does for an encoder."""
    if not hasattr(tower, "heads"):
        return 2 * patches * _weights(cfg, name), 0, 0
    first = 2 * patches * tower.patch_dim * tower.width
    attention = 4 * tower.blocks * tower.width * pairs
    return 2 * patches * _weights(cfg, name), first, attention


def forward_flops(cfg, stats):
    """Returns {part: (FLOPs of products with weights, of the first, of attention)}, forward.

    Args:
      cfg: `VLMConfig`.
      stats: `data.pack.Stats`.
    """
    m = cfg.llm
    block = m.width * m.head_dim * (2 * m.heads + 2 * m.kv_heads) + 3 * m.width * m.mlp
    causal = 2 * m.layers * m.heads * m.head_dim * stats.token_pairs
    extra = stats.routed * _weights(cfg, "llm/extra")
    decoder = {
        "llm": (2 * (stats.tokens * m.layers * block + extra), 0, causal),
        "head": (2 * stats.supervised * m.width * m.vocab, 0, 0),
    }
    if cfg.vision is None:
        return decoder
    parts = {
        name: _tower(cfg, name, tower, patches, pairs)
        for (name, tower), patches, pairs in zip(
            cfg.encoders.items(), stats.patches, stats.patch_pairs, strict=True
        )
    }
    tokens = sum(n * stats.units[sources[0]] for sources, n in cfg.form.groups)
    first = kernels(cfg).get("connector/dense_0/kernel", 0)
    parts["connector"] = (2 * tokens * _weights(cfg, "connector"), 2 * tokens * first, 0)
    return parts | decoder


def train_flops(cfg, stats, trained):
    """Returns {part: FLOPs} of one training step.

    Args:
      cfg: `VLMConfig`.
      stats: `data.pack.Stats` of the batch.
      trained: the set of modules with a trained parameter: encoders, "connector", "llm".
    """
    flops, upstream = {}, False
    for part, (weights, first, attention) in forward_flops(cfg, stats).items():
        here = ("llm" if part == "head" else part) in trained
        before = upstream and part not in cfg.encoders  # encoders stand side by side
        through = before or here
        flops[part] = weights * (1 + through + here) + attention * (1 + 2 * through)
        flops[part] -= first * (here and not before)
        upstream = upstream or here
    return flops


def mfu(flops, seconds, devices=None):
    """Returns the share of peak FLOP/s used, or None on devices without a known peak."""
    peak = peak_flops(devices or jax.devices())
    return None if peak is None else flops / (seconds * peak)
