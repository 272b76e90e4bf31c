import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers.generation.logits_process as reference

from vlmjax.generate.sampling import SamplingConfig, choose, warp

ROWS, VOCAB = 5, 40
CONFIGS = (
    dict(temperature=0.7),
    dict(temperature=1.0, top_k=7),
    dict(temperature=1.3, top_p=0.6),
    dict(temperature=0.5, top_p=1e-9),
    dict(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.1),
    dict(repetition_penalty=1.5),
)


def _scores():
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 3, (ROWS, VOCAB)).astype(np.float32)
    scores[1, :20] = scores[1, 0]  # ties
    return scores


def _processors(values):
    """The chain that transformers' `generate` makes of the same settings."""
    chain = reference.LogitsProcessorList()
    kinds = (
        ("repetition_penalty", reference.RepetitionPenaltyLogitsProcessor),
        ("temperature", reference.TemperatureLogitsWarper),
        ("top_k", reference.TopKLogitsWarper),
        ("top_p", reference.TopPLogitsWarper),
    )
    for name, kind in kinds:
        if name in values:
            chain.append(kind(values[name]))
    return chain


@pytest.mark.parametrize("values", CONFIGS, ids=str)
def test_same_scores_as_transformers(values):
    scores = _scores()
    generated = np.random.default_rng(1).integers(0, VOCAB, (ROWS, 6))
    seen = np.zeros((ROWS, VOCAB), bool)
    np.put_along_axis(seen, generated, True, 1)
    theirs = _processors(values)(torch.tensor(generated), torch.tensor(scores)).numpy()
    ours = np.asarray(warp(jnp.asarray(scores), seen, SamplingConfig(**values)))
    np.testing.assert_array_equal(np.isinf(ours), np.isinf(theirs))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_draws_follow_the_probabilities_and_greedy_takes_the_best():
    scores = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]], jnp.float32))
    draws = 4000
    keys = jax.random.split(jax.random.key(0), draws)
    config = SamplingConfig(temperature=1.0, top_k=3)
    tokens = choose(jnp.tile(scores, (draws, 1)), None, keys, config)
    shares = np.bincount(np.asarray(tokens), minlength=4) / draws
    # The share of 4000 draws has a standard deviation of 0.008 at most.
    np.testing.assert_allclose(shares, np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.03)
    assert choose(scores, None, keys[:1], SamplingConfig()).tolist() == [0]


@pytest.mark.parametrize(
    "values",
    [
        dict(temperature=-1),
        dict(temperature=float("nan")),
        dict(temperature=1, top_k=-1),
        dict(temperature=1, top_k=1.5),
        dict(temperature=1, top_p=0),
        dict(temperature=1, top_p=1.1),
        dict(repetition_penalty=0),
        dict(top_p=0.9),
    ],
    ids=str,
)
def test_bad_settings_are_refused(values):
    name, value = list(values.items())[-1]
    with pytest.raises(ValueError, match=f"{name}={value}.*(must be|set temperature)"):
        SamplingConfig(**values)
