"""The simulator of kernels, on a matrix product whose floor is known."""

import pytest

from vlmjax.aot.simulate import simulated_cycles
from vlmjax.aot.topology import CHIPS

SCRIPT = """
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from vlmjax import sharding
from vlmjax.aot.topology import Topology

def product(x, y, out):
    out[...] = jnp.dot(x[...], y[...], preferred_element_type=jnp.float32)

def call(x, y):
    return pl.pallas_call(
        product,
        out_shape=jax.ShapeDtypeStruct((1024, 1024), jnp.float32),
        grid=(2, 2),
        in_specs=[
            pl.BlockSpec((512, 1024), lambda i, j: (i, 0)),
            pl.BlockSpec((1024, 512), lambda i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec((512, 512), lambda i, j: (i, j)),
        name="product",
    )(x, y)

mesh = sharding.make_mesh(devices=Topology("v5e:1x1").devices)
whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
x = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=whole)
with jax.set_mesh(mesh):
    jax.jit(call).lower(x, x).compile()
"""


@pytest.mark.slow
def test_cycles_of_a_product(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    cycles = simulated_cycles(tmp_path / "script.py", ["product.1"])["product.1"]
    floor = 2 * 1024**3 / 197e12 * CHIPS["v5e"].clock
    assert floor <= cycles <= 1.5 * floor
    with pytest.raises(ValueError, match=r"gave no cycles of 'other\.1' \(exit code 0\)"):
        simulated_cycles(tmp_path / "script.py", ["other.1"])
