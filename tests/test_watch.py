"""Steps that are left out, and what a resumed run says of its config."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest
from test_train import first_batch, make_step
from tiny import tiny_config

from vlmjax import build
from vlmjax.train import loop, metrics
from vlmjax.train.watch import Diverged, Watch


@pytest.mark.parametrize("moments", ["float32", pytest.param("int8", marks=pytest.mark.long)])
def test_a_step_that_is_left_out_changes_nothing(tmp_path, moments):
    """Weights and moments, bit for bit, at a norm above the limit and at what is not a number."""
    run = build.resolve(tiny_config(tmp_path, optim__skip_above=1e9, optim__moment_dtype=moments))
    state, step = make_step(run)
    batch = first_batch(run).batch
    state, values = jax.jit(step)(state, batch)
    assert not values["skipped"]
    weights = np.full_like(batch.weights, np.nan)
    small = dataclasses.replace(run, optim=dataclasses.replace(run.optim, skip_above=1e-9))
    for other, given in ((step, batch._replace(weights=weights)), (make_step(small)[1], batch)):
        after, values = jax.jit(other)(state, given)
        assert values["skipped"] and after.step == 2
        numbers = [x for x in jax.tree.leaves((state.trainable, state.opt)) if x.ndim]
        same = [x for x in jax.tree.leaves((after.trainable, after.opt)) if x.ndim]
        for a, b in zip(numbers, same, strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_steps_left_out_are_said_counted_and_limited(tmp_path, capsys):
    changes = dict(train__steps=12, train__log_every=3, lr=((".*", 0.0),))
    free = loop.train(tiny_config(tmp_path, **changes, optim__skip_above=math.inf), tmp_path / "a")
    assert free["loss_last"] > 0 and all(m["skipped"] == 0 for m in metrics.read(tmp_path / "a"))
    norms = [
        math.hypot(*(v for k, v in m.items() if k.startswith("grad_norm/")))
        for m in metrics.read(tmp_path / "a")
    ]
    changes["optim__skip_above"] = sorted(norms)[-2]
    loop.train(tiny_config(tmp_path, **changes), tmp_path / "b")
    said = r"step \d+ was left out: loss is .*records of its batch: r\d"
    found = re.findall(said, capsys.readouterr().out)
    lines = metrics.read(tmp_path / "b")
    assert len(found) == sum(m["skipped"] for m in lines) > 0
    changes["optim__skip_above"] = 1e-9
    with pytest.raises(Diverged, match="step 11 was left out.* 11th in a row, 10 are allowed"):
        loop.train(tiny_config(tmp_path, **changes), tmp_path / "c")


def test_what_a_resumed_run_changes_is_said(tmp_path, capsys):
    config = tiny_config(tmp_path, train__steps=2)
    loop.train(config, tmp_path / "run")
    before = (tmp_path / "run/config.json").read_text()
    loop.train(config, tmp_path / "run")
    assert "from step" not in capsys.readouterr().out
    config.train.steps, config.optim.b2 = 3, 0.95
    loop.train(config, tmp_path / "run")
    said = capsys.readouterr().out
    assert (
        "from step 3 on optim.b2 was" in said and "from step 3 on train.steps was 2, is 3" in said
    )
    assert (tmp_path / "run/config_until_2.json").read_text() == before


@pytest.mark.parametrize(
    ("num", "ends"), [(0, None), (1, (0, 0)), (4, (0.5, 2.5)), (99, (9.5, 88.5))]
)
def test_means_of_a_session(num, ends):
    """Lines are of what came since the line before, a summary of at most 20 at either end."""
    watch = Watch()
    for step in range(num):
        assert watch.see(step, {"loss": float(step)}, ()) is None
        if step % 3 == 2:
            assert watch.line() == {"loss": step - 1, "skipped": 0}
    assert watch.ends() == ends and watch.line()["loss"] == (num - 1 if num % 3 else None)


def test_a_metric_that_is_no_number_stops_the_run():
    """Whichever an objective returns beside its loss."""
    with pytest.raises(Diverged, match="accuracy is nan at step 3; .* records of that batch: r1"):
        Watch().see(3, {"loss": 1.0, "accuracy": math.nan}, ("r1",))
