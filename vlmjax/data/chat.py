"""The chat format of VideoLLaMA3: messages -> text, tokens and labels.

A message becomes a list of pieces: control tokens, text, and slots for visual items. Tokens are
made from the pieces, so the places of the visual tokens are known by construction and text never
has to be searched; text pieces are encoded as text whatever they contain.

    user:    <|im_start|>user\\n{image}\\n{question}<|im_end|>\\n
    video:   Time 0.0s:{frame},Time 1.0s:{frame}\\n
    stream:  <|stream_start|>stream\\nTime 0.0s: {frame}\\n<|stream_end|>\\n

Labels: the answer and <|im_end|> of assistant messages. After a stream message the first token of
the next message is trained too: it says whether the model keeps watching (<|stream_start|>) or
someone speaks (<|im_start|>). These decisions are balanced within a sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vlmjax.data.tokenizer import Tokenizer

IGNORE = -100
ROLES = ("system", "user", "assistant", "stream")
CONTROL, TEXT, VISUAL = "control", "text", "visual"


class Encoded(NamedTuple):
    """tokens i32[n], labels i32[n] (-100 = ignored, not shifted), visual bool[n]."""

    tokens: np.ndarray
    labels: np.ndarray
    visual: np.ndarray


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
    messages: Sequence[dict], image_token: str, video_token: str, generation: bool = False
) -> str:
    """Returns the text of a conversation with one placeholder per image or frame."""
    check_messages(messages)
    text = "".join(v for m in messages for _, v in _pieces(m, image_token, video_token))
    return text + "<|im_start|>assistant\n" if generation else text


def encode(
    messages: Sequence[dict],
    counts: Sequence[int],
    tokenizer: Tokenizer,
    *,
    image_token: str,
    video_token: str,
    seed: str | None,
    generation: bool = False,
) -> Encoded:
    """Tokenises a conversation.

    Args:
      messages: checked messages; video parts carry their `timestamps`.
      counts: visual tokens of each image or frame, in reading order.
      tokenizer: knows the control tokens that the messages need.
      image_token: placeholder of images.
      video_token: placeholder of video and stream frames.
      seed: chooses which surplus stream decisions are dropped; None keeps all of them.
      generation: end with the header of an assistant message and train nothing.
    """
    tokens, labels, visual_spans, decisions = [], [], [], []
    counts_left = iter(counts)
    previous = None
    for message in messages:
        role = message["role"]
        start = len(tokens)
        for kind, value in _pieces(message, image_token, video_token):
            if kind == TEXT:
                tokens.extend(tokenizer.encode_text(value))
            elif kind == CONTROL:
                tokens.append(tokenizer.id(value))
            else:
                count = next(counts_left, None)
                if count is None:
                    raise ValueError(
                        f"messages hold more images and frames than the {len(counts)} given: add "
                        "the media"
                    )
                visual_spans.append((len(tokens), count))
                tokens.extend([tokenizer.id(value)] * count)
        labels.extend([IGNORE] * (len(tokens) - start))
        if role == "assistant":
            answer = start + 1 + len(tokenizer.encode_text("assistant\n"))
            end = len(tokens) - len(tokenizer.encode_text("\n"))
            labels[answer:end] = tokens[answer:end]
        if previous == "stream":
            decisions.append(start)
        previous = role
    if next(counts_left, None) is not None:
        raise ValueError(
            f"{len(counts)} images and frames given, the messages show {len(visual_spans)}: drop "
            "the rest"
        )
    if generation:
        tokens += [tokenizer.id("<|im_start|>"), *tokenizer.encode_text("assistant\n")]
        labels = [IGNORE] * len(tokens)
    else:
        for place in (
            decisions if seed is None else balance([tokens[p] for p in decisions], decisions, seed)
        ):
            labels[place] = tokens[place]
    visual = np.zeros(len(tokens), bool)
    for start, count in visual_spans:
        visual[start : start + count] = True
    return Encoded(np.array(tokens, np.int32), np.array(labels, np.int32), visual)


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


def _pieces(message: dict, image_token: str, video_token: str) -> list[tuple[str, str]]:
    """Returns (kind, value) pairs; neighbouring texts are one piece, tokenised together."""
    role, content = message["role"], message["content"]
    stream = role == "stream"
    pieces = [(CONTROL, "<|stream_start|>" if stream else "<|im_start|>")]
    text = role + "\n"
    if isinstance(content, str):
        text += content
        content = ()
    for part in content:
        if part["type"] == "text":
            text += part["text"]
        elif part["type"] == "image":
            time = part.get("time")
            if time is not None:
                text += f"Time {time:.1f}s: "
            pieces += [(TEXT, text), (VISUAL, video_token if stream else image_token)]
            text = "\n"
        else:
            for k, time in enumerate(part["timestamps"]):
                text += f"{',' if k else ''}Time {time:.1f}s:"
                pieces += [(TEXT, text), (VISUAL, video_token)]
                text = ""
            text += "\n"
    pieces += [(TEXT, text), (CONTROL, "<|stream_end|>" if stream else "<|im_end|>"), (TEXT, "\n")]
    return [piece for piece in pieces if piece[1]]
