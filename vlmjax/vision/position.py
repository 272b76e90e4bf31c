"""Learned tables of positions, looked up, or sampled for views of another size than the table's."""

import math

import jax
import jax.numpy as jnp

TABLES = ("table", "bucket", "bicubic", "bicubic_antialias")


def sample(table, how, segments, coords):
    """Returns f32[B, P, D], the position of each patch and class token; 0 for registers.

    Args:
      table: f32[side * side, D] in reading order, or with a row more in front for class tokens.
      how: "table" and "bucket": a row of the table at whole coordinates; "bicubic": as torch
        resizes the table, align_corners=False; "bicubic_antialias": with its antialias=True.
      segments, coords: of a `batch.Patches`.
    """
    side = math.isqrt(len(table))
    first, coords = len(table) - side**2, coords.astype(jnp.float32)
    inside = jnp.maximum(coords, -0.5)  # the prefix: anywhere
    if how in ("table", "bucket"):
        at = inside.astype(jnp.int32)
        patches = table[first + at[..., 0] * side + at[..., 1]]
    else:
        if how == "bicubic":
            weights = bicubic(inside, side)
        else:
            weights = antialiased(inside, steps(segments, coords), side)
        by_row, by_column = weights[..., 0, :, None], weights[..., 1, None, :]
        weights = (by_row * by_column).reshape(*segments.shape, side**2)
        patches = jnp.matmul(weights, table[first:], precision="highest")
    row = coords[..., :1]
    return jnp.where(row > -1, patches, jnp.where(row == -1, table[0], 0)) if first else patches


def cubic(x, a):
    """Returns the cubic convolution kernel of parameter a (Keys 1981), 0 from |x| = 2 on."""
    x = jnp.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return jnp.where(x <= 1, near, jnp.where(x < 2, far, 0))


def bicubic(at, side):
    """Returns f32[..., side]: weights that sample `side` values at f32[...] as torch resizes.

    align_corners=False: values lie at 0 .. side - 1, and beyond the ends the last one goes on.
    """
    taps = jnp.floor(at)[..., None] + jnp.arange(-1, 3)
    share = cubic(at[..., None] - taps, -0.75)
    taps = jnp.clip(taps, 0, side - 1)
    return jnp.where(taps[..., None] == jnp.arange(side), share[..., None], 0).sum(-2)


def antialiased(at, step, side):
    """Returns f32[..., side] as `bicubic`, of torch's antialias=True.

    That has another kernel, spread over `step` values where samples are further apart than values,
    and no values beyond the ends.
    """
    width = jnp.maximum(step, 1)[..., None]
    share = cubic((jnp.arange(side) - at[..., None]) / width, -0.5)
    return share / share.sum(-1, keepdims=True)


def steps(segments, coords):
    """Returns f32[B, P, 2]: how far the patches of a view lie apart in the table.

    Its first ones lie at step / 2 - 0.5.
    """
    patches = jnp.where(coords[..., :1] > -1, coords, jnp.inf)
    number = segments.shape[1] + 1
    least = jax.vmap(lambda c, s: jax.ops.segment_min(c, s, number)[s])(patches, segments)
    return 2 * least + 1
