"""XLA:TPU flags for training, by chip generation, each with what it was seen to do.

`aot` compiles with them, and launch scripts start training with them:

    export LIBTPU_INIT_ARGS="$(python -m vlmjax.aot.flags v5e)"
"""

import sys

WINDOWED_EINSUM = (
    "xla_jf_spmd_threshold_for_windowed_einsum_mib",
    1000000,
    "no windowed einsum: FSDP matmuls cut into one piece for each chip run far below the MXU's "
    "speed (VideoLLaMA3-2B stage 2 on v5e:4x4: 12.0 s of operations with it, 2.9 s without)",
)


SPARSE_CORE = tuple(
    (
        f"xla_tpu_enable_sparse_core_collective_offload_{kind}",
        "true",
        "collectives run on the SparseCore beside the matmuls; XLA overlaps none otherwise, its "
        "fused form being for v5e only (8 layers of 1536 x 8960 with FSDP on 16 chips: exposed "
        "communication 9.7 ms without, 6.7 ms with, on v6e; 6.5 and 4.4 ms on v5p)",
    )
    for kind in ("all_gather", "reduce_scatter", "all_reduce")
)


def scoped_vmem(kib, seen):
    """Returns the row of the limit on what one operation may hold in VMEM."""
    return (
        "xla_tpu_scoped_vmem_limit_kib",
        kib,
        "larger tiles of matmuls, whose activation functions are then computed once: " + seen,
    )


V5E_VMEM = scoped_vmem(
    65536, "So400m tower forward and backward with full remat 0.98 s of operations, 1.07 s without"
)
V5P_VMEM = scoped_vmem(
    57344, "So400m tower 0.40 s, 0.45 s without; Qwen2.5-1.5B 0.41 s, 0.48 s without (remat dots)"
)
V6E_VMEM = scoped_vmem(
    98304, "16384 x 3584 x 18944 takes 1.09 of its floor, 1.75 without; a text step 2 % less"
)

# Chip -> ((name, value, reason), ...).
FLAGS = {
    "v5e": (WINDOWED_EINSUM, V5E_VMEM),
    "v5p": (WINDOWED_EINSUM, *SPARSE_CORE, V5P_VMEM),
    "v6e": (WINDOWED_EINSUM, *SPARSE_CORE, V6E_VMEM),
}


def options(chip):
    """Returns {name: value} of a chip generation."""
    return {name: value for name, value, _ in FLAGS[chip]}


def parse(text):
    """Returns {name: value} of "name=value,name=value"."""
    pairs = [item.partition("=") for item in text.split(",") if item]
    wrong = [name for name, equals, value in pairs if not (equals and value)]
    if wrong:
        raise ValueError(f"XLA options {wrong} have no value; give name=value,name=value")
    return {name.lstrip("-"): value for name, _, value in pairs}


if __name__ == "__main__":
    if sys.argv[1:2] == [] or sys.argv[1] not in FLAGS:
        sys.exit(f"usage: python -m vlmjax.aot.flags {{{','.join(FLAGS)}}}")
    print(" ".join(f"--{name}={value}" for name, value in options(sys.argv[1]).items()))
