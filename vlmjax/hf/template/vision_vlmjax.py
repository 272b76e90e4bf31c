"""Vision towers: packed patches in, one feature per slot out.

A row holds views (pictures, frames, tiles) one after another, each a segment. Blocks run on the
views side by side, so that a patch sees its own view only.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .layers_vlmjax import (
    MLP,
    NORMS,
    Attention,
    LayerNorm,
    Scale,
    Table,
    angles_1d,
    attend,
    dense,
    rotate,
    weights,
)


def normalise(pixels, mean, std):
    """Returns f32: (pixels / 255 - mean) / std of raw u8 [..., 3 p p], channel after channel."""
    if pixels.is_floating_point():
        return pixels.float()
    area, how = pixels.shape[-1] // len(mean), dict(dtype=torch.float32, device=pixels.device)
    scale = torch.tensor([255 * s for s in std], **how).repeat_interleave(area)
    shift = torch.tensor([m / s for m, s in zip(mean, std, strict=True)], **how)
    return pixels.float() / scale - shift.repeat_interleave(area)


def views_of(segments):
    """Returns (i64[V, L], bool[V, L]): the slots of each view in [B * P], and which there are."""
    B, P = segments.shape
    row = torch.arange(B, device=segments.device)[:, None] * (P + 1)
    names = torch.where(segments > 0, row + segments, 0).reshape(-1)
    names, counts = torch.unique_consecutive(names, return_counts=True)
    starts = counts.cumsum(0) - counts
    starts, counts = starts[names > 0], counts[names > 0]
    at = torch.arange(int(counts.max()), device=segments.device)
    there = at < counts[:, None]
    return torch.where(there, starts[:, None] + at, 0), there


def resized(x, size):
    """Returns [..., size, size, C]: features of a map [..., h, w, C] resized bilinearly in f32."""
    flat = x.reshape(-1, *x.shape[-3:]).permute(0, 3, 1, 2).float()
    y = F.interpolate(flat, (size, size), mode="bilinear", align_corners=False)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-3], size, size, -1).to(x.dtype)


def cubic(x, a):
    """Returns the cubic convolution kernel of parameter a, 0 from |x| = 2 on."""
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0))


def bicubic(at, side):
    """Returns f32[..., side]: weights that sample `side` values at f32[...] as torch resizes."""
    taps = at.floor()[..., None] + torch.arange(-1, 3, device=at.device)
    share = cubic(at[..., None] - taps, -0.75)
    hit = taps.clamp(0, side - 1)[..., None] == torch.arange(side, device=at.device)
    return torch.where(hit, share[..., None], 0).sum(-2)


def antialiased(at, step, side):
    """Returns f32[..., side] as `bicubic`, for torch's antialias=True: values `step` apart."""
    places = torch.arange(side, device=at.device)
    share = cubic((places - at[..., None]) / step.clamp(min=1)[..., None], -0.5)
    return share / share.sum(-1, keepdim=True)


def sample_positions(table, how, coords, there):
    """Returns f32[V, L, D] of each slot: patches by their place in the table, the class token its
    first row, registers 0.

    Args:
      table: [side * side, D], or with a row more in front.
      how: "table", "bucket", "bicubic" or "bicubic_antialias".
      coords: f32[V, L, 2] places in the table, (-1 - k, 0) for slot k in front of the patches.
      there: bool[V, L].
    """
    table, side = table.float(), math.isqrt(len(table))
    first, inside = len(table) - side**2, coords.clamp(min=-0.5)
    if how in ("table", "bucket"):
        at = inside.trunc().long()
        patches = table[first + at[..., 0] * side + at[..., 1]]
    else:
        if how == "bicubic":
            shares = bicubic(inside, side)
        else:
            patch = (there & (coords[..., 0] > -1))[..., None]
            least = torch.where(patch, coords, torch.inf).amin(1, keepdim=True)
            shares = antialiased(inside, (2 * least + 1).expand_as(coords), side)
        both = shares[..., 0, :, None] * shares[..., 1, None, :]
        patches = both.flatten(-2) @ table[first:]
    if not first:
        return patches
    row = coords[..., :1]
    return torch.where(row > -1, patches, torch.where(row == -1, table[0], 0))


class Block(nn.Module):
    """Transformer layer; its norms stand in front of its branches or behind them."""

    def __init__(self, cfg):
        super().__init__()
        D, N = cfg.width, cfg.heads
        self.order = cfg.order
        self.attn_norm = NORMS[cfg.norm](D, cfg.eps)
        qk_norm = "width" if cfg.qk_norm else "none"
        self.attn = Attention(D, N, N, D // N, cfg.qkv_bias, True, qk_norm, cfg.eps)
        self.mlp_norm = NORMS[cfg.norm](D, cfg.eps)
        self.mlp = MLP(D, cfg.mlp, cfg.act, cfg.gated, True)
        self.attn_scale = Scale(D) if cfg.layer_scale > 0 else None
        self.mlp_scale = Scale(D) if cfg.layer_scale > 0 else None

    def forward(self, x, angles, mask):
        """Returns [V, L, D] of views [V, L, D]."""

        def attention(x):
            q, k, v = self.attn.project(x)
            if angles is not None:
                q, k = rotate(q, angles), rotate(k, angles)
            return self.attn.o(attend(q, k, v, mask))

        x = self.add(x, attention, self.attn_norm, self.attn_scale)
        return self.add(x, self.mlp, self.mlp_norm, self.mlp_scale)

    def add(self, x, branch, norm, scale):
        y = branch(norm(x)) if self.order == "pre" else norm(branch(x))
        return x + (y if scale is None else scale(y))


class ViT(nn.Module):
    """Patch embedding, class token and registers, positions, blocks, final norm."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, D, prefix = cfg, cfg.width, cfg.prefix
        last = cfg.features == "last"
        self.patch = dense(3 * cfg.patch**2, D, cfg.patch_bias)
        built = cfg.layers if last else cfg.layers + 1 + int(cfg.features)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(built))
        self.class_token = Table(1, D) if prefix else None
        self.registers = Table(prefix - 1, D) if prefix > 1 else None
        self.position = Table(cfg.side**2 + (prefix > 0), D) if cfg.side else None
        self.embed_norm = NORMS[cfg.norm](D, cfg.eps) if cfg.embed_norm else None
        self.norm = NORMS[cfg.norm](D, cfg.eps) if cfg.final_norm and last else None
        self.out_width = D

    def forward(self, pixels, segments, coords):
        """Returns [B, P, D], 0 at padding.

        Args:
          pixels: u8[B, P, 3 p p].
          segments: i32[B, P], the view of each slot, 0 = padding.
          coords: f32[B, P, 2], row and column; see `sample_positions`.
        """
        cfg, (B, P) = self.cfg, segments.shape
        slots, there = views_of(segments)
        pixels, coords = (x.reshape(B * P, -1)[slots] for x in (pixels, coords))
        x = self.patch(normalise(pixels, cfg.mean, cfg.std).to(self.patch.kernel.dtype))
        x, angles = self.embed(x, coords, there), None
        if cfg.position == "rope2d":
            size = cfg.width // cfg.heads
            angles = angles_1d(coords, size // 2, cfg.rope_theta).flatten(-2)
        mask = None if there.all() else there[:, None, :]
        for block in self.blocks:
            x = block(x, angles, mask)
        x = x if self.norm is None else self.norm(x)
        out = x.new_zeros(B * P, x.shape[-1])
        out[slots[there]] = x[there]
        return out.reshape(B, P, -1)

    def embed(self, x, coords, there):
        """Returns embedded patches [V, L, D] with the prefix in its slots, and positions."""
        row = coords[..., :1]
        if self.cfg.prefix:
            tables = (self.class_token, self.registers)
            made = torch.cat([t.embedding for t in tables if t is not None])
            index = (-1 - row[..., 0]).long().clamp(0, len(made) - 1)
            x = torch.where(row > -1, x, made[index].to(x.dtype))
        if self.position is not None:
            table = self.position.embedding
            x = x + sample_positions(table, self.cfg.position, coords, there).to(x.dtype)
        return x if self.embed_norm is None else self.embed_norm(x)


class ConvBlock(nn.Module):
    """x + scale(mlp(norm(conv(x)))) on maps [R, h, w, D]."""

    def __init__(self, cfg, width):
        super().__init__()
        self.conv = DepthwiseConv(cfg.kernel, width)
        self.norm = LayerNorm(width, cfg.eps)
        self.mlp = MLP(width, cfg.ratio * width, cfg.act, False, True)
        self.layer_scale = Scale(width)

    def forward(self, x):
        return x + self.layer_scale(self.mlp(self.norm(self.conv(x))))


class DepthwiseConv(nn.Module):
    """Convolution of each channel with its own kernel [k, k, 1, D], the same size out."""

    def __init__(self, size, width):
        super().__init__()
        self.kernel, self.bias = weights(size, size, 1, width), weights(width)

    def forward(self, x):
        kernel = self.kernel.to(x.dtype).permute(3, 2, 0, 1)
        y = F.conv2d(x.permute(0, 3, 1, 2), kernel, padding="same", groups=x.shape[-1])
        return (y.permute(0, 2, 3, 1) + self.bias).to(x.dtype)


class Stage(nn.Module):
    """A halved grid (but in the first stage), then equal blocks."""

    def __init__(self, cfg, i):
        super().__init__()
        before = cfg.widths[i - 1]
        self.down_norm = LayerNorm(before, cfg.eps) if i else None
        self.down = dense(4 * before, cfg.widths[i]) if i else None
        self.blocks = nn.ModuleList(ConvBlock(cfg, cfg.widths[i]) for _ in range(cfg.depths[i]))

    def forward(self, x):
        if self.down is not None:
            R, h, w, D = x.shape
            windows = (
                self.down_norm(x).reshape(R, h // 2, 2, w // 2, 2, D).permute(0, 1, 3, 2, 4, 5)
            )
            x = self.down(windows.reshape(R, h // 2, w // 2, 4 * D))
        for block in self.blocks:
            x = block(x)
        return x


class ConvNeXt(nn.Module):
    """ConvNeXt, the features of all stages on one grid."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.stem = dense(3 * cfg.patch**2, cfg.widths[0])
        self.stem_norm = LayerNorm(cfg.widths[0], cfg.eps)
        for i in range(len(cfg.widths)):
            setattr(self, f"stage_{i}", Stage(cfg, i))
        self.out_width = sum(cfg.widths)

    def forward(self, pixels, segments, coords):
        """Returns [B, I * grid^2, sum of widths] of I views of rows x columns patches a row."""
        cfg, B = self.cfg, len(pixels)
        x = normalise(pixels, cfg.mean, cfg.std).to(self.stem.kernel.dtype)
        x = self.stem_norm(self.stem(x.reshape(-1, cfg.rows, cfg.columns, x.shape[-1])))
        outputs = []
        for i in range(len(cfg.widths)):
            x = getattr(self, f"stage_{i}")(x)
            outputs.append(resized(x, cfg.grid))
        return torch.cat(outputs, -1).reshape(B, -1, self.out_width)


TOWERS = {"vit": ViT, "convnext": ConvNeXt}
