"""DiffFP on the device against the host rule, bit for bit, and what its kernel moves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from vlmjax.aot.compile import no_cache
from vlmjax.aot.topology import Topology
from vlmjax.data import diffp
from vlmjax.kernels.diff_prune import api, pallas_tpu

SMALL = [((3, 4, 12, 2), 0.1, 1), ((1, 9, 27, 3), 0.1, 1), ((5, 7, 40, 1), 0.37, 3)]
# (frames, patches, values of a patch, merge), threshold, fewest kept: one block and several, with
# and without a rest.
CASES = [
    ((11, 132, 12, 2), 0.37, 3),
    ((2, 300, 588, 2), 0.1, 1),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in SMALL),
]


@pytest.fixture(params=["ref", "pallas_tpu"])
def prune(request, monkeypatch):
    how = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    monkeypatch.setattr(pallas_tpu, "INTERPRET", how)
    static = ("merge", "threshold", "min_kept", "kind")
    yield functools.partial(jax.jit(api.prune, static_argnames=static), kind=request.param)
    if request.param == "pallas_tpu":
        assert not interpret_pallas_call.races.races_found


def video(frames, patches, values, merge, threshold=0.1):
    """u8[frames, patches, values]: a window stays, changes by about the threshold, or is new."""
    rng = np.random.default_rng(frames)
    out = rng.integers(0, 256, (frames, patches, values), dtype=np.uint8)
    windows = out.reshape(frames, patches // merge**2, -1)
    n = windows.shape[-1]
    edge = api.least_sum(n, threshold)
    for t in range(1, frames):
        for w, kind in enumerate(rng.integers(0, 5, windows.shape[1])):
            if kind < 4:
                amount = (0, edge - 1, edge, edge + 1)[kind]
                change = amount // n + (np.arange(n) < amount % n)
                before = windows[t - 1, w].astype(int)
                windows[t, w] = before + np.where(before < 128, change, -change)
    return out


def host(frames, merge, threshold, min_kept):
    """Scores and keep masks of `data.diffp`; a first frame has no scores."""
    scores = [
        diffp.change_scores(a, b, merge) for a, b in zip(frames[:-1], frames[1:], strict=True)
    ]
    masks = diffp.keep_masks(frames, merge, threshold, min_kept)
    return np.stack([np.full(masks[0].shape, np.inf, np.float32), *scores]), np.stack(masks)


@pytest.mark.parametrize("size, threshold, min_kept", CASES, ids=str)
def test_equals_the_host_rule(size, threshold, min_kept, prune):
    frames, merge = video(*size, threshold=threshold), size[-1]
    got = prune(frames, merge=merge, threshold=threshold, min_kept=min_kept)
    scores, keep = host(frames, merge, threshold, min_kept)
    np.testing.assert_array_equal(got.scores, scores)
    np.testing.assert_array_equal(got.keep, keep)


def test_streaming_equals_the_whole_video(prune):
    frames = video(3, 24, 12, 2)
    parts = prune(frames[:2], merge=2), prune(frames[2:], frames[1], merge=2)
    for got, want in zip(zip(*parts, strict=True), host(frames, 2, 0.1, 1), strict=True):
        np.testing.assert_array_equal(np.concatenate(got), want)


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.1, 3.7, 509.9, 510.0, np.inf])
def test_the_threshold_in_integers_is_the_hosts(threshold):
    scores = diffp.score(np.arange(255 * 12 + 1), 12)
    kept = np.arange(255 * 12 + 1) >= api.least_sum(12, threshold)
    np.testing.assert_array_equal(kept, scores > np.float32(threshold))


@pytest.mark.parametrize("size", [1, 20, 60, 70])
def test_compaction_is_stable(size):
    keep = np.random.default_rng(size).random((6, 10)) < 0.4
    places, count = jax.jit(api.compact, static_argnames="size")(keep, size=size)
    want = np.full(size, -1)
    want[: keep.sum()] = np.flatnonzero(keep)[:size]
    np.testing.assert_array_equal(places, want)
    assert count == keep.sum()


def test_impossible_frames_are_refused():
    with pytest.raises(ValueError, match=r"int32\[2, 6, 12\], merge=2: give uint8 pixels"):
        api.prune(jnp.zeros((2, 6, 12), jnp.int32), merge=2)
    with pytest.raises(ValueError, match="kind='gpu' is unknown; choose 'auto' or one of"):
        api.prune(jnp.zeros((2, 4, 12), jnp.uint8), merge=2, kind="gpu")


# Three minutes of 336 x 336 at a frame a second, other sizes, a frame of a stream.
COMPILED = [(180, 576, 588), (33, 1020, 588), (5, 9, 768), (180, 64, 3072), (1, 576, 588)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "chip",
    ["v5e:2x2", *(pytest.param(c, marks=pytest.mark.long) for c in ("v5p:2x2x1", "v6e:2x2"))],
)
def test_compiles_ahead_of_time(chip):
    """By the real compiler: every frame moves once, and nothing beside the results is stored."""
    mesh = jax.sharding.Mesh(Topology(chip).devices[:1], ("x",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    for F, P, D in COMPILED:
        frames, previous = (
            jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=whole) for shape in ((F, P, D), (P, D))
        )
        prune = jax.jit(functools.partial(api.prune, merge=2 if P % 4 == 0 else 3))
        with jax.set_mesh(mesh), no_cache():
            program = prune.lower(frames, previous).compile()
        assert program.as_text().count('custom_call_target="tpu_custom_call"') == 1
        if (F, P) == (180, 576):
            assert F * P * D < program.cost_analysis()["bytes accessed"] < 1.1 * F * P * D
            assert program.memory_analysis().temp_size_in_bytes < 0.05 * F * P * D
