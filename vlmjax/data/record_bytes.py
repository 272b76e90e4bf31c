"""A record as bytes, without pickle: u32 length of a JSON header, the header, its media files.

    {"record": {"id": ..., "messages": [... {"type": "image", "image": {"blob": 0}} ...]},
     "blobs": [48113, 902114]}

Media are files as they were, in the order of `blobs`, which has their sizes; the same file is kept
once.
"""

import json
from pathlib import Path

from vlmjax.data.health import BadRecord
from vlmjax.data.image import check_path, open_file
from vlmjax.data.rows import check_size

MEDIA = ("image", "video")
_LENGTH = 4


def encode(record):
    """Returns the bytes of a record whose media are paths or bytes of files.

    Raises:
      BadRecord: what it holds has no place in UTF-8 or JSON, or a medium is not there.
    """
    blobs, places = [], {}

    def medium(source):
        key = source if isinstance(source, (bytes, Path)) else None
        if key is None:
            raise BadRecord(
                "malformed",
                f"record {record['id']!r} has a medium of type {type(source).__name__}: give a "
                "path or the bytes of a file",
            )
        if key not in places:
            places[key] = len(blobs)
            blobs.append(_content(source))
        return {"blob": places[key]}

    messages = [_changed(message, medium) for message in record["messages"]]
    header = {"record": {**record, "messages": messages}}
    header["blobs"] = [len(data) for data in blobs]
    try:
        text = json.dumps(header, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError, RecursionError) as error:  # half an emoji, NaN, a date
        raise BadRecord(
            "malformed", f"record {record['id']!r} cannot be written as JSON ({error}): repair it"
        ) from error
    return b"".join([len(text).to_bytes(_LENGTH, "little"), text, *blobs])


def decode(data):
    """Returns the record of bytes that `encode` made; BadRecord for any others."""
    try:
        size = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
        header, blobs, start = json.loads(data[_LENGTH:size]), [], size
        for length in header["blobs"]:
            if not 0 < length <= len(data) - start:
                raise ValueError(f"a file of {length} bytes of {len(data) - start} left")
            blobs.append(data[start : start + length])
            start += length
        if start != len(data):
            raise ValueError(f"{len(data) - start} bytes too many")
        record = header["record"]
        messages = [_changed(m, lambda value: blobs[value["blob"]]) for m in record["messages"]]
        return {**record, "messages": messages}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise BadRecord("malformed", f"bytes are no record of ours ({error})") from error


def _changed(message, medium):
    """Returns a message with its media replaced."""
    if isinstance(message["content"], str):
        return message
    parts = [
        {**part, part["type"]: medium(part[part["type"]])} if part["type"] in MEDIA else part
        for part in message["content"]
    ]
    return {**message, "content": parts}


def _content(source):
    if isinstance(source, bytes):
        check_size(len(source), "a medium")
        return source
    path = check_path(source, "media path")
    check_size(path.stat().st_size, f"{str(path)!r}")
    with open_file(path, "media path") as file:
        return file.read()
