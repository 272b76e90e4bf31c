"""DiffFP on the device: the Pallas kernel against what XLA makes of `ref`, without a TPU.

python tests/benchmarks/diff_prune.py [--shape 90,576,588] [--chips v5e,v6e]

Both are compiled for each chip by libtpu, and its cycle simulator runs the one operation that reads
the frames, in a process of its own because the simulator may abort it (a minute or more each, and
about 10 GB for 180 frames). It refuses a block that sticks out, so the kernel runs on patches
rounded up to whole blocks: its cycles are an upper bound. It also refuses the two cores of a v5p.
Prints JSON lines; `bytes` is what the compiler counts as accessed by the whole of `api.prune`.
"""

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

OPERATION = {"ref": "convert_reduce_fusion", "pallas_tpu": "diff_prune.1"}
TOPOLOGY = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def compile_one(chip, kind, shape):
    """Compiles in this process; returns the bytes accessed."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    from vlmjax.aot.topology import Topology
    from vlmjax.kernels.diff_prune import api

    mesh = jax.sharding.Mesh(Topology(TOPOLOGY[chip]).devices[:1], ("x",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    frames = jax.ShapeDtypeStruct(shape, "uint8", sharding=whole)
    with jax.set_mesh(mesh):
        prune = jax.jit(functools.partial(api.prune, merge=2, kind=kind))
        return prune.lower(frames).compile().cost_analysis()["bytes accessed"]


def simulated_cycles(chip, kind, shape):
    """Returns the cycles of the operation that reads the frames; None if the simulator aborts."""
    with tempfile.TemporaryDirectory() as folder:
        dump = f"--xla_jf_dump_static_llo_profile_to={folder}"
        only = f"--xla_jf_dump_only_matching_hlo={OPERATION[kind]}"
        flags = ["--chips", chip, "--kind", kind, "--shape", ",".join(map(str, shape))]
        environment = os.environ | {"LIBTPU_INIT_ARGS": f"{dump} {only}"}
        subprocess.run([sys.executable, __file__, *flags], env=environment, capture_output=True)
        text = "".join(file.read_text() for file in Path(folder).iterdir())
    found = re.search(r"estimated_cycles: (\d+)", text)
    return int(found[1]) if found else None


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="90,576,588", help="frames, patches, values of a patch")
    parser.add_argument("--chips", default="v5e,v6e")
    parser.add_argument("--kind", choices=OPERATION, help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape = F, P, D = tuple(map(int, args.shape.split(",")))
    for chip in args.chips.split(","):
        if args.kind:
            compile_one(chip, args.kind, shape)
            continue
        for kind in OPERATION:
            blocks = (F, -P % 128 + P, D) if kind == "pallas_tpu" else shape
            moved, cycles = compile_one(chip, kind, shape), simulated_cycles(chip, kind, blocks)
            row = dict(chip=chip, kind=kind, shape=shape, bytes=int(moved), cycles=cycles)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
