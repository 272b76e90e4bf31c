"""LLaVA and InternVL of transformers: imported and exported models compute the same."""

import numpy as np
import picture_models as models
import pytest
import torch
from transformers import AutoModelForImageTextToText

from vlmjax import from_pretrained

TOLERANCE = 1e-5
NAMES = list(models.CONFIGS)


@pytest.fixture(scope="module", params=NAMES)
def case(request, tmp_path_factory):
    """(name, model of transformers, its directory, ours)."""
    folder = tmp_path_factory.mktemp("reference")
    model = models.model_of(request.param)
    models.save(request.param, model, folder)
    return request.param, model, folder, from_pretrained(folder)


def conversations(name):
    made = {f"{w}x{h}": models.user(models.image(w, h, seed=w)) for w, h in models.SIZES}
    made["several"] = models.user(models.image(90, 60), models.image(40, 70, seed=1))
    if name in models.VIDEO:
        made["video"] = models.user(models.clip())
    return made


def logits_of(name, model, messages, tokens):
    with torch.no_grad():
        return model(**models.reference_inputs(name, messages, tokens)).logits[0].numpy()


def errors(name, model, ours):
    found = {}
    for title, messages in conversations(name).items():
        sample = ours.processor.prompt(messages)
        theirs = logits_of(name, model, messages, sample.tokens)
        got = ours.generator.logits(sample)
        found[title] = float(np.abs(got - theirs).max() / np.abs(theirs).max())
    return found


def test_logits(case):
    name, model, _, ours = case
    found = errors(name, model, ours)
    assert max(found.values()) < TOLERANCE, found
