"""A thirteenth system, made as the README's "How to add" says: a row, a file's worth, a config."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from recipes import config

from vlmjax import build, checkpoint
from vlmjax.batch import UnitRule
from vlmjax.connectors import CONNECTORS
from vlmjax.connectors.specials import Specials
from vlmjax.data.strategies import STRATEGIES
from vlmjax.data.views import Tiling, View, cut
from vlmjax.nn import Dense
from vlmjax.train import costs, loop, metrics
from vlmjax.train.parameters import parameter_table
from vlmjax.vision.vit import PRESETS


@dataclasses.dataclass(frozen=True)
class MeanConfig:
    """One token of a view: the mean of its patches, mapped."""

    specials: tuple = ()
    tokens = 1
    unit = UnitRule("map")


class Mean(nnx.Module):
    def __init__(self, cfg, in_widths, out_width, *, rngs):
        self.dense = Dense((sum(in_widths),), (out_width,), ("embed",), ("mlp",), rngs=rngs)
        self.specials = Specials(cfg.specials, out_width, rngs=rngs)

    def __call__(self, x, mask, size=None, weights=None):
        seen = [jnp.where(m[..., None], f, 0) for f, m in zip(x, mask, strict=True)]
        counts = [jnp.maximum(m.sum(-1, keepdims=True), 1) for m in mask]
        means = [f.sum(2) / n.astype(f.dtype) for f, n in zip(seen, counts, strict=True)]
        return self.dense(jnp.concatenate(means, -1))[:, :, None]


def cost(cfg, widths, out, units, features):
    return costs.Cost(2 * units[0] * sum(widths) * out)


@dataclasses.dataclass(frozen=True)
class Halves:
    side: int


def halves(width, height, s):
    """Two squares beside each other, or above each other."""
    grid = (1, 2) if width >= height else (2, 1)
    canvas = (grid[0] * s.side, grid[1] * s.side)
    views = cut((("resize", canvas),), grid, (s.side, s.side))
    assert all(isinstance(view, View) for view in views)
    return Tiling(views, grid, None, (height, width), ((1, 1), (1, 1)))


@pytest.mark.slow
def test_a_new_encoder_connector_and_strategy(tmp_path, monkeypatch):
    row = PRESETS["clip_l_14_336"] | dict(width=32, mlp=64, layers=2, heads=2, patch=6)
    monkeypatch.setitem(PRESETS, "clip_swish", row)
    monkeypatch.setitem(CONNECTORS, "mean", (MeanConfig, Mean))
    monkeypatch.setitem(costs.CONNECTORS, MeanConfig, cost)
    monkeypatch.setitem(STRATEGIES, "halves", (halves, Halves))
    c = config("llava_1_5", "tiny,stage=2")
    c.model.vision = dict(preset="clip_swish", act="silu", side=4)
    c.model.connector = dict(type="mean")
    with c.unlocked():
        c.processor.picture = dict(strategy=(dict(name="halves", side=24),))
    c.init, c.lr = None, ((".*", 1e-2),)
    c.train.update(steps=20, log_every=1)
    run = build.resolve(c)
    assert "connector" in parameter_table(run)
    loop.train(c, tmp_path)
    losses = [line["loss"] for line in metrics.read(tmp_path)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    start, end = (
        build.random_params(run.model, run.train.seed),
        checkpoint.restore_params(tmp_path)[0],
    )
    kernel = "connector/dense/kernel"
    assert (np.asarray(start[kernel]) != np.asarray(end[kernel])).any()
