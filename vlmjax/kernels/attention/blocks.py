"""The block size of each kernel, chosen by what pairs of blocks cost on the chip."""

import json
from importlib.resources import files

# {device kind: {"128 causal": {block: [forward, backward]}}}: cycles of the chip for a pair of
# blocks and a head of 128 channels, simulated by
# python tests/benchmarks/attention_cycles.py --table
TABLE = json.loads((files("vlmjax.kernels.attention") / "blocks.json").read_text())
# Elsewhere, by kind: (bidirectional, causal).
DEFAULTS = {
    "ref": (1, 1),
    "blockwise": (256, 512),
    "pallas_tpu": (256, 512),
    "pallas_gpu": (128, 128),
}


def pair_cycles(device_kind, size, causal):
    """Returns {block: (forward, backward)} of the simulated head size next to `size`, or {}."""
    sizes = {
        int(name.split()[0]): known
        for name, known in TABLE.get(device_kind, {}).items()
        if causal == name.endswith("causal")
    }
    nearest = min(sizes, key=lambda x: abs(x - size), default=None)
    return {int(block): tuple(x) for block, x in sizes.get(nearest, {}).items()}


def best_block(kind, device_kind, size, causal, segment):
    """Returns the block for heads of `size` channels and segments of about `segment` slots.

    A slot of a segment meets on average the keys of its segment and of one block more: small blocks
    for short segments, large ones, which fill the matrix units, for long segments.
    """
    known = pair_cycles(device_kind, size, causal) if kind == "pallas_tpu" else {}
    if not known:
        return DEFAULTS[kind][causal]
    return min(known, key=lambda b: sum(known[b]) * ((segment or 65536) + b) / b**2)
