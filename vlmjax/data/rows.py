"""Rows of files, tables, tars and TFDS -> annotations -> records.

A row is an annotation (`data.annotation`) as tables write them:
- a medium is a path inside the media root, the bytes of an encoded file, or {"bytes", "path"};
- what has no value is None;
- turns may be {"from": [...], "value": [...]}.
"""

import json

from vlmjax.data import annotation
from vlmjax.data.health import BadRecord

MAX_BYTES = 1 << 31  # of one encoded file that is kept in memory
MAX_TEXT = 1 << 26  # of one annotation
_TURNS = ("conversations", "conversation", "messages")


def parse(text, where):
    """Returns the JSON object of a text; BadRecord if it is none."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRecord("malformed", f"{where} is not JSON ({error}): repair it") from error
    if not isinstance(row, dict):
        raise BadRecord(
            "malformed", f"{where} is a {type(row).__name__}, an object is needed: repair it"
        )
    return row


def to_record(row, media_root, id):
    """Returns the record of a row; BadRecord for whatever is wrong with it.

    Args:
      row: dict.
      media_root: folder of media that are given by path.
      id: used where the row has no id.
    """
    try:
        return annotation.to_record(_annotation(row), media_root, id=id)
    except (ValueError, TypeError, RecursionError) as error:
        reason = error.reason if isinstance(error, BadRecord) else "malformed"
        raise BadRecord(reason, f"{id}: {error}") from error


def check_size(size, what, most=MAX_BYTES):
    """Raises BadRecord for an encoded file that is too large to be kept in memory."""
    if size > most:
        raise BadRecord(
            "hostile_media", f"{what} has {size} bytes, at most {most} are read: shrink it"
        )


def _annotation(row):
    row = _plain(row)
    return row | {key: _listed(row[key]) for key in _TURNS if key in row}


def _plain(value):
    """Returns a value without keys that are None, and with media as bytes or path."""
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    if "bytes" in value and value.keys() <= {"bytes", "path"}:
        return value.get("path") if value["bytes"] is None else value["bytes"]
    return {key: _plain(inner) for key, inner in value.items() if inner is not None}


def _listed(turns):
    """Returns turns one by one; some tables have them as a column for each key."""
    if not isinstance(turns, dict):
        return turns
    return [dict(zip(turns, turn, strict=True)) for turn in zip(*turns.values(), strict=True)]
