"""Sources: random-access sequences of records, opened by a spec.

demo:TASK        records of the embedded demo, without end
json:FILE        LLaVA / VideoLLaMA3 annotations, a JSON list or JSON lines (see `data.annotation`)
"""

import json
from pathlib import Path

from vlmjax.data import annotation


class JsonSource:
    """Annotations of a JSON or JSONL file; media paths are relative to `media_root`, inside it."""

    def __init__(self, file, media_root):
        text = Path(file).read_text()
        try:
            lines = json.loads(text) if text.lstrip().startswith("[") else None
            self.rows = (
                lines
                if lines is not None
                else [json.loads(s) for s in text.splitlines() if s.strip()]
            )
        except json.JSONDecodeError as e:
            raise ValueError(
                f"{file} is neither a JSON list nor one JSON object a line: {e}"
            ) from e
        if not self.rows:
            raise ValueError(f"{file} holds no annotations; it needs at least one")
        self.file, self.media_root = str(file), media_root

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return annotation.to_record(self.rows[index], self.media_root, id=f"{self.file}:{index}")


def _demo(task, media_root, seed):
    from vlmjax.data.demo import DemoSource

    return DemoSource(task, "train", seed)


KINDS = {
    "demo": _demo,
    "json": lambda file, media_root, seed: JsonSource(file, media_root),
}


def open_source(spec, media_root, seed):
    """Returns the source of a spec "kind:rest"; ValueError for an unknown kind."""
    kind, _, rest = spec.partition(":")
    if kind not in KINDS or not rest:
        raise ValueError(
            f"data source {spec!r} is not allowed: write KIND:NAME with KIND one of {sorted(KINDS)}"
        )
    return KINDS[kind](rest, media_root, seed)
