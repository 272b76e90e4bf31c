"""Rows of files, tables, tars and TFDS -> annotations -> records.

A row is an annotation (`data.annotation`) that may also have
- media in columns `image`, `images`, `video`, `videos`: a path inside the media root, the bytes of
  an encoded file, {"bytes": ..., "path": ...}, or a list of these; None and [] are no media;
- `messages` [{"role", "content": text or parts}] for `conversations`; a part is text, or an image
  or video of its own, or one without content for the next of the columns;
- turns as {"from": [...], "value": [...]}.
"""

import json

from vlmjax.data import annotation
from vlmjax.data.health import BadRecord

MAX_BYTES = 1 << 31  # of one encoded file that is kept in memory
MAX_TEXT = 1 << 26  # of one annotation
_COLUMNS = {"image": "image", "images": "image", "video": "video", "videos": "video"}


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
    except BadRecord:
        raise
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise BadRecord("malformed", f"{id}: {error}") from error


def check_size(size, what, most=MAX_BYTES):
    """Raises BadRecord for an encoded file that is too large to be kept in memory."""
    if size > most:
        raise BadRecord(
            "hostile_media", f"{what} has {size} bytes, at most {most} are read: shrink it"
        )


def _annotation(row):
    row = {key: value for key, value in row.items() if value is not None}
    row |= {column: _media(row[column]) for column in _COLUMNS if column in row}
    messages = row.pop("messages", None)
    if messages is None and "conversations" not in row:
        return row
    if messages is not None and "conversations" in row:
        raise BadRecord("malformed", "a row has messages and conversations: keep one of them")
    media = {"image": [], "video": []}
    for column, kind in _COLUMNS.items():
        found = row.pop(column, [])
        media[kind] += [found] if isinstance(found, str) else found
    if messages is not None:
        row["conversations"] = _turns(_listed(messages), media)
    row["conversations"] = _listed(row["conversations"])
    return row | {kind: files for kind, files in media.items() if files}


def _listed(turns):
    """Returns turns one by one; some tables have them as a column for each key."""
    if not isinstance(turns, dict):
        return turns
    return [dict(zip(turns, turn, strict=True)) for turn in zip(*turns.values(), strict=True)]


def _media(value):
    """Returns the media of a column: a path as it is, or a list of paths and bytes."""
    if isinstance(value, str):
        return value
    return [_medium(item) for item in ([value] if isinstance(value, (bytes, dict)) else value)]


def _medium(item):
    if isinstance(item, dict):
        return item["path"] if item.get("bytes") is None else item["bytes"]
    return item


def _turns(messages, media):
    """Returns messages as turns of `conversations`; moves media in their parts to `media`."""
    own, bare, turns = {"image": [], "video": []}, 0, []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            pieces = []
            for part in content:
                kind = part["type"]
                if kind == "text":
                    pieces.append(part["text"])
                    continue
                found = _medium(part.get(kind))
                own[kind] += [] if found is None else [found]
                bare += found is None
                pieces.append(f"<{kind}>")
            content = "".join(pieces)
        turns.append({"from": message["role"], "value": content})
    if any(own.values()):
        if bare or any(media.values()):
            raise BadRecord(
                "malformed", "media are in the messages and in columns: keep them in one place"
            )
        media.update(own)
    return turns
