"""Attention of learned queries over the patches of a unit."""

from flax import nnx

from vlmjax.connectors.units import mean
from vlmjax.kernels.attention import ref
from vlmjax.nn import Dense, LayerNorm


class CrossAttention(nnx.Module):
    """o(attend(q(queries), k(keys), v(values))): units are few queries on many keys, unpacked."""

    def __init__(self, q_width, kv_width, out_width, heads, *, rngs, kv_heads=None, bias=True):
        """`heads` and `kv_heads` are (number, size); equal unless given."""
        (N, H), (K, _) = heads, kv_heads or heads
        q, kv = ("heads", "head_dim"), ("kv_heads", "head_dim")
        self.q = Dense((q_width,), (N, H), ("embed",), q, rngs=rngs, bias=bias)
        self.k = Dense((kv_width,), (K, H), ("embed",), kv, rngs=rngs, bias=bias)
        self.v = Dense((kv_width,), (K, H), ("embed",), kv, rngs=rngs, bias=bias)
        self.o = Dense((N, H), (out_width,), q, ("embed",), rngs=rngs, bias=bias)

    def __call__(self, queries, keys, values, mask):
        """Returns [..., T, D]; a query with nothing to see gets the bias of `o`.

        Args:
          queries: [..., T, Dq].
          keys, values: [..., S, C].
          mask: bool[..., S], True = may be seen.
        """
        return self.o(attend(self.q(queries), self.k(keys), self.v(values), mask))


def attend(q, k, v, mask):
    """Returns [..., T, N, H] of q [..., T, N, H], k and v [..., S, K, H] and mask bool[..., S]."""
    flat = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))
    return ref.masked_attention(*flat, mask.reshape(-1, 1, mask.shape[-1])).reshape(q.shape)


class AttentionPool(nnx.Module):
    """One vector of a set of tokens: their mean asks all of them (`clip_projector` of InternVL).

    Source: `AttentionPoolingBlock` of OpenGVLab/InternVL.
    """

    def __init__(self, width, out_width, heads, *, rngs, eps=1e-5):
        self.q_norm = LayerNorm(width, eps, rngs=rngs)
        self.k_norm = LayerNorm(width, eps, rngs=rngs)
        self.v_norm = LayerNorm(width, eps, rngs=rngs)
        self.attn = CrossAttention(width, width, out_width, (heads, width // heads), rngs=rngs)

    def __call__(self, x, mask):
        """Returns [B, E] of tokens [B, S, D] and mask bool[B, S], True = read."""
        queries = self.q_norm(mean(x, mask)[:, None])
        return self.attn(queries, self.k_norm(x), self.v_norm(x), mask)[:, 0]
