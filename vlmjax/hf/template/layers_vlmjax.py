"""Layers that towers, connectors and decoder share.

Letters: B batch, T query tokens, S key tokens, D width, N heads, K key-value heads, H head size.
Parameters have the layout of vlmjax: a `kernel` [*in, *out] is multiplied from the right, so that
that of queries is [D, N, H] and that of the attention's output [N, H, D].
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def weights(*shape):
    return nn.Parameter(torch.empty(*shape))


class Dense(nn.Module):
    """y = x . kernel (+ bias), contracting the last `len(in_shape)` axes of x into `out_shape`."""

    def __init__(self, in_shape, out_shape, bias=True):
        super().__init__()
        self.kernel = weights(*in_shape, *out_shape)
        self.bias = weights(*out_shape) if bias else None
        self.fan_in, self.contract, self.out_shape = math.prod(in_shape), len(in_shape), out_shape

    def forward(self, x):
        lead = x.shape[: x.dim() - self.contract]
        kernel = self.kernel.to(x.dtype).reshape(self.fan_in, -1)
        y = (x.reshape(-1, self.fan_in) @ kernel).reshape(*lead, *self.out_shape)
        return y if self.bias is None else (y + self.bias).to(x.dtype)


def dense(fan_in, fan_out, bias=True):
    """Returns a `Dense` between two widths."""
    return Dense((fan_in,), (fan_out,), bias)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, computed in f32."""

    def __init__(self, width, eps):
        super().__init__()
        self.scale, self.bias, self.eps = weights(width), weights(width), eps

    def forward(self, x):
        y = x.float()
        y = y - y.mean(-1, keepdim=True)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.scale + self.bias).to(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis, computed in f32."""

    def __init__(self, width, eps):
        super().__init__()
        self.scale, self.eps = weights(width), eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.scale).to(x.dtype)


NORMS = {"layer": LayerNorm, "rms": RMSNorm}


class Scale(nn.Module):
    """x * scale for each channel."""

    def __init__(self, width):
        super().__init__()
        self.scale = weights(width)

    def forward(self, x):
        return (x * self.scale).to(x.dtype)


class Table(nn.Module):
    """Learned vectors [rows, width], or one [width]."""

    def __init__(self, *shape):
        super().__init__()
        self.embedding = weights(*shape)


class Specials(nn.Module):
    """Learned vectors that stand among the tokens, each under its name."""

    def __init__(self, names, width, scale=1.0):
        super().__init__()
        self.names, self.width, self.scale = names, width, scale
        for name in names:
            setattr(self, name, Table(width))

    def forward(self, like):
        """Returns [n, D] of the type of `like`."""
        if not self.names:
            return like.new_zeros(0, self.width)
        vectors = torch.stack([getattr(self, name).embedding for name in self.names])
        return (vectors * self.scale).to(like.dtype)


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
}


class MLP(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) if gated."""

    def __init__(self, width, hidden, act, gated, bias, out_width=None):
        super().__init__()
        self.gate = dense(width, hidden, bias) if gated else None
        self.up = dense(width, hidden, bias)
        self.down = dense(hidden, out_width or width, bias)
        self.act = ACTIVATIONS[act]

    def forward(self, x):
        up = self.up(x)
        return self.down(self.act(up) if self.gate is None else self.act(self.gate(x)) * up)


class DenseStack(nn.Module):
    """Linear maps `dense_i` from each width to the next, activations between; the first `norms` of
    them have a `norm_i` in front."""

    def __init__(self, widths, act="gelu", norms=0, eps=0.0):
        super().__init__()
        self.act, self.depth = ACTIVATIONS[act], len(widths) - 1
        for i, (fan_in, fan_out) in enumerate(zip(widths, widths[1:], strict=False)):
            if i < norms:
                setattr(self, f"norm_{i}", LayerNorm(fan_in, eps))
            setattr(self, f"dense_{i}", dense(fan_in, fan_out))

    def forward(self, x):
        for i in range(self.depth):
            x = self.act(x) if i else x
            x = getattr(self, f"norm_{i}")(x) if hasattr(self, f"norm_{i}") else x
            x = getattr(self, f"dense_{i}")(x)
        return x


class Attention(nn.Module):
    """Projections of N query heads on K key-value heads; q_norm and k_norm over the whole "width",
    over each "head", or "none"."""

    def __init__(
        self, width, heads, kv_heads, size, qkv_bias, o_bias, qk_norm="none", eps=0.0,
        kv_width=None, out_width=None,
    ):  # fmt: skip
        super().__init__()
        self.q = Dense((width,), (heads, size), qkv_bias)
        self.k = Dense((kv_width or width,), (kv_heads, size), qkv_bias)
        self.v = Dense((kv_width or width,), (kv_heads, size), qkv_bias)
        self.o = Dense((heads, size), (out_width or width,), o_bias)
        self.qk_norm = qk_norm
        if qk_norm != "none":
            of_q, of_k = (1, 1) if qk_norm == "head" else (heads, kv_heads)
            self.q_norm, self.k_norm = RMSNorm(of_q * size, eps), RMSNorm(of_k * size, eps)

    def project(self, x):
        """Returns q [..., T, N, H], k and v [..., T, K, H] of x [..., T, D]."""
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        elif self.qk_norm == "width":
            q = self.q_norm(q.flatten(-2)).reshape(q.shape)
            k = self.k_norm(k.flatten(-2)).reshape(k.shape)
        return q, k, v

    def read(self, queries, keys, values, mask):
        """Returns [..., T, D]: queries read others; `mask` bool[..., S] says which may be seen."""
        mask = mask[..., None, :]
        return self.o(attend(self.q(queries), self.k(keys), self.v(values), mask))


def attend(q, k, v, mask=None, causal=False):
    """Returns [..., T, N, H]: softmax attention, 0 for a query that may see nothing.

    Args:
      q: [..., T, N, H], scaled by H^-0.5 here.
      k, v: [..., S, K, H]; query head n reads head n // (N / K).
      mask: bool[..., T or 1, S], True = may look; None = all.
      causal: whether query i sees keys 0 .. i only; without mask.
    """
    lead, (T, N, H), groups = q.shape[:-3], q.shape[-3:], q.shape[-2] // k.shape[-2]
    q, k, v = (x.reshape(-1, *x.shape[-3:]).transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (k, v))
    if mask is None:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    else:
        mask = mask.reshape(-1, 1, *mask.shape[-2:])
        any_key = mask.any(-1, keepdim=True)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | ~any_key)
        y = torch.where(any_key, y, 0)
    return y.transpose(1, 2).reshape(*lead, T, N, H)


def angles_1d(positions, size, theta, divisors=None):
    """Returns f32[..., size / 2]: position * theta^(-2j / size) / divisor."""
    at = torch.arange(0, size, 2, dtype=torch.float32, device=positions.device)
    freq = theta ** (-at / size)
    if divisors is not None:
        freq = freq / torch.tensor(divisors, dtype=torch.float32, device=positions.device)
    return positions[..., None].float() * freq


def rotate(x, angles):
    """Rotates channel i of x [..., T, N, H] with i + R/2 by angles [..., T, R/2], in f32."""
    cos, sin, half = angles.cos()[..., None, :], angles.sin()[..., None, :], angles.shape[-1]
    a, b = x[..., :half].float(), x[..., half : 2 * half].float()
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
    return torch.cat([turned, x[..., 2 * half :]], -1)


def take(x, index):
    """Returns [B, M, ...]: x[b, index[b, m]] of x [B, n, ...]; a negative index gives x[b, 0]."""
    return x[torch.arange(len(x), device=x.device)[:, None], index.clamp(min=0)]


def put(x, new, index):
    """Returns [B, T, ...]: new[b, index[b, t]] where the index is not negative, else x."""
    at = index.reshape(*index.shape, *(1,) * (x.dim() - 2)) >= 0
    return torch.where(at, take(new, index), x)


def gather(features, units):
    """Returns ([B, U, G, C], bool[B, U, G]): the features of each unit, and which may be seen.

    Args:
      features: [B, P, C].
      units: i64[B, U, G]; -1 = none, which gives zeros; -2 - slot: there, but not to be seen.
    """
    rows = torch.arange(len(units), device=units.device)[:, None, None]
    x = features[rows, torch.where(units < -1, -2 - units, units.clamp(min=0))]
    return torch.where((units != -1)[..., None], x, 0), units >= 0


def mean(x, mask, weights=None):
    """Returns [..., C]: the mean of [..., G, C] over the present, in f32; of none, 0."""
    total = torch.where(mask[..., None], x.float(), 0).sum(-2)
    return (total / mask.sum(-1, keepdim=True).clamp(min=1)).to(x.dtype)


def maximum(x, mask, weights=None):
    """Returns [..., C]: the largest of each channel over the present; of none, 0."""
    top = torch.where(mask[..., None], x, torch.finfo(x.dtype).min).amax(-2)
    return torch.where(mask.any(-1, keepdim=True), top, 0)


def weighted(x, mask, weights):
    """Returns [..., C]: the sum over G of weights [..., G] times [..., G, C], in f32."""
    weights = torch.where(mask, weights.float(), 0)[..., None]
    return (weights * x.float()).sum(-2).to(x.dtype)


REDUCE = {"mean": mean, "max": maximum, "weighted": weighted}
