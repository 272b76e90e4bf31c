"""Moments in bf16 and 8 bits: bytes, unbiased rounding, what a run loses by them, any mesh."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_train import first_batch, losses, make_step
from tiny import tiny_config

from vlmjax import build, checkpoint
from vlmjax.train import loop
from vlmjax.train.moments import STORAGE, decode, store_moments, to_int8

DTYPES = ["bfloat16", "int8"]


@pytest.mark.parametrize(
    ("dtype", "per_value", "per_vector"), [("float32", 8, 0), ("bfloat16", 4, 0), ("int8", 2, 8)]
)
def test_bytes(dtype, per_value, per_vector, tmp_path):
    """int8: two codes a parameter and two f32 scales for each vector along the last axis."""
    run = build.resolve(tiny_config(tmp_path, optim__moment_dtype=dtype))
    state = jax.eval_shape(lambda: make_step(run)[0])
    stored = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.opt) if x.ndim)
    values = sum(x.size for x in state.trainable.values())
    vectors = sum(x.size // x.shape[-1] for x in state.trainable.values())
    assert stored == per_value * values + per_vector * vectors


def values_of_many_sizes(positive):
    x = np.random.default_rng(0).normal(size=(50, 200)) * np.logspace(0, -5, 200)
    return jnp.asarray(np.abs(x) if positive else x, jnp.float32)


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_goes_to_a_neighbour_and_keeps_the_mean(dtype, positive):
    x = values_of_many_sizes(positive)
    draws = jnp.linspace(0, 1, 512, endpoint=False) + 1 / 1024
    stored = jax.vmap(lambda draw: decode(STORAGE[dtype](x, jnp.full(x.shape, draw), positive)))
    got = np.asarray(stored(draws))
    assert max(len(np.unique(v)) for v in got.reshape(512, -1).T) == 2
    bound = 2**-7 if dtype == "bfloat16" else 0.4  # small values of a vector have coarse levels
    wide = np.abs(x) > np.abs(x).max(-1, keepdims=True) * 1e-4
    assert (np.ptp(got, 0) <= bound * np.abs(x))[wide].all()
    np.testing.assert_allclose(got.mean(0)[wide], np.asarray(x)[wide], rtol=5e-3)


def test_zero_stays_zero_and_a_root_is_never_of_zero():
    x = jnp.asarray([[0, 1e-30, 1], [0, 0, 0]], jnp.float32)
    for draw in (0.001, 0.5, 0.999):
        signed, positive = (to_int8(x, jnp.full(x.shape, draw), p) for p in (False, True))
        np.testing.assert_array_equal(decode(signed) == 0, [[True, True, False], [True] * 3])
        assert (decode(positive)[0] > 0).all() and (decode(positive)[1] == 0).all()
        assert positive.code.dtype == jnp.uint8 and signed.code.dtype == jnp.int8


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_slow_average_is_followed(dtype):
    """The second moment of gradients that shrink: rounded to the nearest it would never decay."""
    optimizer = store_moments(optax.scale_by_adam(b2=0.999), STORAGE[dtype])
    rng, params = np.random.default_rng(0), {"x": jnp.zeros((8, 64))}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step in range(1500):
        size = 1.0 if step < 50 else 0.1
        grads = {"x": jnp.asarray(size * rng.choice([-1, 1], (8, 64)), jnp.float32)}
        updates, state = update(grads, state)
    want = (1 - 0.999**50) * 0.999**1450 + 0.01 * (1 - 0.999**1450)
    got = np.asarray(decode(state.inner.nu["x"]))
    assert got.mean() == pytest.approx(want, rel=0.05)
    assert np.abs(updates["x"]).max() < 1.5


@pytest.mark.long
def test_training_loses_little(tmp_path):
    """Loss after 80 steps on the same batches, within 3 % of moments in f32."""
    reached = {}
    for dtype in STORAGE:
        changes = dict(optim__moment_dtype=dtype, lr=((".*", 3e-3),), optim__schedule="constant")
        run = build.resolve(tiny_config(tmp_path, **changes))
        state, step = make_step(run)
        step, batch = jax.jit(step, donate_argnums=0), first_batch(run).batch
        for _ in range(80):
            state, values = step(state, batch)
        reached[dtype] = float(values["loss"])
    for dtype in DTYPES:
        assert reached[dtype] == pytest.approx(reached["float32"], rel=0.03), reached


@pytest.mark.long
def test_resumed_equals_uninterrupted(tmp_path):
    config = tiny_config(tmp_path, train__log_every=1, optim__moment_dtype="int8")
    for name in ("whole", "cut"):
        loop.train(config, tmp_path / name)
    (tmp_path / "cut" / "checkpoints" / "6" / "manifest.json").unlink()  # as killed while saving
    loop.train(config, tmp_path / "cut")
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    whole, cut = (checkpoint.restore_params(tmp_path / name)[0] for name in ("whole", "cut"))
    assert all(np.asarray(whole[p]).tobytes() == np.asarray(cut[p]).tobytes() for p in whole)


SHARDED = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
import jax, numpy as np
from tiny import tiny_config
from vlmjax import build, sharding
from vlmjax.train import loop
from vlmjax.train.moments import STORAGE, Quantized, store_moments
from vlmjax.train.program import make_program
import optax

folder, sizes = Path({folder!r}), dict(data=2, fsdp=2, seq=1, tensor=2)
config = tiny_config(folder, mesh=sizes, optim__moment_dtype="int8", train__rows=8)
run, mesh = build.resolve(config), sharding.make_mesh(**sizes)
with jax.set_mesh(mesh):
    program = make_program(run, mesh)
    state = next(x for x in program.state.opt if hasattr(x, "inner"))
    for path, x in state.inner.nu.items():  # codes lie where their parameters do
        assert x.code.sharding == program.where[path], path
    normal = np.random.default_rng(0).normal
    draw = lambda: {{p: np.float32(normal(size=x.shape)) for p, x in program.shapes.items()}}
    optimizer = store_moments(optax.scale_by_adam(), STORAGE["int8"])
    update, where = jax.jit(optimizer.update), jax.tree.map(lambda x: x.sharding, state)
    one = optimizer.init(draw())
    many = jax.device_put(one, where)
    for _ in range(3):
        grads = draw()
        _, one = update(grads, one)
        _, many = update(jax.device_put(grads, program.where), many)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many)):
        np.testing.assert_array_equal(a, b)
summary = loop.train(config, folder / "run")
assert loop.train(config, folder / "run")["loss_last"] == summary["loss_last"]  # restores
print(summary["loss_last"])
"""


@pytest.mark.long
def test_sharded_equals_unsharded(tmp_path):
    """Eight devices in their own process: codes lie like parameters, and are the same bits."""
    code = SHARDED.format(path=sys.path, folder=str(tmp_path))
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    config = tiny_config(tmp_path, optim__moment_dtype="int8", train__rows=8)
    want = loop.train(config, tmp_path / "one")["loss_last"]
    assert float(done.stdout.splitlines()[-1]) == pytest.approx(want, rel=1e-3)
