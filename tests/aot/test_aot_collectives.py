"""What crosses the links in programs for slices that are not here, by the real compiler."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from configs import text_qwen2_5
from vlmjax import build, sharding
from vlmjax.aot import flags, hlo, replay
from vlmjax.aot.compile import no_cache
from vlmjax.aot.topology import Topology
from vlmjax.batch import Patches
from vlmjax.kernels.attention.api import AttentionSpec
from vlmjax.nn import bind, unbind, unflatten
from vlmjax.objectives import OBJECTIVES
from vlmjax.train.program import batch_shapes
from vlmjax.vision.vit import PRESETS, ViT, ViTConfig
from vlmjax.vlm import place_tokens

pytestmark = pytest.mark.slow
GiB = 2**30


def collectives(function, slice_, mesh, folder, *args, **how):
    """Returns the collectives of a step of a compiled function, loops counted by their trips."""
    options = flags.options(slice_.kind) | {"xla_dump_to": str(folder)}
    del options["xla_tpu_scoped_vmem_limit_kib"]  # tiles of matmuls: only the compilation is longer
    with jax.set_mesh(mesh), no_cache():
        jax.jit(function, **how).lower(*args).compile(compiler_options=options)
    module = hlo.parse(next(folder.glob("*after_codegen.txt")).read_text())
    return replay.replay(module, replay.Machine(slice_, mesh, 1e15)).collectives


def test_placement_needs_none(tmp_path):
    """Forward and backward, of 32 rows of 4,096 tokens and 3,584 channels."""
    slice_ = Topology("v5e:4x4")
    mesh = sharding.make_mesh(fsdp=16, data=1, devices=slice_.devices)
    rows = sharding.rows_sharding(mesh)
    text, visual = (
        jax.ShapeDtypeStruct((32, n, 3584), jnp.bfloat16, sharding=rows) for n in (4096, 2048)
    )
    source = jax.ShapeDtypeStruct((32, 4096), jnp.int32, sharding=rows)

    def step(text, visual, source, g):
        out, back = jax.vjp(lambda *x: place_tokens(*x, source), text, visual)
        return out, back(g)

    assert collectives(step, slice_, mesh, tmp_path, text, visual, source, text) == []


@pytest.mark.parametrize("trained", [False, True])
def test_the_tower_sends_its_gradient_once(trained, tmp_path):
    """So400m, 64 images of 1,024 patches over data 4 x tensor 4: frozen it sends nothing."""
    slice_, made = Topology("v5e:4x4"), {}
    mesh = sharding.make_mesh(data=4, tensor=4, devices=slice_.devices)

    def init():
        tower = ViT(ViTConfig(**PRESETS["siglip_so400m_14"]), rngs=nnx.Rngs(0))
        made["graphdef"], params = unbind(tower)
        return params

    whole = sharding.NamedSharding(mesh, sharding.P())
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), jax.eval_shape(init)
    )
    rows = sharding.rows_sharding(mesh)
    patches, coords, segments = (
        jax.ShapeDtypeStruct((16, 4096, *shape), dtype, sharding=rows)
        for shape, dtype in (((588,), "u1"), ((2,), "i4"), ((), "i4"))
    )
    spread = sharding.NamedSharding(mesh, sharding.P(("data", "fsdp", "tensor")))
    features = jax.ShapeDtypeStruct((16, 4096, 1152), jnp.bfloat16, sharding=spread)

    def step(params, patches, coords, segments, g):
        def run(params):
            how = dict(dtype=jnp.bfloat16, attention=AttentionSpec(segment=1024), remat="full")
            return bind(made["graphdef"], params)(Patches(patches, segments, coords), **how)

        return jax.vjp(run, params)[1](g)[0] if trained else run(params)

    inputs = params, patches, coords, segments, features
    out = jax.tree.map(lambda _: whole, params) if trained else spread
    found = collectives(step, slice_, mesh, tmp_path, *inputs, out_shardings=out)
    if not trained:
        assert found == []
        return
    assert {(row["kind"], *row["axes"]) for row in found} == {("all-reduce", "data", "tensor")}
    weights = sum(x.size for x in jax.tree.leaves(params))
    assert sum(row["bytes"] for row in found) < 1.02 * 2 * weights  # bfloat16: 0.77 GiB
    assert sum(row["bytes"] / row["count"] for row in found) < 0.35 * GiB  # a loop counted once


@pytest.mark.parametrize("name", ["v5p-32", "v5p-64", "v5p-128"])
def test_no_weight_is_all_reduced_in_the_forward_pass(name, tmp_path):
    """FSDP gathers them. On a torus (v5p-128) one axis was seen to zero-pad and reduce instead."""
    config = text_qwen2_5.get_config("size=1.5b")
    config.model.llm = dict(
        vocab=151936, width=1536, mlp=8960, layers=2, heads=12, kv_heads=2, head_dim=128
    )
    slice_ = Topology(name)
    sizes = dict(fsdp=len(slice_.devices))
    config.train.rows = len(slice_.devices)
    mesh = sharding.make_mesh(**dict(data=1) | sizes, devices=slice_.devices)
    run = build.resolve(config)
    graphdef, shapes, axes = build.abstract(run.model)
    where = build.shardings(shapes, axes, mesh)
    params = {
        path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where[path])
        for path, x in shapes.items()
    }
    with jax.set_mesh(mesh):
        batch = batch_shapes(run, build.make_budgets(run)[0], mesh)

    def loss(params, batch):
        return OBJECTIVES["sft"](bind(graphdef, unflatten(params)), batch)[0]

    found = collectives(loss, slice_, mesh, tmp_path, params, batch)
    gathered = sum(row["bytes"] for row in found if row["kind"] == "all-gather")
    reduced = sum(row["bytes"] for row in found if row["kind"] == "all-reduce")
    assert gathered > 2 * 100e6 and reduced < 1e6
