"""Properties of the model that no reference covers."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from vlmjax import rope
from vlmjax.batch import Budget, Form, TowerForm
from vlmjax.connectors.mlp import MLPConfig
from vlmjax.data.pack import pack
from vlmjax.data.sample import Item, Sample
from vlmjax.llm.decoder import DecoderConfig
from vlmjax.nn import bind, flatten, unbind, unflatten
from vlmjax.vision.vit import ViTConfig
from vlmjax.vlm import VLM, Compute, VLMConfig

CONFIG = VLMConfig(
    vision=ViTConfig(width=24, mlp=40, layers=2, heads=2, patch=4),
    connector=MLPConfig(),
    llm=DecoderConfig(61, 32, 44, 2, 4, 2, 8),
    compute=Compute(vision_block=8, llm_block=8),
)


@functools.cache
def model():
    """Returns the model; every bias and scale is random too."""
    graphdef, params = unbind(VLM(CONFIG, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    flat = {
        p: x + 0.1 * rng.normal(size=x.shape).astype(np.float32) for p, x in flatten(params).items()
    }
    return graphdef, unflatten(flat)


@jax.jit
def logits(params, batch):
    return bind(model()[0], params).logits(batch)


@jax.jit
def encode(params, batch):
    return bind(model()[0], params).encode(batch).tokens


def item(rng, grid, merge, kept=1.0):
    count = grid[0] * grid[1] // merge**2
    keep = rng.random(count) < kept
    keep[0] = True
    return Item(rng.integers(0, 256, (grid[0] * grid[1], 48), dtype=np.uint8), grid, merge, keep)


def sample(number, text=6):
    """A text, an image, an image pair or a pruned video, by number."""
    rng = np.random.default_rng(number)
    kinds = [(), (((2, 3), 1, 1.0),), (((1, 5), 1, 1.0), ((4, 2), 2, 1.0)), (((4, 4), 2, 0.5),) * 3]
    items = tuple(item(rng, *shape) for shape in kinds[number % 4])
    visual = np.zeros(text, bool)
    for it in items:
        visual = np.insert(visual, 2, np.ones(int(it.keep.sum()), bool))
    tokens = rng.integers(0, 61, len(visual)).astype(np.int32)
    return Sample(str(number), tokens, tokens.copy(), items, visual)


def run(samples, budget):
    """Returns the logits of each sample of one packed row."""
    batch, _ = pack([samples], budget, Form((TowerForm(4),)))
    out = np.asarray(logits(model()[1], batch))[0]
    return [out[batch.segments[0] == k + 1] for k in range(len(samples))]


def test_packed_equals_separate():
    samples = [sample(n) for n in range(4)]
    budget = Budget(64, 80, 40, 4)
    for one, together in zip(samples, run(samples, budget), strict=True):
        alone = run([one], budget)[0]
        np.testing.assert_allclose(together, alone, atol=1e-5 * np.abs(alone).max())


@pytest.mark.parametrize("number", range(4))
def test_padding_changes_nothing(number):
    """Neither how much there is nor what it holds."""
    one = sample(number)
    small, large = Budget(24, 56, 24, 4), Budget(64, 80, 40, 4)
    want = run([one], small)[0]
    np.testing.assert_allclose(run([one], large)[0], want, atol=1e-5 * np.abs(want).max())
    batch, _ = pack([[one]], large, Form((TowerForm(4),)))
    pad_t, pad_p = batch.segments == 0, batch.patches[0].segments == 0
    batch.tokens[pad_t], batch.positions[pad_t], batch.patches[0].pixels[pad_p] = 17, 5, 99
    noisy = np.asarray(logits(model()[1], batch))[0][~pad_t[0]]
    np.testing.assert_allclose(noisy, want, atol=1e-5 * np.abs(want).max())


def test_video_encoded_whole_equals_frame_by_frame():
    video = sample(3)
    budget = Budget(64, 80, 40, 4)
    whole = np.asarray(encode(model()[1], pack([[video]], budget, Form((TowerForm(4),)))[0]))[0]
    at = 0
    for frame in video.items:
        n = int(frame.keep.sum())
        alone = Sample("f", video.tokens[:n], video.labels[:n], (frame,), np.ones(n, bool))
        batch, _ = pack([[alone]], budget, Form((TowerForm(4),)))
        out = np.asarray(encode(model()[1], batch))[0, :n]
        np.testing.assert_allclose(whole[at : at + n], out, atol=1e-5 * np.abs(out).max())
        at += n


def test_a_row_does_not_depend_on_the_other_rows():
    budget = Budget(32, 80, 40, 4)
    two, _ = pack([[sample(1)], [sample(3)]], budget, Form((TowerForm(4),)))
    one, _ = pack([[sample(1)], []], budget, Form((TowerForm(4),)))
    np.testing.assert_array_equal(*(np.asarray(logits(model()[1], b))[0] for b in (two, one)))


def test_rope_2d_depends_on_offsets_only():
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=(1, 6, 2, 16)).astype(np.float32) for _ in "qk")
    coords = rng.integers(0, 9, (1, 6, 2))

    def scores(shift):
        angles = rope.angles_2d(coords + np.array(shift), 16, 1e4)
        return np.einsum("btnh,bsnh->bnts", rope.rotate(q, angles), rope.rotate(k, angles))

    np.testing.assert_allclose(scores((0, 0)), scores((31, 7)), atol=1e-4)
    assert np.abs(scores((0, 0)) - np.einsum("btnh,bsnh->bnts", q, k)).max() > 0.1
