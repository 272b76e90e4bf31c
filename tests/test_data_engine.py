"""The data of whole runs: the same batches on any hosts and workers; bad records; shares."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
from data_mixture import ROWS, broken, mixture_config, pictures, write
from processes import finish, start

from vlmjax import build, checkpoint, sharding
from vlmjax.data import cli, jsonl, mix
from vlmjax.train import feed, loop, metrics


def make_index(config, workers=0):
    run = build.resolve(config)
    return cli.index(build.open_data(run), build.make_budgets(run)[0], workers)


def batches(config, folder, steps, saved=None, step=0):
    """Returns [(ids of a step, PackedBatch)] as a run of one host gets them."""
    run = build.resolve(config)
    mesh = sharding.make_mesh(data=1)
    opened = feed.open_feed(run, build.make_budgets(run), mesh, saved, step, folder)
    found = list(itertools.islice(opened.batches, steps))
    opened.batches.close()
    return opened, found


def same(a, b):
    assert a.ids == b.ids and a.bucket == b.bucket and a.stats == b.stats
    for x, y in zip(a.batch.patches[0], b.batch.patches[0], strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(a.batch.tokens, b.batch.tokens)


@pytest.mark.slow
def test_workers_and_restarts_change_nothing(tmp_path):
    config = mixture_config(tmp_path / "mix")
    make_index(config, workers=2)
    opened, whole = batches(config, tmp_path, 12)
    assert all(b.batch.tokens.shape[0] == ROWS for b in whole)
    for workers in (1, 4):
        config.data.workers = workers
        for a, b in zip(whole, batches(config, tmp_path, 12)[1], strict=True):
            same(a, b)
    config.data.workers = 0
    for step in (1, 5, 11):
        saved = {"position": whole[step - 1].position, "identity": opened.identity}
        saved = json.loads(json.dumps(saved))
        for a, b in zip(
            whole[step:], batches(config, tmp_path, 12 - step, saved, step)[1], strict=True
        ):
            same(a, b)


@pytest.mark.slow
def test_the_rows_of_hosts_with_workers_are_those_of_one(tmp_path, monkeypatch):
    """Two hosts as the data see them: each has one of the two rows of a step, from a worker."""
    config = mixture_config(tmp_path / "mix")
    make_index(config)
    whole, parts = batches(config, tmp_path, 6)[1], []
    config.data.workers = 1
    for host in range(ROWS):
        monkeypatch.setattr(sharding, "local_rows", lambda mesh, rows, host=host: (host,))
        parts.append(batches(config, tmp_path, 6)[1])
    for a, *own in zip(whole, *parts, strict=True):
        assert a.ids == sum((b.ids for b in own), ()) and {a.bucket} == {b.bucket for b in own}
        for name in ("tokens", "segments", "targets", "weights"):
            found = np.concatenate([getattr(b.batch, name) for b in own])
            np.testing.assert_array_equal(found, getattr(a.batch, name))
        for k, x in enumerate(a.batch.patches[0]):
            np.testing.assert_array_equal(np.concatenate([b.batch.patches[0][k] for b in own]), x)


CODE = """
import json, sys
from pathlib import Path
import jax
from ml_collections import ConfigDict
from vlmjax.train import cluster, feed, loop
cluster.join()
folder, config = Path(sys.argv[1]), ConfigDict(json.loads(Path(sys.argv[2]).read_text()))
opened, log = feed.open_feed, open(folder / f"ids{jax.process_index()}", "a")

def spy(*args):
    made = opened(*args)
    def each():
        for packed in made.batches:
            print(json.dumps(packed.ids), file=log, flush=True)
            yield packed
    return made._replace(batches=each())

loop.open_feed = spy
loop.train(config, folder / "run")
"""


def run_hosts(folder, config, hosts):
    """Trains with so many processes, four devices in all; returns the ids of each step, counted."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config.to_json_best_effort())
    for file in folder.glob("ids*"):
        file.unlink()
    finish(folder, start(folder, CODE, (folder, folder / "config.json"), hosts, 4))
    lines = [(folder / f"ids{i}").read_text().splitlines() for i in range(hosts)]
    steps = [[i for ids in map(json.loads, step) for i in ids] for step in zip(*lines, strict=True)]
    shared = hosts // min(hosts, config.mesh.fsdp)  # hosts that have parts of the same rows
    counts = [Counter(ids) for ids in steps]
    assert all(number % shared == 0 for step in counts for number in step.values())
    return [{i: number // shared for i, number in step.items()} for step in counts]


@pytest.mark.slow
@pytest.mark.parametrize("seq", [1, pytest.param(2, marks=pytest.mark.long)])
def test_hosts_change_nothing_and_may_change(tmp_path, seq):
    """One process, then two that are four from the middle on: record for record, loss for loss.

    Theirs have worker processes. With seq=2 two of four hosts have halves of the same row.
    """
    config = mixture_config(
        tmp_path / "mix",
        train__rows=4,
        train__steps=6,
        train__log_every=1,
        mesh=dict(fsdp=4 // seq, seq=seq),
        optim=dict(warmup=0.0, schedule="constant"),  # whatever the number of steps
    )
    make_index(config)
    one, several = tmp_path / "one", tmp_path / "several"
    whole = run_hosts(one, config, 1)[:6]
    config.data.workers = 1
    config.train.update(steps=3, save_every=3)
    found = run_hosts(several, config, 2)[:3]
    config.train.update(steps=6)
    found += run_hosts(several, config, 4)[:3]
    assert found == whole and len(whole) == 6
    lines = (metrics.read(folder / "run") for folder in (one, several))
    for a, b in zip(*lines, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        for count in ("supervised_tokens", "token_fill", "patch_fill", "visual_kept"):
            assert a[count] == pytest.approx(b[count], rel=1e-5)  # six digits are kept


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["plan", "stream"])
def test_broken_records_are_named_and_every_other_is_used_once(tmp_path, packing):
    """Twelve kinds among 1,188 good ones; one picture is found out only when it is decoded."""
    folder, outside = tmp_path / "mix", tmp_path / "outside"
    folder.mkdir(), outside.mkdir()
    rng = np.random.default_rng(0)
    bad = broken(folder, outside, rng)
    assert len(bad) == 12
    rows = pictures(folder, 60, rng) + [
        {
            "id": f"t{i}",
            "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        }
        for i in range(1128)
    ]
    for at, (row, _) in zip(rng.permutation(len(rows))[:12], bad.values(), strict=True):
        rows.insert(int(at), row)
    spec = write(folder / "rows.jsonl", rows)
    config = mixture_config(folder, 8, data__sources=((spec, 1.0),), data__quota=0.02)
    if packing == "plan":
        config.data.epochs = 1.0
        make_index(config)
        assert sum(1 for _ in mix.planned(*planning(config))[0]) > 3
    else:
        config.data.index = ""
    good, seen = {row["id"] for row in rows} - set(bad), []
    run = build.resolve(config)
    opened = feed.open_feed(
        run, build.make_budgets(run), sharding.make_mesh(data=1), None, 0, tmp_path
    )
    try:
        for packed in opened.batches:
            seen += packed.ids
            opened.ledger.extend(packed.bad, packed.repairs)
            if packing == "stream" and len(set(seen)) == len(good):
                break
    except IndexError as error:
        assert "the plan ends" in str(error)
    opened.batches.close()
    if packing == "plan":
        assert sorted(seen) == sorted(good)
    else:
        assert set(seen) == good and sorted(seen[: len(good) - 40]) == sorted(
            set(seen[: len(good) - 40])
        )
    listed = list(map(json.loads, (tmp_path / "data_errors.jsonl").read_text().splitlines()))
    number = {f"{folder}/rows.jsonl:{k}": row["id"] for k, row in enumerate(rows)}
    assert {number[entry["id"]]: entry["reason"] for entry in listed} == {
        name: reason for name, (_, reason) in bad.items()
    }
    assert len(listed) == 12


def planning(config):
    run = build.resolve(config)
    return build.open_data(run), build.make_budgets(run), run.train.rows


def test_a_share_of_text_is_a_share_of_the_samples(tmp_path):
    config = mixture_config(tmp_path / "mix")
    make_index(config)
    plan, _, _, _ = mix.planned(*planning(config))
    drawn = np.concatenate([row for step in range(400) for row in plan[step].rows])
    assert (drawn[:, 0] == 1).mean() == pytest.approx(0.25, abs=0.01)
    said = cli.plan(*planning(config))
    assert "steps of 2 rows" in said and "epochs of 48" in said


def test_a_run_with_an_index_opens_its_sources_without_reading_them(tmp_path, monkeypatch):
    config = mixture_config(tmp_path / "mix", 4)
    found = build.open_data(build.resolve(config)).sources
    make_index(config)
    monkeypatch.setattr(jsonl, "_scanned", None)
    for a, b in zip(build.open_data(build.resolve(config)).sources, found, strict=True):
        assert a.fingerprint == b.fingerprint and [a[k] for k in range(4)] == [
            b[k] for k in range(4)
        ]


def test_other_data_are_refused_or_accepted_from_a_step_on(tmp_path):
    config = mixture_config(tmp_path / "mix", train__steps=3)
    make_index(config)
    loop.train(config, tmp_path / "run")
    config.train.steps = 5
    config.data.sources = ((config.data.sources[0][0], 1.0), (config.data.sources[1][0], 1.0))
    with pytest.raises(ValueError, match="step 3 was trained on other data .*changed_at=3"):
        loop.train(config, tmp_path / "run")
    config.data.changed_at = 3
    loop.train(config, tmp_path / "run")
    _, meta = checkpoint.restore_params(tmp_path / "run")
    assert meta["identity"]["changed_at"] == 3
    config.train.steps = 6
    loop.train(config, tmp_path / "run")  # goes on with them
    (first,) = batches(config, tmp_path / "run", 1, meta | {"position": [0, 0, 0]}, 3)[1]
    config.data.changed_at = 0
    (anew,) = batches(config, tmp_path / "new", 1)[1]
    assert anew.ids == first.ids
    assert meta["identity"]["numpy"] == ".".join(np.__version__.split(".")[:2])
    config.data.changed_at = 9
    with pytest.raises(ValueError, match="changed_at=9 lies behind step 0"):
        batches(config, tmp_path / "new", 1)


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(epochs=1.0, index=""), "data.epochs=1.0 with data.index=''.*with an index"),
        (dict(epochs=-1.0), "data.epochs=-1.0 with"),
        (dict(epochs=float("inf")), "data.epochs=inf with"),
        (dict(sources=(("json:a",),)), "data.sources has ..json:a',.: a source is"),
        (dict(sources=("json:a",)), "data.sources has 'json:a': a source is"),
        (dict(sources=(("json:a", "1"),)), "'json:a' has weight=1, .*: give one"),
        (dict(sources=(("json:a", float("nan")),)), "weight=nan, .*: give one"),
        (dict(sources=(dict(spec="json:a", epochs=float("inf")),)), "epochs=inf, .*: give one"),
        (dict(groups=(("g", 0.0),)), "data.groups=.*a weight above 0"),
    ],
)
def test_amounts_that_nothing_can_be_drawn_by(changes, message):
    known = dict(sources=(("json:a", 1.0),), tokenizer="demo", budget=(8, 8, 8, 4), index="i")
    mix.DataConfig(**known, epochs=0.5)
    with pytest.raises(ValueError, match=message):
        mix.DataConfig(**known | changes)


@pytest.mark.parametrize("setting", ["image_merge", "video_merge", "patch"])
def test_a_source_is_not_processed_for_another_model(tmp_path, setting):
    config = mixture_config(tmp_path / "mix", 2)
    (spec, _), text = config.data.sources
    other = dict(spec=spec, name="shown", weight=1.0, processor={setting: 3})
    config.data.sources = (other, text)
    with pytest.raises(ValueError, match=f"'shown' is processed with .*{setting}=3.*the model has"):
        build.open_data(build.resolve(config))


def test_groups_caps_absent_sources_and_settings_of_their_own(tmp_path):
    config = mixture_config(tmp_path / "mix")
    shown, text = (spec for spec, _ in config.data.sources)
    config.data.sources = (
        dict(spec=shown, name="shown", group="pictures", processor=dict(max_visual_tokens=20)),
        dict(spec="json:none.jsonl", name="gone", group="pictures"),
        dict(spec=text, name="text", group="text", cap=10),
    )
    with config.unlocked():
        config.data.groups = (("pictures", 9.0), ("text", 1.0))
        config.data.absent = "error"
    with pytest.raises(
        ValueError, match="1 of 3 sources are not there:\n  gone: none.jsonl is not"
    ):
        build.open_data(build.resolve(config))
    config.data.absent = "report"
    make_index(config)
    opened, found = batches(config, tmp_path, 8)
    assert opened.data.absent == ("gone",) and set(opened.ledger.sizes) == {"shown", "text"}
    plan, reader, _, _ = mix.planned(*planning(config))
    drawn = np.concatenate([row for step in range(300) for row in plan[step].rows])
    texts = drawn[drawn[:, 0] == 1, 1]
    assert len(texts) / len(drawn) == pytest.approx(0.1, abs=0.01) and len(set(texts)) == 10
    assert all(reader.id(1, k).startswith(text.removeprefix("json:")) for k in texts)
    ids = sum((packed.ids for packed in found), ())
    assert any(i.startswith("p") for i in ids)
    of_pictures = [reader(0, record) for record in range(8)]
    assert all(sample.visual.sum() <= 20 for sample in of_pictures)
