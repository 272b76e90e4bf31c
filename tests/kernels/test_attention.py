"""Every implementation of segment attention against the definition, and how much work it does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlmjax.kernels.attention import api, blocks, blockwise, ref

LAYOUTS = {
    "one": [40],
    "ragged": [7, 1, 19, 12],
    "ones": [1] * 24,
    "padding": [10, 13],
    "block_edges": [8, 16, 8],
    "empty": [],
}


def segments_of(*lengths, slots):
    row = np.zeros(slots, np.int32)
    at = 0
    for i, n in enumerate(lengths, 1):
        row[at : at + n] = i
        at += n
    return row


def make(layout, heads, kv_heads, size, seed=0):
    rng = np.random.default_rng(seed)
    segments = np.stack([segments_of(*LAYOUTS[layout], slots=43), segments_of(5, 30, slots=43)])
    q, g = (rng.normal(size=(2, 43, heads, size)).astype(np.float32) for _ in "qg")
    k, v = (rng.normal(size=(2, 43, kv_heads, size)).astype(np.float32) for _ in "kv")
    return segments, q, k, v, g * (segments > 0)[..., None, None]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [(2, 2), (4, 1), (7, 1)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_blockwise_equals_ref(layout, heads, causal):
    segments, q, k, v, g = make(layout, *heads, size=12)

    def value_and_grads(spec):
        def f(q, k, v):
            work = api.plan(segments, segments, 0, causal=causal, spec=spec)
            out = api.attention(q, k, v, work, causal=causal, spec=spec)
            return (out * g).sum(), out

        grads, out = jax.jit(jax.grad(f, (0, 1, 2), has_aux=True))(q, k, v)
        return out * (segments > 0)[..., None, None], *grads

    want = value_and_grads(api.AttentionSpec("ref"))
    got = value_and_grads(api.AttentionSpec("blockwise", 8))
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)
    for a, b in zip(got[1:], want[1:], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * max(1, float(jnp.abs(b).max())))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block", [4, 8, 16])
def test_executed_pairs_are_exactly_the_needed_ones(block, causal):
    """Counted against the dense mask: a block pair is listed iff some query in it may see a key."""
    rng = np.random.default_rng(1)
    rows = []
    for _ in range(6):
        lengths = []
        while sum(lengths) < 50:
            lengths.append(int(rng.integers(1, 20)))
        rows.append(segments_of(*lengths[:-1], slots=64))
    segments = jnp.array(rows)
    plan = blockwise.plan(segments, segments, 0, block, causal)
    mask = np.asarray(ref.segment_mask(segments, segments, causal))
    n = 64 // block
    needed = mask.reshape(len(rows), n, block, n, block).any((2, 4))
    for row in range(len(rows)):
        listed = np.asarray(plan.pairs[row, : plan.count[row]])
        assert sorted(map(tuple, listed)) == sorted(zip(*np.nonzero(needed[row]), strict=True))


def test_loop_runs_once_for_each_listed_pair():
    """Executed, not only listed: the loop body counts itself."""
    segments = jnp.array([segments_of(9, 20, 3, slots=40), segments_of(40, slots=40)])
    plan = blockwise.plan(segments, segments, 0, 8, True)
    visits = blockwise._for_each_pair(
        plan, lambda b, i, j, seen: seen.at[b, i, j].add(1), jnp.zeros((2, 5, 5), jnp.int32)
    )
    assert visits.max() == 1
    np.testing.assert_array_equal(visits.sum((1, 2)), plan.count)


def test_work_follows_the_sum_of_squares():
    """64 frames of 64 patches take 1/64 of the pairs of one segment of the same length."""
    frames = jnp.repeat(jnp.arange(1, 65), 64)[None]
    whole = jnp.ones((1, 64 * 64), jnp.int32)
    counts = [int(blockwise.plan(s, s, 0, 64, False).count[0]) for s in (frames, whole)]
    assert counts == [64, 64 * 64]


def test_a_share_of_the_queries_sees_the_keys_of_its_row():
    """Slots of a row spread over devices: each part of the queries, with all keys, is that part."""
    segments, q, k, v, _ = make("ragged", 4, 2, size=12)
    spec = api.AttentionSpec("blockwise", 8)

    def run(start, stop):
        mine = segments[:, start:stop]
        work = api.plan(mine, segments, start, causal=True, spec=spec)
        return api.attention(q[:, start:stop], k, v, work, causal=True, spec=spec)

    parts = jnp.concatenate([run(0, 16), run(16, 32), run(32, 43)], 1)
    np.testing.assert_allclose(parts, run(0, 43), atol=1e-6)


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="'flash' is unknown; choose 'auto' or one of"):
        api.AttentionSpec("flash").resolve(64, True)


def test_auto_is_the_kind_of_the_platform():
    assert api.AttentionSpec().resolve(64, True) == ("blockwise", 512, 0)


def test_blocks_follow_the_segments():
    """Small ones where a block would reach far beyond a segment, large ones in long segments."""
    for chip in blocks.TABLE:
        chosen = [blocks.best_block("pallas_tpu", chip, 128, True, n) for n in (64, 512, 65536, 0)]
        assert chosen == sorted(chosen) and chosen[0] < chosen[-1] == 512
        near = blocks.pair_cycles(chip, 80, False)
        assert near == blocks.pair_cycles(chip, 72, False) != blocks.pair_cycles(chip, 72, True)
    assert blocks.pair_cycles("TPU v9", 128, True) == {}
    assert blocks.best_block("pallas_tpu", "TPU v9", 128, True, 64) == 512
    assert blocks.best_block("blockwise", "cpu", 128, False, 64) == 256
