"""What a run compiles: its jitted step, and the shapes and shardings of state and batches.

`train` runs it, `aot` compiles it for chips that are not there.
"""

from functools import partial
from typing import Any, NamedTuple

import jax

from vlmjax import build, sharding
from vlmjax.batch import empty_batch
from vlmjax.objectives import OBJECTIVES
from vlmjax.train.optimizer import choose, make_optimizer, resolve_lr
from vlmjax.train.step import TrainState, init_state, make_train_step, measure_loss


class Program(NamedTuple):
    """The step of a run on a mesh; nothing is allocated or compiled yet."""

    step: Any  # jitted (TrainState, Batch) -> (TrainState, metrics); donates the state
    measure: Any  # jitted (TrainState, Batch) -> (sum of losses, number of supervised tokens)
    state: TrainState  # of ShapeDtypeStructs with shardings
    fresh: Any  # function {path: array} -> TrainState of step 0
    shapes: dict  # {path: ShapeDtypeStruct} of the parameters
    where: dict  # {path: NamedSharding} of the parameters
    trained: frozenset  # modules with a trained parameter


def make_program(run, mesh):
    """Returns the `Program` of a `build.Run`; call it, and use it, under `jax.set_mesh(mesh)`."""
    graphdef, shapes, axes = build.abstract(run.model)
    lrs = resolve_lr(run.lr, shapes)
    peaks = {path: lr for path, lr in lrs.items() if lr is not None}
    optimizer = make_optimizer(run.optim, peaks, run.train.steps)
    objective = choose(OBJECTIVES, run.objective, "objective")
    where = build.shardings(shapes, axes, mesh)

    def fresh(params):
        return init_state(params, lrs, optimizer, run.train.frozen_dtype)

    def place(path, x):
        names = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
        spec = jax.sharding.PartitionSpec()
        if names:  # a parameter, a moment like it, or the scales of one, of which there are fewer
            spec = sharding.spec_of(names[-1], axes[names[-1]], x.shape, mesh)
        return jax.sharding.NamedSharding(mesh, spec)

    abstract = jax.eval_shape(fresh, shapes)
    placed = jax.tree_util.tree_map_with_path(place, abstract)
    step = make_train_step(
        graphdef, objective, optimizer, run.train.accumulate, run.optim.skip_above
    )
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return Program(
        step=jax.jit(step, donate_argnums=0, out_shardings=(placed, None)),
        measure=jax.jit(partial(measure_loss, graphdef), out_shardings=whole),
        state=jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, placed
        ),
        fresh=fresh,
        shapes=shapes,
        where=where,
        trained=frozenset(path.split("/")[0] for path in peaks),
    )


def batch_shapes(run, budget, mesh, rows=None):
    """Returns the `Batch` of ShapeDtypeStructs, with shardings, of so many rows of `budget`; None =
    those of a step."""
    spread, rows = sharding.rows_sharding(mesh), rows or run.train.rows
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=spread),
        empty_batch(1, budget, run.model.form),
    )
