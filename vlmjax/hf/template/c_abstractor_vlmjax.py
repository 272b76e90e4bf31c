"""The C-Abstractor of Honeybee and 360VL: convolutions over a map, pooled to a square of tokens."""

import math

import torch
from torch import nn

from .layers_vlmjax import DenseStack, LayerNorm, Specials, Table, dense, weights
from .vision_vlmjax import bicubic


class RegNetBlock(nn.Module):
    """1x1, depthwise 3x3, squeeze and excitation, 1x1, a shortcut around; maps [R, h, w, C]."""

    def __init__(self, in_width, width, eps):
        super().__init__()
        squeezed = round(in_width / 4)
        self.enter, self.enter_norm = dense(in_width, width, False), LayerNorm(width, eps)
        self.conv, self.conv_norm = Depthwise(width), LayerNorm(width, eps)
        self.squeeze, self.excite = dense(width, squeezed), dense(squeezed, width)
        self.leave, self.leave_norm = dense(width, width, False), LayerNorm(width, eps)
        self.changes = in_width != width
        if self.changes:
            self.skip, self.skip_norm = dense(in_width, width, False), LayerNorm(width, eps)

    def forward(self, x):
        silu = nn.functional.silu
        y = silu(self.enter_norm(self.enter(x)))
        y = silu(self.conv_norm(self.conv(y)))
        level = y.float().mean((1, 2), keepdim=True).to(y.dtype)
        y = y * torch.sigmoid(self.excite(silu(self.squeeze(level))))
        y = self.leave_norm(self.leave(y))
        return silu(y + (self.skip_norm(self.skip(x)) if self.changes else x))


class Depthwise(nn.Module):
    """3x3 convolution of each channel by itself, kernel [3, 3, C], in f32."""

    def __init__(self, width):
        super().__init__()
        self.kernel = weights(3, 3, width)

    def forward(self, x):
        kernel = self.kernel.float().permute(2, 0, 1)[:, None]
        y = nn.functional.conv2d(
            x.float().permute(0, 3, 1, 2), kernel, padding="same", groups=x.shape[-1]
        )
        return y.permute(0, 2, 3, 1).to(x.dtype)


class RegNetStage(nn.Module):
    """Blocks; the one that changes the width, if any, is `first`."""

    def __init__(self, in_width, width, depth, eps):
        super().__init__()
        self.first = RegNetBlock(in_width, width, eps) if in_width != width else None
        equal = depth - (in_width != width)
        self.blocks = nn.ModuleList(RegNetBlock(width, width, eps) for _ in range(equal))

    def forward(self, x):
        x = x if self.first is None else self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


class Abstractor(nn.Module):
    """One copy of the C-Abstractor: square maps to `queries` tokens each."""

    def __init__(self, cfg, in_width, D):
        super().__init__()
        self.cfg = cfg
        self.norm = LayerNorm(in_width, 1e-6) if cfg.norm == "layer" else None
        self.pos = Table(cfg.side**2, in_width)
        self.before = RegNetStage(in_width, cfg.width, cfg.depth, cfg.eps)
        self.after = RegNetStage(cfg.width, cfg.width, cfg.depth, cfg.eps)
        self.readout = DenseStack((cfg.width, *(D,) * cfg.layers), "silu")
        self.eos = Table(cfg.eos, D) if cfg.eos else None

    def forward(self, x):
        cfg, (B, U, G, C) = self.cfg, x.shape
        side, out = math.isqrt(G), math.isqrt(cfg.queries)
        x = x if self.norm is None else self.norm(x)
        pos = self.pos.embedding.float().reshape(cfg.side, cfg.side, C)
        if side != cfg.side:
            at = (torch.arange(side, device=x.device) + 0.5) * cfg.side / side - 0.5
            shares = bicubic(at, cfg.side)
            pos = torch.einsum("ih,hwc,jw->ijc", shares, pos, shares)
        x = self.before(x.reshape(B * U, side, side, C) + pos.to(x.dtype))
        pooled = nn.functional.adaptive_avg_pool2d(x.permute(0, 3, 1, 2).float(), out)
        x = self.after(pooled.permute(0, 2, 3, 1).to(x.dtype))
        x = self.readout(x).reshape(B, U, cfg.queries, -1)
        if self.eos is not None:
            eos = self.eos.embedding.to(x.dtype)
            x = torch.cat([x, eos.expand(B, U, *eos.shape)], 2)
        return x


class CAbstractor(nn.Module):
    """Maps the units of each source through the copy of that source."""

    def __init__(self, cfg, in_widths, D):
        super().__init__()
        self.cfg = cfg
        for name, in_width in zip(cfg.copies, in_widths, strict=True):
            setattr(self, name, Abstractor(cfg, in_width, D))
        self.specials = Specials(cfg.specials, D)

    def forward(self, x, mask, size=None, weights=None):
        return torch.cat([getattr(self, n)(f) for n, f in zip(self.cfg.copies, x, strict=True)], 1)
