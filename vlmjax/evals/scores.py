"""Scores of the demo's answers, 0 to 1, and what a model that sees nothing would get.

Lists are scored by entry: "0.0s cat 1.0s dog" against "0.0s cat 1.0s pig" is 0.5; an entry is right
when its key (time, place, image, colour, name) and its value both are, and entries that the truth
does not have count as errors. Everything else is right or wrong as a whole.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

_SIDES = {"left", "right", "top", "bottom", "center"}
_ENTRY = {
    "count": re.compile(r"(\w+) (\d+)"),
    "chart": re.compile(r"(\w+) (\d+)"),
    "where": re.compile(r"([a-z ]+) ([a-z]+)"),
    "multi_image": re.compile(r"image (\d+): (\w+)"),
    "video": re.compile(r"(\d+\.\d)s (\w+)"),
    "stream": re.compile(r"(\d+\.\d)s (\w+)"),
}
_SEPARATOR = {"count": ", ", "chart": ", ", "where": ", ", "multi_image": "; "}
# Lists whose keys the prompt itself tells: a blind answer may use them.
_KEYS_IN_PROMPT = ("multi_image", "video")


def score(task: str, prediction: str, answer: str) -> float:
    """Returns how right a prediction is.

    Args:
      task: a demo task; tasks without a list format are scored by exact match.
      prediction: what the model said. Of a stream: "2.0s cat", one such entry per thing said,
        the time being that of the newest frame, and "" for a model that stayed silent.
      answer: the right answer, in the same form.
    """
    prediction, answer = _clean(prediction), _clean(answer)
    truth = _entries(task, answer)
    if truth is None:
        return float(prediction == answer)
    found = _entries(task, prediction) or []
    if not truth and not found:
        return float(not prediction)
    right = sum((Counter(truth) & Counter(found)).values())
    return right / max(len(truth), len(found))


def chance(task: str, answers: Sequence[str]) -> float:
    """Returns the mean score of the best answer that does not depend on the picture.

    Questions of different forms (a list, a number, a word) may each have their own constant answer,
    since the question tells the form. A blind answer also knows what the prompt says in words: the
    times of a video, the number of images, the name a stream is watched for.
    """
    if not answers:
        raise ValueError("no answers given, chance needs at least one: score some samples first")
    if task == "stream":  # the name is in the question; only the time is unknown
        answers = [re.sub(r"s \w+", "s it", a) for a in answers]
    groups: dict[str, list[str]] = {}
    for answer in map(_clean, answers):
        groups.setdefault(_form(task, answer), []).append(answer)
    total = 0.0
    for form, group in groups.items():
        if form == "list" and task in _KEYS_IN_PROMPT:
            total += _best_by_key(task, group)
        else:
            total += max(sum(score(task, c, a) for a in group) for c in set(group))
    return total / len(answers)


def standard_error(scores: Sequence[float]) -> float:
    """Returns the standard error of the mean, never below that of one miss in all."""
    n = len(scores)
    if n < 2:
        raise ValueError(f"{n} scores given, a standard error needs at least 2: score more samples")
    mean = sum(scores) / n
    variance = sum((s - mean) ** 2 for s in scores) / (n - 1)
    return math.sqrt(max(variance, (1 - 1 / n) / n) / n)


def _clean(text: str) -> str:
    return " ".join(text.split())


def _entries(task: str, text: str) -> list[tuple] | None:
    """Returns the (key, value) entries of a list, None for an answer that is not a list."""
    if task == "caption":
        things, _, ground = text.partition(" on ")
        return [*enumerate(things.split(" and ")), ("on", ground)]
    if task not in _ENTRY:
        return None
    pattern, separator = _ENTRY[task], _SEPARATOR.get(task)
    if separator is None:
        found = pattern.findall(text)
        return found if found or task == "stream" else None
    if task == "where" and (not text or text.split()[-1] in _SIDES):
        return None
    matches = [pattern.fullmatch(piece) for piece in text.split(separator)]
    if not any(matches):
        return None
    return [m.groups() if m else ("?", piece) for piece, m in enumerate(matches)]


def _form(task: str, answer: str) -> str:
    if _entries(task, answer) is not None:
        return "list"
    if answer[:1].isdigit():
        return "number"
    return "word" if len(answer) > 1 else "letter"


def _best_by_key(task: str, answers: list[str]) -> float:
    """Returns the summed score of the best list with one value per place in the list."""
    lists = [[value for _, value in _entries(task, a)] for a in answers]
    places = [Counter() for _ in range(max(map(len, lists)))]
    for values in lists:
        for place, value in zip(places, values, strict=False):
            place[value] += 1 / len(values)
    best = [place.most_common(1)[0][0] for place in places]
    return sum(
        sum(a == b for a, b in zip(values, best, strict=False)) / len(values) for values in lists
    )
