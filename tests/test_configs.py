"""Configs resolve and their steps lower at full size; the paper's table; what is refused."""

import dataclasses
import functools
import importlib
import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from recipes import RECIPES
from tiny import tiny_config

from configs import common
from configs.common import SLICES, parse_arg
from vlmjax import build, sharding
from vlmjax.batch import empty_batch
from vlmjax.data.mix import DataConfig
from vlmjax.nn import REMAT
from vlmjax.objectives import OBJECTIVES
from vlmjax.train import loop
from vlmjax.train.optimizer import make_optimizer, resolve_lr
from vlmjax.train.program import batch_shapes, make_program
from vlmjax.train.step import init_state, make_train_step

ROOT = Path(__file__).parents[1]
ARGS = {
    "demo": [f"stage={s}" for s in range(5)],
    "videollama3": [f"size={size},stage={s}" for size in ("2b", "7b") for s in range(1, 5)],
    "text_qwen2_5": ["size=1.5b", "size=7b"],
}
ALL = [(name, arg) for name, args in ARGS.items() for arg in args]


def _config(name, arg=None):
    return importlib.import_module(f"configs.{name}").get_config(arg)


def test_every_config_is_tested():
    files = {p.stem for p in (ROOT / "configs").glob("*.py")} - {"__init__", "common"}
    assert files == set(ARGS) | set(RECIPES)


@pytest.mark.parametrize(("name", "arg"), ALL)
def test_resolves_and_lowers_at_full_size(name, arg):
    """Abstractly: nothing of the model or the batch is allocated, nothing is compiled."""
    run = build.resolve(_config(name, arg))
    budget, rows = build.make_budgets(run)[0], run.train.rows
    if run.processor.picture is None and run.model.vision is not None:
        assert run.processor.max_visual_tokens <= budget.visual[0] or not any(budget.visual)
        assert run.processor.patch == run.model.vision.patch
    assert run.processor.max_length is None or run.processor.max_length <= budget.tokens
    with jax.set_mesh(sharding.make_mesh()):
        graphdef, shapes, axes = build.abstract(run.model)
        lrs = resolve_lr(run.lr, shapes)
        peaks = {path: lr for path, lr in lrs.items() if lr is not None}
        optimizer = make_optimizer(run.optim, peaks, run.train.steps)
        state = jax.eval_shape(
            functools.partial(
                init_state, lrs=lrs, optimizer=optimizer, frozen_dtype=run.train.frozen_dtype
            ),
            shapes,
        )
        batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype),
            empty_batch(1, budget, run.model.form),
        )
        step = make_train_step(graphdef, OBJECTIVES[run.objective], optimizer, run.train.accumulate)
        lowered = jax.jit(step, donate_argnums=0).lower(state, batch)
    new, values = lowered.out_info
    assert jax.tree.map(np.shape, new) == jax.tree.map(np.shape, state)
    assert set(values) == {"loss"} | {
        f"grad_norm/{module}" for module in {p.split("/")[0] for p in peaks}
    }
    assert (
        len(lowered.as_text()) < 2e6
    )  # scanned layers, no constants: the program does not grow with the model


# Stage -> learning rates of vision, connector, llm (None = frozen); image and video merge;
# compression; steps.
PAPER = {
    1: (1e-5, 1e-3, None, 1, 2, False, 121_600),
    2: (2e-6, 1e-5, 1e-5, 1, 2, False, 171_600),
    3: (2e-6, 1e-5, 1e-5, 1, 2, True, 148_800),
    4: (2e-6, 1e-5, 1e-5, 2, 2, True, 44_600),
}


@pytest.mark.parametrize("stage", PAPER)
@pytest.mark.parametrize("size", ["2b", "7b"])
def test_recipe_is_that_of_the_paper(size, stage):
    run = build.resolve(_config("videollama3", f"size={size},stage={stage}"))
    lrs = resolve_lr(run.lr, build.abstract(run.model)[1])
    by_module = [
        {lr for path, lr in lrs.items() if path.startswith(m)}
        for m in ("vision", "connector", "llm")
    ]
    *rates, image_merge, video_merge, compression, steps = PAPER[stage]
    assert by_module == [{lr} for lr in rates]
    p, o = run.processor, run.optim
    assert (p.image_merge, p.video_merge, p.compression) == (image_merge, video_merge, compression)
    assert (p.max_length, p.max_visual_tokens, p.fps, p.max_frames) == (16384, 10240, 1.0, 180)
    assert (o.name, o.b1, o.b2, o.eps, o.wd, o.clip) == ("adamw", 0.9, 0.999, 1e-8, 0.0, "none")
    assert (o.schedule, o.warmup, run.train.seed) == ("cosine", 0.03, 42)
    assert abs(run.train.steps - steps) < 100
    assert run.model.compute.dtype == "bfloat16"
    llm = run.model.llm
    want = (1536, 28, 12, 2, 151936, True) if size == "2b" else (3584, 28, 28, 4, 152064, False)
    assert (llm.width, llm.layers, llm.heads, llm.kv_heads, llm.vocab, llm.tie) == want
    if stage > 1:
        assert run.init == f"runs/vl3_{size}/stage{stage - 1}"


@pytest.mark.parametrize("name", SLICES)
def test_slices_spread_the_rows_of_a_step(name):
    run = build.resolve(_config("videollama3", f"size=7b,stage=3,slice={name}"))
    kind, number = name.split("-")
    chips = int(number) // (2 if kind == "v5p" else 1)
    sizes = dict(run.mesh)
    assert math.prod(sizes.values()) == chips
    shards = sizes["data"] * sizes["fsdp"]
    assert run.train.rows == 64 == shards * run.train.accumulate
    assert {run.model.compute.remat, run.model.compute.vision_remat} <= set(REMAT)


def test_several_slices_share_the_rows():
    """Each is spread as one alone, and takes its part of the rows."""
    one, two = (
        build.resolve(_config("videollama3", f"stage=2,slice={name}"))
        for name in ("v5e-16", "2xv5e-16")
    )
    assert dict(two.mesh) == dict(one.mesh) | dict(data=2)
    assert (one.train.accumulate, two.train.accumulate) == (4, 2)
    assert (two.train.rows, two.model) == (one.train.rows, one.model)


def test_slices_that_the_rows_do_not_divide_over():
    with pytest.raises(
        ValueError, match="'3xv5e-16' spreads rows over 48 shards, .* 64 rows .*leave slice out"
    ):
        _config("videollama3", "stage=2,slice=3xv5e-16")


@pytest.mark.parametrize("name", ["v9-4", "0xv5e-16", "xv5e-16", "2x"])
def test_unknown_slice_is_refused(name):
    with pytest.raises(ValueError, match=f"slice='{name}' is none of .*v5p-64.*as 2xv5e-16"):
        _config("videollama3", f"slice={name}")


def test_stages_2_to_4_are_one_program():
    """What is compiled for one of them, and planned, holds for all: they differ on the host."""
    texts = []
    for stage in (2, 3, 4):
        run = build.resolve(_config("videollama3", f"stage={stage}"))
        mesh = sharding.make_mesh()
        with jax.set_mesh(mesh):
            program = make_program(run, mesh)
            batch = batch_shapes(run, build.make_budgets(run)[0], mesh)
            text = program.step.lower(program.state, batch).as_text()
        texts.append(re.sub(r"dense<[^>]*>", "", text))  # the schedule's constants
    assert texts[0] == texts[1] == texts[2]


def test_demo_is_the_same_recipe():
    """What is frozen, pruned and merged, stage by stage, as in the paper's table."""
    for stage in range(1, 5):
        runs = [build.resolve(_config(name, f"stage={stage}")) for name in ("demo", "videollama3")]
        recipes = []
        for run in runs:
            lrs = resolve_lr(run.lr, build.abstract(run.model)[1])
            frozen = {path.split("/")[0] for path, lr in lrs.items() if lr is None}
            p = run.processor
            recipes.append((p.image_merge, p.video_merge, p.compression, frozen))
        assert recipes[0] == recipes[1]
        assert stage == 1 or runs[0].init == f"runs/demo/stage{stage - 1}"


def test_a_decoder_alone_trains(tmp_path):
    """As in text_qwen2_5: no tower in the model, text rows only."""
    lr = (("llm/.*", 1e-2),)
    config = tiny_config(tmp_path, model__vision=None, data__budget=(160, 0, 0, 4), lr=lr)
    (tmp_path / "text.json").write_text(
        json.dumps(
            [
                {
                    "id": str(i),
                    "conversations": [
                        {"from": "human", "value": "Count."},
                        {"from": "gpt", "value": f"One, two, {i}."},
                    ],
                }
                for i in range(4)
            ]
        )
    )
    config.data.sources = ((f"json:{tmp_path / 'text.json'}", 1.0),)
    summary = loop.train(config, tmp_path / "run")
    assert summary["compiles"] == 1 and summary["loss_last"] < summary["loss_first"]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "learning_rate",
            1.0,
            r"unknown keys \['learning_rate'\], missing keys \[\]; a config has exactly",
        ),
        (
            "train__step",
            6,
            r"'train' \(TrainConfig\): unknown keys \['step'\]; allowed are \['accumulate'",
        ),
        (
            "optim__weight_decay",
            0.1,
            r"'optim' \(OptimConfig\): unknown keys \['weight_decay'\]; allowed",
        ),
        (
            "processor__merge",
            2,
            r"'processor' \(ProcessorConfig\): unknown keys \['merge'\]; allowed are",
        ),
        ("data__source", (), r"'data' \(DataConfig\): unknown keys \['source'\]; allowed are"),
        (
            "model__compute__block",
            1,
            r"'model\.compute' \(Compute\): unknown keys \['block'\]; allowed are",
        ),
        (
            "model__vision__depth",
            1,
            r"'model\.vision' \(ViTConfig\): unknown keys \['depth'\]; allowed are",
        ),
        ("model__audio", {}, r"'model': unknown keys \['audio'\]; allowed are"),
        (
            "model__llm__preset",
            "qwen2_5_2b",
            r"model\.llm\.preset='qwen2_5_2b' is unknown; choose one of \[",
        ),
        ("model__llm__kv_heads", 3, r"heads=4 is not a multiple of kv_heads=3"),
        ("train__rows", 0, r"train\.rows=0 must be at least 1"),
        ("train__accumulate", 4, r"train\.rows=2 is not a multiple of train\.accumulate=4"),
    ],
)
def test_refused(path, value, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build.resolve(tiny_config(tmp_path, **{path: value}))


def test_missing_key_is_refused(tmp_path):
    config = tiny_config(tmp_path)
    del config.train.steps
    with pytest.raises(
        ValueError, match=r"'train' \(TrainConfig\): missing keys \['steps'\]; allowed are"
    ):
        build.resolve(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(lr=(("vision/.*", 1e-3), ("connector/.*", 1e-3))), r"no row matches \['llm/"),
        (
            dict(lr=(("conector/.*", 1e-3), (".*", None))),
            r"no parameter matches \['conector/\.\*'\]",
        ),
        (dict(objective="dpo"), r"objective='dpo' is unknown; choose one of \['sft'\]"),
        (dict(optim=dict(clip="norm")), r"optim\.clip='norm' is unknown; choose one of"),
        (dict(mesh=dict(data=3)), r"mesh data=3, fsdp=1, seq=1, tensor=1 does not fit"),
        (dict(data__budget=(160, 80)), r"data\.budget=\(160, 80\) counts views, .*: give \(tokens"),
        (dict(data__buckets=(160, 0, 0, 4)), r"data\.buckets=\(160, .* is a tuple of such tuples"),
        (dict(data__buckets=((160, 0, 0, 1),)), r"data\.buckets=.* the last number that of data"),
        (
            dict(init=dict(vision="", llm="")),
            r"(?s)stage 1 .*init of llm, vision is empty; .*--config\.init\.vision=hf:",
        ),
        (dict(init=dict(vison=None)), r"init\['vison'\]=None is not allowed"),
        (
            dict(init=dict(vision="runs/x")),
            r"init\['vision'\]='runs/x' is not allowed: .*'hf:DIR' or 'random'",
        ),
        (
            dict(init=""),
            r"init of stage 1 is empty; it needs the work directory of the stage before",
        ),
    ],
)
def test_refused_before_the_first_step(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        loop.train(tiny_config(tmp_path, **change), tmp_path / "run")


def test_stage_1_names_the_weights_it_needs():
    run = build.resolve(_config("videollama3"))
    with pytest.raises(
        ValueError, match=r"(?s)llm, vision is empty; .*init\.vision=hf:DIR \(or =random\)"
    ):
        loop.initial_params(run, None, None)


def test_random_init_is_said_in_some_ways(tmp_path):
    values = []
    for init in (
        None,
        "random",
        "None",
        dict(vision="None"),
        dict(vision=None, llm=None),
        dict(vision="random", connector="random", llm="random"),
    ):
        run = build.resolve(tiny_config(tmp_path, init=init))
        values.append(loop.initial_params(run, None, None))
    for other in values[1:]:
        assert all((other[path] == x).all() for path, x in values[0].items())


@pytest.mark.parametrize(
    ("name", "arg", "message"),
    [
        ("videollama3", "size=3b", r"size='3b', stage=1: size is one of \['2b', '7b'\]"),
        ("videollama3", "stage=5", r"stage=5: size is one of .*, stage one of 1, 2, 3, 4"),
        (
            "videollama3",
            "stge=1",
            r"argument 'stge' is unknown; allowed are \['data', 'size', 'slice', 'stage'\]",
        ),
        ("videollama3", "stage=one", r"argument stage='one' must be a int"),
        ("demo", "stage=5", r"stage=5 is not allowed; choose one of \[0, 1, 2, 3, 4\]"),
        ("demo", "scale=fast", r"argument scale='fast' must be a float"),
    ],
)
def test_wrong_config_argument(name, arg, message):
    with pytest.raises(ValueError, match=message):
        _config(name, arg)


def test_parse_arg():
    defaults = dict(a=1, b="x", c=False, d=0.5)
    assert parse_arg(None, **defaults) == defaults
    assert parse_arg("c,a=3,d=2,b=y", **defaults) == dict(a=3, b="y", c=True, d=2.0)
    with pytest.raises(ValueError, match="argument c='maybe' must be true or false"):
        parse_arg("c=maybe", **defaults)


def test_every_setting_of_the_data_can_be_overridden():
    """What a config does not have, the command line cannot set."""
    known = {field.name: field.default for field in dataclasses.fields(DataConfig)}
    for name, default in common.data().items():
        assert known.pop(name) == default or name == "pool", name
    assert set(known) == {"sources", "tokenizer", "budget"}


def test_tables_of_videollama3():
    """Counts of the paper, and sources with the names of what it lists."""
    for stage, total in ((1, 15.57), (2, 21.97), (3, 19.05), (4, 5.72)):
        c = importlib.import_module("configs.videollama3").get_config(f"stage={stage},data=d")
        groups = dict(c.data.groups)
        assert sum(groups.values()) == pytest.approx(total, abs=0.005)
        assert {s["group"] for s in c.data.sources} == set(groups)
        assert c.data.sources[0]["spec"] == f"json:d/{c.data.sources[0]['name']}.jsonl"
        assert not any("-" in (s["name"][0], s["name"][-1]) for s in c.data.sources)
        assert c.train.steps == pytest.approx(total * 1e6 / 128, rel=1e-3)
