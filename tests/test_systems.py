"""What holds for every system, whatever its views, towers, connector and format."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
import systems
from flax import nnx

from vlmjax.batch import Budget
from vlmjax.data.pack import check_fits, pack, size
from vlmjax.data.picture import row_budget
from vlmjax.data.processor import Processor
from vlmjax.generate.decode import Generator
from vlmjax.nn import bind, flatten, unbind, unflatten
from vlmjax.objectives.sft import sft
from vlmjax.vlm import VLM


def systems_of(*fast):
    """Parametrizes by all systems; those that are not named have the marker of long tests."""
    long = pytest.mark.long
    names = [pytest.param(n, marks=() if n in fast else long) for n in systems.SYSTEMS]
    return pytest.mark.parametrize("name", names)


# The softmax of attention does not see what is added to all of its scores.
UNSEEN = r".*/k/bias"


@functools.lru_cache(maxsize=1)
def made(name):
    """Returns (config, processor, graphdef, params, samples); every bias and scale is random."""
    cfg, process = systems.make(name)
    graphdef, params = unbind(VLM(cfg, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    flat = {
        p: x + 0.1 * rng.normal(size=x.shape).astype(np.float32) for p, x in flatten(params).items()
    }
    return cfg, process, graphdef, unflatten(flat), systems.samples(name, process)


def whole_budget(samples, cfg):
    """Returns the `Budget` of a row that all samples fill."""
    form = cfg.form
    sources = len(form.encoders)
    least = Budget(1, (0,) * len(form.towers), (0,) * sources, (1,) * sources)
    total = np.sum([size(s, least) for s in samples], 0).tolist()
    patches, units = np.split(total[1:-2], [len(form.towers)])
    placed = [s.placement for s in samples if s.items]
    group = [max(a.units[k].index.shape[1] for a in placed) for k in range(len(units))]
    pool = (0, 0)
    if placed[0].pool is not None:
        pool = (total[-2], max(a.pool.index.shape[1] for a in placed))
    return Budget(total[0], tuple(patches), tuple(units), group, pool, total[-1])


@functools.cache
def runner(graphdef):
    return jax.jit(lambda params, batch: bind(graphdef, params).logits(batch))


@systems_of("llava_onevision", "minicpm", "cogvlm2", "cambrian")
def test_packed_equals_separate_and_padding_changes_nothing(name):
    cfg, _, graphdef, params, samples = made(name)
    budget, run = whole_budget(samples, cfg), runner(graphdef)
    batch, stats = pack([samples], budget, cfg.form)
    assert stats.samples == len(samples) and stats.token_fill == stats.patch_fill == 1
    together = np.asarray(run(params, batch))[0]
    mixed = np.asarray(run(params, pack([samples[::-1]], budget, cfg.form)[0]))[0]
    at, end = 0, len(mixed)
    for sample in samples:
        n = len(sample.tokens)
        alone = np.asarray(run(params, pack([[sample]], budget, cfg.form)[0]))[0, :n]
        most = 1e-5 * np.abs(alone).max()
        np.testing.assert_allclose(together[at : at + n], alone, atol=most)
        np.testing.assert_allclose(mixed[end - n : end], alone, atol=most)
        at, end = at + n, end - n


@systems_of("llava_onevision", "minicpm", "cogvlm2", "cambrian")
def test_text_alone_runs_no_tower(name):
    cfg, _, graphdef, params, samples = made(name)
    budget, text = whole_budget(samples, cfg), samples[2]
    assert not text.items
    none = ((0,) * len(x) for x in (budget.patches, budget.visual))
    small = Budget(len(text.tokens), *none, budget.group)
    batch, _ = pack([[text]], small, cfg.form)
    assert not batch.has_vision
    got = np.asarray(runner(graphdef)(params, batch))[0]
    want = runner(graphdef)(params, pack([[text]], budget, cfg.form)[0])[0, : len(text.tokens)]
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@systems_of("cogvlm2")
def test_cached_equals_full(name):
    """What is said word by word is what one pass over the whole conversation would say."""
    cfg, process, _, params, _ = made(name)
    rng = np.random.default_rng(2)
    prompt = process.prompt(systems.messages(systems.picture(rng, 50, 50), answer=""))
    generator = Generator(cfg, params)
    said = generator.generate_samples([prompt], max_new_tokens=5)[0].tokens
    tokens, place = np.concatenate([prompt.tokens, said]).astype(np.int32), prompt.placement
    n, more = len(prompt.tokens), np.arange(len(said), dtype=np.int32)
    place = dataclasses.replace(
        place,
        source=np.append(place.source, np.full_like(more, -1)),
        positions=np.append(place.positions, place.positions[-1] + 1 + more),
    )
    visual = np.append(prompt.visual, np.zeros(len(said), bool))
    full = dataclasses.replace(prompt, tokens=tokens, labels=tokens, visual=visual, placement=place)
    np.testing.assert_array_equal(generator.logits(full)[n - 1 : -1].argmax(-1), said)


@systems_of("cogvlm2")
def test_every_weight_has_a_gradient(name):
    cfg, _, graphdef, params, samples = made(name)
    batch, _ = pack([samples], whole_budget(samples, cfg), cfg.form)
    grads = jax.jit(jax.grad(lambda p, b: sft(bind(graphdef, p), b)[0]))(params, batch)
    size = {path: np.abs(g).max() for path, g in flatten(grads).items()}
    assert not [path for path, most in size.items() if not np.isfinite(most)]
    least = 1e-6 * max(size.values())
    assert not [p for p, most in size.items() if most < least and not re.fullmatch(UNSEEN, p)]


@pytest.mark.parametrize("name", systems.SYSTEMS)
def test_a_budget_of_views_holds_them(name):
    """So many tokens and views are enough for any sample of as many, whatever a view needs."""
    cfg, process = systems.make(name)
    for sample in systems.samples(name, process):
        views = sum(item.encoder == 0 for item in sample.items)
        for budget in (
            row_budget(process.show, 2048, views),
            row_budget(process.show, 2048, views + 3, multiple=64),
        ):
            check_fits(sample, budget)
            _, stats = pack([[sample], []], budget, cfg.form)
            assert stats.samples == 1 and stats.tokens == len(sample.tokens)


@pytest.mark.parametrize("name", systems.SYSTEMS)
def test_every_token_of_a_video_has_its_place(name):
    """Of three square frames, of which nothing is padding."""
    cfg, process = systems.make(name)
    frames = np.random.default_rng(0).integers(0, 255, (3, 60, 60, 3), dtype=np.uint8)
    sample = process({"id": "0", "messages": systems.messages(frames)})
    made = sample.placement
    number = sum(len(made.units[sources[0]].index) * n for sources, n in cfg.form.groups)
    number = number if made.pool is None else len(made.pool.index)
    shown = made.source[made.source >= 0]
    np.testing.assert_array_equal(np.sort(shown), np.arange(number))
    once = process({"id": "0", "messages": systems.messages(frames[:1])}).placement
    assert len(shown) == 3 * np.count_nonzero(once.source >= 0)


def test_a_whole_prompt_of_minicpm():
    """Newlines between the slices of a picture that is three of them high, and one after it."""
    _, process = systems.make("minicpm")
    rng = np.random.default_rng(0)
    prompt = process.prompt(systems.messages(systems.picture(rng, 20, 60), answer=""))
    seen = "<image>####</image>"
    text = process.tokenizer.decode(prompt.tokens, skip_special=False)
    found = text.replace(process.config.image_token, "#")
    assert found == f"<s><用户>{seen}<slice>{seen}\n{seen}\n{seen}</slice>\nwhat?<AI>"
    frames = np.zeros((2, 20, 20, 3), np.uint8)
    video = process.prompt(systems.messages(frames, answer=""))
    text = process.tokenizer.decode(video.tokens, skip_special=False)
    found = text.replace(process.config.video_token, "#")
    assert found == f"<s><用户>{seen}\n{seen}\nwhat?<AI>"


def test_a_frame_of_vila_is_an_image_with_its_newline():
    """As `"<image>\\n" * frames + question` of llava/data/dataset.py in NVlabs/VILA."""
    _, process = systems.make("vila")
    frames = np.zeros((3, 20, 20, 3), np.uint8)
    prompt = process.prompt(systems.messages(frames, answer=""))
    text = process.tokenizer.decode(prompt.tokens, skip_special=False)
    seen = process.config.video_token * 4
    assert f" USER: {3 * (seen + chr(10))}what? ASSISTANT:" in text
    np.testing.assert_array_equal(prompt.placement.source[prompt.placement.source >= 0], range(12))


def test_what_is_too_long_names_what_the_system_reads():
    cfg, process = systems.make("llava_next")
    short = Processor(
        dataclasses.replace(process.config, max_length=9), process.tokenizer, cfg.form
    )
    rng = np.random.default_rng(0)
    record = {"id": "0", "messages": systems.messages(systems.picture(rng, 60, 40))}
    with pytest.raises(ValueError, match=r"lower the views of picture.strategy or max_frames"):
        short(record)
