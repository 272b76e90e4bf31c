"""What crosses the network between TPU slices in a train step, by the real compiler."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from test_aot_collectives import collectives
from test_aot_plan import LLM, SIZES
from tiny import tiny_config

from vlmjax import build, sharding
from vlmjax.aot import report
from vlmjax.aot.plan import make_plan
from vlmjax.aot.topology import Topology

pytestmark = pytest.mark.slow
# Widths of which a quarter fills the 128 lanes of a register: no padding is sent.
WIDE = SIZES | dict(
    model__vision=dict(width=512, mlp=512, layers=2, heads=4, patch=8),
    model__llm=LLM | dict(width=512, mlp=512, kv_heads=4, head_dim=128),
    train__rows=8,
    mesh=dict(data=2, fsdp=-1, seq=1, tensor=1),
)


def size(shape):
    """Returns the number of elements of "f32[2,3]"."""
    return math.prod(map(int, re.search(r"\[([\d,]+)\]", shape)[1].split(",")))


def test_only_gradients_cross_slices_and_once(tmp_path):
    """Each chip sends the gradient of its part of the weights; FSDP gathers inside a slice."""
    run = build.resolve(tiny_config(tmp_path, **WIDE))
    plan = make_plan(run, "tiny", "2xv5e:2x2")
    assert plan["mesh"] == dict(data=2, fsdp=4, seq=1, tensor=1)
    across = [row for row in plan["collectives"] if row["part"] == "network"]
    assert {(row["kind"], *row["axes"], row["count"]) for row in across} == {
        ("all-reduce", "data", 1)
    }
    sent = sum(size(row["shape"]) for row in across)
    weights = plan["arguments"]["trainable"] / 4  # of a chip
    tied = 272 * 512 / 4  # the gradients of the token table and of the head go one by one
    assert weights <= sent <= 1.01 * (weights + tied)
    inside = {axis for row in plan["collectives"] if row not in across for axis in row["axes"]}
    assert inside == {"fsdp"}
    n = plan["between_slices"]
    assert (n["slices"], n["axis"], n["kinds"]) == (2, "data", ["all-reduce"])
    assert n["count"] == len(across) and n["sent_bytes"] == sum(row["bytes"] for row in across)
    assert n["seconds"] == pytest.approx(n["sent_bytes"] / 3.125e9)
    assert 0 < n["exposed_seconds"] <= n["seconds"]
    line = (
        rf"between 2 slices, over data: a chip sends .* in {len(across)} transfers \(all-reduce\), "
    )
    assert re.search(line + r".* at the least .*3.125 GB/s by the data sheet", report.text(plan))


def test_data_over_all_chips_is_reduced_inside_a_slice_first(tmp_path):
    """The default mesh: a chip sends a quarter of the gradient, not all of it."""
    slice_ = Topology("2xv5e:2x2")
    mesh = sharding.make_mesh(devices=slice_.devices)
    whole, rows = sharding.NamedSharding(mesh, sharding.P()), sharding.rows_sharding(mesh)
    w = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=whole)
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=rows)

    def gradient(w, x):
        return jax.grad(lambda w: jnp.square(x @ w).astype(jnp.float32).sum())(w)

    found = collectives(gradient, slice_, mesh, tmp_path, w, x, out_shardings=whole)
    assert {tuple(row["axes"]) for row in found} == {("data",)}
    (across,) = (row for row in found if row["part"] == "network")
    assert (across["kind"], size(across["shape"])) == ("all-reduce", 1024 * 1024 / 4)


@pytest.mark.parametrize("name", ["v5e-16", "2xv5e-16"])
def test_the_gradient_of_the_token_table_is_sent_in_parts(name, tmp_path):
    """Of Qwen2.5-1.5B; left to XLA, every device was sent the rows of all, 768 MiB."""
    slice_ = Topology(name)
    mesh = sharding.make_mesh(data=2, fsdp=-1, devices=slice_.devices)
    table = sharding.NamedSharding(mesh, sharding.P(None, "fsdp"))
    rows, B = sharding.rows_sharding(mesh), len(slice_.devices)
    shapes = (
        jax.ShapeDtypeStruct((151936, 1536), jnp.float32, sharding=table),
        jax.ShapeDtypeStruct((B, 4096), jnp.int32, sharding=rows),
        jax.ShapeDtypeStruct((B, 4096, 1536), jnp.bfloat16, sharding=rows),
    )

    def gradient(table, tokens, g):
        return jax.vjp(lambda t: sharding.look_up(t, tokens, jnp.bfloat16), table)[1](g)[0]

    found = collectives(gradient, slice_, mesh, tmp_path, *shapes, out_shardings=table)
    assert max(row["bytes"] for row in found if row["kind"] != "all-reduce") <= 4096 * 1536 * 4
    reduced = [row for row in found if row["kind"] == "all-reduce"]
    assert {(*row["axes"], row["count"]) for row in reduced} == {("data", 1)}
