"""Connectors: from the features of units of patches to tokens of the decoder.

    tokens = connector(x, mask, size, weights)      [B, U, n, D]

For each source k x[k] [B, U, G, C] and mask[k] bool[B, U, G], True = may be seen; size i32[B, U, 2]
are rows and columns of a unit, weights[k] f32[B, U, G] those of sums.
"""

import math

import torch
from torch import nn

from .c_abstractor_vlmjax import CAbstractor
from .layers_vlmjax import (
    MLP,
    REDUCE,
    Attention,
    DenseStack,
    LayerNorm,
    RMSNorm,
    Specials,
    Table,
    angles_1d,
    attend,
    dense,
    rotate,
)
from .sva_vlmjax import SVA


class MLPConnector(DenseStack):
    """Patches of a window averaged or laid side by side, then linear maps."""

    def __init__(self, cfg, in_widths, D):
        widths = (cfg.window**2 * sum(in_widths), *cfg.hidden, *(D,) * cfg.layers)
        norms = 1 + len(cfg.hidden) if cfg.norm == "layer" else 0
        super().__init__(widths, norms=norms, eps=cfg.eps)
        self.cfg = cfg
        self.specials = Specials(cfg.specials, D)

    def forward(self, x, mask, size=None, weights=None):
        places, reduce = self.cfg.window**2, REDUCE[self.cfg.reduce]

        def split(a):
            return a.reshape(*a.shape[:2], places, -1, *a.shape[3:])

        merged = [
            reduce(split(f), split(m), None if weights is None else split(weights[k]))
            for k, (f, m) in enumerate(zip(x, mask, strict=True))
        ]
        return super().forward(torch.cat(merged, -1).flatten(2))[:, :, None]


def sincos(row, column, width):
    """Returns f32[..., width]: sines and cosines of the column, then of the row."""
    at = torch.arange(width // 4, dtype=torch.float32, device=row.device)
    freq = 10000.0 ** (-at / (width // 4))
    x, y = (at[..., None].float() * freq for at in (column, row))
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], -1)


class Resampler(nn.Module):
    """Learned queries read a view once; keys carry the position of their patch."""

    def __init__(self, cfg, in_widths, D):
        super().__init__()
        (in_width,), heads = in_widths, cfg.heads
        self.cfg = cfg
        self.query = Table(cfg.queries, D)
        self.kv = dense(in_width, D, False)
        self.q_norm, self.kv_norm = LayerNorm(D, cfg.eps), LayerNorm(D, cfg.eps)
        self.attn = Attention(D, heads, heads, D // heads, True, True)
        self.norm = LayerNorm(D, cfg.eps)
        self.out = dense(D, D, False)
        self.specials = Specials(cfg.specials, D)

    def forward(self, x, mask, size, weights=None):
        (x,), (mask,) = x, mask
        values = self.kv_norm(self.kv(x))
        at, columns = torch.arange(x.shape[2], device=x.device), size[..., 1:].clamp(min=1)
        pos = sincos(at // columns, at % columns, values.shape[-1])
        queries = self.q_norm(self.query.embedding.to(x.dtype))
        if self.cfg.query_pos == "sincos":
            side = math.isqrt(len(queries))
            at = torch.arange(len(queries), device=x.device)
            queries = queries + sincos(at // side, at % side, queries.shape[-1]).to(x.dtype)
        queries = queries.expand(*x.shape[:2], *queries.shape)
        y = self.attn.read(queries, values + pos.to(x.dtype), values, mask)
        return self.out(self.norm(y))


class PerceiverLayer(nn.Module):
    """Latents read context and latents, then a gated MLP."""

    def __init__(self, cfg, D):
        super().__init__()
        self.attn_norm, self.context_norm = RMSNorm(D, cfg.eps), RMSNorm(D, cfg.eps)
        self.attn = Attention(D, cfg.heads, cfg.kv_heads, cfg.head_dim, False, False)
        self.mlp_norm = RMSNorm(D, cfg.eps)
        self.mlp = MLP(D, cfg.mlp or 4 * D, "silu", True, False)

    def forward(self, latents, context, mask):
        queries = self.attn_norm(latents)
        keys = torch.cat([self.context_norm(context), queries], -2)
        latents = latents + self.attn.read(queries, keys, keys, mask)
        return latents + self.mlp(self.mlp_norm(latents))


class Perceiver(nn.Module):
    """Learned latents read a view layer after layer."""

    def __init__(self, cfg, in_widths, D):
        super().__init__()
        (in_width,) = in_widths
        hidden = cfg.hidden
        gated = MLP(in_width, hidden, "silu", True, False, out_width=D) if hidden else None
        self.project = gated or dense(in_width, D, False)
        self.query = Table(cfg.queries, D)
        self.blocks = nn.ModuleList(PerceiverLayer(cfg, D) for _ in range(cfg.layers))
        self.norm = RMSNorm(D, cfg.eps)
        self.specials = Specials(cfg.specials, D)

    def forward(self, x, mask, size=None, weights=None):
        (x,), (mask,) = x, mask
        context, latents = self.project(x), self.query.embedding.to(x.dtype)
        latents = latents.expand(*x.shape[:2], *latents.shape)
        mask = torch.cat([mask, mask.new_ones(latents.shape[:3])], -1)
        for block in self.blocks:
            latents = block(latents, context, mask)
        return self.norm(latents)


class QFormerBlock(nn.Module):
    """Llama layer; `between` is what happens after self-attention."""

    def __init__(self, cfg):
        super().__init__()
        D, N = cfg.width, cfg.heads
        self.attn_norm = RMSNorm(D, cfg.eps)
        self.attn = Attention(D, N, N, D // N, False, False)
        self.mlp_norm = RMSNorm(D, cfg.eps)
        self.mlp = MLP(D, cfg.mlp, "silu", True, False)

    def forward(self, x, angles, between):
        q, k, v = self.attn.project(self.attn_norm(x))
        x = between(x + self.attn.o(attend(rotate(q, angles), rotate(k, angles), v)))
        return x + self.mlp(self.mlp_norm(x))


class Cross(nn.Module):
    """x + attention of x to vision features, both normalised."""

    def __init__(self, cfg, in_width):
        super().__init__()
        D, N = cfg.width, cfg.heads
        self.q_norm, self.kv_norm = RMSNorm(D, cfg.eps), RMSNorm(in_width, cfg.eps)
        self.attn = Attention(D, N, N, D // N, False, False, kv_width=in_width)

    def forward(self, x, features, mask):
        keys = self.kv_norm(features)
        return x + self.attn.read(self.q_norm(x), keys, keys, mask)


class QFormer(nn.Module):
    """QLLaMA: learned queries in a Llama that reads the patches in every `every`-th layer."""

    def __init__(self, cfg, in_widths, D):
        super().__init__()
        (in_width,) = in_widths
        self.cfg = cfg
        self.query = Table(cfg.queries, cfg.width)
        self.blocks = nn.ModuleList(QFormerBlock(cfg) for _ in range(cfg.layers))
        reads = cfg.layers // cfg.every
        self.cross = nn.ModuleList(Cross(cfg, in_width) for _ in range(reads))
        self.norm = RMSNorm(cfg.width, cfg.eps)
        self.out = DenseStack((cfg.width, *(D,) * cfg.out_layers)) if cfg.out_layers else None
        self.specials = Specials(cfg.specials, D)

    def forward(self, x, mask, size=None, weights=None):
        cfg, (x,), (mask,) = self.cfg, x, mask
        (B, U), y = x.shape[:2], self.query.embedding.to(x.dtype)
        y = y.expand(B * U, *y.shape)
        at = torch.arange(cfg.queries, device=x.device)
        angles = angles_1d(at, cfg.width // cfg.heads, cfg.rope_theta)
        features, mask = x.flatten(0, 1), mask.flatten(0, 1)
        for i, block in enumerate(self.blocks):
            read = i % cfg.every == 0
            cross = self.cross[i // cfg.every]
            y = block(y, angles, lambda y: cross(y, features, mask) if read else y)  # noqa: B023
        y = self.norm(y).reshape(B, U, cfg.queries, -1)
        return y if self.out is None else self.out(y)


class ConvGLU(nn.Module):
    """The adapter of CogVLM2 and GLM-4V: a 2x2 convolution, a norm, a gated MLP."""

    def __init__(self, cfg, in_widths, D):
        super().__init__()
        self.cfg, width, places = cfg, sum(in_widths), cfg.window**2
        to = {"in": width, "out": D}[cfg.conv] if places > 1 else width
        self.conv = dense(places * width, to) if places > 1 else None
        self.dense = dense(to, D, False)
        self.norm = LayerNorm(D, cfg.eps)
        self.mlp = MLP(D, cfg.hidden, "silu", True, False)
        self.specials = Specials(cfg.specials, D, scale=1 / cfg.scaling)

    def forward(self, x, mask, size=None, weights=None):
        (x,) = x
        x = x.flatten(2)
        x = self.dense(x if self.conv is None else self.conv(x))
        x = self.mlp(nn.functional.gelu(self.norm(x)))
        return (x / self.cfg.scaling)[:, :, None]


CONNECTORS = {
    "mlp": MLPConnector,
    "c_abstractor": CAbstractor,
    "resampler": Resampler,
    "perceiver": Perceiver,
    "qformer": QFormer,
    "sva": SVA,
    "conv_glu": ConvGLU,
}
