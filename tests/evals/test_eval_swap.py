"""The wrong-image control: other pixels, the same words."""

import numpy as np
import pytest

from vlmjax.data.chat import render
from vlmjax.data.demo import TASKS, DemoSource
from vlmjax.evals.swap import form, media, swap_media, with_media

WITH_MEDIA = [task for task in TASKS if task != "text"]


def _pixels(record):
    return [part[part["type"]] for part in media(record)]


@pytest.mark.parametrize("task", WITH_MEDIA)
def test_swapping_changes_pixels_and_keeps_words(task, chat):
    source = DemoSource(task, "test", 1)
    records = [source[i] for i in range(12)]
    swapped = swap_media(records, source)
    for record, other in zip(records, swapped, strict=True):
        assert record["id"] == other["id"] and record["answer"] == other["answer"]
        assert form(record) == form(other)
        assert render(record["messages"], "i", "v") == render(other["messages"], "i", "v")
        assert not all(map(np.array_equal, _pixels(record), _pixels(other)))
        ours, theirs = chat.processor(record), chat.processor(other)
        count = [int((s.labels >= 0).sum()) for s in (ours, theirs)]
        assert count[0] == count[1] and len(ours.items) == len(theirs.items)


def test_a_lone_form_finds_a_partner_in_the_source():
    source = DemoSource("video", "test", 1)
    (record,) = records = [source[0]]
    (swapped,) = swap_media(records, source)
    partner = next(r for r in map(source.__getitem__, range(1, 99)) if form(r) == form(record))
    assert np.array_equal(_pixels(swapped)[0], _pixels(partner)[0])


def test_other_forms_are_refused():
    records = DemoSource("name", "test", 1)[0], DemoSource("multi_image", "test", 1)[0]
    with pytest.raises(ValueError, match="only records of one form can exchange"):
        with_media(*records)
