"""How an optimizer's moments are stored between updates: in f32, in bf16 or in 8 bits.

An update decodes them to f32, works as ever and encodes them again. Rounding to the nearest would
lose the small steps of a slow average: at b2 = 0.999 the second moment moves by a thousandth of
itself, while neighbours in bf16 are 1/128 apart. So it is stochastic: up or down, with the
probability that keeps the mean. The draws depend on the number of the update only, so a resumed run
is the same run, on any mesh.

8 bits are a code c and, for every vector along the last axis, its largest magnitude s in f32:

    sign(c) (|c| / 127)^4 s    any moment that can be negative
    (c / 255)^8 s              Adam's second moment, at least c = 1: its root is divided by

Levels are dense near 0, as a vector holds values of many sizes (arXiv:2110.02861 has a table for
that): neighbours of a value or a root are 3 % or 2 % apart at s and 40 % or 16 % at s / 10,000.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class Quantized(NamedTuple):
    """An array in 8 bits."""

    code: jax.Array  # i8[..., n], or u8 where nothing is negative
    scale: jax.Array  # f32[..., 1]


class StoredState(NamedTuple):
    """The state of an optimizer whose moments are stored in another form."""

    count: jax.Array  # i32[], updates done
    inner: optax.OptState


# dtype of the code -> (largest code, how often a square root is taken).
LEVELS = {jnp.dtype("int8"): (127, 2), jnp.dtype("uint8"): (255, 3)}


def to_int8(x, draw, positive):
    """Returns `Quantized` of f32[..., n], rounded up where `draw` in [0, 1) is low enough."""
    dtype = jnp.dtype("uint8" if positive else "int8")
    largest, roots = LEVELS[dtype]
    scale = jnp.abs(x).max(-1, keepdims=True)
    share = jnp.abs(x) / jnp.where(scale > 0, scale, 1)
    root = share
    for _ in range(roots):
        root = jnp.sqrt(root)
    below = jnp.floor(root * largest)
    low, high = ((c / largest) ** 2**roots for c in (below, below + 1))
    code = jnp.minimum(below + (draw < (share - low) / (high - low)), largest)
    code = jnp.maximum(code, 1) if positive else jnp.sign(x) * code
    return Quantized(code.astype(dtype), scale)


def to_bfloat16(x, draw, positive):
    """Returns bf16 of f32, rounded up where `draw` in [0, 1) is below what bf16 cuts off."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (draw * 2**16).astype(jnp.uint32)
    cut = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return cut.astype(jnp.bfloat16)


STORAGE = {"float32": None, "bfloat16": to_bfloat16, "int8": to_int8}


def decode(stored):
    """Returns f32 of a stored moment."""
    if not isinstance(stored, Quantized):
        return stored.astype(jnp.float32)
    largest, roots = LEVELS[stored.code.dtype]
    value = stored.code.astype(jnp.float32) / largest
    return value * jnp.abs(value) ** (2**roots - 1) * stored.scale


def _moments(state):
    """Returns the names of the fields that hold one array for each parameter."""
    return [name for name in state._fields if isinstance(getattr(state, name), dict)]


def store_moments(inner, encode):
    """Returns the transformation `inner` with its moments stored by `encode`, a value of `STORAGE`.

    Args:
      inner: an optax transformation of {path: array} whose state is a NamedTuple.
      encode: function (f32 array, draws like it, whether it is never negative) -> stored form.
    """

    def pack(state, count):
        key, fields = jax.random.fold_in(jax.random.key(0), count), {}
        for name in _moments(state):
            fields[name] = {}
            for path, x in getattr(state, name).items():
                key, now = jax.random.split(key)
                fields[name][path] = encode(x, jax.random.uniform(now, x.shape), name == "nu")
        return StoredState(count, state._replace(**fields))

    def unpack(state):
        return state._replace(
            **{
                name: {path: decode(x) for path, x in getattr(state, name).items()}
                for name in _moments(state)
            }
        )

    def init(params):
        # Zeros by their shapes: XLA would encode whole arrays of zeros while it compiles.
        start = jax.eval_shape(lambda: pack(inner.init(params), jnp.zeros((), jnp.int32)))
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), start)

    def update(grads, state, params=None):
        updates, new = inner.update(grads, unpack(state.inner), params)
        return updates, pack(new, state.count + 1)

    return optax.GradientTransformation(init, update)
