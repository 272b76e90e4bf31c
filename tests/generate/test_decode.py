"""Batched generation: cached = full forward, batch = one by one, padding changes nothing."""

import dataclasses

import numpy as np
import pytest
import torch

from vlmjax.data.sample import Sample
from vlmjax.generate import decode as module
from vlmjax.generate.decode import Generator, bucket, decode, prefill
from vlmjax.generate.sampling import SamplingConfig
from vlmjax.vlm import Compute

NEW = 9
DRAWN = SamplingConfig(temperature=1.2, top_k=50, top_p=0.95, repetition_penalty=1.3)


def _extended(sample, tokens):
    """The sample with text tokens after it."""
    tokens = np.asarray(tokens, np.int32)
    none = np.full(len(tokens), -100, np.int32)
    return Sample(
        sample.id,
        np.concatenate([sample.tokens, tokens]),
        np.concatenate([sample.labels, none]),
        sample.items,
        np.concatenate([sample.visual, np.zeros(len(tokens), bool)]),
    )


def _tokens(completions):
    return [c.tokens.tolist() for c in completions]


def test_buckets():
    assert [bucket(n, 8) for n in (0, 1, 8, 9, 16, 17, 1000)] == [0, 8, 8, 16, 16, 32, 1024]


def test_every_greedy_token_is_the_best_of_a_full_forward(vlm, prompts):
    for sample, done in zip(prompts, vlm.generator.generate_samples(prompts, NEW), strict=True):
        assert done.finish == "length" and len(done.tokens) == NEW
        scores = vlm.generator.logits(_extended(sample, done.tokens))
        assert scores[len(sample.tokens) - 1 : -1].argmax(-1).tolist() == done.tokens.tolist()


def test_cached_scores_equal_the_full_forward(vlm, prompts):
    generator, forced = vlm.generator, [5, 250, 17]
    sample = prompts[3]
    batch, budget, lengths = generator.batch([sample], 1)
    scores, cache = prefill(generator.graphdef, generator.params, batch, lengths, budget.tokens + 8)
    found = [np.asarray(scores[0])]
    model = module.bind(generator.graphdef, generator.params)
    for step, token in enumerate(forced):
        x = model.llm.embed(np.array([[token]]), np.float32)
        hidden, cache = model.llm(x, lengths[:, None] + step, cache=cache)
        found.append(np.asarray(model.llm.logits(hidden[0, 0])))
    full = generator.logits(_extended(sample, forced))[-len(forced) - 1 :]
    assert np.abs(np.stack(found) - full).max() < 1e-5 * np.abs(full).max()


@pytest.mark.parametrize("sampling", [SamplingConfig(), DRAWN], ids=["greedy", "drawn"])
def test_batch_equals_one_by_one_in_any_buckets(weights, prompts, sampling, monkeypatch):
    batched = Generator(*weights).generate_samples(prompts, NEW, sampling, [40], seed=3)
    singles = Generator(*weights, rows=1).generate_samples(prompts, NEW, sampling, [40], seed=3)
    config, params = weights
    config = dataclasses.replace(config, compute=Compute(vision_block=16, llm_block=32))
    monkeypatch.setattr(module, "LEAST_TOKENS", 256)
    monkeypatch.setattr(module, "LEAST_PATCHES", 128)
    monkeypatch.setattr(module, "LEAST_NEW", 64)
    wide = Generator(config, params).generate_samples(prompts, NEW, sampling, [40], seed=3)
    assert _tokens(batched) == _tokens(singles) == _tokens(wide)
    if sampling is DRAWN:
        other = Generator(*weights).generate_samples(prompts, NEW, sampling, [40], seed=4)
        assert _tokens(other) != _tokens(batched)


def test_greedy_tokens_equal_transformers(vlm, prompts, reference):
    for sample, done in zip(
        prompts[:4], vlm.generator.generate_samples(prompts[:4], NEW), strict=True
    ):
        tokens = torch.tensor(sample.tokens[None].astype(np.int64))
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if sample.items:
            pixels = np.concatenate([i.patches for i in sample.items]).astype(np.float32)
            inputs["pixel_values"] = torch.tensor((pixels / 255 - 0.5) / 0.5)
            inputs["image_grid_thw"] = torch.tensor([[1, *i.grid] for i in sample.items])
            inputs["image_merge_sizes"] = torch.tensor([i.merge for i in sample.items])
        theirs = reference.generate(
            **inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert done.tokens.tolist() == theirs[0, len(sample.tokens) :].tolist()


def test_stop_tokens_end_a_row_and_are_left_out(vlm, prompts):
    free = vlm.generator.generate_samples(prompts, NEW)
    stop = int(free[1].tokens[4])
    for before, after in zip(
        free, vlm.generator.generate_samples(prompts, NEW, stop_ids=[stop, 999]), strict=True
    ):
        tokens = before.tokens.tolist()
        expected = tokens[: tokens.index(stop)] if stop in tokens else tokens
        assert after.tokens.tolist() == expected
        assert after.finish == ("stop" if stop in tokens else "length")


def test_repetition_penalty_sees_generated_tokens_only(vlm, prompts):
    strong = SamplingConfig(repetition_penalty=1e6)
    sample = prompts[2]
    free, done = (
        vlm.generator.generate_samples([sample], 30, s)[0].tokens
        for s in (SamplingConfig(), strong)
    )
    assert done[0] == free[0]  # whatever the prompt holds
    positive = vlm.generator.logits(_extended(sample, done))[len(sample.tokens) - 1 : -1]
    repeated = [t for k, t in enumerate(done) if t in done[:k]]
    assert (positive.max(-1) > 0).all() and not repeated


def test_the_loop_ends_with_the_last_row(vlm, prompts):
    """Rows that stop at once leave the device after one step: no forward pass is made."""
    generator = vlm.generator
    batch, budget, lengths = generator.batch(prompts[:2], 4)
    scores, cache = prefill(
        generator.graphdef, generator.params, batch, lengths, budget.tokens + 16
    )
    stops = np.asarray(scores[:2]).argmax(-1).astype(np.int32)
    before = np.array(cache[0])
    ids = np.arange(4, dtype=np.int32)
    inputs = cache, scores, lengths, ids, np.int32(0), stops, np.int32(16)
    static = dict(new=16, sampling=SamplingConfig())
    done = decode(generator.graphdef, generator.params, *inputs, **static)
    assert not np.asarray(done.counts).any() and np.asarray(done.stopped)[:2].all()
    np.testing.assert_array_equal(np.asarray(done.cache[0]), before)


def test_programs_are_counted(weights, prompts):
    generator = Generator(*weights, rows=3)
    before = prefill._cache_size(), decode._cache_size()
    for _ in range(2):
        generator.generate_samples(prompts, NEW, stop_ids=[3])
        generator.generate_samples(prompts[::-1], NEW + 1, stop_ids=[3])
    names = [name for name, *_ in generator.programs]
    compiled = prefill._cache_size() - before[0], decode._cache_size() - before[1]
    assert compiled == (names.count("prefill"), names.count("decode"))


def test_what_does_not_fit_is_refused_with_the_numbers(weights, prompts):
    generator = Generator(*weights, max_length=40)
    n = len(prompts[1].tokens)
    with pytest.raises(
        ValueError, match=f"has {n} tokens .*together {n + 5}, at most 40 .*shorten"
    ):
        generator.generate_samples(prompts, 5)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        generator.generate_samples(prompts, 0)
    with pytest.raises(ValueError, match="rows=0"):
        Generator(*weights, rows=0)
    broken = Sample("b", prompts[1].tokens, prompts[1].labels, (), prompts[1].visual)
    with pytest.raises(ValueError, match="placeholders for 0 visual tokens"):
        Generator(*weights).generate_samples([broken])
    assert Generator(*weights).generate_samples([]) == []
