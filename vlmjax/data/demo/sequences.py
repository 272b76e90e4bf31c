"""Tasks over several pictures: images of one question, frames of a video, a live stream.

Frames are 32x32 (four merged tokens). A thing stays for one or more frames; while it does not move
its pixels do not change, so that DiffFP prunes them.
"""

from __future__ import annotations

from random import Random

import numpy as np

from vlmjax.data.demo import art
from vlmjax.data.demo.classes import NAMES, SHOTS, trained_styles
from vlmjax.data.demo.reading import shot_frames
from vlmjax.data.demo.task import Draw, ask, draw_until, picture

_FRAME = 32
_SINGLE_SHARE = 0.2
_LENGTHS = (3, 3, 4, 4, 5)  # frames
_SHOT_SHARE = 0.2
_CLIP_STEP = 0.25  # seconds between the stored frames of the real shots


def multi_image(rng: Random, split: str) -> Draw:
    """Two to four images: "image 1: cat; image 2: dog"."""
    things, content = draw_until(
        split, lambda: rng.sample(NAMES, rng.choice((2, 2, 2, 3, 3, 4))), lambda t: str(sorted(t))
    )
    parts = []
    for k, thing in enumerate(things):
        ground = art.plain(_FRAME, _FRAME, art.light(rng))
        parts += [
            {"type": "text", "text": f"image {k + 1}:"},
            picture(_with_icon(rng, ground, thing), thing),
        ]
    if rng.random() < _SINGLE_SHARE:
        k = rng.randrange(len(things))
        question, answer = f"which image shows the {things[k]}?", str(k + 1)
    else:
        question = "list the images."
        answer = "; ".join(f"image {k + 1}: {thing}" for k, thing in enumerate(things))
    return Draw(ask(question, *parts, answer=answer), answer, (content,))


def video(rng: Random, split: str) -> Draw:
    """Three to five frames, icons and real shots spliced: "0.0s cat 1.0s cat 2.0s city"."""
    runs, content = draw_until(split, lambda: _runs(rng, rng.choice(_LENGTHS)), _splice)
    step = rng.choice((0.5, 1.0, 1.0, 2.0))
    frames, things = _frames(rng, split, runs, step)
    times = [k * step for k in range(len(things))]
    part = {"type": "video", "video": np.stack(frames), "timestamps": times, "alt": things}
    once = [k for k, thing in enumerate(things) if things.count(thing) == 1]
    kind = rng.random()
    if kind < _SINGLE_SHARE / 2:
        k = rng.randrange(len(things))
        question, answer = f"what is at {times[k]:.1f}s?", things[k]
    elif kind < _SINGLE_SHARE and once:
        k = rng.choice(once)
        question, answer = f"when is the {things[k]}?", f"{times[k]:.1f}s"
    else:
        question = "list the frames."
        answer = " ".join(f"{t:.1f}s {thing}" for t, thing in zip(times, things, strict=True))
    return Draw(ask(question, part, answer=answer), answer, (content,))


def stream(rng: Random, split: str) -> Draw:
    """Frames arrive one a second; the assistant speaks once, when the named thing appears.

    The answer lists what is said and when ("2.0s cat"); it is empty when the thing never comes.
    """
    runs, content = draw_until(split, lambda: _runs(rng, rng.choice(_LENGTHS)), _splice)
    seen = list(dict.fromkeys(thing for thing, _ in runs))
    absent = rng.random() < 0.15
    target = rng.choice([n for n in NAMES if n not in seen] if absent else seen)
    frames, things = _frames(rng, split, runs, 1.0)
    messages = [{"role": "user", "content": f"say when you see the {target}."}]
    answer = ""
    for k, (frame, thing) in enumerate(zip(frames, things, strict=True)):
        part = picture(frame, thing, time=float(k))
        messages.append({"role": "stream", "content": [part]})
        if thing == target and not answer:
            messages.append({"role": "assistant", "content": target})
            answer = f"{k:.1f}s {target}"
    return Draw(messages, answer, (content,))


def _runs(rng: Random, length: int) -> list[tuple[str, int]]:
    """Returns (thing, frames it stays) pairs of different things, `length` frames in all."""
    stays = []
    while sum(stays) < length:
        stays.append(min(rng.choice((1, 1, 2, 2)), length - sum(stays)))
    shots, icons = rng.sample(tuple(SHOTS), len(SHOTS)), rng.sample(NAMES, len(stays))
    things = [shots.pop() if shots and rng.random() < _SHOT_SHARE else icons.pop() for _ in stays]
    return list(zip(things, stays, strict=True))


def _splice(runs) -> str:
    return " ".join(thing for thing, _ in runs)


def _frames(rng: Random, split: str, runs, step: float):
    """Returns the frames u8[32, 32, 3] of the runs and what each shows."""
    ground = art.plain(_FRAME, _FRAME, art.light(rng))
    frames, things = [], []
    for thing, stay in runs:
        if thing in SHOTS:
            frames += _shot(rng, split, thing, stay, step)
        else:
            frame = _with_icon(rng, ground.copy(), thing)
            moves = rng.random() < 0.2
            frames.append(frame)
            for _ in range(stay - 1):
                frames.append(_with_icon(rng, ground.copy(), thing) if moves else frame)
        things += [thing] * stay
    return frames, things


def _shot(rng: Random, split: str, name: str, stay: int, step: float) -> list[np.ndarray]:
    """Returns consecutive frames of a real shot, `step` seconds apart."""
    stride = round(step / _CLIP_STEP)
    frames = shot_frames(name, split)
    first = rng.choice(frames[: max(len(frames) - (stay - 1) * stride, 1)])
    side = rng.choice((56, 64))
    corner = (64 - side) // 2
    return [
        art.shot_frame(name, min(first + k * stride, frames[-1]), corner, corner, side, _FRAME)
        for k in range(stay)
    ]


def _with_icon(rng: Random, ground: np.ndarray, thing: str) -> np.ndarray:
    size = rng.randint(26, 32)
    space = _FRAME - size
    stamp = art.icon(thing, rng.choice(trained_styles(thing)), size)
    art.stamp(ground, *stamp, rng.randint(0, space), rng.randint(0, space))
    return ground
