"""The decoder: Llama and Qwen2/2.5 by preset. Embeddings in, hidden states out.

The head is applied by the caller.

Source: `modeling_qwen2.py` and `modeling_llama.py` in transformers.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from vlmjax.attention import Attention, cached, packed
from vlmjax.nn import MLP, Dense, RMSNorm, param, scan_layers, stack
from vlmjax.rope import angles_1d
from vlmjax.sharding import Layout, layout_of


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder; `tie` uses the embedding as the head."""

    vocab: int
    width: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float = 1e6
    eps: float = 1e-6
    qkv_bias: bool = True
    tie: bool = True

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}; "
                "grouped-query attention needs that"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotary positions")


PRESETS = {
    "qwen2_5_1_5b": dict(
        vocab=151936, width=1536, mlp=8960, layers=28, heads=12, kv_heads=2, head_dim=128, tie=True
    ),
    "qwen2_5_7b": dict(
        vocab=152064,
        width=3584,
        mlp=18944,
        layers=28,
        heads=28,
        kv_heads=4,
        head_dim=128,
        tie=False,
    ),
    "llama3_8b": dict(
        vocab=128256,
        width=4096,
        mlp=14336,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        rope_theta=5e5,
        eps=1e-5,
        qkv_bias=False,
        tie=False,
    ),
}


class Embed(nnx.Module):
    """Token table f32[V, D]."""

    def __init__(self, vocab, width, *, rngs):
        # Of the size of what the layers add, also where it is the head of a narrow model.
        self.embedding = param(rngs, (vocab, width), ("vocab", "embed"), fan_in=width)

    def __call__(self, tokens, dtype):
        return jnp.take(self.embedding[...], tokens, axis=0).astype(dtype)


class Block(nnx.Module):
    """Pre-norm layer with gated MLP."""

    def __init__(self, cfg, *, rngs):
        heads = (cfg.heads, cfg.kv_heads, cfg.head_dim)
        make = dict(rngs=rngs, out_scale=(2 * cfg.layers) ** -0.5)
        self.attn_norm = RMSNorm(cfg.width, cfg.eps, rngs=rngs)
        self.attn = Attention(cfg.width, *heads, qkv_bias=cfg.qkv_bias, o_bias=False, **make)
        self.mlp_norm = RMSNorm(cfg.width, cfg.eps, rngs=rngs)
        self.mlp = MLP(cfg.width, cfg.mlp, "silu", gated=True, bias=False, **make)

    def __call__(self, x, attend, cache):
        y, cache = self.attn(self.attn_norm(x), attend, cache)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), cache


class Decoder(nnx.Module):
    """Causal transformer over packed rows, or over a cache."""

    def __init__(self, cfg, *, rngs):
        self.cfg = cfg
        self.embed = Embed(cfg.vocab, cfg.width, rngs=rngs)
        self.blocks = stack(lambda rngs: Block(cfg, rngs=rngs), cfg.layers, rngs=rngs)
        self.norm = RMSNorm(cfg.width, cfg.eps, rngs=rngs)
        head = ((cfg.width,), (cfg.vocab,), ("embed",), ("vocab",))
        self.head = None if cfg.tie else Dense(*head, rngs=rngs, bias=False)

    def head_kernel(self):
        """Returns [D, V], the (tied) output layer."""
        return self.embed.embedding[...].T if self.head is None else self.head.kernel[...]

    def logits(self, hidden):
        """Returns f32[..., V]."""
        kernel = self.head_kernel().astype(hidden.dtype)
        return jnp.einsum("...d,dv->...v", hidden, kernel, preferred_element_type=jnp.float32)

    def __call__(self, x, positions, segments=None, *, cache=None, attention=None, remat="none"):
        """Returns ([B, T, D] after the final norm, cache).

        Args:
          x: [B, T, D] embeddings.
          positions: i32[B, T].
          segments: i32[B, T] of packed rows, in order, 0 = padding at the end; attention stays
            inside a segment. None appends the tokens to the cache instead.
          cache: of `init_cache`, or None. With segments (prefill, one segment a row) it is filled
            from slot 0; without, the new tokens go to the slots of their positions.
          attention: an `AttentionSpec` for packed rows.
          remat: a key of `nn.REMAT`.
        """
        T = x.shape[1]
        angles = angles_1d(positions, self.cfg.head_dim, self.cfg.rope_theta)
        if segments is None:
            layout, attend = Layout(), cached(positions, angles)
        else:
            layout = layout_of("llm", *segments.shape)
            how = dict(size=self.cfg.head_dim, causal=True, spec=attention, layout=layout)
            attend = packed(segments, angles, **how)

        def layer(block, x, cache):
            y, new = block(x, attend, cache)
            if segments is not None and cache is not None:
                new = tuple(
                    old.at[:, :T].set(n.astype(old.dtype))
                    for old, n in zip(cache, new, strict=True)
                )
            return layout.constrain(y), new

        x, cache = scan_layers(self.blocks, layer, x, cache, remat)
        return self.norm(x), cache


def init_cache(cfg, rows, slots, dtype):
    """Returns (keys, values), each [L, B, slots, K, H] of zeros."""
    shape = (cfg.layers, rows, slots, cfg.kv_heads, cfg.head_dim)
    return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
