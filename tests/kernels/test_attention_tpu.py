"""The TPU kernels under the interpreter that knows memories, copies and races, and compiled."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vlmjax.aot.compile import no_cache
from vlmjax.aot.topology import Topology
from vlmjax.kernels.attention import api, pallas_tpu, ref, worklist
from vlmjax.kernels.attention.api import AttentionSpec
from vlmjax.kernels.attention.intervals import needed_pairs

BLOCK = 128
# name: (lengths in each row, slots, query heads, kv heads, head size, causal, cores)
LAYOUTS = {
    "frames": ([[128, 128, 128]], 384, 2, 2, 72, False, 1),
    "one segment": ([[384]], 384, 2, 2, 72, False, 1),
    "one segment, causal": ([[384]], 384, 4, 1, 128, True, 1),
    "ragged": ([[100, 3, 170, 111]], 384, 2, 2, 72, False, 1),
    "one-token segments": ([[1] * 200 + [150]], 384, 2, 2, 72, False, 1),
    "one-token segments, causal": ([[1] * 300], 384, 2, 2, 128, True, 1),
    "padding": ([[50, 90]], 512, 2, 2, 72, False, 1),
    "empty row": ([[], [200, 56]], 256, 2, 2, 128, False, 1),
    "rows": ([[200, 100], [30, 1, 300]], 384, 4, 1, 128, True, 1),
    "7:1": ([[90, 200]], 384, 7, 1, 128, True, 1),
    "groups of heads": ([[130, 200]], 384, 32, 8, 64, True, 1),
    "odd slots": ([[140, 100]], 300, 2, 1, 64, True, 1),
    "two cores": ([[300, 80]], 512, 2, 2, 72, False, 2),
    "two cores, causal": ([[300, 80], [1, 2, 3, 400]], 512, 4, 1, 128, True, 2),
}
QUICK = ("ragged", "two cores, causal")


def segments_of(rows, slots):
    out = np.zeros((len(rows), slots), np.int32)
    for row, lengths in enumerate(rows):
        ends = np.cumsum([0, *lengths])
        for i, (a, b) in enumerate(zip(ends[:-1], ends[1:], strict=True), 1):
            out[row, a:b] = i
    return jnp.asarray(out)


@pytest.fixture(params=[0])
def interpreter(monkeypatch):
    def use(cores):
        how = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=cores)
        monkeypatch.setattr(pallas_tpu, "INTERPRET", how)

    return use


@pytest.mark.parametrize(
    "layout", [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in LAYOUTS]
)
def test_kernels_equal_ref_without_races(layout, interpreter):
    rows, slots, heads, kv_heads, size, causal, cores = LAYOUTS[layout]
    interpreter(cores)
    segments, B = segments_of(rows, slots), len(rows)
    rng = np.random.default_rng(0)
    q, g = (rng.normal(size=(B, slots, heads, size)).astype(np.float32) for _ in "qg")
    k, v = (rng.normal(size=(B, slots, kv_heads, size)).astype(np.float32) for _ in "kv")

    def value_and_grads(attend):
        def f(q, k, v):
            out = attend(q, k, v)
            return (out * g).sum(), out

        grads, out = jax.grad(f, (0, 1, 2), has_aux=True)(q, k, v)
        return out, *grads

    turned = (size, size // 2, 0)[list(LAYOUTS).index(layout) % 3]  # channels
    angles = rng.normal(size=(B, slots, turned // 2)).astype(np.float32)
    turn = np.cos(angles), np.sin(angles)

    def kernel(q, k, v):
        work = pallas_tpu.plan(segments, segments, 0, BLOCK, causal, cores)
        turns = (tuple(x.swapaxes(1, 2) for x in turn),) * 2 if turned else None
        spec = AttentionSpec("pallas_tpu", BLOCK)
        return pallas_tpu.attention(q, k, v, work, turns, spec, causal)

    def definition(q, k, v):
        q, k = ref.rotate(q, *turn), ref.rotate(k, *turn)
        return ref.masked_attention(q, k, v, ref.segment_mask(segments, segments, causal))

    got, want = value_and_grads(kernel), value_and_grads(definition)
    assert not interpret_pallas_call.races.races_found
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)
    for a, b in zip(got[1:], want[1:], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * max(1, float(jnp.abs(b).max())))


def random_rows(rng, slots):
    rows = []
    for _ in range(3):
        lengths = []
        while sum(lengths) < slots - 300:
            lengths.append(int(rng.integers(1, 700)))
        rows.append(lengths[: len(lengths) - 1])
    return segments_of([*rows, []], slots)


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("start", [0, 768])
def test_listed_pairs_are_exactly_the_needed_ones(causal, start, cores):
    """Against the dense mask, both lists; flags, order and parts are as the kernels need."""
    segments = random_rows(np.random.default_rng(start + cores), 2048)
    queries = segments[:, start : start + 1024]
    B, n, m = 4, 1024 // BLOCK, 2048 // BLOCK
    plan = pallas_tpu.plan(queries, segments, start, BLOCK, causal, cores)
    mask = np.asarray(ref.segment_mask(queries, segments, causal, start))
    needed = mask.reshape(B, n, BLOCK, m, BLOCK).any((2, 4))
    np.testing.assert_array_equal(needed, needed_pairs(queries, segments, start, BLOCK, causal))
    want = {(b * n + i, b * m + j) for b, i, j in zip(*np.nonzero(needed), strict=True)}
    for work, outer in ((plan.by_query, 0), (plan.by_key, 1)):
        parts = np.asarray(work.parts[0])
        entries = np.asarray(work.pairs).reshape(-1)[: parts[-1]]
        blocks = np.stack([worklist.query_of(entries), worklist.key_of(entries)], 1)
        works = entries & worklist.WORK != 0
        listed = [tuple(map(int, x)) for x in blocks[works]]
        assert set(listed) == want and len(listed) == len(want)
        own = blocks[:, outer]
        assert (np.diff(own) >= 0).all() and set(own) == set(range(B * (n, m)[outer]))
        edges = np.flatnonzero(np.diff(own, prepend=-1))
        np.testing.assert_array_equal(np.flatnonzero(entries & worklist.FIRST), edges)
        np.testing.assert_array_equal(
            np.flatnonzero(entries & worklist.LAST), [*(edges[1:] - 1), len(entries) - 1]
        )
        for part, (a, b) in enumerate(zip(parts[:-1], parts[1:], strict=True)):
            assert b > a and (a in edges)  # no core is idle, none shares an output block
            seen = set()
            for entry, pair, does in zip(entries[a:b], blocks[a:b], works[a:b], strict=True):
                inner = int(pair[1 - outer])
                assert not does or bool(entry & worklist.NEW) == (inner not in seen)
                seen |= {inner} if does else set()
            if outer == 1:
                met = np.flatnonzero(np.asarray(plan.met)[:, part].reshape(-1))
                assert seen == set(met.tolist())


def test_work_follows_the_sum_of_squares():
    frames = jnp.repeat(jnp.arange(1, 65), 256)[None]
    for segments, pairs in ((frames, 64), (jnp.ones_like(frames), 64 * 64)):
        plan = pallas_tpu.plan(segments, segments, 0, 256, False)
        assert int(plan.by_query.parts[0, -1]) == int(plan.by_key.parts[0, -1]) == pairs


@pytest.mark.parametrize("rows, slots, block", [(4, 1024 * 256, 128), (1, 131072, 256)])
def test_too_many_blocks_are_refused(rows, slots, block):
    """More than an entry can number, and a list of 1 MiB, which the compiler refused."""
    segments = jax.ShapeDtypeStruct((rows, slots), jnp.int32)
    plan = functools.partial(pallas_tpu.plan, q_start=0, causal=True)
    with pytest.raises(NotImplementedError, match="larger block than"):
        jax.eval_shape(lambda s: plan(s, s, block=block), segments)
    jax.eval_shape(lambda s: plan(s, s, block=16 * block), segments)


SHAPES = {  # slots, heads, kv heads, head size, causal
    "16k patches": (16384, 16, 16, 72, False),
    "65k patches": (65536, 16, 16, 72, False),
    "16k tokens": (16384, 12, 2, 128, True),
}


CHIPS = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"]
# The largest on every chip, causal and grouped heads on one.
COMPILED = [("65k patches", chip) for chip in CHIPS] + [("16k tokens", "v5e:2x2")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "chip"),
    [
        pytest.param(*case, marks=() if case in COMPILED else pytest.mark.long)
        for case in itertools.product(SHAPES, CHIPS)
    ],
)
def test_kernels_compile_for_chips_that_are_not_here(shape, chip):
    """By the real compiler; logits never exist in HBM and the list is what the grid is made of."""
    slots, heads, kv_heads, size, causal = SHAPES[shape]
    mesh = Mesh(np.array(Topology(chip).devices[:1]), ("x",), axis_types=(AxisType.Auto,))
    spec = AttentionSpec()

    def step(q, k, v, segments, angles, g):
        how = spec.resolve(size, causal)
        work = api.plan(segments, segments, 0, angles, angles, causal=causal, spec=how)
        attend = functools.partial(api.attention, plan=work, causal=causal, spec=how)
        out, back = jax.vjp(attend, q, k, v)
        return out, back(g)

    q = jax.ShapeDtypeStruct((1, slots, heads, size), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, slots, kv_heads, size), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((1, slots), jnp.int32)
    angles = jax.ShapeDtypeStruct((1, slots, size // 2), jnp.float32)
    with jax.set_mesh(mesh), no_cache():
        where = NamedSharding(mesh, PartitionSpec())
        compiled = jax.jit(step, in_shardings=where).lower(q, k, k, segments, angles, q).compile()
    text = compiled.as_text()
    assert text.count("tpu_custom_call") >= 2 and "segment_attention_backward" in text
    # At most eight arrays of the size of q in float32, where dense logits would be thousands.
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * 4 * slots * heads * 128
