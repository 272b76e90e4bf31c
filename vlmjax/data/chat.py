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
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from vlmjax.data.grounding import GROUNDING, PARTS, Grounding, check_part
from vlmjax.data.health import BadRecord
from vlmjax.data.templates import CONTROL, TEMPLATES, TEXT, VISUAL, Template
from vlmjax.data.timed import TIMES, check_stream, is_time
from vlmjax.data.tokenizer import Tokenizer

IGNORE = -100
TRAINED = ("assistant", "document")
ROLES = ("system", "user", "assistant", "stream", "document")


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
      kind: CONTROL, TEXT or VISUAL.
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


def named_media(messages):
    """Returns messages with media under the name of their type, where transformers writes "path".

    What is malformed stays so. For messages of a user: records name files by `media_root` alone.
    """

    def part(p):
        kind = p.get("type") if isinstance(p, dict) else None
        return {**p, kind: p["path"]} if kind in ("image", "video") and "path" in p else p

    def message(m):
        content = m.get("content") if isinstance(m, dict) else None
        several = isinstance(content, (list, tuple))
        return {**m, "content": [part(p) for p in content]} if several else m

    return [message(m) for m in messages] if isinstance(messages, (list, tuple)) else messages


def check_messages(messages: Sequence[dict]) -> None:
    """Raises BadRecord unless every message has a known role and well-formed content."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise BadRecord("malformed", "the record has no messages: give at least one user message")
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise BadRecord(
                "malformed",
                f"message {number} is a {type(message).__name__}: give role and content",
            )
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in ROLES:
            raise BadRecord(
                "unknown_role",
                f"message {number} has role {role!r}, known roles are {ROLES}: rename it",
            )
        if role == "document" and len(messages) > 1:
            raise BadRecord(
                "malformed",
                f"message {number} is a document beside others: make it a record of its own",
            )
        if isinstance(content, str):
            continue
        if not isinstance(content, (list, tuple)):
            raise BadRecord(
                "malformed",
                f"message {number} has content of type {type(content).__name__}: give text or "
                "parts",
            )
        for part in content:
            _check_part(part, number, role)
    check_stream(messages)


def _check_part(part, number, role):
    def malformed(what):
        return BadRecord("malformed", f"message {number} {what}")

    kind = part.get("type") if isinstance(part, dict) else part
    if kind not in ("text", "image", "video", *PARTS):
        raise malformed(f"has a part of type {kind!r}: use text, image or video, or of {PARTS}")
    if kind in PARTS:
        return check_part(part)
    if kind == "text" and not isinstance(part.get("text"), str):
        raise malformed("has a text part without its text: give a string")
    for key in TIMES:
        if not is_time(part.get(key)):
            raise malformed(f"has {key} {str(part[key])[:80]!r}: give seconds, a finite number")
    if kind != "text" and role in ("system", "assistant"):
        raise malformed(f"({role}) holds a {kind}: move it to a user or stream message")
    if kind == "video" and role == "stream" and number:
        raise malformed("(stream) holds a video: give it first, or one timed image per message")
    return None


def text_length(messages: Sequence[dict]) -> int:
    """Returns the number of characters that checked messages say."""
    contents = (m["content"] for m in messages)
    said = ([{"text": c}] if isinstance(c, str) else c for c in contents)
    return sum(len(part.get("text", "")) for parts in said for part in parts)


def check_answer(messages: Sequence[dict]) -> None:
    """Raises BadRecord unless an assistant or a document says something, so that it is trained."""
    for message in messages:
        if message["role"] in TRAINED:
            said = message["content"]
            parts = [{"type": "text", "text": said}] if isinstance(said, str) else said
            if any(p["type"] in ("box", "span") or p.get("text", "").strip() for p in parts):
                return
    raise BadRecord(
        "no_answer", "no assistant turn has any text, so nothing would be trained: add an answer"
    )


def cut_at_turns(
    messages: Sequence[dict], fits: Callable[[list[dict]], bool]
) -> tuple[list[dict], int]:
    """Returns the longest start of a conversation that fits, and how many messages were dropped.

    It is cut between rounds only: a round is what others say (with what is shown) and the answers
    to it. A first round that does not fit is a BadRecord.

    Args:
      messages: checked messages.
      fits: whether messages fit; when some do, every shorter start does.
    """
    messages = list(messages)
    if fits(messages):
        return messages, 0
    ends = [
        k
        for k in range(1, len(messages))
        if messages[k - 1]["role"] == "assistant" and messages[k]["role"] != "assistant"
    ]
    low, high = 0, len(ends)  # ends[:low] fit, ends[high:] do not
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(messages[: ends[middle]]) else (low, middle)
    if not low:
        raise BadRecord(
            "too_long",
            f"the first round of {len(messages)} messages does not fit: shorten it, or raise the "
            "limits",
        )
    return messages[: ends[low - 1]], len(messages) - ends[low - 1]


def render(
    messages: Sequence[dict],
    image_token: str,
    video_token: str,
    generation: bool = False,
    template: Template = TEMPLATES["videollama3"],
    grounding: Grounding = GROUNDING["videollama3"],
) -> str:
    """Returns the text of a conversation with one placeholder per image or frame."""
    check_messages(messages)
    tokens = {"image": image_token, "video": video_token}
    pieces = _conversation(messages, template, tokens, grounding, generation)
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
    grounding: Grounding = GROUNDING["videollama3"],
) -> Encoded:
    """Tokenises a conversation.

    Args:
      messages: checked messages; video parts carry their `timestamps`.
      pictures: what is shown for each image, frame or whole video in reading order: how many visual
        tokens; or a sequence of (VISUAL, i32[k] its tokens) with (TEXT, str) and (CONTROL,
        str).
      tokenizer: knows the control tokens that the messages need.
      image_token: placeholder of images.
      video_token: placeholder of video and stream frames.
      seed: chooses which surplus stream decisions are dropped; None keeps all of them.
      generation: end where an answer begins and train nothing.
      template: of the conversation.
      grounding: how boxes and spans are written.
    """
    placeholders = {"image": image_token, "video": video_token}
    pieces = _conversation(messages, template, placeholders, grounding, generation)
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


def _conversation(messages, template, tokens, grounding, generation):
    """Returns the `Piece`s of messages; those of visual items have no entries yet."""
    made, previous = [Piece(*piece) for piece in template.pieces(template.start)], None
    if messages[0]["role"] == "document":
        content = _content(messages[0], template, tokens, grounding)
        made += [Piece(*piece, piece[0] != VISUAL) for piece in content]
        ends = template.document and not generation
        return made + ([Piece(CONTROL, template.document, True)] if ends else [])
    if template.system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": template.system}, *messages]
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if role not in template.turns:
            raise BadRecord(
                "unknown_role",
                f"a message has role {role!r}, the template knows {sorted(template.turns)}: move "
                "its text to one of these, or choose another template",
            )
        before, after = map(template.pieces, template.turns[role])
        content = _content(message, template, tokens, grounding)
        if role == "assistant":
            if template.last and number == len(messages):
                after = template.pieces(template.last)
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


def _content(message, template, tokens, grounding):
    """Returns the (kind, value) pairs of what a message says."""
    content, pieces, stream = message["content"], [], message["role"] == "stream"
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    if message["role"] in template.trim:
        parts = _trimmed(parts)
    before, after = map(template.pieces, template.picture)
    for part in parts:
        kind = part["type"]
        if kind == "text":
            pieces += [(TEXT, part["text"])] if part["text"] else []
        elif kind in PARTS:
            pieces += grounding.pieces(part)
        elif kind == "image":
            time = part.get("time")
            if time is not None:
                pieces.append((TEXT, f"Time {time:.1f}s: "))
            pieces += [*before, (VISUAL, tokens["video" if stream else "image"]), *after]
        elif template.video == "whole":
            pieces += [*before, (VISUAL, tokens["video"]), *after]
        else:
            for k, time in enumerate(part["timestamps"]):
                said = f"{',' if k else ''}Time {time:.1f}s:"
                pieces += [(TEXT, said), (VISUAL, tokens["video"])]
            pieces += after
    return pieces


def _trimmed(parts):
    """Returns parts without the space that a message begins and ends with."""
    if parts and parts[0]["type"] == "text":
        parts[0] = {**parts[0], "text": parts[0]["text"].lstrip()}
    if parts and parts[-1]["type"] == "text":
        parts[-1] = {**parts[-1], "text": parts[-1]["text"].rstrip()}
    return parts


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
