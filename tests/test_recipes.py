"""Recipes: every size and stage lowers, published numbers, and tiny variants that train."""

import dataclasses
import importlib

import jax
import numpy as np
import pytest
import torchvision_shim
from PIL import Image
from recipes import ALL, RECIPES, TINY, config, stages
from test_train import first_batch

import vlmjax
from vlmjax import build, checkpoint, sharding
from vlmjax.generate.chat import Chat
from vlmjax.nn import bind, flatten, unflatten
from vlmjax.objectives import OBJECTIVES
from vlmjax.train import loop
from vlmjax.train.optimizer import resolve_lr
from vlmjax.train.program import batch_shapes, make_program

torchvision_shim.install()  # before an export looks for transformers' configs
FIRST = {(name, args[-1]) for name, args in RECIPES.items()}


def long_but(fast, cases):
    """The cases, those that are not in `fast` with the marker of long tests."""
    return [pytest.param(*c, marks=() if c in fast else pytest.mark.long) for c in cases]


@pytest.mark.parametrize(("name", "arg"), long_but(FIRST, ALL))
def test_lowers_at_full_size(name, arg):
    """Abstractly, with one row: nothing is allocated, nothing is compiled."""
    run = build.resolve(config(name, arg))
    assert run.train.rows % run.train.accumulate == 0
    (budget,) = build.make_budgets(run)
    assert run.processor.max_length <= budget.tokens
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, rows=1, accumulate=1))
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        program = make_program(run, mesh)
        lowered = program.step.lower(program.state, batch_shapes(run, budget, mesh))
    _, values = lowered.out_info
    assert set(values) == {"loss"} | {f"grad_norm/{module}" for module in program.trained}
    towers = len(run.model.encoders)
    assert len(lowered.as_text()) < 1e6 * (1 + towers)  # scanned layers, no constants


# Config, argument -> peak of vision, connector, decoder; batch; warm-up; wd. Published but for the
# warm-up of InternVL and the batch of MiniCPM-V, which pin what the configs call unverified.
PUBLISHED = {
    ("llava_1_5", "stage=1"): (None, 1e-3, None, 256, 0.03, 0),
    ("llava_1_5", "stage=2"): (None, 2e-5, 2e-5, 128, 0.03, 0),
    ("llava_next", "stage=1"): (None, 1e-3, None, 256, 0.03, 0),
    ("llava_next", "stage=2"): (2e-6, 2e-5, 2e-5, 128, 0.03, 0),
    ("llava_next", "size=qwen1_5_72b,stage=2"): (2e-6, 1e-5, 1e-5, 128, 0.03, 0),
    ("internvl_1_5", "version=1.2,size=40b,stage=1"): (2e-5, 2e-5, None, 8192, 0.03, 0.05),
    ("internvl_1_5", "version=1.2,size=40b,stage=2"): (1e-5, 1e-5, 1e-5, 512, 0.03, 0.05),
    ("internvl_1_5", "size=26b,stage=1"): (1e-5, 1e-5, None, 2048, 0.03, 0.05),
    ("internvl_1_5", "size=26b,stage=2"): (2e-5, 2e-5, 2e-5, 1024, 0.03, 0.05),
    ("internvl_1_5", "size=40b,stage=1"): (None, 1e-4, None, 2048, 0.03, 0.05),
    ("internvl_1_5", "size=2b,stage=2"): (4e-5, 4e-5, 4e-5, 1024, 0.03, 0.01),
    ("internvl_1_5", "size=4b,stage=1"): (None, 2e-4, None, 2048, 0.03, 0.05),
    ("minicpm_v", "version=2.5,stage=2"): (1e-6, 1e-6, 1e-6, 128, 0.01, 0.1),
    ("vila_1_5", "stage=1"): (None, 1e-3, None, 256, 0.03, 0),
    ("vila_1_5", "stage=2"): (None, 5e-5, 5e-5, 1024, 0.03, 0),
    ("vila_1_5", "stage=3"): (1e-4, 1e-4, 1e-4, 1024, 0.03, 0),
    ("vila_1_5", "size=40b,stage=3"): (2e-5, 2e-5, 2e-5, 512, 0.03, 0.05),
    ("cambrian_1", "stage=1"): (None, {1e-3, 1e-4}, {1e-4, None}, 512, 0.06, 0),
    ("cambrian_1", "size=34b,stage=2"): (None, 2e-5, 2e-5, 1024, 0.03, 0),
}


@pytest.mark.parametrize(("name", "arg"), PUBLISHED)
def test_numbers_are_the_published_ones(name, arg, monkeypatch):
    module, said = importlib.import_module(f"configs.{name}"), {}
    recipe = module.recipe
    monkeypatch.setattr(module, "recipe", lambda *a, **how: said.update(how) or recipe(*a, **how))
    run = build.resolve(config(name, arg))
    lrs = resolve_lr(run.lr, build.abstract(run.model)[1])
    *rates, batch, warmup, wd = PUBLISHED[name, arg]
    for module, want in zip(("vision", "connector", "llm"), rates, strict=True):
        found = {lr for path, lr in lrs.items() if path.startswith(module)}
        assert found == (want if isinstance(want, set) else {want}), module
    assert (run.optim.warmup, run.optim.wd) == (warmup, wd)
    assert run.train.rows * said["per_row"] == batch == said["batch"]
    assert run.model.compute.dtype == "bfloat16" and run.optim.schedule == "cosine"


# Config, argument -> template, in the words of `data.templates`.
TEMPLATES = {
    ("llava_next", "size=hermes_yi_34b,stage=1"): "plain_chatml",
    ("llava_next", "size=hermes_yi_34b,stage=2"): "llava_chatml",
    ("llava_next", "size=llama3_8b,stage=1"): "plain_llama3",
    ("llava_next", "size=mistral_7b,stage=1"): "plain",
    ("llava_next_interleave", "stage=1"): "plain_chatml",
    ("vila_1_5", "size=8b,stage=1"): "plain_llama3",
    ("vila_1_5", "size=8b,stage=3"): "vila_llama3",
    ("vila_1_5", "size=40b,stage=2"): "llava_chatml",
    ("cambrian_1", "size=8b"): "cambrian_llama3",
    ("cambrian_1", "size=34b"): "cambrian_chatml",
    ("internvl_1_5", "size=26b"): "internvl_internlm2",
    ("internvl_1_5", "size=40b"): "internvl",
    ("internvl_1_5", "version=1.1,size=19b"): "internvl_zh",
}


@pytest.mark.parametrize(("name", "arg"), TEMPLATES)
def test_templates_are_the_published_ones(name, arg):
    found = config(name, arg).processor
    assert found.template == TEMPLATES[name, arg]
    if name == "vila_1_5":  # one newline after a picture, that of the template
        assert "format" not in found.picture and found.max_length == 4096


@pytest.mark.parametrize("name", RECIPES)
def test_a_stage_goes_on_from_the_one_before(name):
    """Its parameters are the same ones, and stage 1 says which weights it needs."""
    runs = [build.resolve(config(name, f"stage={s}")) for s in stages(name)]
    shapes = [{p: x.shape for p, x in build.abstract(run.model)[1].items()} for run in runs]
    assert all(other == shapes[0] for other in shapes[1:])
    for stage, run in zip(stages(name)[1:], runs[1:], strict=True):
        assert run.init.startswith("runs/") and run.init.endswith(f"/stage{stage - 1}")
    if name == "llava_next_video":
        assert runs[0].init == "runs/llava_next_vicuna_7b/stage2"
        before = build.resolve(config("llava_next", "size=vicuna_7b,stage=2"))
        assert {p: x.shape for p, x in build.abstract(before.model)[1].items()} == shapes[0]
    else:
        with pytest.raises(ValueError, match=r"vision.* is empty; .*--config\.init\.vision=hf:DIR"):
            loop.initial_params(runs[0], None, None)


def test_tokenizers_of_tiny_variants_have_room_in_the_vocabulary():
    """The control tokens of each system, behind the ids of the demo's own."""
    own = build.make_tokenizer(build.resolve(config("llava_1_5", "tiny,stage=2"))).id("<|im_end|>")
    for name, variants in TINY.items():
        for stage in stages(name):
            run = build.resolve(config(name, "tiny", variants[0], f"stage={stage}"))
            tokenizer = build.make_tokenizer(run)
            assert tokenizer.id("<|im_end|>") == own < tokenizer.size <= run.model.llm.vocab


def same(a, b):
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


def loss_of(run, params, batch):
    graphdef = build.abstract(run.model)[0]
    objective = OBJECTIVES[run.objective]
    return float(jax.jit(lambda p: objective(bind(graphdef, unflatten(p)), batch)[0])(params))


CASES = [(name, variant) for name, variants in TINY.items() for variant in variants]


@pytest.mark.long
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_tiny_variant_trains(name, variant, tmp_path):
    """All stages in sequence: the loss falls, what is frozen stays, the last stage resumes.

    Its export is read back.
    """
    before = None
    for stage in stages(name):
        c = config(name, "tiny", variant, f"stage={stage}")
        c.init = None if before is None else str(before)
        c.train.update(steps=20, save_every=10)
        run, folder = build.resolve(c), tmp_path / str(stage)
        start = build.random_params(run.model, run.train.seed)
        if before is not None:
            start = checkpoint.restore_params(before)[0]
        loop.train(c, folder)
        end = checkpoint.restore_params(folder)[0]
        lrs = resolve_lr(run.lr, end)
        assert all(same(start[p], end[p]) for p, lr in lrs.items() if lr is None)
        moved = {p.split("/")[0] for p in end if not same(start[p], end[p])}
        assert moved == {p.split("/")[0] for p, lr in lrs.items() if lr is not None}
        batch = first_batch(run).batch
        assert loss_of(run, end, batch) < loss_of(run, start, batch)
        before = folder
    (before / "checkpoints" / "20" / "manifest.json").unlink()  # as killed while saving
    loop.train(c, before)
    again = checkpoint.restore_params(before)[0]
    assert all(same(again[p], end[p]) for p in end)
    exports_and_reloads(end, before, tmp_path / "hf")


def exports_and_reloads(params, workdir, out):
    """The export of a run has its weights, and scores a picture as the run does."""
    chat = Chat.from_run(workdir)
    read = vlmjax.from_pretrained(chat.save_pretrained(out))
    weights = flatten(read.params)
    assert weights.keys() == params.keys()
    assert all(same(weights[p], params[p]) for p in params)
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8))
    asked = [{"type": "image", "image": picture}, {"type": "text", "text": "what?"}]
    messages = [{"role": "user", "content": asked}]
    np.testing.assert_allclose(read.logits(messages), chat.logits(messages), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "arg", "message"),
    [
        ("llava_1_5", "size=70b", r"size='70b' is none of \['13b', '7b'\]"),
        ("llava_next", "max_tiles=5", r"max_tiles=5 is none of \[0, 4, 9, 16\]"),
        ("internvl_1_5", "size=7b", r"version='1\.5', size='7b', stage=1 is none of"),
        ("cogvlm2", "stage=3", r"stage=3 is none of \[1, 2\]"),
    ],
)
def test_wrong_argument(name, arg, message):
    with pytest.raises(ValueError, match=message):
        config(name, arg)
