"""Held-out records: never drawn, and the loss on them, in training and by the eval command."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from test_train import make_step
from tiny import annotations, tiny_config

from vlmjax import build, checkpoint, sharding
from vlmjax.data import held_out, mix
from vlmjax.data.pack import pack
from vlmjax.evals import loss as eval_loss
from vlmjax.train import feed as feeds
from vlmjax.train import loop, metrics
from vlmjax.train.step import measure_loss


def held_config(folder, number=3, **changes):
    """A tiny run that holds records out and measures them; its rates are 0 unless it is told."""
    config = tiny_config(folder, **dict(eval__every=2, lr=((".*", 0.0),)) | changes)
    spec = f"json:{annotations(folder, 12)}"
    config.data.sources = (dict(spec=spec, name="things", weight=1.0, held_out=number),)
    return config


def held_ids(config):
    (part,) = build.open_held_out(build.resolve(config))
    return {part.source[k]["id"] for k in part.records}  # as those of batches


@pytest.mark.parametrize("cap", [0, 5])
@pytest.mark.parametrize("packing", ["stream", "plan"])
def test_what_is_held_out_is_never_drawn(tmp_path, packing, cap):
    config = held_config(tmp_path)
    if packing == "plan":
        config.data.index = str(tmp_path / "index")
    held, drawn = held_ids(config), set()
    for seed in (0, 1):  # the same for every seed
        config.train.seed = seed
        entry = dict(config.data.sources[0]) | dict(cap=cap)
        run = dataclasses.replace(
            build.resolve(config),
            data=dataclasses.replace(build.resolve(config).data, sources=(entry,)),
        )
        assert held_ids(config) == held and len(held) == 3
        data, budgets = build.open_data(run), build.make_budgets(run)
        if packing == "plan":
            for part in zip(data.names, data.sources, data.processors, strict=True):
                folder = mix.index_folder(run.data, part[0])
                mix.index.build(*part[1:], budgets[0], folder)
        opened = feeds.open_feed(
            run, budgets, sharding.make_mesh(devices=jax.devices()[:1]), None, 0, tmp_path / "run"
        )
        found = set()
        for _ in range(20):
            found |= set(next(opened.batches).ids)
        opened.batches.close()
        assert len(found) == (cap or 9) and not found & held
        drawn |= found
    assert cap or len(drawn) == 9


def test_the_loss_is_the_mean_over_all_held_out_tokens(tmp_path):
    """Against the losses of each record alone in a row; weights and order of training stay."""
    changes = dict(train__rows=4, train__accumulate=2, train__steps=5, number=5)
    config = held_config(tmp_path, **changes)
    ends = loop.train(config, tmp_path / "run")
    run, lines = build.resolve(config), metrics.read(tmp_path / "run")
    assert [m["step"] for m in lines if "held_out_loss" in m] == [2, 4, 5]
    (part,) = build.open_held_out(run)
    state, _ = make_step(run)
    budget, total, tokens = build.make_budgets(run)[0], 0.0, 0
    measure = jax.jit(measure_loss, static_argnums=0)
    graphdef = build.abstract(run.model)[0]
    for k in range(len(part.records)):
        batch = pack([[part.reader(0, k)]], budget, run.model.form)[0]
        values = measure(graphdef, state, batch)
        total, tokens = total + float(values[0]), tokens + int(values[1])
    for line in lines:
        if "held_out_loss" in line:
            assert line["held_out_loss"] == pytest.approx(total / tokens, rel=1e-5)
            assert line["held_out_loss/things"] == line["held_out_loss"]
            assert line["seconds_per_step"] > 0 < line["held_out_seconds"]
    config.eval.every = 0
    assert loop.train(config, tmp_path / "without")["loss_last"] == ends["loss_last"]
    # The command gives the same of the same weights.
    found = eval_loss.run(config, tmp_path / "run", tmp_path / "out")
    (things,) = found["sources"].values()
    assert found["held_out"] and things["n"] == 5 and things["tokens"] == tokens
    assert things["loss"] == pytest.approx(total / tokens, rel=1e-5)


@pytest.mark.slow
def test_evaluation_changes_no_bit_and_a_resumed_run_measures_the_same(tmp_path):
    changes = dict(lr=((".*", 1e-3),), train__steps=6, train__save_every=2)
    config = held_config(tmp_path, **changes)
    loop.train(config, tmp_path / "run")
    config.train.steps = 2
    loop.train(config, tmp_path / "cut")
    config.train.steps = 6
    loop.train(config, tmp_path / "cut")
    config.eval.every = 0
    loop.train(config, tmp_path / "without")
    whole, cut, without = (
        checkpoint.restore_params(tmp_path / name)[0] for name in ("run", "cut", "without")
    )
    for path, x in whole.items():
        assert np.array_equal(x, cut[path]) and np.array_equal(x, without[path]), path
    losses = [
        [m.get("held_out_loss") for m in metrics.read(tmp_path / name)[-2:]]
        for name in ("run", "cut", "without")
    ]
    assert losses[0] == losses[1] and None not in losses[0] and losses[2] == [None, None]


def test_bad_held_out_records_are_listed_once(tmp_path, capsys):
    """Those without a file are found at once, those that are damaged when they are decoded."""
    others = tmp_path / "others"
    others.mkdir()
    file = annotations(others, 6)
    (others / "1_0.png").unlink()
    whole = (others / "2_1.png").read_bytes()
    (others / "2_1.png").write_bytes(whole[:-40])
    changes = dict(eval__sources=(f"json:{file}",), train__steps=4, data__quota=0.5)
    config = held_config(tmp_path, **changes)
    config.data.media_root = str(tmp_path)
    rows = json.loads(file.read_text())
    for row in rows:
        if "image" in row:
            row["image"] = [f"others/{name}" for name in row["image"]]
    file.write_text(json.dumps(rows))
    loop.train(config, tmp_path / "run")
    said = "every 2 steps the loss of 8 held-out records of 2 sources is measured"
    assert said in capsys.readouterr().out
    listed = (tmp_path / "run/data_errors.jsonl").read_text().splitlines()
    found = {(e["id"], e["reason"]) for e in map(json.loads, listed)}
    assert len(listed) == 2
    assert found == {(f"{file}:1", "missing_file"), (f"{file}:2", "damaged_media")}
    last = metrics.read(tmp_path / "run")[-1]
    assert last[f"bad/json:{file}/damaged_media"] == 1 and last[f"held_out_loss/json:{file}"] > 0
    config.data.quota = 0.0
    with pytest.raises(ValueError, match="2 of the 6 records of source"):
        loop.train(config, tmp_path / "run2")


@pytest.mark.parametrize(
    ("number", "changes", "message"),
    [
        (3, dict(eval__every=3), "eval.every=3 is not a multiple of train.log_every=2"),
        (0, {}, "eval.every=2 and there are no held-out records: name sources"),
        (12, {}, "'things' is to hold out 12 records and has 12: lower its held_out"),
        (0.5, {}, "held_out=0.5: give one of the first three.* numbers of records"),
        (3, dict(eval__samples=1), "eval.samples=1 is not allowed"),
    ],
)
def test_settings_that_measure_nothing(tmp_path, number, changes, message):
    config = held_config(tmp_path, number, **changes)
    with pytest.raises(ValueError, match=message):
        loop.train(config, tmp_path / "run")


def test_sources_that_cannot_be_held_out(tmp_path):
    (tmp_path / "x").mkdir()
    for spelling in ("", "x/../"):
        specs = (f"json:{tmp_path}/{spelling}annotations.json",)
        config = held_config(tmp_path, eval__sources=specs)
        with pytest.raises(ValueError, match="which data.sources trains on: hold records of it"):
            loop.train(config, tmp_path / "run")
    config.eval.sources = ("json:gone.json",)
    with pytest.raises(ValueError, match="eval.sources has 'json:gone.json': .* correct the path"):
        loop.train(config, tmp_path / "run")
    for sources in ("json:a", ("json:a", "json:a")):
        with pytest.raises(ValueError, match="eval.sources=.*json:a.* give a tuple of specs"):
            build.EvalConfig(sources=sources)
    config = held_config(tmp_path)
    (entry,) = config.data.sources
    config.data.sources = (dict(entry), dict(entry) | dict(name="again", held_out=0))
    with pytest.raises(ValueError, match="'things' and 'again' have the same records and hold out"):
        loop.train(config, tmp_path / "run")
    config = tiny_config(tmp_path, eval__every=2)
    config.data.sources = (dict(spec="demo:text", weight=1.0, held_out=3),)
    with pytest.raises(ValueError, match="'demo:text' is to hold out 3 records and has no end"):
        loop.train(config, tmp_path / "run")


def test_eval_needs_no_source_of_training_that_holds_nothing_out(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    config = held_config(tmp_path, 0, eval__every=0, train__steps=1)
    loop.train(config, tmp_path / "run")
    (tmp_path / "annotations.json").unlink()
    config.eval.sources = (f"json:{annotations(other, 3)}",)
    config.data.media_root = str(other)
    (found,) = eval_loss.run(config, tmp_path / "run", tmp_path)["sources"].values()
    assert found["n"] == 3 and found["loss"] > 0


def test_the_same_rows_come_in_every_round(tmp_path):
    config = held_config(tmp_path, 7, eval__sources=("demo:text#test",), eval__samples=5)
    run = build.resolve(config)
    budget = build.make_budgets(run)[0]
    parts = build.open_held_out(run)
    parts, sizes, bad = zip(*(held_out.measured(part, budget) for part in parts), strict=True)
    assert not any(bad) and [len(s) for s in sizes] == [7, 5]
    rows = held_out.Rounds(parts, sizes, budget, 2, (0, 1), run.model.form)
    total = 2 * sum(rows.steps)
    first = [rows[k].ids for k in range(total)]
    assert [rows[k].ids for k in range(total, 2 * total)] == first
    ids = [id for row in first for id in row]
    assert len(ids) == len(set(ids)) == 12
    assert {id.startswith("demo/text/test") for id in sum(first[2 * rows.steps[0] :], ())} == {True}
