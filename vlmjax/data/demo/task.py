"""What a demo task is, and the rule that keeps training and test content apart."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

SPLITS = ("train", "test")
_TEST_SHARE = 8  # one content in eight is held out


class Draw(NamedTuple):
    """One example: its messages, the right answer, and what it is made of.

    `content` holds the atoms that no other split may use: strings, glyph ids, class combinations.
    """

    messages: list[dict]
    answer: str
    content: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """A demo task: `make(rng, split)` draws one example of a split."""

    make: Callable[[Random, str], Draw]
    splits: tuple[str, ...] = SPLITS


def split_of(content: str) -> str:
    """Returns the split a content belongs to, by its hash."""
    return "test" if zlib.crc32(content.encode()) % _TEST_SHARE == 0 else "train"


def draw_until(split: str, draw: Callable[[], Any], key: Callable[[Any], str]) -> tuple[Any, str]:
    """Draws until the content falls in the split; returns the drawn value and its key."""
    while True:
        value = draw()
        content = key(value)
        if split_of(content) == split:
            return value, content


def divide(items, key=str) -> dict[str, list]:
    """Returns the items of each split."""
    pools: dict[str, list] = {split: [] for split in SPLITS}
    for item in items:
        pools[split_of(key(item))].append(item)
    return pools


def ask(question: str, *parts: dict, answer: str) -> list[dict]:
    """Returns a user turn with media and a question, and the assistant's answer."""
    content = [*parts, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def picture(pixels, alt: str, **extra) -> dict:
    """Returns an image part with its words; pixels u8[h, w, 3]."""
    return {"type": "image", "image": pixels, "alt": alt, **extra}
