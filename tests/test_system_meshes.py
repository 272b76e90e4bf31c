"""Systems of every kind on eight devices equal themselves on one, forward and backward."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import jax, numpy as np, systems
from flax import nnx
from vlmjax import sharding
from vlmjax.data.pack import pack
from vlmjax.data.picture import row_budget
from vlmjax.nn import bind, flatten, unbind
from vlmjax.objectives.sft import sft
from vlmjax.vlm import VLM

NAMES = "llava_onevision", "360vl", "cogvlm2", "cambrian", "minicpm"
MESHES = (2, 4, 1, 1), (1, 2, 1, 4), (1, 1, 4, 2)
for name in NAMES:
    cfg, process = systems.make(name, vision_block=16, llm_block=64, loss_chunk=16)
    samples = systems.samples(name, process)
    views = max(sum(item.encoder == 0 for item in s.items) for s in samples)
    budget = row_budget(process.show, 512, views + 1, multiple=64)
    rows = [[samples[k % len(samples)]] + [samples[2]] * (k % 3) for k in range(8)]
    batch, _ = pack(rows, budget, cfg.form)
    graphdef, params = unbind(VLM(cfg, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), params)
    step = jax.value_and_grad(lambda p, b: sft(bind(graphdef, p), b)[0])

    def run(sizes):
        mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
        with jax.set_mesh(mesh):
            placed = jax.tree.map(lambda x: sharding.place_rows(mesh, x), batch)
            return jax.device_get(jax.jit(lambda p, b: step(p, b))(params, placed))

    want, want_grads = run((1, 1, 1, 1))
    want_grads = flatten(want_grads)
    largest = max(np.abs(x).max() for x in want_grads.values())
    for sizes in MESHES:
        got, grads = run(sizes)
        np.testing.assert_allclose(got, want, rtol=1e-5)
        for path, g in flatten(grads).items():
            # That of a bias of keys is 0.
            most = 1e-5 * np.abs(want_grads[path]).max() + 1e-6 * largest
            error = np.abs(g - want_grads[path]).max()
            assert error <= most, (name, sizes, path, error, most)
        print(name, sizes, flush=True)
"""


@pytest.mark.long
def test_eight_devices_equal_one():
    root = Path(__file__).parents[1]
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    path = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=root, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
