"""The decoder: embeddings in, hidden states out, over a cache of transformers or without one."""

import math

import numpy as np
import torch
from torch import nn

from .layers_vlmjax import (
    MLP,
    Attention,
    RMSNorm,
    angles_1d,
    attend,
    dense,
    put,
    rotate,
    take,
    weights,
)


class Embed(nn.Module):
    """Token table [V, D], times `scale` where it is looked up."""

    def __init__(self, vocab, width, scale):
        super().__init__()
        self.embedding, self.scale = weights(vocab, width), scale

    def forward(self, tokens, dtype):
        x = nn.functional.embedding(tokens, self.embedding).to(dtype)
        return x if self.scale == 1 else x * torch.tensor(self.scale, dtype=dtype, device=x.device)


class Expert(nn.Module):
    """A second set of weights of a layer for the tokens of pictures (CogVLM)."""

    def __init__(self, cfg):
        super().__init__()
        self.attn = Attention(cfg.width, cfg.heads, cfg.kv_heads, cfg.head_dim, True, False)
        self.mlp = MLP(cfg.width, cfg.mlp, "silu", True, False)


def serve(routed, language, expert, *x):
    """Returns language(x), and expert(x) for the tokens that the expert serves.

    Args:
      routed: (i64[B, W] the tokens, -1 = none; i64[B, T] the place of each among these, or -1), or
        None.
      language, expert: functions of [B, n, ...] that return one array or several.
    """
    y = language(*x)
    if routed is None:
        return y
    slots, index = routed
    z = expert(*(take(a, slots) for a in x))
    if isinstance(y, tuple):
        return tuple(put(a, b, index) for a, b in zip(y, z, strict=True))
    return put(y, z, index)


class DecoderBlock(nn.Module):
    """Pre-norm layer with gated MLP."""

    def __init__(self, cfg):
        super().__init__()
        heads = (cfg.heads, cfg.kv_heads, cfg.head_dim)
        self.attn_norm = RMSNorm(cfg.width, cfg.eps)
        self.attn = Attention(
            cfg.width, *heads, cfg.qkv_bias, cfg.o_bias, qk_norm=cfg.qk_norm, eps=cfg.eps
        )
        self.mlp_norm = RMSNorm(cfg.width, cfg.eps)
        self.mlp = MLP(cfg.width, cfg.mlp, "silu", True, cfg.mlp_bias)
        self.expert = Expert(cfg) if cfg.expert != "none" else None
        self.multiplier = cfg.residual_multiplier

    def add(self, x, y):
        scale = torch.tensor(self.multiplier, dtype=y.dtype, device=y.device)
        return x + y if self.multiplier == 1 else x + y * scale

    def forward(self, x, attention, routed=None, between=None):
        """Returns [B, T, D]; `between` is a function of x, run after attention."""
        expert = self.expert if routed is not None else self
        qkv = serve(routed, self.attn.project, expert.attn.project, self.attn_norm(x))
        y = attention(*qkv)
        x = self.add(x, serve(routed, self.attn.o, expert.attn.o, y))
        x = x if between is None else between(x)
        return self.add(x, serve(routed, self.mlp, expert.mlp, self.mlp_norm(x)))


class Decoder(nn.Module):
    """Causal transformer; `extra` are blocks of another kind after some of its layers."""

    def __init__(self, cfg, extra=None):
        super().__init__()
        self.cfg = cfg
        self.embed = Embed(cfg.vocab, cfg.width, cfg.embed_multiplier)
        self.blocks = nn.ModuleList(DecoderBlock(cfg) for _ in range(cfg.layers))
        self.norm = RMSNorm(cfg.width, cfg.eps)
        self.head = None if cfg.tie else dense(cfg.width, cfg.vocab, False)
        self.extra = extra
        self.rotated = cfg.rotary or cfg.head_dim
        factors = {"short": cfg.rope_short, "long": cfg.rope_long}.get(cfg.rope_factors, (1.0,))
        divisors = np.array(factors, np.float32) * np.float32(cfg.rope_scale)
        self.divisors = None if (divisors == 1).all() else divisors.tolist()
        scale = np.full(cfg.head_dim, cfg.attention_multiplier or cfg.head_dim**-0.5)
        scale *= math.sqrt(cfg.head_dim)
        scale[: self.rotated] *= cfg.rope_attention**2  # what keys would be multiplied by, too
        self.query_scale = None if np.allclose(scale, 1, rtol=1e-9) else scale.tolist()

    @property
    def dtype(self):
        return self.embed.embedding.dtype

    def logits(self, hidden):
        """Returns f32[..., V]."""
        kernel = self.embed.embedding.T if self.head is None else self.head.kernel
        return (hidden @ kernel.to(hidden.dtype)).float()

    def extra_of(self, layer):
        """Returns the number of the extra block after a layer, or None."""
        number, rest = divmod(layer - self.cfg.extra_start, self.cfg.extra_stride)
        return number if not rest and 0 <= number < self.cfg.extra_num else None

    def forward(self, x, positions, attention_mask, cache, routed, extra):
        """Returns [B, T, D] for the head.

        Args:
          x: [B, T, D] embeddings.
          positions: i64[B, T], rotary.
          attention_mask: [B, S], 0 = padding, of the tokens in the cache and the new ones.
          cache: of transformers, or None.
          routed: of `serve`.
          extra: function (extra block, x) -> x, or None = the extra blocks are not run.
        """
        cfg, T = self.cfg, x.shape[1]
        angles = angles_1d(positions, self.rotated, cfg.rope_theta, self.divisors)
        mask = visible(attention_mask, T)
        for i, block in enumerate(self.blocks):

            def attention(q, k, v, i=i):
                if self.query_scale is not None:
                    q = (q * torch.tensor(self.query_scale, device=q.device)).to(q.dtype)
                q, k = rotate(q, angles), rotate(k, angles)
                if cache is not None:
                    k, v = cache.update(k.transpose(1, 2), v.transpose(1, 2), i)
                    k, v = k.transpose(1, 2), v.transpose(1, 2)
                causal = mask is None and k.shape[1] == T > 1
                return attend(q, k, v, mask, causal)

            number = None if extra is None else self.extra_of(i)
            run = None if number is None else lambda x, n=number: extra(self.extra[n], x)
            inside = run if cfg.extra_place == "attention" else None
            x = block(x, attention, routed, inside)
            x = run(x) if run is not None and inside is None else x
        x = self.norm(x)
        if cfg.logits_divisor != 1:
            x = x / torch.tensor(cfg.logits_divisor, dtype=x.dtype, device=x.device)
        return x


def visible(attention_mask, T):
    """Returns bool[B, T, S]: the keys that the last T of S tokens see; None = all up to their own.

    None only where that needs no mask: a single token, or all tokens at once, without padding.
    """
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: give [batch, tokens], as a "
            "dynamic cache needs; static caches are not supported"
        )
    keep, S = attention_mask.bool(), attention_mask.shape[1]
    if keep.all() and T in (1, S):
        return None
    at = torch.arange(S, device=keep.device)
    return (at <= at[S - T :, None]) & keep[:, None, :]
