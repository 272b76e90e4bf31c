"""Compiles a run's train step for devices that are not there."""

import contextlib
import math
import re
import time
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

from vlmjax.train.program import batch_shapes, make_program


class Compiled(NamedTuple):
    """What the compiler said."""

    trained: frozenset  # modules with a trained parameter
    arguments: dict  # {"trainable", "frozen", "optimizer", "batch": bytes of a chip}
    memory: object  # jax's CompiledMemoryStats, or None
    peak_bytes: int  # of HBM that a chip needs
    seconds: float
    dump: Path  # the compiler's text
    refusal: str | None = None  # why it does not fit, in XLA's words


def local_bytes(tree):
    """Returns the bytes of ShapeDtypeStructs with shardings that one device holds."""

    def one(x):
        return x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape))

    return sum(map(one, jax.tree.leaves(tree)))


def check_rows(run, mesh):
    """Raises ValueError when the rows of a step do not divide over the mesh."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = run.train.rows // run.train.accumulate
    if rows % shards:
        raise ValueError(
            f"train.rows={run.train.rows} in {run.train.accumulate} micro-batches does not divide "
            f"over data x fsdp = {shards} shards of rows; change --config.train.rows to a multiple "
            f"of {shards * run.train.accumulate}, or --config.train.accumulate, or the mesh"
        )


def compile_step(run, mesh, budget, options, dump):
    """Returns the `Compiled` step of a `build.Run` with rows of `budget`.

    Args:
      run: a `build.Run`.
      mesh: over topology devices.
      budget: a `Budget`.
      options: {XLA option: value}.
      dump: empty folder for the compiler's text.
    """
    check_rows(run, mesh)
    options = options | {"xla_dump_to": str(dump), "xla_dump_latency_hiding_schedule": True}
    with jax.set_mesh(mesh):
        program = make_program(run, mesh)
        batch = batch_shapes(run, budget, mesh)
        state = program.state
        arguments = dict(
            trainable=state.trainable, frozen=state.frozen, optimizer=state.opt, batch=batch
        )
        common = program.trained, {name: local_bytes(x) for name, x in arguments.items()}
        lowered = program.step.lower(state, batch)
        began = time.monotonic()
        try:
            with no_cache():
                compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as e:
            needed = out_of_memory(str(e))
            if needed is None:
                raise
            return Compiled(*common, None, needed, time.monotonic() - began, Path(dump), str(e))
        seconds = time.monotonic() - began
    m = compiled.memory_analysis()
    peak = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    peak += m.temp_size_in_bytes + m.generated_code_size_in_bytes
    return Compiled(*common, m, peak, seconds, Path(dump))


@contextlib.contextmanager
def no_cache():
    """Compiles without jax's cache on disk: it cannot read programs of absent chips back."""
    enabled = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def out_of_memory(message):
    """Returns the bytes of HBM a refused program needs, or None for another error.

    XLA calls the sum of arguments, outputs and temporaries "HLO temporaries" here.
    """
    found = re.search(r"required for HLO temporaries \(([\d.]+)([KMGT])\) exceeds", message)
    if not found:
        return None
    return int(float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1))
