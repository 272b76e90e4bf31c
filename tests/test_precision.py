"""f32 where it matters: what a step that computes in bf16 never does in bf16.

Read from the jaxpr of the train step, so it holds for whatever XLA makes of it.
"""

import jax
import jax.numpy as jnp
import pytest
from tiny import tiny_config

from vlmjax import build, sharding
from vlmjax.train.program import batch_shapes, make_program

ACCUMULATE, VOCAB = 2, 272
# Softmax, loss, norm statistics, rotary angles, sums over tokens or channels, optimizer.
ONLY_F32 = (
    *("exp", "exp2", "log", "log1p", "rsqrt", "sqrt", "div", "pow", "sin", "cos"),
    *("reduce_sum", "reduce_max", "cumsum", "cumlogsumexp"),
)


def equations(jaxpr, outside=""):
    """All (equation, its scopes), those of inner jaxprs included."""
    for equation in jaxpr.eqns:
        scope = f"{outside}/{equation.source_info.name_stack}"
        yield equation, scope
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner, scope)


def floats(variables):
    dtypes = [v.aval.dtype for v in variables if hasattr(v.aval, "dtype")]
    return {d.name for d in dtypes if jnp.issubdtype(d, jnp.floating)}


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """(jaxpr, (new state, metrics)) of a step in bf16, everything trained."""
    changes = dict(model__compute__dtype="bfloat16", model__compute__remat="full", train__rows=4)
    changes |= dict(train__accumulate=ACCUMULATE)
    run = build.resolve(tiny_config(tmp_path_factory.mktemp("run"), **changes))
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        program = make_program(run, mesh)
        batch = batch_shapes(run, build.make_budgets(run)[0], mesh)
        step = program.step.trace(program.state, batch)
    return step.jaxpr.jaxpr, step.out_info


def test_matrix_products_are_in_bf16(traced):
    """Else the rest would prove nothing: those of layers are, gradients included."""
    products = [e for e, _ in equations(traced[0]) if e.primitive.name == "dot_general"]
    assert sum(floats(e.invars) == {"bfloat16"} for e in products) > 30


def test_masters_moments_and_metrics_are_f32(traced):
    _, (state, values) = traced
    for x in jax.tree.leaves((state.trainable, state.opt, values)):
        assert x.dtype == jnp.float32 or x.ndim == 0


def test_gradients_are_accumulated_in_f32(traced):
    scans = [e for e in traced[0].eqns if e.primitive.name == "scan"]
    (over_batches,) = [e for e in scans if e.params["length"] == ACCUMULATE]
    carried = over_batches.outvars  # loss and gradients; it returns nothing else
    assert len(carried) == 1 + len(traced[1][0].trainable) and floats(carried) == {"float32"}


def test_sums_and_functions_of_them_are_f32(traced):
    seen = set()
    for e, scope in equations(traced[0]):
        name = e.primitive.name
        derivative_of_gelu = name == "exp" and "connector" in scope
        if name in ONLY_F32 and not derivative_of_gelu:
            seen.add(name)
            assert floats(e.invars) <= {"float32"}, (name, scope, e.invars)
    assert seen >= {"exp", "log", "rsqrt", "sqrt", "reduce_sum", "reduce_max"}


def test_attention_and_logits_are_summed_in_f32(traced):
    """Products with a batch axis are those of attention, products as wide as V are the logits."""
    scores = logits = 0
    for e, _ in equations(traced[0]):
        if e.primitive.name == "dot_general":
            batch = e.params["dimension_numbers"][1][0]
            vocab = e.outvars[0].aval.shape[-1] == VOCAB
            scores, logits = scores + bool(batch), logits + vocab
            assert floats(e.outvars) == {"float32"} or not (batch or vocab), e
    assert scores > 8 and logits > 2
