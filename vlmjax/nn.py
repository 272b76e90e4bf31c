"""Layers with parameters declared once: shape, initialiser, logical axes.

Axis letters, used everywhere: B batch, T query tokens, S key tokens, P patches, U visual tokens,
G patches of a visual token, D width, N heads, K key-value heads, H head size, M mlp width,
V vocabulary, L layers.

Logical axes (`embed mlp heads kv_heads head_dim vocab patch`) are right-aligned: layers stacked
by `stack` have one more leading axis than their parameters name. They get a meaning only in
`sharding.py`.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx


def param(rngs, shape, axes, init="fan_in", fan_in=None, scale=1.0):
    """Returns an `nnx.Param` f32[shape].

    Args:
      rngs: an `nnx.Rngs`.
      shape: of the array.
      axes: one logical axis name (or None) for each dimension.
      init: "fan_in" (truncated normal of variance scale^2 / fan_in), "zeros" or "ones".
      fan_in: defaults to the first dimension.
      scale: of "fan_in" and "ones".
    """
    if init == "zeros":
        value = jnp.zeros(shape)
    elif init == "ones":
        value = scale * jnp.ones(shape)
    else:
        std = (
            scale / math.sqrt(fan_in or shape[0]) / 0.87962566
        )  # the last is that of the truncated normal
        value = std * jax.random.truncated_normal(rngs.params(), -2, 2, shape)
    return nnx.Param(value, axes=axes)


class Dense(nnx.Module):
    """y = x . kernel (+ bias), contracting the last `len(in_shape)` axes of x into `out_shape`.

    The kernel f32[*in_shape, *out_shape] is cast to the dtype of x.
    """

    def __init__(self, in_shape, out_shape, in_axes, out_axes, *, rngs, bias=True, scale=1.0):
        fan_in, axes = math.prod(in_shape), (*in_axes, *out_axes)
        self.kernel = param(rngs, (*in_shape, *out_shape), axes, fan_in=fan_in, scale=scale)
        self.bias = param(rngs, out_shape, out_axes, "zeros") if bias else None
        self.contract = len(in_shape)

    def __call__(self, x):
        kernel = self.kernel[...].astype(x.dtype)
        lead, out_shape = x.shape[: x.ndim - self.contract], kernel.shape[self.contract :]
        # Two matrices: with more axes XLA:CPU transposes activations for the weight gradient
        # (2x the step time).
        fan_in, fan_out = math.prod(kernel.shape[: self.contract]), math.prod(out_shape)
        y = (x.reshape(-1, fan_in) @ kernel.reshape(fan_in, fan_out)).reshape(*lead, *out_shape)
        # In f32, so that the gradient of the bias is summed over all tokens in f32.
        return y if self.bias is None else (y + self.bias[...]).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, computed in f32."""

    def __init__(self, width, eps, *, rngs):
        self.scale = param(rngs, (width,), ("embed",), "ones")
        self.bias = param(rngs, (width,), ("embed",), "zeros")
        self.eps = eps

    def __call__(self, x):
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last axis, computed in f32 (arXiv:1910.07467)."""

    def __init__(self, width, eps, *, rngs):
        self.scale = param(rngs, (width,), ("embed",), "ones")
        self.eps = eps

    def __call__(self, x):
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * self.scale[...]).astype(x.dtype)


class Scale(nnx.Module):
    """x * scale for each channel, the product in f32 (LayerScale, arXiv:2103.17239)."""

    def __init__(self, width, initial, *, rngs):
        self.scale = param(rngs, (width,), ("embed",), "ones", scale=initial)

    def __call__(self, x):
        return (x * self.scale[...]).astype(x.dtype)


class Table(nnx.Module):
    """Learned vectors f32[rows, width], looked up by the caller."""

    def __init__(self, rows, width, *, rngs):
        self.embedding = param(rngs, (rows, width), (None, "embed"), fan_in=width)


ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
}


class MLP(nnx.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) if gated; `out_scale` is of `down`."""

    def __init__(self, width, hidden, act, *, rngs, gated, bias, out_scale=1.0):
        shape = ((width,), (hidden,), ("embed",), ("mlp",))
        self.gate = Dense(*shape, rngs=rngs, bias=bias) if gated else None
        self.up = Dense(*shape, rngs=rngs, bias=bias)
        self.down = Dense(
            (hidden,), (width,), ("mlp",), ("embed",), rngs=rngs, bias=bias, scale=out_scale
        )
        self.act = act

    def __call__(self, x):
        act = ACTIVATIONS[self.act]
        h = act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x)
        return self.down(h)


def unbind(module):
    """Returns (graphdef, params): the static structure and the weights, a nested dict."""
    graphdef, state = nnx.split(module)
    return graphdef, nnx.to_pure_dict(state)


def bind(graphdef, params):
    """Returns the module whose weights are `params`; the inverse of `unbind`."""
    return nnx.merge(graphdef, params)


def flatten(tree, prefix=""):
    """Returns {path: leaf} of a nested dict."""
    flat = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat |= flatten(value, f"{path}/") if isinstance(value, dict) else {path: value}
    return flat


def unflatten(flat):
    """The inverse of `flatten`."""
    tree = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[name] = leaf
    return tree


def stack(make, num, *, rngs):
    """Returns one module whose every parameter has a leading axis of `num` layers.

    Args:
      make: function of `nnx.Rngs` returning a layer.
    """
    keys = jax.random.split(rngs.params(), num)
    return jax.vmap(lambda key: make(nnx.Rngs(key)))(keys)


_ATTENTION = jax.checkpoint_policies.save_only_these_names("attention")
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _ATTENTION
    ),
    "attention": _ATTENTION,
    "offload_attention": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["attention"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def scan_layers(blocks, call, x, xs=None, remat="none"):
    """Runs stacked layers in order as one compiled loop.

    Args:
      blocks: module made by `stack`.
      call: function (layer, x, xs_i) -> (x, ys_i).
      x: the carry, the same shape before and after each layer.
      xs: optional pytree with a leading axis of L, one slice for each layer (a cache).
      remat: what the backward pass may keep of a layer, a key of `REMAT`: "none" recomputes
        nothing, "full" recomputes the whole layer, "attention" keeps attention outputs, "dots"
        these and matrix products, "offload_attention" keeps them in the memory of the host.

    Returns:
      (x, ys) with ys stacked over layers.
    """
    if remat not in REMAT:
        raise ValueError(f"remat={remat!r} is unknown; choose one of {sorted(REMAT)}")
    graphdef, params = unbind(blocks)

    def body(x, layer):
        params, xs = layer
        return call(bind(graphdef, params), x, xs)

    if REMAT[remat] is not None:
        body = jax.checkpoint(body, policy=REMAT[remat], prevent_cse=False)
    return jax.lax.scan(body, x, (params, xs))
