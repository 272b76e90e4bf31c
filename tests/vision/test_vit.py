"""What holds for every tower: sizes, pixels, packing, positions, gradients, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from views import REF, error, pack, view

from vlmjax.batch import Patches
from vlmjax.kernels.attention.api import AttentionSpec
from vlmjax.nn import bind, flatten, unbind
from vlmjax.vision import position
from vlmjax.vision.convnext import PRESETS as CONVNEXTS
from vlmjax.vision.convnext import ConvNeXt, ConvNeXtConfig
from vlmjax.vision.pixels import CLIP, HALF, normalise
from vlmjax.vision.vit import PRESETS, ViT, ViTConfig

SMALL = dict(width=24, mlp=40, layers=2, heads=2, patch=4)
TOWERS = {  # one of each kind
    name: ViTConfig(**PRESETS[name] | SMALL | (dict(side=5) if "side" in PRESETS[name] else {}))
    for name in (
        "siglip_so400m_14",
        "clip_l_14_336",
        "internvit_6b_v1_5",
        "dinov2_l_14_reg4",
        "dinov2_g_14",
        "eva2_clip_e",
    )
}
SIZES = (20, 20), (8, 12), (28, 16)  # the table's own, smaller, larger on one axis

# Of the parameters that configurations and checkpoints of others have. Those of MiniCPM-V 2.0 and
# CogVLM2 are what is left of the official index files (3,434,965,792 parameters with a decoder of
# 3,007,703,808 and a resampler of 29,514,240; 19,503,105,280 with a decoder of 15,009,779,712 and
# an adapter of 196,364,032); InternVL publishes 304.01M, 5.54B and 5.9B.
TOTALS = {
    "siglip_so400m_14_384": 412_987_248,
    "siglip_minicpm_v_2": 3_434_965_792 - 3_007_703_808 - 29_514_240,
    "clip_l_14_336": 303_507_456,
    "dfn5b_h_14_378": 631_371_520,
    "internvit_6b_v1_0": 5_902_793_600,
    "internvit_6b_v1_5": 5_536_496_000,
    "internvit_300m": 304_012_288,
    "dinov2_l_14": 304_367_616,
    "dinov2_l_14_reg4": 304_371_712,
    "dinov2_g_14": 1_136_479_232,
    "eva2_clip_e": 19_503_105_280 - 15_009_779_712 - 196_364_032,
}


def total(make):
    return sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: unbind(make())[1])))


@pytest.mark.parametrize("name", TOTALS)
def test_parameters_of_presets(name):
    assert total(lambda: ViT(ViTConfig(**PRESETS[name]), rngs=nnx.Rngs(0))) == TOTALS[name]


def test_parameters_of_convnext():
    cfg = ConvNeXtConfig(**CONVNEXTS["convnext_xxl"])
    assert total(lambda: ConvNeXt(cfg, rngs=nnx.Rngs(0))) == 843_391_872  # 843.4M
    assert (cfg.out_grid(256, 256), cfg.out_width) == ((96, 96), 5760)


def test_features_are_those_of_a_shorter_tower():
    whole = ViTConfig(**PRESETS["clip_l_14_336"])
    before = dataclasses.replace(whole, features="-2")
    assert (whole.blocks, before.blocks) == (24, 23)
    block, norm = 12 * 1024**2 + 13 * 1024, 2 * 1024
    assert total(lambda: ViT(before, rngs=nnx.Rngs(0))) == TOTALS["clip_l_14_336"] - block - norm


def random_tower(cfg, seed=0):
    """A tower under whose weights every term shows."""
    graphdef, params = unbind(ViT(cfg, rngs=nnx.Rngs(seed)))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    leaves = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return bind(graphdef, jax.tree.unflatten(tree, leaves))


def pictures(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (3, *size), dtype=np.uint8) for size in SIZES]


@pytest.mark.parametrize("name", TOWERS)
def test_packed_views_equal_separate_ones(name):
    """Of different sizes: together in a row without padding, and alone in rows of padding."""
    cfg = TOWERS[name]
    images = pictures()[: 2 if cfg.position == "table" else 3]
    views = [view(cfg, image) for image in images]
    for (pixels, _), image in zip(views, images, strict=True):
        assert len(pixels) == cfg.prefix + np.prod(cfg.out_grid(*(n // 4 for n in image.shape[1:])))
    sizes = [len(pixels) for pixels, _ in views]
    rows = [pack(views), *(pack([x], sum(sizes) - len(x[0])) for x in views)]
    patches = Patches(*(np.concatenate(x) for x in zip(*rows, strict=True)))
    out = jax.jit(lambda m, p: m(p, attention=REF))(random_tower(cfg), patches)
    for i, together in enumerate(np.split(out[0], np.cumsum(sizes)[:-1])):
        assert error(out[i + 1, : sizes[i]], together) < 2e-5


@pytest.mark.parametrize("name", ["internvit_6b_v1_5"])
def test_blockwise_attention_and_bfloat16(name):
    cfg = TOWERS[name]
    model, patches = random_tower(cfg), pack([view(cfg, x) for x in pictures()[:2]], 4)
    real = patches.segments[0] > 0
    how = dict(attention=AttentionSpec("blockwise", 8))
    want = model(patches, attention=REF)[0, real]
    assert error(model(patches, **how)[0, real], np.asarray(want)) < 1e-5
    low = model(patches, dtype=jnp.bfloat16, **how)
    assert low.dtype == jnp.bfloat16
    assert error(low[0, real].astype(jnp.float32), np.asarray(want)) < 0.05


@pytest.mark.parametrize("name", TOWERS)
def test_every_parameter_gets_a_gradient(name):
    cfg = TOWERS[name]
    graphdef, params = unbind(random_tower(cfg))
    patches = pack([view(cfg, x) for x in pictures()[:2]], 4)
    weight = np.random.default_rng(3).normal(size=(*patches.segments.shape, cfg.width))
    weight *= patches.segments[..., None] > 0

    @jax.jit
    def gradient(params):
        def loss(params):
            return (bind(graphdef, params)(patches, attention=REF, remat="full") * weight).sum()

        return jax.grad(loss)(params)

    for path, g in flatten(gradient(params)).items():
        assert np.isfinite(g).all(), path
        if path != "blocks/attn/k/bias" or cfg.position == "rope2d" or cfg.qk_norm:
            assert np.abs(g).max() > 1e-4, path  # softmax does not see a bias of keys


def test_pixels_are_normalised_once():
    image = np.arange(256, dtype=np.uint8).reshape(-1, 1).repeat(12, 1)
    mean, std = (np.repeat(np.array(CLIP[x]), 4) for x in ("mean", "std"))
    wanted = (image / 255 - mean) / std
    np.testing.assert_allclose(normalise(image, **CLIP), wanted, atol=1e-6)
    done = wanted.astype(np.float32)
    np.testing.assert_array_equal(normalise(done, **CLIP), done)


def test_pixels_of_videollama3_keep_their_bits():
    image = np.arange(256, dtype=np.uint8).reshape(-1, 1).repeat(12, 1)
    before = jax.jit(lambda x: x.astype(jnp.float32) / 127.5 - 1)(image)
    ours = jax.jit(lambda x: normalise(x, **HALF))(image)
    np.testing.assert_array_equal(ours, before)


@pytest.mark.parametrize("size", [(5, 5), (3, 8), (9, 2), (1, 17), (10, 10)])
@pytest.mark.parametrize("how", ["bicubic", "bicubic_antialias"])
def test_tables_are_resized_as_in_torch(how, size):
    table = np.random.default_rng(0).normal(size=(26, 6)).astype(np.float32)
    coords = (np.stack(np.mgrid[: size[0], : size[1]], -1).reshape(-1, 2) + 0.5) * 5 / size - 0.5
    coords = np.concatenate([[[-1, 0], [-2, 0]], coords]).astype(np.float32)
    segments = np.ones((1, len(coords)), np.int32)
    ours = position.sample(jnp.asarray(table), how, segments, jnp.asarray(coords[None]))[0]
    x = torch.tensor(table[1:].reshape(1, 5, 5, 6)).permute(0, 3, 1, 2)
    antialias = how == "bicubic_antialias"
    x = torch.nn.functional.interpolate(x, size, mode="bicubic", antialias=antialias)
    np.testing.assert_allclose(ours[2:], x[0].permute(1, 2, 0).reshape(-1, 6), atol=5e-6)
    np.testing.assert_array_equal(ours[0], table[0])  # the class token
    np.testing.assert_array_equal(ours[1], 0)  # a register
    if size == (5, 5):
        looked_up = position.sample(jnp.asarray(table), "table", segments, coords[None])[0]
        np.testing.assert_allclose(ours, looked_up, atol=2e-6)


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(norm="batch"), "choose one of"),
        (dict(order="sandwich"), "choose one of"),
        (dict(position="sincos"), "choose one of"),
        (dict(width=26, heads=4), "head size"),
        (dict(width=36, heads=6), "multiple of 4"),
        (dict(prefix=1), "a place for a class token"),
        (dict(position="table"), "needs its side"),
        (dict(side=4), "needs its side"),
        (dict(features="-3"), "'-1' to '-2'"),
        (dict(features="-0"), "'-1' to '-2'"),
        (dict(features="penultimate"), "choose 'last'"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        ViTConfig(**SMALL | changes)


def test_convnext_takes_whole_images():
    cfg = ConvNeXtConfig(widths=(4, 8), depths=(1, 2), rows=4, columns=2, grid=3)
    graphdef, params = unbind(ConvNeXt(cfg, rngs=nnx.Rngs(0)))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 24, 48), dtype=np.uint8)
    patches = Patches(pixels, np.ones((2, 24), np.int32), np.zeros((2, 24, 2), np.float32))
    weight = np.random.default_rng(1).normal(size=(2, 3 * 9, 12))
    run = jax.jit(lambda params, patches: bind(graphdef, params)(patches, remat="full"))
    out = run(params, patches)
    alone = run(params, Patches(*(x[1:, 8:16] for x in patches)))
    assert error(out[1:, 9:18], alone) < 2e-5
    gradient = jax.jit(jax.grad(lambda params: (run(params, patches) * weight).sum()))(params)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))
    with pytest.raises(ValueError, match="whole number of images"):
        run(params, Patches(*(x[:, :20] for x in patches)))
    with pytest.raises(ValueError, match="resize the view"):
        cfg.out_grid(4, 4)
    with pytest.raises(ValueError, match="multiples of 2"):
        dataclasses.replace(cfg, columns=3)
