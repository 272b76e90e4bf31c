"""LLaVA and VideoLLaMA3 training annotations -> records {"id", "messages"} for the processor.

    {"image": path or paths | "video": path,
     "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, ...]}
    {"stream": true, "video": path, "start_time": 2.0, "end_time": 9.0,
     "conversation": [{"role": "user", "content": "Tell me.", "time": 2.0}, ...]}

Unlike the reference loader, system turns stay system messages, unknown roles and a tag count that
differs from the media count are errors, and nothing is replaced by another record.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from vlmjax.data.image import check_path
from vlmjax.data.video import VideoFrame, open_video

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_TAG = re.compile("(<image>|<video>)")


def to_record(
    annotation: dict,
    root: str | Path,
    *,
    id: str | None = None,
    fps: float = 1.0,
    sampling: str = "last_of_second",
    max_stream_frames: int = 400,
) -> dict:
    """Returns the record of an annotation whose media paths are relative to `root` and stay inside
    it.

    Args:
      annotation: one entry of an annotation file.
      root: folder of the media.
      id: used where the annotation has no "id".
      fps, sampling: frames of a stream.
      max_stream_frames: a longer stream is cut there, and the number of messages lost is in
        "dropped_messages".
    """
    name = annotation.get("id", id)
    if name is None:
        raise ValueError(
            f"annotation with keys {sorted(annotation)} has no 'id': pass one, e.g. its line number"
        )
    if not annotation.get("stream"):
        messages = ordinary_messages(annotation)
        for part in (
            p for m in messages if not isinstance(m["content"], str) for p in m["content"]
        ):
            if part["type"] != "text":
                part[part["type"]] = media_path(root, part[part["type"]])
        return {"id": str(name), "messages": messages}
    (path,) = _media(annotation, "video", allowed=1)
    video = open_video(
        media_path(root, path),
        fps=fps,
        sampling=sampling,
        max_frames=1_000_000,
        start=annotation.get("start_time"),
        end=annotation.get("end_time"),
    )
    frames = [VideoFrame(video, k) for k in range(len(video.pts))]
    messages, dropped = stream_messages(annotation, video.timestamps, frames, max_stream_frames)
    return {"id": str(name), "messages": messages, "dropped_messages": dropped}


def media_path(root: str | Path, name: str) -> Path:
    """Returns the file `name` inside `root`; URLs and paths that lead outside are ValueErrors."""
    root = Path(root).resolve()
    path = (root / name).resolve() if "://" not in str(name) else name
    if isinstance(path, Path) and not path.is_relative_to(root):
        raise ValueError(
            f"media path {str(name)!r} leads outside {str(root)!r}: use paths inside the media "
            "folder"
        )
    return check_path(path, "media path")


def ordinary_messages(annotation: dict) -> list[dict]:
    """Returns the messages of an ordinary annotation; media parts hold the paths as written.

    Text around tags is stripped. Without any tag the media come first. Assistant turns before the
    first user turn are dropped.
    """
    images, videos = _media(annotation, "image"), _media(annotation, "video", allowed=1)
    if images and videos:
        raise ValueError(
            "annotation has both 'image' and 'video', one of them is allowed: use messages for "
            "mixtures"
        )
    turns = _turns(annotation)
    tags = [tag for role, value in turns if role == "user" for tag in _TAG.findall(value)]
    kind, media = ("video", videos) if videos else ("image", images)
    expected = [f"<{kind}>"] * len(media)
    if tags and tags != expected:
        raise ValueError(
            f"annotation has {tags.count('<image>')} <image> and {tags.count('<video>')} <video> "
            f"tags for {len(images)} "
            f"images and {len(videos)} videos: write one tag per file, or none at all"
        )
    left, messages = iter(media), []
    for role, value in turns:
        if role != "user":
            messages.append({"role": role, "content": value})
            continue
        if not tags:
            value, tags = "".join(expected) + value, expected
        content = []
        for piece in _TAG.split(value):
            if piece == f"<{kind}>" and media:
                content.append({"type": kind, kind: next(left)})
            elif piece.strip():
                content.append({"type": "text", "text": piece.strip()})
        messages.append({"role": role, "content": content})
    return messages


def stream_messages(
    annotation: dict, timestamps: Sequence[float], frames: Sequence, max_frames: int = 400
) -> tuple[list[dict], int]:
    """Returns the messages of a stream annotation and how many were dropped because the stream was
    cut.

    Before each message come the frames shown up to its time, one stream message each, timed from
    `start_time`. Frames after the last message are left out.

    Args:
      annotation: with "conversation" in order of time.
      timestamps: seconds of each frame, absolute in the file.
      frames: image sources, one per timestamp.
      max_frames: messages at or after the time of the first frame beyond it are dropped.
    """
    origin = annotation.get("start_time") or 0.0
    conversation = annotation.get("conversation") or ()
    if not conversation:
        raise ValueError(
            "stream annotation has no 'conversation': give [{'role', 'content', 'time'}]"
        )
    cut = timestamps[max_frames] if len(timestamps) > max_frames else float("inf")
    messages, shown, before = [], 0, float("-inf")
    for number, turn in enumerate(conversation):
        if turn.get("role") not in ROLES or not isinstance(turn.get("content"), str):
            raise ValueError(
                f"stream turn {number} has role {turn.get('role')!r}, give one of {list(ROLES)} "
                "and text"
            )
        if not isinstance(turn.get("time"), (int, float)) or turn["time"] < before:
            raise ValueError(
                f"stream turn {number} has time {turn.get('time')!r} after {before}: sort turns "
                "by time"
            )
        before = turn["time"]
        if before >= cut:
            return messages, len(conversation) - number
        while shown < len(timestamps) and timestamps[shown] <= before:
            part = {"type": "image", "image": frames[shown], "time": timestamps[shown] - origin}
            messages.append({"role": "stream", "content": [part]})
            shown += 1
        messages.append({"role": ROLES[turn["role"]], "content": turn["content"]})
    return messages, 0


def _media(annotation: dict, kind: str, allowed: int | None = None) -> list[str]:
    paths = annotation.get(kind)
    paths = [] if paths is None else [paths] if isinstance(paths, str) else list(paths)
    if allowed is not None and (
        len(paths) > allowed or (annotation.get("stream") and len(paths) != 1)
    ):
        raise ValueError(
            f"annotation has {len(paths)} {kind} files, {allowed} is allowed: split it into records"
        )
    return paths


def _turns(annotation: dict) -> list[tuple[str, str]]:
    """Returns (role, text) from the first user turn on, and the system turns before it."""
    turns = []
    for number, turn in enumerate(annotation.get("conversations") or ()):
        role = ROLES.get(turn.get("from"))
        if role is None or not isinstance(turn.get("value"), str):
            raise ValueError(
                f"turn {number} is from {turn.get('from')!r} with a "
                f"{type(turn.get('value')).__name__}: "
                f"give one of {list(ROLES)} and a text"
            )
        if role != "assistant" or any(r == "user" for r, _ in turns):
            turns.append((role, turn["value"]))
    if not any(role == "user" for role, _ in turns):
        raise ValueError("annotation has no human turn in 'conversations': give at least one")
    return turns
