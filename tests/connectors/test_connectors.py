"""Properties of connectors that no golden file covers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from by_hand import close, random_connector, run
from flax import nnx

from vlmjax import batch, nn
from vlmjax.connectors import (
    CONNECTORS,
    CAbstractorConfig,
    ConvGLUConfig,
    MLPConfig,
    PerceiverConfig,
    QFormerConfig,
    ResamplerConfig,
    SVAConfig,
    units,
)
from vlmjax.connectors.c_abstractor import bicubic, pooling_bins
from vlmjax.connectors.specials import Specials
from vlmjax.hf import connectors as tables

TOLERANCE, OUT = 2e-5, 16
# type -> config, widths of the sources, patches of a unit in each
CASES = {
    "mlp": (MLPConfig(window=2, norm="layer", hidden=(12,)), (6,), (4,)),
    "mlp mean of sources": (MLPConfig(specials=("newline",)), (6, 5), (4, 3)),
    "mlp max": (MLPConfig(reduce="max"), (6,), (4,)),
    "mlp weighted": (MLPConfig(reduce="weighted"), (6,), (4,)),
    "c_abstractor": (CAbstractorConfig(4, 8, 2, side=3, eos=1, norm="layer"), (8,), (16,)),
    "c_abstractor pair": (
        CAbstractorConfig(4, 8, 2, side=3, copies=("crops", "whole")),
        (6, 6),
        (16, 9),
    ),
    "resampler": (ResamplerConfig(4, 4, "sincos"), (6,), (12,)),
    "perceiver": (PerceiverConfig(3, 2, 4, 2, 6), (6,), (12,)),
    "qformer": (QFormerConfig(3, 8, 12, 4, 2), (6,), (13,)),
    "qformer every layer": (QFormerConfig(3, 8, 12, 2, 2, every=1, out_layers=1), (6,), (13,)),
    "sva": (SVAConfig(2, (1, 2), 8, 2, 2), (6, 5), (4, 16)),
    "conv_glu": (ConvGLUConfig(12, scaling=2.0), (6,), (4,)),
    "conv_glu of one patch": (ConvGLUConfig(12, window=1), (6,), (1,)),
}


@functools.cache
def connector(name):
    cfg, in_widths, _ = CASES[name]
    return random_connector(name.split()[0], cfg, in_widths, OUT)


def inputs(name, B=2, U=3):
    """(x, mask, size, weights) of units; the last unit of the last row has nothing."""
    _, widths, sizes = CASES[name]
    rng = np.random.default_rng(2)
    x = [
        rng.normal(size=(B, U, G, C)).astype(np.float32) for G, C in zip(sizes, widths, strict=True)
    ]
    mask = [np.ones(f.shape[:3], bool) for f in x]
    for f, m in zip(x, mask, strict=True):
        m[-1, -1], f[-1, -1] = False, 0
    size = np.tile(np.array([3, 4], np.int32), (B, U, 1))
    size[-1, -1] = 0
    weights = [rng.random(m.shape, np.float32) for m in mask]
    return tuple(x), tuple(mask), size, tuple(weights)


@pytest.mark.parametrize("name", CASES)
def test_shapes_and_gradients_with_an_empty_unit(name):
    """Every parameter gets a gradient; what an empty unit gives is finite, its gradient too."""
    module, (x, *rest) = connector(name), inputs(name)
    cfg = module.cfg
    graphdef, params = nn.unbind(module)

    def loss(params, x):
        tokens = nn.bind(graphdef, params)(x, *rest)
        return jnp.sin(tokens).sum(), tokens

    (_, tokens), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    rows = sum(f.shape[1] for f in x) if hasattr(cfg, "copies") else x[0].shape[1]
    assert tokens.shape == (2, rows, cfg.tokens, OUT)
    assert np.isfinite(tokens).all()
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    silent = {p for p, g in nn.flatten(grads[0]).items() if not np.abs(g).any()}
    assert silent == {p for p in nn.flatten(params) if p.startswith("specials/")}
    assert module.specials(jnp.bfloat16).shape == (len(cfg.specials), OUT)
    assert isinstance(cfg.unit, batch.UnitRule)
    assert isinstance(hash(cfg), int)


@pytest.mark.parametrize("name", sorted({name.split()[0] for name in CASES}))
def test_parameters_are_drawn(name):
    """Norms and biases begin as nothing, all others with a deviation of about what they sum."""
    cfg, in_widths, _ = CASES[name]
    make = CONNECTORS[name][1]
    draw = jax.jit(lambda: nn.unbind(make(cfg, in_widths, OUT, rngs=nnx.Rngs(0)))[1])
    for path, x in nn.flatten(draw()).items():
        if path.endswith(("scale", "bias")):
            np.testing.assert_array_equal(x, float(path.endswith("scale")), err_msg=path)
        else:
            assert 0.01 < x.std() <= 1.1, path


@pytest.mark.parametrize("name", CASES)
def test_units_do_not_meet(name):
    """A unit gives the same wherever it is, and in bf16 about the same."""
    module, (x, mask, size, weights) = connector(name), inputs(name)
    cut = [jax.tree.map(lambda a: a[:1, 1:2], part) for part in (x, mask, size, weights)]
    alone, together = run(module, *cut), run(module, x, mask, size, weights)
    places = [1, 4] if hasattr(module.cfg, "copies") and len(x) > 1 else [1]
    close(alone[0], np.asarray(together)[0, places], 1e-5)
    half = run(module, jax.tree.map(lambda f: f.astype(jnp.bfloat16), x), mask, size, weights)
    assert half.dtype == jnp.bfloat16
    close(half.astype(np.float32), np.asarray(together), 0.1)


@pytest.mark.parametrize("name", ["resampler", "perceiver", "qformer", "mlp max"])
def test_absent_patches_do_not_matter(name):
    module, ((x,), (mask,), size, weights) = connector(name), inputs(name)
    mask = mask & (np.arange(mask.shape[2]) % 3 > 0)
    noise = np.random.default_rng(0).normal(size=x.shape).astype(np.float32)
    one, other = (
        run(module, (np.where(mask[..., None], x, y),), (mask,), size, weights)
        for y in (0 * noise, noise)
    )
    np.testing.assert_array_equal(one, other)


def test_gather_reads_hidden_patches_and_no_others():
    features = np.arange(1, 7, dtype=np.float32).reshape(1, 6, 1)
    x, mask = units.gather(features, np.array([[[0, -1, 4], [-2, -7, 5]]], np.int32))
    np.testing.assert_array_equal(x[0, :, :, 0], [[1, 0, 5], [1, 6, 6]])
    np.testing.assert_array_equal(mask[0], [[True, False, True], [False, False, True]])


def test_pool():
    tokens = np.array([[[1, -5], [3, -1], [8, -2]]], np.float32)
    index = np.array([[[0, 1], [2, -1], [-1, -1]]], np.int32)
    weights = np.array([[[0.25, 0.75], [1, 9], [9, 9]]], np.float32)
    for kind, want in (
        ("mean", [[2, -3], [8, -2], [0, 0]]),
        ("max", [[3, -1], [8, -2], [0, 0]]),
        ("weighted", [[2.5, -2], [8, -2], [0, 0]]),
    ):
        np.testing.assert_array_equal(units.pool(tokens, index, weights, kind)[0], want)


@pytest.mark.parametrize(("size", "bins"), [(24, 12), (24, 16), (48, 12), (6, 4), (3, 5)])
def test_resizing_as_torch_does(size, bins):
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    pooled = torch.nn.functional.adaptive_avg_pool2d(x, bins).numpy()
    p, r = pooling_bins(size, bins), bicubic(size, bins)
    close(p @ x.numpy() @ p.T, pooled, TOLERANCE)
    resized = torch.nn.functional.interpolate(x, (bins, bins), mode="bicubic").numpy()
    close(r @ x.numpy() @ r.T, resized, TOLERANCE)


def test_specials_have_the_size_of_embeddings():
    specials = Specials(("newline", "boi"), 4096, rngs=nnx.Rngs(0), scale=0.5)
    vectors = np.asarray(specials())
    assert vectors.shape == (2, 4096)
    # The deviation of 4,096 draws is itself known to 1.1 %; the bound is over four of these.
    np.testing.assert_allclose(vectors.std(1), 0.5 / 64, rtol=0.05)
    assert set(nn.flatten(nn.unbind(specials)[1])) == {"newline/embedding", "boi/embedding"}


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: MLPConfig(norm="rms"), "norm='rms'"),
        (lambda: MLPConfig(reduce="sum"), "reduce='sum'"),
        (lambda: MLPConfig(order="spiral"), "order='spiral'"),
        (lambda: CAbstractorConfig(queries=10), "queries=10"),
        (lambda: ResamplerConfig(queries=10, query_pos="sincos"), "queries=10"),
        (lambda: QFormerConfig(layers=3), "layers=3"),
        (lambda: SVAConfig(heads=7), "heads=7"),
        (lambda: ConvGLUConfig(8, conv="side"), "conv='side'"),
        (lambda: batch.UnitRule("map", order="cell"), "out="),
        (lambda: CONNECTORS["sva"][1](SVAConfig(), (6,), 8, rngs=None), "1 towers"),
        (lambda: CONNECTORS["c_abstractor"][1](CAbstractorConfig(), (6, 6), 8, rngs=None), "2 s"),
        (lambda: tables.rows(connector("mlp"), "torch"), "'torch'"),
        (lambda: tables.rows(connector("mlp"), "llava"), "dense_2/bias"),
    ],
)
def test_errors_name_what_is_wrong(make, named):
    with pytest.raises(ValueError, match=named):
        make()
