"""Messages -> text, tokens and labels, by a template.

A conversation becomes a list of pieces: control tokens, text, and slots for visual items. Tokens
are made from the pieces, so the places of the visual tokens are known by construction and text
never has to be searched; text pieces are encoded as text whatever they contain. In the template of
VideoLLaMA3:

    user:    <|im_start|>user\\n{image}\\n{question}<|im_end|>\\n
    video:   Time 0.0s:{frame},Time 1.0s:{frame}\\n
    stream:  <|stream_start|>stream\\nTime 0.0s: {frame}\\n<|stream_end|>\\n

Labels: the answer of an assistant message with the control token that ends it. After a stream
message the first token of the next message is trained too: it says whether the model keeps watching
(<|stream_start|>) or someone speaks (<|im_start|>). These decisions are balanced within a sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vlmjax.data.templates import CONTROL, TEMPLATES, TEXT, VISUAL, Template
from vlmjax.data.tokenizer import Tokenizer

IGNORE = -100
ROLES = ("system", "user", "assistant", "stream")


class Encoded(NamedTuple):
    """A conversation as tokens i32[n] and labels i32[n] (-100 = ignored, not shifted).

    `visual` bool[n] says where a picture has a slot, `picture` i32[n] which one it is (-1 = none)
    and `entry` i32[n] which of its visual tokens stands there.
    """

    tokens: np.ndarray
    labels: np.ndarray
    visual: np.ndarray
    picture: np.ndarray
    entry: np.ndarray


class Piece(NamedTuple):
    """A part of a conversation.

    Attributes:
      kind: CONTROL, TEXT, ALONE or VISUAL.
      value: the text, or the token that stands at visual slots.
      trained: whether it belongs to an answer.
      decides: whether it follows a stream message.
      entries: i32[k] of visual slots.
      picture: its number.
      prompt: the text of this run that belongs to no answer.
    """

    kind: str
    value: str
    trained: bool = False
    decides: bool = False
    entries: np.ndarray | None = None
    picture: int = -1
    prompt: str = ""


def check_messages(messages: Sequence[dict]) -> None:
    """Raises ValueError unless every message has a known role and well-formed content."""
    if not messages:
        raise ValueError("the record has no messages: give at least one user message")
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(
                f"message {number} is a {type(message).__name__}: give role and content"
            )
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(
                f"message {number} has role {role!r}, known roles are {ROLES}: rename it"
            )
        if isinstance(content, str):
            continue
        if not isinstance(content, (list, tuple)):
            raise ValueError(
                f"message {number} has content of type {type(content).__name__}: give text or parts"
            )
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else part
            if kind not in ("text", "image", "video"):
                raise ValueError(
                    f"message {number} has a part of type {kind!r}: use text, image or video"
                )
            if kind == "text" and not isinstance(part.get("text"), str):
                raise ValueError(
                    f"message {number} has a text part without its text: give a string"
                )
            if not isinstance(part.get("time", 0), (int, float, np.number, type(None))):
                raise ValueError(f"message {number} has time {part['time']!r}: give seconds")
            if kind != "text" and role in ("system", "assistant"):
                raise ValueError(
                    f"message {number} ({role}) holds a {kind}: move it to a user or stream message"
                )
            if kind == "video" and role == "stream":
                raise ValueError(
                    f"message {number} (stream) holds a video: give one timed image per stream "
                    "message"
                )


def render(
    messages: Sequence[dict],
    image_token: str,
    video_token: str,
    generation: bool = False,
    template: Template = TEMPLATES["videollama3"],
) -> str:
    """Returns the text of a conversation with one placeholder per image or frame."""
    check_messages(messages)
    pieces = _conversation(messages, template, image_token, video_token, generation)
    return "".join(piece.value for piece in pieces)


def encode(
    messages: Sequence[dict],
    pictures: Sequence,
    tokenizer: Tokenizer,
    *,
    image_token: str,
    video_token: str,
    seed: str | None,
    generation: bool = False,
    template: Template = TEMPLATES["videollama3"],
) -> Encoded:
    """Tokenises a conversation.

    Args:
      messages: checked messages; video parts carry their `timestamps`.
      pictures: what is shown for each image, frame or whole video in reading order: how many visual
        tokens; or a sequence of (VISUAL, i32[k] its tokens) with (TEXT, str), (ALONE, str) and
        (CONTROL, str).
      tokenizer: knows the control tokens that the messages need.
      image_token: placeholder of images.
      video_token: placeholder of video and stream frames.
      seed: chooses which surplus stream decisions are dropped; None keeps all of them.
      generation: end where an answer begins and train nothing.
      template: of the conversation.
    """
    pieces = _conversation(messages, template, image_token, video_token, generation)
    tokens, labels, picture, entry, decisions = [], [], [], [], []
    for piece in _runs(_shown(pieces, pictures)):
        if piece.decides:
            decisions.append(len(tokens))
        if piece.kind == VISUAL:
            ids = [tokenizer.id(piece.value)] * len(piece.entries)
        elif piece.kind == CONTROL:
            ids = [tokenizer.id(piece.value)]
        else:
            ids = list(tokenizer.encode_text(piece.value))
        asked = len(tokenizer.encode_text(piece.prompt.rstrip(" "))) if piece.prompt else 0
        labels += [IGNORE] * asked + ids[asked:] if piece.trained else [IGNORE] * len(ids)
        tokens += ids
        picture += [piece.picture] * len(ids)
        entry += [0] * len(ids) if piece.entries is None else list(piece.entries)
    if generation:
        labels = [IGNORE] * len(tokens)
    else:
        if seed is not None:
            decisions = balance([tokens[p] for p in decisions], decisions, seed)
        for place in decisions:
            labels[place] = tokens[place]
    arrays = [np.array(x, np.int32) for x in (tokens, labels, picture, entry)]
    return Encoded(*arrays[:2], arrays[2] >= 0, *arrays[2:])


def balance(kinds: Sequence[int], places: Sequence[int], seed: str) -> list[int]:
    """Returns the places to keep: as many of each kind as the rarest has, chosen by the seed."""
    if not kinds:
        return []
    rng = np.random.default_rng(
        int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little")
    )
    groups = {
        kind: [p for k, p in zip(kinds, places, strict=True) if k == kind]
        for kind in sorted(set(kinds))
    }
    rarest = min(map(len, groups.values()))
    return sorted(int(p) for group in groups.values() for p in rng.permutation(group)[:rarest])


def _conversation(messages, template, image_token, video_token, generation):
    """Returns the `Piece`s of messages; those of visual items have no entries yet."""
    if template.system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": template.system}, *messages]
    made, previous = [Piece(*piece) for piece in template.pieces(template.start)], None
    for message in messages:
        role = message["role"]
        if role not in template.turns:
            raise ValueError(
                f"a message has role {role!r}, the template knows {sorted(template.turns)}: move "
                "its text to one of these, or choose another template"
            )
        before, after = map(template.pieces, template.turns[role])
        content = _content(message, template, image_token, video_token)
        if role == "assistant":
            content = [(*piece, True) for piece in content]
            last = next((k for k, (kind, _) in enumerate(after) if kind == CONTROL), len(after))
            after = [(*piece, k <= last) for k, piece in enumerate(after)]
        if template.place == "first":
            shown = [piece for piece in content if piece[0] == VISUAL]
            before = (*shown, *before)
            content = [piece for piece in content if piece[0] != VISUAL]
        here = [Piece(*piece) for piece in (*before, *content, *after)]
        if previous == "stream" and here:
            here[0] = here[0]._replace(decides=True)
        made, previous = made + here, role
    if generation:
        return made + [Piece(*piece) for piece in template.pieces(template.answer)]
    answered = previous == "assistant"
    return made + [Piece(*piece, answered) for piece in template.pieces(template.end)]


def _content(message, template, image_token, video_token):
    """Returns the (kind, value) pairs of what a message says."""
    if isinstance(message["content"], str):
        return [(TEXT, message["content"])] if message["content"] else []
    pieces, stream = [], message["role"] == "stream"
    before, after = map(template.pieces, template.picture)
    for part in message["content"]:
        if part["type"] == "text":
            pieces.append((TEXT, part["text"]))
        elif part["type"] == "image":
            time = part.get("time")
            if time is not None:
                pieces.append((TEXT, f"Time {time:.1f}s: "))
            pieces += [*before, (VISUAL, video_token if stream else image_token), *after]
        elif template.video == "whole":
            pieces += [*before, (VISUAL, video_token), *after]
        else:
            for k, time in enumerate(part["timestamps"]):
                pieces += [(TEXT, f"{',' if k else ''}Time {time:.1f}s:"), (VISUAL, video_token)]
            pieces += after
    return pieces


def _shown(pieces, pictures):
    """Yields the pieces with every visual one replaced by what its picture shows."""
    places = sum(piece.kind == VISUAL for piece in pieces)
    if places != len(pictures):
        raise ValueError(
            f"{len(pictures)} images and frames given, the messages show {places}: each needs one"
        )
    number = 0
    for piece in pieces:
        if piece.kind != VISUAL:
            yield piece
            continue
        picture = pictures[number]
        if isinstance(picture, int):
            picture = [(VISUAL, np.arange(picture))]
        for kind, value in picture:
            if kind == VISUAL:
                yield piece._replace(entries=np.asarray(value), picture=number)
            else:
                yield Piece(kind, value)
        number += 1


def _runs(pieces):
    """Yields the pieces with neighbouring texts as one, because they are tokenised together."""
    run = None
    for piece in pieces:
        joins = run is not None and (run.kind, piece.kind) == (TEXT, TEXT)
        if joins and (piece.trained or not run.trained):  # what follows an answer is apart
            prompt = run.prompt if run.trained else run.value
            run = run._replace(
                value=run.value + piece.value,
                trained=piece.trained,
                prompt=prompt if piece.trained else "",
            )
        else:
            if run is not None:
                yield run
            run = piece
    if run is not None:
        yield run
