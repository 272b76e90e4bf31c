"""Text-only tasks: letters of words, numbers, element symbols, sentences of Python's manual."""

from __future__ import annotations

import json
import re
from functools import cache
from pydoc_data.topics import topics
from random import Random

from vlmjax.data.demo import art
from vlmjax.data.demo.reading import words
from vlmjax.data.demo.task import Draw, ask, divide, draw_until

# Ways to ask for a symbol. A (fact, way) pair may be held out, the fact itself never is.
_ASK_SYMBOL = ("symbol of {}?", "what is the symbol of {}?", "{} is written as")


def text(rng: Random, split: str) -> Draw:
    """Letters of a word, the largest number, sums, symbols; training also reads sentences."""
    kind = rng.random()
    if kind < 0.15 and split == "train":
        return _sentence(rng)
    if kind < 0.5:
        return _letter(rng, split)
    if kind < 0.75:
        return _largest(rng, split)
    return _sum(rng, split) if kind < 0.85 else _symbol(rng, split)


def _draw(question: str, answer: str, content: str) -> Draw:
    return Draw(ask(question, answer=answer), answer, (content,))


def _letter(rng: Random, split: str) -> Draw:
    word = rng.choice(words()[split][rng.randint(3, 5)])
    which, place = rng.choice((("first", 0), ("last", -1), ("second", 1)))
    return _draw(f"{which} letter of {word}?", word[place], word)


def _largest(rng: Random, split: str) -> Draw:
    numbers, content = draw_until(
        split, lambda: rng.sample(range(10), rng.choice((2, 3, 3))), lambda n: str(sorted(n))
    )
    return _draw(f"largest of {' '.join(map(str, numbers))}?", str(max(numbers)), content)


def _sum(rng: Random, split: str) -> Draw:
    (a, b), content = draw_until(
        split,
        lambda: (rng.randrange(10), rng.randrange(10)),
        lambda n: f"{min(n)}+{max(n)}",
    )
    return _draw(f"{a}+{b}=", str(a + b), content)


@cache
def _symbols() -> dict[str, list[tuple[str, str, str]]]:
    """Split -> (content, question, symbol); of each element at most one way to ask is held out."""
    pools: dict[str, list] = {"train": [], "test": []}
    facts = json.loads((art.ASSETS / "tables.json").read_text())["elements"]
    for k, (element, symbol) in enumerate(facts[:24]):
        for way, question in enumerate(_ASK_SYMBOL):
            split = "test" if k % 4 == way else "train"
            pools[split].append((f"{element} {way}", question.format(element), symbol))
    return pools


def _symbol(rng: Random, split: str) -> Draw:
    content, question, symbol = rng.choice(_symbols()[split])
    return _draw(question, symbol, content)


@cache
def _sentences() -> list[str]:
    """Short sentences of the Python language reference, which every Python ships."""
    whole = re.sub(r"\s+", " ", " ".join(topics[key] for key in sorted(topics)))
    found = re.findall(r"(?<=[.] )[A-Z][a-z]+ [A-Za-z ,'()-]{12,70}[.](?= )", whole)
    return divide(sorted(set(found)))["train"]


def _sentence(rng: Random) -> Draw:
    sentence = rng.choice(_sentences())
    return _draw("read a text.", sentence, sentence)
