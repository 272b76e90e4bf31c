"""GPU kernels of segment attention, interpreted; JAX_PLATFORMS=cuda runs them on a GPU."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlmjax.kernels.attention import pallas_gpu, ref
from vlmjax.kernels.attention.api import AttentionSpec
from vlmjax.nn import REMAT

SLOTS, BLOCK = 150, 32
LAYOUTS = {
    "one": [150],
    "one_short": [37],
    "one_token": [1],
    "ones": [1] * 40,
    "ragged": [7, 1, 19, 12, 50, 33],
    "empty": [],
    "block_edges": [32, 64, 32],
    "tile_edges": [16, 48, 16, 70],
    "beside_edges": [31, 33, 1, 63, 17],
    "long_then_ones": [120, 1, 1, 1],
    "ones_between": [1, 30, 1, 30, 1, 30, 1],
    "padding": [10, 83],
}
SEGMENTS = np.stack(
    [
        np.repeat([*range(1, len(n) + 1), 0], [*n, SLOTS - sum(n)]).astype(np.int32)
        for n in LAYOUTS.values()
    ]
)
SOME = SEGMENTS[4:7]


def arrays(segments, heads, kv_heads, size, dtype="float32"):
    """Returns q, k, v and the gradient of the output, which is 0 at padding."""
    rng = np.random.default_rng(0)
    numbers = heads, kv_heads, kv_heads, heads
    q, k, v, g = (rng.normal(size=(*segments.shape, n, size)) for n in numbers)
    g = g * (segments > 0)[..., None, None]
    return [jnp.asarray(x, dtype) for x in (q, k, v, g)]


def value_and_grads(attend, q, k, v, g):
    """Returns [output, dq, dk, dv]."""

    @jax.jit
    def run(q, k, v, g):
        out, back = jax.vjp(attend, q, k, v)
        return out, *back(g)

    return run(q, k, v, g)


def by_kernel(segments, causal, queries=slice(None), block=BLOCK):
    """Returns the attention of a slice of the queries of rows to all keys."""

    def attend(q, k, v):
        start = jnp.asarray(queries.start or 0)
        work = pallas_gpu.plan(segments[:, queries], segments, start, block, causal)
        return pallas_gpu.attention(q, k, v, work, AttentionSpec("pallas_gpu", block), causal)

    return attend


def by_definition(segments, causal):
    mask = ref.segment_mask(segments, segments, causal)
    return lambda q, k, v: ref.masked_attention(q, k, v, mask)


def assert_close(got, want, tolerances):
    """Row by row, so that a failure says where; gradients relative to their largest."""
    for name, a, b, tolerance in zip(("out", "dq", "dk", "dv"), got, want, tolerances, strict=True):
        scale = max(1, float(jnp.abs(b).max())) if name != "out" else 1
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        for row, (x, y) in enumerate(zip(a, b, strict=True)):
            np.testing.assert_allclose(x, y, 0, tolerance * scale, err_msg=f"{name}, row {row}")


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "heads, size, causal",
    [
        ((2, 2), 72, False),
        ((2, 2), 128, True),
        ((4, 1), 72, True),
        ((4, 1), 128, False),
        ((7, 1), 72, False),
        slow((7, 1), 128, True),
        slow((7, 1), 128, False),
        slow((2, 2), 72, True),
        slow((2, 2), 64, True),
        slow((2, 2), 64, False),
    ],
)
def test_equals_ref(heads, size, causal):
    inputs = arrays(SEGMENTS, *heads, size)
    want = value_and_grads(by_definition(SEGMENTS, causal), *inputs)
    got = value_and_grads(by_kernel(SEGMENTS, causal), *inputs)
    assert_close(got, want, (1e-5, 1e-4, 1e-4, 1e-4))
    for x in got:
        assert not np.asarray(x)[SEGMENTS == 0].any()


@pytest.mark.parametrize("causal", [False, slow(True)])
def test_programs_that_take_a_part_of_a_block(causal):
    """As f32 does: 32 queries or keys of a block of 128."""
    inputs = arrays(SOME, 2, 1, 24)
    want = value_and_grads(by_definition(SOME, causal), *inputs)
    got = value_and_grads(by_kernel(SOME, causal, block=128), *inputs)
    assert_close(got, want, (1e-5, 1e-4, 1e-4, 1e-4))


def test_bfloat16_equals_ref():
    inputs = arrays(SOME, 2, 1, 24, "bfloat16")
    exact = [x.astype(jnp.float32) for x in inputs]
    want = value_and_grads(by_definition(SOME, True), *exact)
    got = value_and_grads(by_kernel(SOME, True), *inputs)
    assert {x.dtype.name for x in got} == {"bfloat16"}
    assert_close(got, want, (2e-2,) * 4)  # a bfloat16 has 8 bits


@pytest.mark.parametrize("causal", [True, slow(False)])
def test_parts_of_the_queries(causal):
    """A row cut in two, with all keys on both sides, as when the sequence is sharded."""
    q, k, v, g = arrays(SOME, 2, 1, 24)
    want = value_and_grads(by_kernel(SOME, causal), q, k, v, g)
    cut = 72  # neither a block nor a tile edge
    parts = [
        value_and_grads(by_kernel(SOME, causal, part), q[:, part], k, v, g[:, part])
        for part in (slice(0, cut), slice(cut, None))
    ]
    pairs = list(zip(*parts, strict=True))
    got = *(jnp.concatenate(pair, 1) for pair in pairs[:2]), *(a + b for a, b in pairs[2:])
    assert_close(got, want, (1e-5,) * 4)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block", pallas_gpu.BLOCKS)
def test_visited_pairs_are_exactly_the_needed_ones(block, causal):
    """And those visited without a mask are exactly the ones that need none."""
    work = pallas_gpu.plan(SEGMENTS, SEGMENTS, 0, block, causal)
    mask = np.asarray(ref.segment_mask(SEGMENTS, SEGMENTS, causal))
    mask = np.pad(mask, ((0, 0), *((0, -SLOTS % block),) * 2))
    B, T, S = mask.shape
    step = block // 2
    for tiles, dense in ((work.q_tiles, mask), (work.kv_tiles, mask.swapaxes(1, 2))):
        pairs = dense.reshape(B, T // block, block, S // step, step)
        tile, bounds = np.arange(S // step), np.asarray(tiles)[..., None]
        visited = (bounds[:, :, 0] <= tile) & (tile < bounds[:, :, 3])
        np.testing.assert_array_equal(visited, pairs.any((2, 4)))
        unmasked = (bounds[:, :, 1] <= tile) & (tile < bounds[:, :, 2])
        np.testing.assert_array_equal(unmasked, pairs.all((2, 4)))


def test_kernels_read_the_listed_tiles_and_no_other():
    """Executed, not only listed: NaN in any tile spoils exactly the blocks that list it."""
    q, k, v, g = arrays(SEGMENTS, 1, 1, 16)
    work, step = pallas_gpu.plan(SEGMENTS, SEGMENTS, 0, BLOCK, True), BLOCK // 2

    @jax.jit
    def spoiled(tile):
        bad = jnp.where(jnp.arange(SLOTS) // step == tile, jnp.nan, 0)[:, None, None]

        def attend(q, k, v):
            return pallas_gpu.attention(q, k, v, work, AttentionSpec("pallas_gpu", BLOCK), True)

        out, back = jax.vjp(attend, q, k, v + bad)
        dq = back(g)[0]
        dv = jax.vjp(attend, q, k, v)[1](g + bad)[2]
        return tuple(jnp.isnan(x).any((2, 3)) for x in (out, dq, dv))

    def blocks(x):
        return np.pad(x, ((0, 0), (0, -SLOTS % BLOCK))).reshape(len(x), -1, BLOCK).any(-1)

    for tile in range(math.ceil(SLOTS / step)):
        for x, tiles in zip(
            spoiled(tile), (work.q_tiles, work.q_tiles, work.kv_tiles), strict=True
        ):
            listed = (tiles[..., 0] <= tile) & (tile < tiles[..., 3])
            np.testing.assert_array_equal(blocks(np.asarray(x)), listed)


def test_remat_by_name_runs_the_forward_kernel_once():
    q, k, v, _ = arrays(SOME, 2, 2, 16)
    attend = jax.checkpoint(by_kernel(SOME, True), policy=REMAT["attention"])
    grad = jax.make_jaxpr(jax.grad(lambda q: attend(q, k, v).sum()))(q)
    names = re.findall(r"name=(segment_attention\w*)", str(grad))
    both = 2  # a branch of the jaxpr for CPUs and one for GPUs
    assert sorted(set(names)) == [
        "segment_attention",
        "segment_attention_dkv",
        "segment_attention_dq",
    ]
    assert names.count("segment_attention") == both


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize(
    "slots, heads, size, causal",
    [(16384, (12, 2), 128, True), (16384, (28, 4), 128, True), (16384, (16, 16), 72, False)],
)
def test_lowers_for_cuda_without_a_dense_array(slots, heads, size, causal):
    def step(q, k, v, g, segments):
        work = pallas_gpu.plan(segments, segments, 0, 128, causal)
        out, back = jax.vjp(
            lambda *x: pallas_gpu.attention(*x, work, AttentionSpec("pallas_gpu", 128), causal),
            q,
            k,
            v,
        )
        return out, back(g)

    q, kv = (jax.ShapeDtypeStruct((1, slots, n, size), jnp.bfloat16) for n in heads)
    segments = jax.ShapeDtypeStruct((1, slots), jnp.int32)
    chip = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=chip)):
        traced = jax.jit(step).trace(q, kv, kv, q, segments)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__gpu$xla.gpu.triton(") == 3
    shapes = set(re.findall(r"tensor<([\dx]+)x[a-z]", text))
    assert max(math.prod(map(int, s.split("x"))) for s in shapes) == math.prod(q.shape)


def test_impossible_blocks_are_refused():
    with pytest.raises(ValueError, match="block=256 is not one of .32, 64, 128."):
        pallas_gpu.plan(SEGMENTS, SEGMENTS, 0, 256, True)
