"""DiffFP of frames that are on the device: the rule of `data.diffp`.

scores, keep = prune(video, merge=2)                    u8[F, P, D], its first frame kept whole
scores, keep = prune(frame[None], previous, merge=2)    a stream: against the frame before
places, count = compact(keep, size=4096)                kept windows of all frames, in order
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vlmjax.data.diffp import score
from vlmjax.kernels.diff_prune import pallas_tpu, ref

KINDS = {"ref": ref.patch_sums, "pallas_tpu": pallas_tpu.patch_sums}


class Pruned(NamedTuple):
    """f32[F, windows], how much each window changed, and the keep mask bool[F, windows]."""

    scores: jax.Array
    keep: jax.Array


@functools.lru_cache
def least_sum(values, threshold):
    """Returns the least sum of differences over a window of `values` that is above the threshold.

    Found on the host, so that the mask does not depend on how a device rounds a division.
    """
    scores = score(np.arange(255 * values + 1, dtype=np.uint32), values)
    return int(np.searchsorted(scores, np.float32(threshold), side="right"))


def prune(frames, previous=None, *, merge, threshold=0.1, min_kept=1, kind="auto"):
    """Returns `Pruned`, as `data.diffp.change_scores` and `next_mask` define it.

    Args:
      frames: u8[F, P, D] patches in merge-window-major order, as in `data.sample.Item`.
      previous: u8[P, D], the frame before the first. None = there is none: the first frame is kept
        whole and its scores are infinite.
      merge: side of the window of patches that becomes one visual token.
      threshold: a window is kept when its score is above.
      min_kept: a frame that keeps fewer windows also keeps its first ones, that many.
      kind: "ref", "pallas_tpu" or "auto", which takes the kernel on a TPU.
    """
    F, P, D = frames.shape
    if frames.dtype != jnp.uint8 or P % merge**2:
        raise ValueError(
            f"frames are {frames.dtype}[{F}, {P}, {D}], merge={merge}: give uint8 pixels and whole "
            f"windows of {merge**2} patches"
        )
    if kind == "auto":
        device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
        kind = "pallas_tpu" if device.platform == "tpu" else "ref"
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; choose 'auto' or one of {sorted(KINDS)}")
    sums = KINDS[kind](frames, previous)
    sums, values = sums.reshape(F, -1, merge**2).sum(-1), merge**2 * D
    keep = sums >= least_sum(values, threshold)
    # A divisor known to be one number becomes a product with its inverse, which rounds otherwise.
    divisor = jax.lax.optimization_barrier(jnp.full(sums.shape, values, jnp.float32))
    scores = score(sums, divisor)
    few = keep.sum(1, keepdims=True) < min_kept
    keep |= few & (jnp.arange(keep.shape[1]) < min_kept)
    if previous is None:
        first = jnp.arange(F)[:, None] == 0
        scores, keep = jnp.where(first, jnp.inf, scores), keep | first
    return Pruned(scores, keep)


def compact(keep, size):
    """Returns (i32[size] places of the True entries in order, -1 = none; i32[] how many there are).

    Args:
      keep: bool of any shape; places count through it in row-major order.
      size: of the result; entries beyond it are left out.
    """
    flat = keep.reshape(-1)
    place = jnp.where(flat, jnp.arange(flat.size, dtype=jnp.int32), flat.size)
    # Equal keys are all "none", so an unstable sort of one operand gives the stable order.
    place = jax.lax.sort(place, is_stable=False)[:size]
    place = jnp.pad(place, (0, size - place.size), constant_values=flat.size)
    return jnp.where(place < flat.size, place, -1), flat.sum(dtype=jnp.int32)
