"""Units written out with numpy, golden files, and connectors with given weights."""

import functools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from vlmjax import nn
from vlmjax.connectors import units
from vlmjax.hf import connectors as tables
from vlmjax.hf import table as table_of_keys

GOLDENS = Path(os.environ.get("VLMJAX_GOLDENS", Path(__file__).parents[1] / "goldens"))


class Golden:
    """A golden file: weights, inputs, outputs and what it says of itself."""

    def __init__(self, name):
        self.arrays = np.load(GOLDENS / f"{name}.npz")
        self.meta = json.loads(str(self.arrays["meta"]))
        self.config = self.meta["config"]
        files = self.arrays.files
        self.weights = {k[2:]: self.arrays[k] for k in files if k.startswith("w/")}

    def __getitem__(self, key):
        return self.arrays[key]

    def close(self, name, ours):
        """Asserts that an output is what the reference gave."""
        theirs, tolerance = self[f"out/{name}"], self.meta["tolerance"]
        allowed = tolerance.get("rel_per_array", {}).get(f"out/{name}", tolerance["rel"])
        close(ours, theirs, allowed)


def close(ours, theirs, allowed):
    ours = np.asarray(ours)
    assert ours.shape == theirs.shape
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    if os.environ.get("VLMJAX_SHOW"):
        print(f"{error:.1e} of {allowed:.1e}")
    assert error <= allowed, error


def load(module, layout, weights, key="", **kwargs):
    """The module (abstract or not) with weights of a checkpoint, which must be written back."""
    table = tables.rows(module, layout, key, path="", **kwargs)
    params = table_of_keys.load(table, weights)
    for name, stored in table_of_keys.store(table, params).items():
        if name == "pos_emb" or name.endswith(".pos_emb"):
            stored[:, 0] = weights[name][:, 0]  # the row that nothing reads
        np.testing.assert_array_equal(stored, weights[name])
    graphdef = nn.unbind(module)[0]
    return nn.bind(graphdef, jax.tree.map(jnp.asarray, params))


def golden_connector(kind, cfg, in_widths, out_width, layout, weights, key="", **kwargs):
    return load(tables.abstract(kind, cfg, in_widths, out_width), layout, weights, key, **kwargs)


def random_connector(kind, cfg, in_widths, out_width):
    """A connector whose every weight is random, biases and scales too."""
    graphdef, shapes = nn.unbind(tables.abstract(kind, cfg, in_widths, out_width))
    rng = np.random.default_rng(1)

    def draw(path, x):
        value = 0.2 * rng.normal(size=x.shape).astype(np.float32)
        return jnp.asarray(1 + value if path.endswith("scale") else value)

    flat = nn.flatten(shapes)
    return nn.bind(graphdef, nn.unflatten({p: draw(p, x) for p, x in flat.items()}))


@functools.partial(jax.jit, static_argnames="call")
def run(module, *args, call="__call__"):
    """Returns what a method of a module gives, compiled."""
    return getattr(module, call)(*args)


def windows(rows, columns, side, order="row", pad=True):
    """Returns i32[1, U, side^2] patches of the windows of a grid, -1 outside."""
    grid = np.full((-(-rows // side) * side, -(-columns // side) * side), -1, np.int32)
    grid[:rows, :columns] = np.arange(rows * columns).reshape(rows, columns)
    if not pad:
        grid = grid[: rows // side * side, : columns // side * side]
    h, w = grid.shape[0] // side, grid.shape[1] // side
    axes = (0, 2, 1, 3) if order == "row" else (2, 0, 1, 3)
    return grid.reshape(h, side, w, side).transpose(axes).reshape(1, h * w, side * side)


def cells(rows, columns, side):
    """Returns i32[1, 1, rows * columns]: a map as side x side cells, cell after cell."""
    number = np.arange(rows * columns, dtype=np.int32).reshape(side, rows // side, side, -1)
    return number.transpose(0, 2, 1, 3).reshape(1, 1, -1)


def whole(patches):
    """Returns i32[1, 1, G]: a map in reading order as one unit."""
    return np.arange(patches, dtype=np.int32)[None, None]


def gather(features, index):
    """Returns (x, mask) of units that are the same in every row of features [B, P, C]."""
    return units.gather(features, np.repeat(index, len(features), 0))


def flat(tokens):
    """[B, U, n, D] -> [B, U n, D]."""
    return tokens.reshape(len(tokens), -1, tokens.shape[-1])
