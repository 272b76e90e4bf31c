"""Training: what is frozen stays, what is resumed continues, what is wrong stops."""

import os
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from vlmjax import build, checkpoint, sharding
from vlmjax.data import mix
from vlmjax.data.stream import packed_batches
from vlmjax.generate.chat import Chat
from vlmjax.objectives import OBJECTIVES
from vlmjax.train import loop, metrics, program
from vlmjax.train.optimizer import make_optimizer, resolve_lr
from vlmjax.train.step import init_state, make_train_step
from vlmjax.train.watch import Diverged

CONNECTOR_ONLY = (("connector/.*", 1e-2), (".*", None))
TEXT_BUCKET = ((160, 0, 0, 4),)
STEP_COMPILED = ("/jax/core/compile/backend_compile_duration", "jit(train_step)")


def first_batch(run, rows=None):
    mixture, reader, _ = mix.streamed(build.open_data(run))
    return next(
        packed_batches(
            mixture,
            reader,
            build.make_budgets(run),
            rows or run.train.rows,
            pool=run.data.pool,
            form=run.model.form,
            normalisation=run.data.normalisation,
        )
    )


def make_step(run, accumulate=1):
    graphdef, shapes, _ = build.abstract(run.model)
    lrs = resolve_lr(run.lr, shapes)
    optimizer = make_optimizer(run.optim, {p: lr for p, lr in lrs.items() if lr is not None}, 20)
    state = init_state(build.random_params(run.model, 0), lrs, optimizer, run.train.frozen_dtype)
    above = run.optim.skip_above
    return state, make_train_step(graphdef, OBJECTIVES["sft"], optimizer, accumulate, above)


def test_frozen_is_frozen(tmp_path):
    run = build.resolve(tiny_config(tmp_path, lr=CONNECTOR_ONLY, optim__wd=0.1))
    state, step = make_step(run)
    assert {p.split("/")[0] for p in state.frozen} == {"vision", "llm"}
    moments = jax.tree_util.tree_flatten_with_path(state.opt)[0]
    assert {k.key.split("/")[0] for path, _ in moments for k in path if hasattr(k, "key")} == {
        "connector"
    }
    before = jax.tree.map(np.asarray, state)
    batch, step = first_batch(run).batch, jax.jit(step)
    for _ in range(20):
        state, _ = step(state, batch)
    for path, x in before.frozen.items():
        assert np.asarray(state.frozen[path]).tobytes() == x.tobytes(), path
    assert all((np.asarray(state.trainable[p]) != x).any() for p, x in before.trainable.items())


def compiled_ops(run):
    """Returns (shape, name) of the instructions of the compiled step that jax named."""
    state, step = make_step(run)
    text = jax.jit(step).lower(state, first_batch(run).batch).compile().as_text()
    return re.findall(r"= (\S+) \S+\(.*op_name=\"([^\"]*)\"", text)


def test_of_a_frozen_tower_nothing_is_kept_or_differentiated(tmp_path):
    """Scope names survive into HLO: nothing under transpose(...) belongs to the vision tower."""

    def seen(lr):
        run = build.resolve(tiny_config(tmp_path, lr=lr))
        ops = [(shape, name) for shape, name in compiled_ops(run) if re.search(r"\bvision\b", name)]
        vision, (patches,) = run.model.vision, build.make_budgets(run)[0].patches
        rows = run.train.rows
        stacks = rf"\[{vision.layers},(1,)?({rows},{patches}|{rows * patches}),"
        return (
            [name for _, name in ops if "transpose(" in name],
            [shape for shape, _ in ops if re.search(stacks, shape)],
        )

    assert all(seen(((".*", 1e-3),)))
    assert not any(seen(CONNECTOR_ONLY))


def test_a_frozen_decoder_gets_no_weight_gradient(tmp_path):
    """As in stage 1: the loop of its backward pass stacks nothing of the shape of its weights."""

    def gradients(lr):
        run = build.resolve(tiny_config(tmp_path, lr=lr))
        weights = build.abstract(run.model)[1].items()
        shapes = {str(list(w.shape)) for path, w in weights if path.startswith("llm/blocks")}
        return {
            dims
            for shape, name in compiled_ops(run)
            if re.search(r"transpose\(.*\bllm\b.*dynamic_update_slice", name)
            and (dims := f"[{shape.partition('[')[2].partition(']')[0].replace(',', ', ')}]")
            in shapes
        }

    assert len(gradients(((".*", 1e-3),))) >= 4
    assert not gradients((("llm/.*", None), (".*", 1e-3)))


def test_text_only_step_has_no_vision_tower(tmp_path):
    """Not forward and not backward: parameters of the tower only pass through the optimizer."""
    run = build.resolve(tiny_config(tmp_path, data__buckets=TEXT_BUCKET))
    state, step = make_step(run)
    found = []
    for budget in build.make_budgets(run):
        batch = program.batch_shapes(run, budget, sharding.make_mesh(data=1))
        text = jax.jit(step).lower(state, batch).compile().as_text()
        names = {part.split('"')[0] for part in text.split('op_name="')[1:]}
        found.append([n for n in names if re.search(r"/.*\b(vision|connector)\b.*/", n)])
    assert found[0] and not found[1]


@pytest.mark.slow
def test_every_bucket_is_compiled_before_the_first_step(tmp_path, monkeypatch, request):
    compiled, seen = [], []

    def listen(event, _, **kwargs):
        compiled.append((event, kwargs.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    request.addfinalizer(lambda: jax.monitoring.unregister_event_duration_listener(listen))
    write = metrics.Writer.write

    def spy(writer, step, values):
        seen.append(compiled.count(STEP_COMPILED))
        write(writer, step, values)

    monkeypatch.setattr(metrics.Writer, "write", spy)
    config = tiny_config(
        tmp_path, data__buckets=TEXT_BUCKET, train__steps=12, train__log_every=1, lr=((".*", 1e-3),)
    )
    summary = loop.train(config, tmp_path / "run")
    lines = metrics.read(tmp_path / "run")
    assert summary["compiles"] == 2 and seen == [2] * 12
    used = [k for m in lines for k in (0, 1) if f"bucket{k}/steps" in m]
    assert len(used) == 12 and set(used) == {0, 1}
    for bucket, m in zip(used, lines, strict=True):
        assert m["token_fill"] == m[f"bucket{bucket}/token_fill"] > 0.5
        assert ("patch_fill" in m) == (bucket == 0)
        assert (m["grad_norm/vision"] > 0) == (bucket == 0)


def test_text_only_rows_train(tmp_path):
    """The loss depends on every record, those without media too."""
    run = build.resolve(tiny_config(tmp_path))
    packed = first_batch(run)
    state, step = make_step(run)
    loss_of = lambda w: step(state, packed.batch._replace(weights=w))[1]["loss"]  # noqa: E731
    loss, grad = jax.jit(jax.value_and_grad(loss_of))(packed.batch.weights)
    assert "r0" in packed.ids or "r3" in packed.ids
    supervised = packed.batch.weights > 0
    # The loss is a mean: each adds how much it lies above.
    assert (np.asarray(grad)[supervised] + float(loss) > 0).all()


def test_accumulation_equals_the_whole_batch(tmp_path):
    run = build.resolve(tiny_config(tmp_path))
    batch = first_batch(run, rows=4).batch
    results = []
    for accumulate in (1, 2, 4):
        state, step = make_step(run, accumulate)
        state, values = jax.jit(step)(state, batch)
        results.append((values["loss"], state.opt))
    for loss, opt in results[1:]:
        np.testing.assert_allclose(loss, results[0][0], rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), opt, results[0][1])


def losses(workdir):
    return {m["step"]: m["loss"] for m in metrics.read(workdir)}


def test_resumed_equals_uninterrupted(tmp_path):
    """Stopped at step 3 of 6 and started again: the same losses and weights, bit for bit."""
    config = tiny_config(tmp_path, train__log_every=1)
    summary = loop.train(config, tmp_path / "whole")
    assert summary["compiles"] == 1 and summary["steps"] == 6
    first = loop.train(tiny_config(tmp_path, train__log_every=1), tmp_path / "cut")
    assert first["loss_last"] == summary["loss_last"]
    for step in (6,):
        (
            tmp_path / "cut" / "checkpoints" / str(step) / "manifest.json"
        ).unlink()  # as killed while saving
    again = loop.train(config, tmp_path / "cut")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert again["compiles"] == 1
    whole, cut = (checkpoint.restore_params(tmp_path / name)[0] for name in ("whole", "cut"))
    assert all(np.asarray(whole[p]).tobytes() == np.asarray(cut[p]).tobytes() for p in whole)
    assert (tmp_path / "whole" / "loss.png").stat().st_size > 5000


def test_next_stage_starts_from_the_one_before(tmp_path):
    one = tiny_config(tmp_path, lr=CONNECTOR_ONLY, train__steps=2, train__frozen_dtype="bfloat16")
    loop.train(one, tmp_path / "one")
    two = tiny_config(tmp_path, init=str(tmp_path / "one"), stage=2, train__steps=1)
    assert loop.train(two, tmp_path / "two")["stage"] == 2


def test_init_must_exist(tmp_path):
    with pytest.raises(ValueError, match="holds no complete checkpoint; run that stage first"):
        loop.train(tiny_config(tmp_path, init=str(tmp_path / "nowhere")), tmp_path / "run")


def test_init_of_another_size_is_refused(tmp_path):
    loop.train(tiny_config(tmp_path, train__steps=1), tmp_path / "one")
    other = tiny_config(tmp_path, init=str(tmp_path / "one"), model__llm__mlp=64)
    with pytest.raises(
        ValueError, match=r"(?s)llm/blocks/mlp/up/kernel is \(2, 32, 48\), the model needs"
    ):
        loop.train(other, tmp_path / "two")


def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    config = tiny_config(
        tmp_path, lr=((".*", 1e30),), train__steps=8, train__save_every=1, optim__warmup=0.9
    )
    with pytest.raises(
        Diverged, match=r"(?s) is (nan|inf).* at step \d+; .*records of that batch: r\d"
    ):
        loop.train(config, tmp_path / "run")
    params, _ = checkpoint.restore_params(tmp_path / "run")
    assert params


def test_a_refused_run_leaves_the_one_of_before(tmp_path):
    config = tiny_config(tmp_path, train__steps=2)
    with pytest.raises(ValueError, match="workdir=gs://b/run is a URL, a folder is needed"):
        loop.train(config, "gs://b/run")
    loop.train(config, tmp_path / "run")
    before = (tmp_path / "run/config.json").read_text()
    config.stage, config.train.steps = config.stage + 1, 3
    with pytest.raises(ValueError, match="give each stage a workdir of its own"):
        loop.train(config, tmp_path / "run")
    assert (tmp_path / "run/config.json").read_text() == before
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')  # a crash
    config.stage -= 1
    loop.train(config, tmp_path / "run")
    assert [m["step"] for m in metrics.read(tmp_path / "run")][-1] == 3


@pytest.mark.slow
def test_eight_devices_equal_one(tmp_path):
    """Run in its own process, with eight CPU devices; the mesh spreads rows and shards weights.

    The gradients under every preset: `test_meshes.py`.
    """
    held = dict(spec=f"json:{tmp_path / 'annotations.json'}", weight=1.0, held_out=2)
    changes = dict(train__rows=8, train__steps=4, data__sources=(held,), eval__every=4)
    code = f"""
import sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from tiny import tiny_config
from vlmjax.train import loop
folder = Path({str(tmp_path)!r})
mesh = dict(data=2, fsdp=2, seq=1, tensor=2)
loop.train(tiny_config(folder, mesh=mesh, **{changes!r}), folder / "run")
"""
    env = os.environ | {
        "JAX_NUM_CPU_DEVICES": "8",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    loop.train(tiny_config(tmp_path, **changes), tmp_path / "one")
    got, want = (
        [m[name] for m in metrics.read(tmp_path / run) for name in sorted(m) if "loss" in name]
        for run in ("run", "one")
    )
    assert len(want) == 5  # of three lines, the last one also of what is held out
    np.testing.assert_allclose(got, want, rtol=1e-5)


TRAIN = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from tiny import tiny_config
from vlmjax.train import loop
folder = Path({folder!r})
config = tiny_config(folder, train__steps=40000, train__save_every=2, train__log_every=1)
loop.train(config, folder / "run")
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "terminate"])
def test_killed_run_loses_at_most_the_steps_since_the_last_checkpoint(tmp_path, how):
    code = TRAIN.format(path=sys.path, folder=str(tmp_path))
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    run = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while len(checkpoint.steps(tmp_path / "run")) < 2:
        assert run.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    run.send_signal(how)
    run.wait()
    last = max(losses(tmp_path / "run"))
    saved = checkpoint.steps(tmp_path / "run")[-1]
    checkpoint.verify(tmp_path / "run" / "checkpoints" / str(saved))
    assert saved == last if how == signal.SIGTERM else saved >= last - 5


def test_frozen_storage_is_bf16_and_masters_are_f32(tmp_path):
    run = build.resolve(tiny_config(tmp_path, lr=CONNECTOR_ONLY, train__frozen_dtype="bfloat16"))
    state, _ = make_step(run)
    assert {x.dtype for x in state.frozen.values()} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in state.trainable.values()} == {jnp.dtype("float32")}


def test_modules_start_from_hugging_face_directories(tmp_path):
    """Each from its own; a module that is not named starts at random."""
    first = tiny_config(tmp_path, train__steps=3)
    loop.train(first, tmp_path / "one")
    chat = Chat.from_run(tmp_path / "one")
    chat.save_pretrained(tmp_path / "hf")
    source = f"hf:{tmp_path / 'hf'}"
    run = build.resolve(tiny_config(tmp_path, init=dict(vision=source, llm=source)))
    _, shapes, axes = build.abstract(run.model)
    where = build.shardings(shapes, axes, sharding.make_mesh())
    params = loop.initial_params(run, shapes, where)
    saved, _ = checkpoint.restore_params(tmp_path / "one")
    for path, x in params.items():
        same = np.array_equal(np.asarray(x), np.asarray(saved[path]))
        assert same == (not path.startswith("connector/")), path
    # A later stage takes a whole model.
    run = build.resolve(tiny_config(tmp_path, stage=2, init=source))
    whole = loop.initial_params(run, shapes, where)
    assert whole.keys() == saved.keys()
    assert all(np.array_equal(whole[path], x) for path, x in saved.items())
