"""Any source with a length -> one ArrayRecord file with the media in it, as they are encoded."""

import json
import os
from collections import Counter

from tqdm import tqdm

from vlmjax.data.array_record import Writer
from vlmjax.data.health import BadRecord


def pack(source, output):
    """Writes the records of a source in order; returns (how many, {reason: how many were not}).

    Those that cannot be used are left out and listed by id and reason in OUTPUT.errors.jsonl. Media
    are not decoded, so what is wrong inside of them is found when they are used.

    Args:
      source: with a length.
      output: the ArrayRecord file; it is there only once it is whole.
    """
    if not hasattr(source, "__len__"):
        raise ValueError("a source without end cannot be packed: choose one with a length")
    bad, errors = Counter(), f"{os.fspath(output)}.errors.jsonl"
    with Writer(output) as writer, open(errors, "w") as listed:
        for index in tqdm(range(len(source)), "records", disable=None):
            try:
                writer.write(source[index])
            except BadRecord as error:
                bad[error.reason] += 1
                entry = {"id": source.id(index), "reason": error.reason, "error": str(error)}
                listed.write(json.dumps(entry) + "\n")
    if not bad:
        os.unlink(errors)
    return len(source) - bad.total(), dict(bad)
