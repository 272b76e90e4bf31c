"""Chooses the implementation of attention inside segments.

work = plan(segments, causal=True, spec=AttentionSpec("blockwise", 256))     once for a layout
out = attention(q, k, v, work, causal=True, spec=spec)                       in every layer
"""

from typing import NamedTuple

from vlmjax.kernels.attention import blockwise, ref


class AttentionSpec(NamedTuple):
    """Which implementation: "ref" (dense, for short rows) or "blockwise" (skips other segments)."""

    kind: str = "blockwise"
    block: int = 256

    def check(self):
        """Returns itself; ValueError for an unknown kind or block."""
        if self.kind not in ("ref", "blockwise"):
            raise ValueError(
                f"attention kind {self.kind!r} is unknown; choose 'ref' or 'blockwise'"
            )
        if self.block < 1:
            raise ValueError(f"attention block={self.block} must be a positive number of slots")
        return self


def plan(segments, *, causal, spec):
    """Returns what `attention` needs to know of a packed layout, i32[B, S], 0 = padding."""
    if spec.check().kind == "ref":
        return ref.segment_mask(segments, segments, causal)
    return blockwise.plan(segments, spec.block, causal)


def attention(q, k, v, work, *, causal, spec):
    """Returns [B, T, N, H]: softmax(q k^T H^-0.5) v inside each segment.

    Args:
      q: [B, T, N, H].
      k, v: [B, T, K, H] with N a multiple of K.
      work: of `plan` with the same causal and spec.
    """
    if spec.kind == "ref":
        return ref.masked_attention(q, k, v, work)
    return blockwise.attention(q, k, v, work, spec.block, causal)
