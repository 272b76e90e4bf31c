"""Properties of connectors that no golden file covers, and classes of transformers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from by_hand import close, flat, gather, load, random_connector, run, whole, windows
from flax import nnx
from transformers import (
    Idefics2Config,
    InternVLConfig,
    LlavaConfig,
    VipLlavaConfig,
)
from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.models.vipllava.modeling_vipllava import VipLlavaMultiModalProjector

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
        (lambda: SVAConfig(mode="both"), "mode='both'"),
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


def _reference(model):
    """A torch module with every parameter random, and its weights."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.copy_(p.data + 0.2 * torch.randn(p.shape, generator=generator))
    return model.eval(), {k: v.numpy() for k, v in model.state_dict().items()}


def _features(*shape):
    return np.random.default_rng(3).normal(size=shape).astype(np.float32)


def _vit(layers=2):
    return dict(hidden_size=6, intermediate_size=8, num_hidden_layers=layers, num_attention_heads=2)


TEXT = dict(model_type="llama", hidden_size=OUT, intermediate_size=12, num_attention_heads=2)


def _load_mlp(cfg, in_widths, layout, weights):
    return load(tables.abstract("mlp", cfg, in_widths, OUT), layout, weights)


def test_llava_against_transformers():
    vision = dict(model_type="clip_vision_model", **_vit())
    config = LlavaConfig(vision_config=vision, text_config=TEXT)
    reference, weights = _reference(LlavaMultiModalProjector(config))
    module, x = _load_mlp(MLPConfig(), (6,), "llava", weights), _features(2, 5, 6)
    theirs = reference(torch.tensor(x)).detach().numpy()
    close(flat(run(module, *((v,) for v in gather(x, windows(1, 5, 1))))), theirs, TOLERANCE)


def test_vipllava_against_transformers():
    """Layers of the tower are sources of the connector."""
    vision = dict(model_type="clip_vision_model", **_vit())
    layers = [-2, -5, 3]
    config = VipLlavaConfig(vision_config=vision, text_config=TEXT, vision_feature_layers=layers)
    reference, weights = _reference(VipLlavaMultiModalProjector(config))
    module, x = _load_mlp(MLPConfig(norm="layer"), (6,) * 3, "llava", weights), _features(2, 5, 18)
    theirs = reference(torch.tensor(x)).detach().numpy()
    sources = [gather(f, windows(1, 5, 1)) for f in np.split(x, 3, -1)]
    close(flat(run(module, *zip(*sources, strict=True))), theirs, TOLERANCE)


def test_internvl_against_transformers():
    config = InternVLConfig(vision_config=_vit(), text_config=TEXT)
    reference, weights = _reference(InternVLMultiModalProjector(config))
    cfg = MLPConfig(window=2, norm="layer")
    module, x = _load_mlp(cfg, (6,), "internvl_transformers", weights), _features(2, 4, 6, 6)
    x, mask = gather(x.reshape(2, 24, 6), windows(4, 6, 2))
    theirs = reference(torch.tensor(np.asarray(x).reshape(2, 6, 24))).detach().numpy()
    close(flat(run(module, (x,), (mask,))), theirs, TOLERANCE)


def test_perceiver_against_transformers():
    sizes = dict(resampler_n_latents=3, resampler_depth=2, resampler_n_heads=4)
    perceiver = dict(hidden_size=OUT, resampler_head_dim=6, num_key_value_heads=2, **sizes)
    config = Idefics2Config(
        vision_config=_vit(),
        text_config=TEXT | dict(model_type="mistral"),
        perceiver_config=perceiver,
    )
    config.perceiver_config._attn_implementation = "eager"
    reference, weights = _reference(Idefics2Connector(config))
    cfg = PerceiverConfig(3, 2, 4, 2, 6, hidden=12)
    module = load(tables.abstract("perceiver", cfg, (6,), OUT), "idefics2", weights)
    x, (_, mask) = _features(2, 7, 6), gather(_features(2, 7, 6), whole(7))
    mask = np.asarray(mask) & (np.arange(7) < np.array([7, 4])[:, None, None])
    theirs = reference(torch.tensor(x), torch.tensor(mask[:, 0])).detach().numpy()
    close(run(module, (x[:, None],), (mask,))[:, 0], theirs, TOLERANCE)
