"""The demo as random-access sources of records, and their twins in words."""

from __future__ import annotations

import hashlib
from random import Random

from vlmjax.data.demo import reading, scenes, sequences, text
from vlmjax.data.demo.art import ASSETS
from vlmjax.data.demo.task import Task

TOKENIZER = ASSETS / "tokenizer"
TASKS = {
    "name": Task(reading.name),
    "name_cross": Task(reading.name_cross, ("test",)),
    "digit": Task(reading.digit),
    "digits": Task(reading.digits),
    "letter": Task(reading.letter),
    "ocr": Task(reading.ocr),
    "count": Task(scenes.count),
    "where": Task(scenes.where),
    "caption": Task(scenes.caption),
    "chart": Task(scenes.chart),
    "multi_image": Task(sequences.multi_image),
    "video": Task(sequences.video),
    "stream": Task(sequences.stream),
    "text": Task(text.text),
}
_TEXT_SUFFIX = "_as_text"


class DemoSource:
    """Records of one task and split, without end: source[i] depends on (task, split, seed, i) only.

    A task named "ocr_as_text" gives the records of "ocr" with each picture replaced by words.
    """

    def __init__(self, task: str, split: str = "train", seed: int = 0):
        name = task.removesuffix(_TEXT_SUFFIX)
        if name not in TASKS:
            raise ValueError(
                f"demo task {task!r} is unknown, the tasks are {sorted(TASKS)} (each also with the "
                f"suffix {_TEXT_SUFFIX!r}): choose one of them"
            )
        if split not in TASKS[name].splits:
            raise ValueError(
                f"demo task {task!r} has no split {split!r}, it has {TASKS[name].splits}: "
                "choose one of them"
            )
        self.task, self.split, self.seed = name, split, seed
        self._words = task != name

    def id(self, index: int) -> str:
        name = f"demo/{self.task}/{self.split}/{self.seed}/{index}"
        return name + "/text" if self._words else name

    @property
    def fingerprint(self) -> str:
        """A hex digest of what the records follow from, the assets by name and size."""
        found = hashlib.sha256(self.id(0).encode())
        for file in sorted(file for file in ASSETS.rglob("*") if file.is_file()):
            found.update(f"{file.relative_to(ASSETS)}\0{file.stat().st_size}\0".encode())
        return found.hexdigest()

    def __getitem__(self, index: int) -> dict:
        name = f"{self.task}/{self.split}/{self.seed}/{index}"
        seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
        messages, answer, content = TASKS[self.task].make(Random(seed), self.split)
        record = {
            "id": f"demo/{name}",
            "task": self.task,
            "messages": messages,
            "answer": answer,
            "content": content,
        }
        return as_text(record, filler=2) if self._words else record


def as_text(record: dict, filler: int = 0) -> dict:
    """Returns the record with each medium replaced by its `alt` words.

    With `filler`, up to that many "~" stand before each word and at the end, as a picture's
    blank patches stand between its things; which ones follows from the record's id.
    """
    rng = Random(record["id"])
    messages = []
    for message in record["messages"]:
        content = message["content"]
        if not isinstance(content, str):
            content = "".join(_words(part, rng, filler) for part in content)
        messages.append({**message, "content": content})
    return {**record, "id": record["id"] + "/text", "messages": messages}


def _words(part: dict, rng: Random, filler: int) -> str:
    if part["type"] == "text":
        return part["text"]
    if part["type"] == "image":
        time = part.get("time")
        start = "" if time is None else f"Time {time:.1f}s: "
        return start + _spread(part["alt"], rng, filler) + "\n"
    frames = [
        f"Time {time:.1f}s:{_spread(alt, rng, filler)}"
        for time, alt in zip(part["timestamps"], part["alt"], strict=True)
    ]
    return ",".join(frames) + "\n"


def _spread(words: str, rng: Random, filler: int) -> str:
    if not filler:
        return words
    pieces = []
    for word in words.split(" "):
        pieces += ["~"] * rng.randint(0, filler) + [word]
    return " ".join(pieces + ["~"] * rng.randint(0, filler))
