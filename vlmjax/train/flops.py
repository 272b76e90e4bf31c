"""The true FLOP count of a multimodal batch, and MFU.

FLOPs are multiplies and adds (2 for each weight and vector) of real slots only, never of padding.
For towers that are ViTs and an MLP connector:

    vision   patches, class tokens and registers x 2 x weights
             +  4 x layers x heads x head size x sum over images or frames of n_i^2
    connector  visual tokens (after pruning) x 2 x weights
    llm      tokens x 2 x weights of the blocks
             +  2 x layers x heads x head size x sum over samples of n_i^2   (causal: half)
    head     supervised tokens x 2 x width x vocabulary

`costs` has the others. Each encoder counts for itself, under the name of its parameters. Blocks of
a connector between the layers of a decoder count to the decoder.

A token that an expert of the decoder serves goes through its weights instead of those it would go
through otherwise, which are as many: it is counted once, although both are computed for it (T
tokens of which the expert serves W cost the time of T + W).

Each part is counted as often as training needs it: once forward; once more when a gradient has to
pass through it, to something trained before it or inside it; and once more, weights only, when it
is trained. The first product of the first trained module needs no gradient of its input and counts
one less; no encoder comes before another. Attention has no weights and counts 3 or 1. What remat
recomputes is not counted. So a frozen decoder behind a trained connector counts 2, a frozen tower
in front 1, a trained module 3. MFU = FLOPs / (seconds x peak of all chips).
"""

import jax

from vlmjax.train import costs

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


def forward_flops(cfg, stats):
    """Returns {part: `costs.Cost`}, forward.

    Args:
      cfg: `VLMConfig`.
      stats: `data.pack.Stats`.
    """
    towers, m = list(cfg.encoders.items()), cfg.llm
    parts = {
        name: costs.tower(tower, stats.patches[i], stats.patch_pairs[i])
        for i, (name, tower) in enumerate(towers)
    }
    llm = costs.decoder(m, stats.tokens, stats.token_pairs)
    if towers:
        widths = [towers[e][1].out_width for e in cfg.form.encoders]
        read = stats.units, stats.features
        parts["connector"] = costs.connector(cfg.connector, widths, m.width, *read)
    if m.extra_num:
        extra = costs.sva_block(cfg.connector, m.width, stats.units[0])
        llm = costs.Cost(*(n + m.extra_num * more for n, more in zip(llm, extra, strict=True)))
    return parts | {"llm": llm, "head": costs.Cost(2 * stats.supervised * m.width * m.vocab)}


def train_flops(cfg, stats, trained):
    """Returns {part: FLOPs} of one training step.

    Args:
      cfg: `VLMConfig`.
      stats: `data.pack.Stats` of the batch.
      trained: the set of modules with a trained parameter: of the names of the encoders,
        "connector" and "llm".
    """
    flops, before = {}, False
    for part, (weights, first, attention) in forward_flops(cfg, stats).items():
        here = ("llm" if part == "head" else part) in trained
        upstream = before and part not in cfg.encoders
        through = upstream or here
        flops[part] = weights * (1 + through + here) + attention * (1 + 2 * through)
        flops[part] -= first * (here and not upstream)
        before = before or here
    return flops


def mfu(flops, seconds, devices=None):
    """Returns the share of peak FLOP/s used, or None on devices without a known peak."""
    peak = peak_flops(devices or jax.devices())
    return None if peak is None else flops / (seconds * peak)
