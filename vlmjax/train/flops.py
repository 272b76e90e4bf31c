"""The true FLOP count of a multimodal batch, and MFU.

FLOPs are multiplies and adds (2 for each weight and token) of real slots only, never of padding:

    vision   patches x 2 x weights
             +  4 x layers x heads x head size x sum over images or frames of n_i^2
    connector  visual tokens (after pruning) x 2 x weights
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

import jax

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
    """Returns {part: (FLOPs of products with weights, of the first, of attention)}, forward.

    Args:
      cfg: `VLMConfig`.
      stats: `data.pack.Stats`.
    """
    v, m = cfg.vision, cfg.llm
    block = m.width * m.head_dim * (2 * m.heads + 2 * m.kv_heads) + 3 * m.width * m.mlp
    causal = 2 * m.layers * m.heads * m.head_dim * stats.token_pairs
    decoder = {
        "llm": (2 * stats.tokens * m.layers * block, 0, causal),
        "head": (2 * stats.supervised * m.width * m.vocab, 0, 0),
    }
    if v is None:
        return decoder
    patch, vit = v.patch_dim * v.width, v.layers * (4 * v.width**2 + 2 * v.width * v.mlp)
    first, others = v.width * m.width, (cfg.connector.layers - 1) * m.width**2
    patches, visual = 2 * stats.patches[0], 2 * stats.visual
    tower = (
        patches * (patch + vit),
        patches * patch,
        4 * v.layers * v.width * stats.patch_pairs[0],
    )
    return {
        "vision": tower,
        "connector": (visual * (first + others), visual * first, 0),
    } | decoder


def train_flops(cfg, stats, trained):
    """Returns {part: FLOPs} of one training step.

    Args:
      cfg: `VLMConfig`.
      stats: `data.pack.Stats` of the batch.
      trained: the set of modules with a trained parameter, of {"vision", "connector", "llm"}.
    """
    flops, upstream = {}, False
    for part, (weights, first, attention) in forward_flops(cfg, stats).items():
        here = ("llm" if part == "head" else part) in trained
        through = upstream or here
        flops[part] = weights * (1 + through + here) + attention * (1 + 2 * through)
        flops[part] -= first * (here and not upstream)
        upstream = through
    return flops


def mfu(flops, seconds, devices=None):
    """Returns the share of peak FLOP/s used, or None on devices without a known peak."""
    peak = peak_flops(devices or jax.devices())
    return None if peak is None else flops / (seconds * peak)
