"""Eight devices equal one under every way of spreading a step, and nothing is sent for nothing."""

import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.common import SLICES
from vlmjax import sharding

MESHES = {
    "rows": (8, 1, 1, 1),
    "fsdp": (1, 8, 1, 1),
    "hybrid": (2, 2, 2, 1),
    "tensor, shared kv heads": (1, 2, 1, 4),
    "sequence and tensor": (1, 1, 4, 2),
}


def for_eight(sizes):
    """Returns the mesh of a slice for eight devices: its longest axis is halved until they do."""
    sizes = [sizes.get(axis, 1) for axis in ("data", "fsdp", "seq", "tensor")]
    while math.prod(sizes) > 8:
        sizes[sizes.index(max(sizes))] //= 2
    return tuple(sizes)


MESHES |= {
    name: mesh
    for name, preset in SLICES.items()
    if (mesh := for_eight(preset["mesh"])) not in MESHES.values()
}
CODE = """
import jax, numpy as np, sys
from flax import nnx
from vlmjax import sharding
from vlmjax.batch import Budget, Form, TowerForm, empty_batch
from vlmjax.connectors.mlp import MLPConfig
from vlmjax.llm.decoder import DecoderConfig
from vlmjax.objectives.sft import sft
from vlmjax.vision.vit import ViTConfig
from vlmjax.vlm import VLM, Compute, VLMConfig, bind, unbind

cfg = VLMConfig(
    ViTConfig(width=24, mlp=40, layers=2, heads=2, patch=4), MLPConfig(layers=2),
    DecoderConfig(vocab=64, width=32, mlp=48, layers=2, heads=4, kv_heads=2, head_dim=8),
    Compute(vision_block=8, llm_block=8, loss_chunk=16, loss_columns=24),
)
rng = np.random.default_rng(0)
batch = empty_batch(8, Budget(32, 64, 16, 4), Form((TowerForm(4),)))
for r in range(8):
    n = rng.integers(3, 20)
    batch.segments[r, :n], batch.segments[r, n:30] = 1, 2
    batch.positions[r, :30] = [*range(n), *range(30 - n)]
    batch.tokens[r], batch.targets[r] = rng.integers(0, 64, (2, 32))
    batch.weights[r, :30] = rng.random(30) * (rng.random(30) < 0.5) / 60
    batch.source[r, 2:10] = np.arange(8)
    batch.units[0].index[r, :12] = np.arange(48).reshape(12, 4)
    patches = batch.patches[0]
    patches.segments[r, :20], patches.segments[r, 20:48] = 1, 2
    patches.pixels[r] = rng.integers(0, 255, (64, 48))
    patches.coords[r] = rng.integers(0, 8, (64, 2))
model = VLM(cfg, rngs=nnx.Rngs(0))
graphdef, params = unbind(model)

def run(sizes):
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    with jax.set_mesh(mesh):
        rows = jax.tree.map(lambda x: sharding.place_rows(mesh, x), batch)
        step = jax.jit(jax.value_and_grad(lambda p, b: sft(bind(graphdef, p), b)[0]))
        return jax.device_get(step(params, rows))

want, want_grads = run((1, 1, 1, 1))
for sizes in eval(sys.argv[1]):
    got, grads = run(sizes)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
"""


def run(meshes):
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, repr(meshes)],
        cwd=Path(__file__).parents[1],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_eight_devices_equal_one(name):
    run([MESHES[name]])


def test_heads_that_straddle_groups_are_refused():
    """12 heads over 6 devices are 2 each, of groups of 3."""
    layout = sharding.Layout(("data",), (), ("tensor",))
    mesh = jax.sharding.AbstractMesh((1, 6), ("data", "tensor"))
    q, kv = jnp.zeros((1, 8, 12, 4)), jnp.zeros((1, 8, 4, 4))
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(ValueError, match="groups of 3"):
        sharding.map_attention(None, q, kv, kv, None, layout)


def chips(slices, side=4, platform="tpu", kind="TPU v5 lite"):
    """Returns square slices that are not there, their chips in no order."""
    spots = [(s, x, y) for s in range(slices) for y in range(side) for x in range(side)]
    devices = [
        SimpleNamespace(
            id=i,
            process_index=i // 4,
            slice_index=s,
            coords=(x, y, 0),
            core_on_chip=0,
            platform=platform,
            device_kind=kind,
        )
        for i, (s, x, y) in enumerate(spots)
    ]
    return [devices[i] for i in np.random.default_rng(0).permutation(len(devices))]


def grid(monkeypatch, *sizes, devices):
    """Returns the devices of a mesh; jax makes no `Mesh` of devices that are not its own."""
    monkeypatch.setattr(sharding, "Mesh", lambda grid, *_, **__: grid)
    return sharding.make_mesh(*sizes, devices=devices)


@pytest.mark.parametrize(
    ("slices", "sizes"),
    [
        (2, (2, 16, 1, 1)),
        (2, (2, -1, 1, 1)),
        (2, (-1, 1, 1, 1)),  # the default
        (2, (8, 2, 1, 2)),
        (2, (-1, 2, 2, 2)),
        (3, (3, 4, 2, 2)),
        (4, (8, 8, 1, 1)),
    ],
)
def test_only_data_crosses_slices(monkeypatch, slices, sizes):
    """Blocks of data are the slices, in their order; along no other axis do slices differ."""
    devices = chips(slices)
    made = grid(monkeypatch, *sizes, devices=devices)
    assert sorted(d.id for d in made.flat) == list(range(len(devices)))
    index = np.vectorize(lambda d: d.slice_index)(made)
    blocks = index.reshape(slices, -1)
    assert (blocks == np.arange(slices)[:, None]).all()
    assert (index == index[:, :1, :1, :1]).all()


@pytest.mark.parametrize("sizes", [(1, -1, 1, 1), (-1, 32, 1, 1), (1, 16, 2, 1)])
def test_data_must_go_over_all_slices(monkeypatch, sizes):
    match = r"fit 2 slices of 16 chips: data is 1 and must be a multiple of 2.*data=2 fsdp=-1"
    with pytest.raises(ValueError, match=match):
        grid(monkeypatch, *sizes, devices=chips(2))


def test_one_slice_is_spread_as_before(monkeypatch):
    """And so are hosts of GPUs, which jax numbers as slices: FSDP may go over them."""
    one = grid(monkeypatch, 1, 16, 1, 1, devices=chips(1))
    assert {d.id for d in one.flat} == set(range(16))
    hosts = grid(monkeypatch, 1, 8, 1, 1, devices=chips(2, 2, "gpu", "NVIDIA H200"))
    assert [d.slice_index for d in hosts.flat] == [0] * 4 + [1] * 4
