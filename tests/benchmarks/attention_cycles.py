"""Simulated cycles of the TPU attention kernels, with no TPU: libtpu's own cycle simulator.

    python tests/benchmarks/attention_cycles.py                    our kernels, JSON lines
    python tests/benchmarks/attention_cycles.py --rivals           and splash attention
    python tests/benchmarks/attention_cycles.py --blocks           other block sizes too
    python tests/benchmarks/attention_cycles.py --table            kernels/attention/blocks.json

Rows of 16,384 slots in bfloat16: `vision` is 64 frames of 256 patches, 16 heads of 72, one layer;
`decoder` 16 samples of 1,024 tokens, causal, 12 query and 2 key-value heads of 128, `decoder_7b` 28
and 4. The simulator reads run-time scalars as 0, so a list of block pairs made on the device would
look empty: here the same kernels get the list as a closed form of the position in it, and
`at_peak` (matrix FLOPs of the listed pairs at peak rate, over the simulated time) shows that it was
not. Splash is simulated on a whole square of 4,096 slots, which needs no list, and counted for the
block pairs that its causal mask leaves of the row. The table, from which blocks are chosen, is of
rows of 4,096 slots: `image` (segments of 1,024 patches) and `decoder`.
"""

import argparse
import json
import re
from pathlib import Path

from vlmjax.aot.simulate import simulated_cycles

SLOTS = 16384
SHORT = 4096  # slots of splash's square, and of a row of the table
# name: (heads, kv heads, head size, causal, segment)
CASES = {
    "vision": (16, 16, 72, False, 256),
    "image": (16, 16, 72, False, 1024),
    "decoder": (12, 2, 128, True, 1024),
    "decoder_7b": (28, 4, 128, True, 1024),
}
# chip: (topology, clock in Hz, peak in FLOP/s, HBM in bytes/s)
CHIPS = {
    "v5e": ("v5e:2x2", 1.5e9, 197e12, 819e9),
    "v5p": ("v5p:2x2x1", 1.75e9, 459e12, 2765e9),
    "v6e": ("v6e:2x2", 1.75e9, 918e12, 1640e9),
}
BEST = {"vision": 256, "image": 256, "decoder": 512, "decoder_7b": 512}
TABLE = Path(__file__).parents[2] / "vlmjax/kernels/attention/blocks.json"
TABLED = {"image": "72", "decoder": "128 causal"}
BLOCKS = (256, 512)
KERNELS = {
    "forward": "segment_attention_forward.1",
    "backward": "segment_attention_backward.1",
    "splash": "splash_mqa_fwd_segmented_no_residuals.1",
}


def listing(slots, segment, block, causal, by_key):
    """Returns (function position -> entry, length) of the list for equal segments."""
    import jax.numpy as jnp

    from vlmjax.kernels.attention import worklist as kernel

    r = max(segment // block, 1)
    pairs = [
        (a, b) for a in range(r) for b in range(r) if not causal or (a <= b if by_key else a >= b)
    ]
    entries = []
    for k, (outer, inner) in enumerate(pairs):
        query, key = (inner, outer) if by_key else (outer, inner)
        flags = kernel.WORK
        flags |= kernel.FIRST * (k == 0 or pairs[k - 1][0] != outer)
        flags |= kernel.LAST * (k + 1 == len(pairs) or pairs[k + 1][0] != outer)
        flags |= kernel.NEW * all(inner != b for _, b in pairs[:k])
        entries.append(query + (key << kernel.BITS) + flags)

    def entry(p):
        within = p % len(pairs)
        chosen = sum(jnp.where(within == k, e, 0) for k, e in enumerate(entries))
        if len(pairs) == 1:
            chosen = entries[0]
        return jnp.int32(chosen + p // len(pairs) * r * ((1 << kernel.BITS) + 1))

    return entry, slots // max(segment, block) * len(pairs)


def ours(case, block, direction, cores, slots):
    """Returns (function to compile, the shapes of its arguments)."""
    import jax
    import jax.numpy as jnp

    from vlmjax.kernels.attention import pallas_tpu as kernel
    from vlmjax.kernels.attention import worklist
    from vlmjax.kernels.attention.api import AttentionSpec

    heads, kv_heads, size, causal, segment = CASES[case]
    entry, length = listing(slots, segment, block, causal, direction == "backward")
    work = worklist.Work(entry, tuple(length * c // cores for c in range(cores + 1)))
    spec = AttentionSpec("pallas_tpu", block, segment)

    def run(q, k, v, g, segments, angles):
        turns = ((jnp.cos(angles), jnp.sin(angles)),) * 2
        met = jnp.ones((1, cores, slots // block), bool)
        plan = worklist.Plan(segments, segments, jnp.zeros(1, jnp.int32), work, work, met)
        if direction == "forward":
            return kernel._forward(q, k, v, plan, turns, spec, causal)[0]
        step = kernel._heads(heads, kv_heads, size)
        lse = jnp.zeros((kv_heads // step[1], step[0], 1, slots))
        out = g.reshape(1, -1, slots)
        return kernel._backward(spec, causal, (q, k, v, plan, turns, out, lse), g)[:3]

    wide, narrow = ((1, slots, n, size) for n in (heads, kv_heads))
    arguments = [(x, jnp.bfloat16) for x in (wide, narrow, narrow, wide)]
    return run, [
        *(jax.ShapeDtypeStruct(*x) for x in arguments),
        jax.ShapeDtypeStruct((1, slots), jnp.int32),
        jax.ShapeDtypeStruct((1, size // 2, slots), jnp.float32),
    ]


def splash(case, block):
    """Returns the same of jax's splash attention, forward, on the whole square."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        BlockSizes,
        FullMask,
        MultiHeadMask,
        SegmentIds,
        make_splash_mqa_single_device,
    )

    heads, kv_heads, size, _, _ = CASES[case]
    group = heads // kv_heads
    sizes = BlockSizes(block_q=block, block_kv=block, block_kv_compute=min(block, 512))
    slots = SHORT
    mask = MultiHeadMask([FullMask((slots, slots))] * group)
    kernel = make_splash_mqa_single_device(mask, block_sizes=sizes)
    # Without lists of blocks it visits every one, and has no scalars that a simulator cannot read.
    every = kernel.fwd_mask_info._replace(data_next=None, mask_next=None, block_mask=None)
    kernel = type(kernel)(every, None, None, **kernel.kwargs)

    def run(q, k, v, segments):
        return jax.vmap(kernel, in_axes=(0, 0, 0, None))(q, k, v, SegmentIds(segments, segments))

    q = jax.ShapeDtypeStruct((kv_heads, group, slots, size), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((kv_heads, slots, size), jnp.bfloat16)
    return run, [q, k, k, jax.ShapeDtypeStruct((slots,), jnp.int32)]


def compile_one(chip, case, block, direction, slots):
    """Compiles one kernel, in a process that libtpu was told to simulate it in."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    device = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip][0]).devices[0]
    mesh = Mesh(np.array([device]), ("x",), axis_types=(AxisType.Auto,))
    if direction == "splash":
        run, shapes = splash(case, block)
    else:
        run, shapes = ours(case, block, direction, device.num_cores, slots)
    with jax.set_mesh(mesh):
        where = NamedSharding(mesh, PartitionSpec())
        jax.jit(run, in_shardings=where).lower(*shapes).compile()


def report(chip, case, block, direction, slots=SLOTS):
    """Returns the JSON line of one kernel."""
    heads, _, size, causal, segment = CASES[case]
    _, clock, peak, hbm = CHIPS[chip]
    arguments = ("--one", chip, case, str(block), direction, str(slots))
    cycles = simulated_cycles(__file__, [KERNELS[direction]], *arguments)[KERNELS[direction]]
    if direction == "splash":  # the block pairs that a causal mask leaves of the square
        n = SLOTS // block
        pairs, products = n * (n + 1) // 2 if causal else n * n, 2
        cycles = cycles * pairs // (SHORT // block) ** 2
    else:
        pairs, products = (
            listing(slots, segment, block, causal, False)[1],
            2 if direction == "forward" else 5,
        )
    line = dict(chip=chip, case=case, block=block, kernel=direction, cycles=cycles)
    seconds, flops = cycles / clock, pairs * block**2 * heads * size * 2 * products
    line |= dict(ms=round(seconds * 1e3, 3), at_peak=round(flops / peak / seconds, 3))
    if direction != "splash":
        line["pair_cycles"] = round(cycles / pairs / heads, 1)
    return line


def table(chips):
    """Writes the cycles of a pair of blocks and a head of the chips into `TABLE`."""
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    found = json.loads(TABLE.read_text())
    for chip in chips:
        kind = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip][0]).devices[0]
        rows = found[kind.device_kind] = {}
        for case, name in TABLED.items():
            for block in BLOCKS:
                lines = [report(chip, case, block, d, SHORT) for d in ("forward", "backward")]
                print(json.dumps(lines), flush=True)
                rows.setdefault(name, {})[str(block)] = [line["pair_cycles"] for line in lines]
        text = json.dumps(found, indent=1)
        TABLE.write_text(re.sub(r"\[\s+([\d.]+),\s+([\d.]+)\s+\]", r"[\1, \2]", text) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chips", nargs="*", default=list(CHIPS))
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--rivals", action="store_true")
    parser.add_argument("--blocks", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--one", nargs=5)
    args = parser.parse_args()
    if args.one:
        chip, case, block, direction, slots = args.one
        return compile_one(chip, case, int(block), direction, int(slots))
    if args.table:
        return table(args.chips)
    for chip in args.chips:
        for case in args.cases:
            for block in BLOCKS if args.blocks else (BEST[case],):
                for direction in ("forward", "backward"):
                    line = report(chip, case, block, direction)
                    print(json.dumps(line), flush=True)
            if args.rivals and case != "vision":
                print(json.dumps(report(chip, case, 1024, "splash")), flush=True)
    return None


if __name__ == "__main__":
    main()
