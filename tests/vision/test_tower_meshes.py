"""Towers on eight devices equal themselves on one, forward and backward."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import jax, numpy as np
from flax import nnx
from vlmjax import sharding
from vlmjax.batch import Patches
from vlmjax.kernels.attention.api import AttentionSpec
from vlmjax.nn import bind, unbind
from vlmjax.vision.convnext import ConvNeXt, ConvNeXtConfig
from vlmjax.vision.vit import PRESETS, ViT, ViTConfig

rng, P = np.random.default_rng(0), 64
segments = np.repeat([[1] * 17 + [2] * 17 + [3] * 17 + [0] * 13], 4, 0).astype(np.int32)
view = np.concatenate([[[-1, 0]], np.stack(np.mgrid[:4, :4], -1).reshape(-1, 2)])
coords = np.zeros((4, P, 2), np.float32)
coords[:, :51] = np.tile(view, (3, 1))
patches = Patches(rng.integers(0, 256, (4, P, 48), dtype=np.uint8), segments, coords)
small = dict(width=24, mlp=40, layers=2, heads=2, patch=4, side=4)
towers = {
    name: ViT(ViTConfig(**PRESETS[name] | small | dict(prefix=1)), rngs=nnx.Rngs(0))
    for name in ("internvit_6b_v1_5", "dinov2_l_14_reg4")
}
cfg = ConvNeXtConfig((8, 16), (1, 2), rows=4, columns=4, grid=3, layer_scale=1.0)
towers["convnext"] = ConvNeXt(cfg, rngs=nnx.Rngs(0))
for name, tower in towers.items():
    graphdef, params = unbind(tower)
    real = (segments > 0)[..., None] if name != "convnext" else 1

    def step(params, patches):
        def loss(params):
            out = bind(graphdef, params)(patches, attention=AttentionSpec("blockwise", 8)) * real
            return (out * np.cos(np.arange(out.size)).reshape(out.shape)).sum(), out

        (_, out), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return out, grads

    want = jax.jit(step)(params, patches)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(want))
    for sizes in ((2, 2, 1, 2), (1, 1, 4, 2)):
        mesh = sharding.make_mesh(*sizes)
        with jax.set_mesh(mesh):
            where = sharding.rows_sharding(mesh)
            placed = Patches(*(sharding.place(x, where) for x in patches))
            got = jax.jit(step)(params, placed)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            a, b = np.asarray(a), np.asarray(b)
            most = 1e-5 * np.abs(b).max() + 1e-6 * largest  # that of a bias of keys is 0
            assert np.abs(a - b).max() <= most, (name, sizes, a.shape)
"""


@pytest.mark.long
def test_eight_devices_equal_one():
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=Path(__file__).parents[2],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
