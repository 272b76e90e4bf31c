"""Slices by name, the speed of their links, and the compiler's own view of the chip."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from vlmjax import sharding
from vlmjax.aot import flags, hlo, topology
from vlmjax.aot.compile import no_cache
from vlmjax.train import flops

P = jax.sharding.PartitionSpec


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("v5e:4x4", (1, "v5e", (4, 4))),
        ("v5e-8", (1, "v5e", (2, 4))),
        ("v5p-64", (1, "v5p", (2, 4, 4))),
        ("v5p:4x4x8", (1, "v5p", (4, 4, 8))),
        ("v6e-256", (1, "v6e", (16, 16))),
        ("2xv5e-16", (2, "v5e", (4, 4))),
        ("12xv5p:2x2x4", (12, "v5p", (2, 2, 4))),
    ],
)
def test_names(name, parsed):
    assert topology.parse(name) == parsed


UNKNOWN = "v5e", "v5e:4", "v5e:4x4x4", "v5p-7", "v9-4", "v5e-24", ":", "", "2x", "0xv5e-16", "x-1"


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_names_list_examples(name):
    match = r"is unknown; known are v5e:4x4, v5p:2x4x4, .*v5p-128, .*several slices are 2xv5e-16"
    with pytest.raises(ValueError, match=match):
        topology.parse(name)


def test_impossible_layout_is_refused():
    with pytest.raises(ValueError, match=r"'v5e:3x3' is refused by libtpu: .*; known are v5e:4x4"):
        topology.Topology("v5e:3x3")


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"libtpu, which is not installed; pip install 'vlmjax\[a"):
        topology.Topology("v5e:2x2")


def test_several_slices():
    """Each has the chips of one; what crosses them, of 8 bytes in two and in four slices."""
    two, four = topology.Topology("2xv5e-8"), topology.Topology("4xv5e:2x2")
    assert (two.name, two.slices, two.shape) == ("2xv5e:2x4", 2, (2, 4))
    assert [sum(d.slice_index == i for d in two.devices) for i in (0, 1)] == [8, 8]
    assert sharding.num_slices(four.devices) == 4 and len(four.devices) == 16
    assert sharding.num_slices(topology.Topology("v5e-8").devices) == 1
    kinds = "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"
    assert [two.sent_bytes(kind, 8) for kind in kinds] == [8, 8, 4, 4, 8]
    assert [four.sent_bytes(kind, 8) for kind in kinds] == [12, 24, 6, 6, 8]


def test_rings():
    assert topology.wraps("v5p", (4, 4, 8)) == (True,) * 3
    assert topology.wraps("v5p", (2, 4, 4)) == (False,) * 3
    assert topology.wraps("v5e", (8, 16)) == (False, True)


def test_collective_seconds():
    """Of 45 GB: a corner of v5e:4x4 has two links, of v5e:16x16 (rings) four."""
    small, large = (topology.Topology(name) for name in ("v5e:4x4", "v5e:16x16"))
    row = [d for d in small.devices if d.coords[1] == 0]

    def seconds(slice_, kind, members=None):
        return slice_.collective_seconds(kind, 45e9, members or slice_.devices)

    about = functools.partial(pytest.approx, rel=1e-4)
    assert seconds(small, "all-gather") == about(15 / 16 / 2)
    assert seconds(small, "all-reduce") == about(15 / 16)
    assert seconds(small, "all-gather", row) == about(3 / 4)
    assert seconds(large, "reduce-scatter") == about(255 / 256 / 4)
    assert seconds(small, "all-to-all") == about(1)
    assert seconds(small, "collective-permute") == about(1)
    assert small.collective_seconds("all-gather", 0, small.devices) == 6 * topology.HOP
    assert seconds(small, "all-gather", row[:1]) == 0


def compiled_text(slice_, function, *arguments, folder, **options):
    """Returns the scheduled text of a function compiled for the first devices of a slice."""
    mesh = sharding.make_mesh(devices=slice_.devices)
    whole = jax.sharding.NamedSharding(mesh, P())
    arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole) for x in arguments]
    with jax.set_mesh(mesh), no_cache():
        jax.jit(function).lower(*arguments).compile(
            compiler_options=options | {"xla_dump_to": str(folder)}
        )
    return next(folder.glob("*after_codegen.txt")).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_estimated_cycles_of_a_matmul_are_those_of_the_chip(name, tmp_path):
    """Clock, peak and units fit together: no faster than the MXU, and not much slower."""
    slice_ = topology.Topology(name)
    x = jax.ShapeDtypeStruct((8192, 8192), jnp.bfloat16)
    options = flags.options(slice_.kind)
    text = compiled_text(slice_, jnp.matmul, x, x, folder=tmp_path, **options)
    module = hlo.parse(text)
    cycles = sum(op.cycles or 0 for op in module.computations[module.entry])
    floor = 2 * 8192**3 / (flops.peak_flops(slice_.devices) / len(slice_.devices))
    assert floor <= cycles / slice_.chip.clock <= 1.5 * floor


@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_capacity_is_what_the_compiler_allows(name, tmp_path):
    slice_ = topology.Topology(name)
    x = jax.ShapeDtypeStruct((2**18, 2**18), jnp.float32)
    with pytest.raises(jax.errors.JaxRuntimeError) as refused:
        compiled_text(slice_, lambda x: x + 1, x, folder=tmp_path)
    allowed = re.search(r"exceeds available HBM \(([\d.]+)G\)", str(refused.value))
    assert slice_.chip.hbm_bytes == int(float(allowed[1]) * 2**30)
