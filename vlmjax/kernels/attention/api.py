"""Chooses the implementation of attention inside segments.

spec = AttentionSpec().resolve(size, causal=True)
work = plan(segments, segments, 0, angles, angles, causal=True, spec=spec)   once for a layout
out = attention(q, k, v, work, causal=True, spec=spec)                       in every layer
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlmjax.kernels.attention import blockwise, pallas_gpu, pallas_tpu, ref
from vlmjax.kernels.attention.blocks import best_block

KINDS = {
    "ref": ref,  # dense: the definition, for short rows
    "blockwise": blockwise,  # any backend
    "pallas_tpu": pallas_tpu,
    "pallas_gpu": pallas_gpu,
}
OF_PLATFORM = {"tpu": "pallas_tpu", "gpu": "pallas_gpu", "cuda": "pallas_gpu"}


class AttentionSpec(NamedTuple):
    """Which implementation, and what it may know.

    Attributes:
      kind: a key of `KINDS`, or "auto" for that of the platform of the mesh in use.
      block: slots in a block; 0 = `blocks.best_block`.
      segment: expected length of a segment, for the block and for cost estimates; 0 = unknown.
    """

    kind: str = "auto"
    block: int = 0
    segment: int = 0

    def resolve(self, size, causal):
        """Returns the spec with "auto" and 0 replaced for heads of `size` channels.

        Raises:
          ValueError: an unknown kind or block.
        """
        if self.kind not in (*KINDS, "auto"):
            raise ValueError(
                f"attention kind {self.kind!r} is unknown; choose 'auto' or one of {sorted(KINDS)}"
            )
        if self.block < 0:
            raise ValueError(f"attention block={self.block} must be a number of slots, or 0")
        device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
        kind = self.kind
        if kind == "auto":
            kind = OF_PLATFORM.get(device.platform, "blockwise")
        block = self.block or best_block(kind, device.device_kind, size, causal, self.segment)
        return self._replace(kind=kind, block=block)


class Plan(NamedTuple):
    """What `attention` needs to know of a packed layout: arrays with B in front.

    Attributes:
      work: of the kind that was chosen.
      turns: ((cos, sin) of queries, (cos, sin) of keys), or None without rotary positions.
    """

    work: Any
    turns: tuple | None


def plan(q_segments, kv_segments, q_start, q_angles=None, kv_angles=None, *, causal, spec):
    """Returns the `Plan` of a packed layout.

    Args:
      q_segments: i32[B, T], 1, 2, ... in order with padding (0) at the end.
      kv_segments: i32[B, S], those of whole rows.
      q_start: i32[], the slot of the row at which the queries start.
      q_angles, kv_angles: f32[B, T, R / 2] and f32[B, S, R / 2] of `ref.rotate`, R up to the head
        size, not differentiated; None for heads without rotary positions.
      causal: whether queries see only earlier keys.
      spec: a resolved `AttentionSpec`.
    """
    work = KINDS[spec.kind].plan(q_segments, kv_segments, q_start, spec.block, causal)
    if q_angles is None:
        return Plan(work, None)
    angles = [jax.lax.stop_gradient(x) for x in (q_angles, kv_angles)]
    if spec.kind == "pallas_tpu":  # which has slots along lanes
        angles = [x.swapaxes(1, 2) for x in angles]
    return Plan(work, tuple((jnp.cos(x), jnp.sin(x)) for x in angles))


def attention(q, k, v, plan, *, causal, spec):
    """Returns [B, T, N, H]: softmax(q k^T H^-0.5) v inside each segment, 0 at padding.

    Queries and keys are given without their rotary positions.

    Args:
      q: [B, T, N, H].
      k, v: [B, S, K, H] with N a multiple of K.
      plan: of `plan` with the same causal and spec.
    """
    if spec.kind == "pallas_tpu":  # which rotates on the way
        return pallas_tpu.attention(q, k, v, *plan, spec, causal)
    if plan.turns is not None:
        q, k = (ref.rotate(x, *turn) for x, turn in zip((q, k), plan.turns, strict=True))
    return KINDS[spec.kind].attention(q, k, v, plan.work, spec, causal)
