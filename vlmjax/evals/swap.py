"""Asks a question about another record's media: the control that shows whether a model looks.

A swapped record keeps its id, its words and its timestamps; the pixels are those of another record
with as many images and frames. Pictures may differ in size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

_MEDIA = ("image", "video")  # types of parts; the pixels are under the name of the type
_FURTHEST = 2000  # records of a source to search for a partner


def media(record: dict) -> Iterator[dict]:
    """Yields the parts of a record that are images or videos, in order."""
    for message in record["messages"]:
        if not isinstance(message["content"], str):
            yield from (part for part in message["content"] if part["type"] in _MEDIA)


def form(record: dict) -> tuple:
    """Returns what must agree for two records to exchange media: each medium's type and frames."""
    return tuple((p["type"], len(p["video"]) if p["type"] == "video" else 1) for p in media(record))


def with_media(record: dict, other: dict) -> dict:
    """Returns the record with the pixels (and the `alt` words) of another one of the same form."""
    if form(record) != form(other):
        raise ValueError(
            f"records {record['id']!r} and {other['id']!r} hold media {form(record)} and "
            f"{form(other)}: only records of one form can exchange them; choose another"
        )
    others = media(other)
    messages = []
    for message in record["messages"]:
        content = message["content"]
        if not isinstance(content, str):
            content = [_replace(p, next(others)) if p["type"] in _MEDIA else p for p in content]
        messages.append({**message, "content": content})
    return {**record, "messages": messages}


def _replace(part: dict, other: dict) -> dict:
    return {**part, **{key: other[key] for key in (part["type"], "alt") if key in other}}


def swap_media(records: Sequence[dict], source) -> list[dict]:
    """Returns each record with the media of the next one of its form.

    Args:
      records: the first records of `source`.
      source: random-access records, in which a partner is searched for a form that occurs once.
    """
    groups: dict[tuple, list[int]] = {}
    for number, record in enumerate(records):
        groups.setdefault(form(record), []).append(number)
    swapped: list = [None] * len(records)
    for wanted, group in groups.items():
        ring = [records[number] for number in group]
        ring += ring[:1] if len(ring) > 1 else [_find(source, len(records), wanted)]
        for number, other in zip(group, ring[1:], strict=True):
            swapped[number] = with_media(records[number], other)
    return swapped


def _find(source, start: int, wanted: tuple) -> dict:
    for record in map(source.__getitem__, itertools.islice(itertools.count(start), _FURTHEST)):
        if form(record) == wanted:
            return record
    raise ValueError(
        f"none of {_FURTHEST} records holds media {wanted}: a wrong picture needs two such "
        "records; change the seed or the number of samples"
    )
