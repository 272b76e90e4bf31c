"""Pallas TPU kernel of `ref.patch_sums` that reads every frame from HBM once (XLA: twice).

The grid goes over blocks of patches and, inside, over blocks of frames in order, so that the frame
before is carried in VMEM. The MXU adds up: differences of 8-bit values are exact in bf16, sums
below 2^24 in f32, and the sums of a frame come out along the lanes, as they are stored.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

FRAMES, PATCHES = 32, 128  # of a block; patches are lanes of the output
SUBLANES = 8
VMEM_BYTES = 48 * 2**20  # room for two blocks of patches of 32 x 32 pixels
INTERPRET = False


def _kernel(previous, frames, sums, carry):
    @pl.when(pl.program_id(1) == 0)
    def _():
        carry[...] = previous[...].astype(jnp.float32)

    ones = jnp.ones((SUBLANES, frames.shape[2]), jnp.bfloat16)
    for k in range(frames.shape[0]):
        frame = frames[k].astype(jnp.float32)
        difference = jnp.abs(frame - carry[...]).astype(jnp.bfloat16)
        carry[...] = frame
        total = jax.lax.dot_general(
            ones, difference, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        sums[k] = total[0].astype(jnp.int32)


def patch_sums(frames, previous=None):
    """Returns i32[F, P], the same as `ref.patch_sums`.

    Args:
      frames: u8[F, P, D].
      previous: u8[P, D], or None.
    """
    F, P, D = frames.shape
    count, patches = min(F, FRAMES), min(P, PATCHES)
    return pl.pallas_call(
        _kernel,
        name="diff_prune",
        grid=(pl.cdiv(P, patches), pl.cdiv(F, count)),
        in_specs=[
            pl.BlockSpec((None, patches, D), lambda i, t: (0, i, 0)),
            pl.BlockSpec((count, patches, D), lambda i, t: (t, i, 0)),
        ],
        out_specs=pl.BlockSpec((count, patches), lambda i, t: (t, i)),
        out_shape=jax.ShapeDtypeStruct((F, P), jnp.int32),
        scratch_shapes=[pltpu.VMEM((patches, D), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=3 * F * P * D, bytes_accessed=(F + 1) * P * D + 4 * F * P, transcendentals=0
        ),
        interpret=INTERPRET,
    )(frames if previous is None else previous[None], frames)
