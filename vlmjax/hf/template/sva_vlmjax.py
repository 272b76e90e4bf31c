"""The Spatial Vision Aggregator of Cambrian-1, in the connector and between decoder layers."""

import torch
from torch import nn

from .layers_vlmjax import Dense, DenseStack, LayerNorm, Specials, Table, attend, dense, weighted


class Read(nn.Module):
    """Attention of each query to its windows in all towers, in one softmax."""

    def __init__(self, cfg):
        super().__init__()
        D, self.towers = cfg.width, len(cfg.windows)
        heads = (cfg.heads, D // cfg.heads)
        for name in ("q", *(f"{x}_{k}" for k in range(self.towers) for x in "kv")):
            setattr(self, f"{name}_norm", LayerNorm(D, cfg.eps))
            setattr(self, name, Dense((D,), heads, False))
        self.o = Dense(heads, (D,), False)

    def forward(self, x, latents, masks):
        def heads(name, x):
            return getattr(self, name)(getattr(self, f"{name}_norm")(x))

        keys, values = (
            torch.cat([heads(f"{x}_{k}", latents[k]) for k in range(self.towers)], -3) for x in "kv"
        )
        mask = torch.cat(masks, -1)[..., None, :]
        return self.o(attend(heads("q", x)[..., None, :, :], keys, values, mask)[..., 0, :, :])


class SVABlock(nn.Module):
    """Queries [B, I, Q, width] read every tower and are added to."""

    def __init__(self, cfg, width):
        super().__init__()
        D, self.windows = cfg.width, cfg.windows
        self.context, self.enter = dense(D, D, False), dense(width + D, D, False)
        for k, side in enumerate(cfg.windows):
            if side > 1:
                setattr(self, f"pos_{k}", Table(side**2, D))
        self.attn = Read(cfg)
        self.norm = LayerNorm(D, cfg.eps)
        self.up, self.down = dense(D, D, False), dense(D, width, False)

    def forward(self, x, sources):
        latents, masks, context = sources
        context = self.context(context)
        context = context.expand(*x.shape[:-1], context.shape[-1])
        latents = [
            f + getattr(self, f"pos_{k}").embedding.to(f.dtype) if side > 1 else f
            for k, (side, f) in enumerate(zip(self.windows, latents, strict=True))
        ]
        h = self.enter(torch.cat([x, context.to(x.dtype)], -1))
        h = self.norm(h + self.attn(h, latents, masks))
        return x + self.down(nn.functional.gelu(self.up(h)))


class Tower(nn.Module):
    """Projects the features of one tower: linear, GELU, linear, norm."""

    def __init__(self, in_width, width, eps):
        super().__init__()
        self.proj = DenseStack((in_width, width, width))
        self.norm = LayerNorm(width, eps)

    def forward(self, x):
        return self.norm(self.proj(x))


class SVA(nn.Module):
    """The Spatial Vision Aggregator: a grid of queries, each reading its window of every tower."""

    def __init__(self, cfg, in_widths, D):
        super().__init__()
        self.cfg = cfg
        for k, in_width in enumerate(in_widths):
            setattr(self, f"tower_{k}", Tower(in_width, cfg.width, cfg.eps))
        self.query = Table(1, cfg.width)
        self.blocks = nn.ModuleList(SVABlock(cfg, cfg.width) for _ in range(cfg.layers))
        self.out = DenseStack((cfg.width, D, D))
        self.specials = Specials(cfg.specials, D)

    def forward(self, x, mask, size=None, weights=None):
        sources = self.sources(x, mask, weights)
        y = self.query.embedding.to(sources[2].dtype)
        y = y.expand(*sources[2].shape[:2], self.cfg.side**2, y.shape[-1])
        for block in self.blocks:
            y = block(y, sources)
        return self.out(y)

    def sources(self, x, mask, weights=None):
        """Returns (latents, masks, context) that every block reads, also those in the decoder."""

        def cut(a, side):
            return a.reshape(*a.shape[:2], self.cfg.side**2, side**2, *a.shape[3:])

        if self.cfg.reduce == "weighted":
            merged = [
                self.merge(k, *each) for k, each in enumerate(zip(x, mask, weights, strict=True))
            ]
            x, mask = zip(*merged, strict=True)
        latents = [getattr(self, f"tower_{k}")(f) for k, f in enumerate(x)]
        context = latents[0].float().mean(2, keepdim=True).to(latents[0].dtype)
        masks = [cut(m, side) for m, side in zip(mask, self.cfg.windows, strict=True)]
        masks = [m | ~m.any(-1, keepdim=True) for m in masks]
        latents = [cut(f, side) for f, side in zip(latents, self.cfg.windows, strict=True)]
        return latents, masks, context

    def merge(self, k, x, mask, weights):
        """Returns the sums [B, I, places, C] of tower k, and which of them may be seen."""
        shape = (*mask.shape[:2], (self.cfg.side * self.cfg.windows[k]) ** 2, -1)
        x, mask = x.reshape(*shape, x.shape[-1]), mask.reshape(shape)
        return weighted(x, torch.ones_like(mask), weights.reshape(shape)), mask.any(-1)
