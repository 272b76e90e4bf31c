"""The block size of each kernel, chip and shape."""

# (device kind, head size, causal) -> block, by simulated cycles:
# python tests/benchmarks/attention_cycles.py --blocks
BLOCKS = {}
# Otherwise, by kind: (bidirectional, causal).
DEFAULTS = {
    "ref": (1, 1),
    "blockwise": (256, 512),
    "pallas_tpu": (256, 512),
    "pallas_gpu": (128, 128),
}


def best_block(kind, device_kind, size, causal):
    """Returns the block for heads of `size` channels on a device."""
    if kind == "pallas_tpu" and (device_kind, size, causal) in BLOCKS:
        return BLOCKS[device_kind, size, causal]
    return DEFAULTS[kind][causal]
