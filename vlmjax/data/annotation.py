"""Annotations of training data -> records {"id", "messages"} for the processor.

    {"image": path or paths, "video": path or paths,
     "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, ...]}
    {"messages": [{"role": "user", "content": text, or parts}, ...]}       other names for the same
    {"image": path, "boxes": [[x1, y1, x2, y2], ...], "image_size": [width, height],
     "spans": [[start, end], ...], "conversations": [..., "It is at <box>, and moves at <span>."]}
    {"texts": [text, ...], "image_info": [{"image": path, "matched_text_index": 0}, ...]}
    {"texts": [text or None, ...], "images": [None or path, ...]}
    {"stream": true, "video": path, "start_time": 2.0, "end_time": 9.0,
     "conversation": [{"role": "user", "content": "Tell me.", "time": 2.0}, ...]}

Unlike the reference loader, system turns stay system messages, unknown roles and a tag count that
differs from the media count are errors (`BadRecord`), and nothing is replaced by another record.
"""

from __future__ import annotations

import re
from pathlib import Path

from vlmjax.data.chat import check_answer
from vlmjax.data.grounding import box_part, check_part
from vlmjax.data.health import BadRecord
from vlmjax.data.image import check_machine, check_path
from vlmjax.data.timed import check_stream, is_time

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
MEDIA = ("image", "video")
_TAG = re.compile("(<image>|<video>)")


def to_record(
    annotation: dict,
    root: str | Path,
    *,
    id: str | None = None,
) -> dict:
    """Returns the record of an annotation whose media paths are relative to `root` and stay inside
    it; BadRecord if it cannot be used.

    What was put right is counted by name in "repairs", which is absent when nothing was:
    "missing_tag" (a file that no tag says the place of: it comes first), "leading_assistant" (a
    turn that answers nothing: it is left out) and "literal_tag" (HTML or SVG in a record without
    media: it is text).

    Args:
      annotation: one entry of an annotation file.
      root: folder of the media.
      id: used where the annotation has no "id".
    """
    if not isinstance(annotation, dict):
        raise _malformed(f"annotation is a {type(annotation).__name__}", "give an object")
    name = id if annotation.get("id") is None else annotation["id"]
    if name is None:
        raise ValueError(
            f"annotation with keys {sorted(annotation)} has no 'id': pass one, e.g. its line number"
        )
    record = {"id": str(name)}
    if annotation.get("stream"):
        record["messages"] = stream_messages(annotation)
    elif "texts" in annotation or "text_list" in annotation:
        record["messages"] = [document_message(annotation)]
    else:
        record["messages"], repairs = ordinary_messages(annotation)
        record |= {"repairs": repairs} if repairs else {}
    check_answer(record["messages"])
    for message in record["messages"]:
        parts = () if isinstance(message["content"], str) else message["content"]
        for part in (p for p in parts if p["type"] in MEDIA):
            part[part["type"]] = media_path(root, part[part["type"]])
    return record


def media_path(root: str | Path, name):
    """Returns the file `name` inside `root`; what is no path (bytes, a picture) stays as it is.

    URLs, missing files and paths that lead outside, also by a link, are BadRecords.
    """
    if not isinstance(name, (str, Path)):
        return name
    if "://" in str(name):
        raise BadRecord(
            "remote_media",
            f"media path {str(name)!r} is a URL, only local files are opened: download it first",
        )
    root = Path(root).resolve()
    try:
        path = (root / name).resolve()
        inside = path.is_relative_to(root)
    except (OSError, ValueError, RuntimeError) as e:  # too long, a null byte, a loop of links
        check_machine(e)
        raise BadRecord("missing_file", f"media path {str(name)[:200]!r} cannot exist: {e}") from e
    if not inside:
        raise BadRecord(
            "outside_root",
            f"media path {str(name)!r} leads outside {str(root)!r}: use paths inside the media "
            "folder",
        )
    return check_path(path, "media path")


def ordinary_messages(annotation: dict) -> tuple[list[dict], dict[str, int]]:
    """Returns the messages of an ordinary annotation, media parts as written, and the repairs.

    Text around <image> and <video> is stripped; that around <box>, <span> and <ref>phrase</ref> is
    not. These three are tags only where the annotation has "boxes" or "spans". Media without any
    tag of their kind come first, images before videos. Assistant turns before the first user turn
    are left out.
    """
    turns, leading = _turns(annotation)
    repairs, missing = {"leading_assistant": leading} if leading else {}, []
    left = {kind: _media(annotation, kind) for kind in MEDIA}
    content = [_parts(role, value) for role, value in turns]
    if literal := _literal(turns, left):
        repairs["literal_tag"] = literal
        content = [_parts(role, value, tags=None) for role, value in turns]
    for kind in MEDIA:
        tags = sum(p["type"] == kind and kind not in p for parts in content for p in parts)
        if not tags:
            missing += [{"type": kind}] * len(left[kind])
        elif tags != len(left[kind]):
            raise BadRecord(
                "placeholders",
                f"annotation has {tags} <{kind}> tags for {len(left[kind])} {kind} files: write "
                "one tag per file, or none at all",
            )
    if missing:
        repairs["missing_tag"] = len(missing)
        first = next(k for k, (role, _) in enumerate(turns) if role == "user")
        content[first] = [*missing, *content[first]]
    left = {kind: iter(files) for kind, files in left.items()}
    tags, messages = _Grounds(annotation), []
    for (role, _), parts in zip(turns, content, strict=True):
        said = []
        for part in parts:
            if part["type"] == "text":
                said += tags.fill(part["text"])
            elif part["type"] in MEDIA and part["type"] not in part:
                said.append({**part, part["type"]: next(left[part["type"]])})
            else:
                said.append(part)
        if role != "user" and [part["type"] for part in said] in ([], ["text"]):
            said = said[0]["text"] if said else ""
        messages.append({"role": role, "content": said})
    tags.check()
    return messages, repairs


class _Grounds:
    """The boxes and spans of an annotation, which take the places of tags one by one."""

    def __init__(self, annotation):
        self.given, self.found = {}, {}
        if "boxes" in annotation:
            boxes, sizes = _list(annotation, "boxes"), annotation.get("image_size")
            if not isinstance(sizes, (list, tuple)) or _pair(sizes):
                sizes = [sizes] * len(boxes)
            if len(sizes) != len(boxes):
                raise _malformed(
                    f"annotation has {len(sizes)} sizes in 'image_size' for {len(boxes)} boxes",
                    "give [width, height], or one for each box",
                )
            self.given["<box>"] = [box_part(*given) for given in zip(boxes, sizes, strict=True)]
        if "spans" in annotation:
            spans = [{"type": "span", "span": span} for span in _list(annotation, "spans")]
            for span in spans:
                check_part(span)
            self.given["<span>"] = spans
        tags = [*self.given, *(["<ref>.*?</ref>"] if self.given else [])]
        self.split = re.compile(f"({'|'.join(tags)})", re.DOTALL) if tags else None
        self.found = dict.fromkeys(self.given, 0)

    def fill(self, text: str) -> list[dict]:
        """Returns the parts of a text; one without tags is itself."""
        parts = []
        for k, piece in enumerate(self.split.split(text) if self.split else [text]):
            if k % 2 and piece in self.given:
                number, parts_left = self.found[piece], self.given[piece]
                parts += parts_left[number : number + 1]
                self.found[piece] += 1
            elif k % 2:
                parts.append({"type": "ref", "text": piece[len("<ref>") : -len("</ref>")]})
            elif piece:
                parts.append({"type": "text", "text": piece})
        return parts

    def check(self) -> None:
        """Raises BadRecord unless every one had its tag."""
        for tag, given in self.given.items():
            if self.found[tag] != len(given):
                raise BadRecord(
                    "placeholders",
                    f"annotation has {self.found[tag]} {tag} tags for {len(given)}: write one each",
                )


def document_message(annotation: dict) -> dict:
    """Returns the one message of a document: texts, and images before, between and after them.

    Texts that follow each other are joined by a space, as in VILA. With "image_info" (or MMC4's
    "text_list" and "image_name") an image stands before the text of its "matched_text_index"; with
    two lists (OBELICS) texts[k] or images[k] is None.
    """
    key = "texts" if "texts" in annotation else "text_list"
    texts = _list(annotation, key)
    if "image_info" in annotation:
        before = [[] for _ in texts]
        for info in _list(annotation, "image_info"):
            known = info if isinstance(info, dict) else {}
            image, place = known.get("image", known.get("image_name")), "matched_text_index"
            if image is None or not _index(known.get(place), texts):
                raise _malformed(
                    f"image_info holds {str(info)[:200]} in a document of {len(texts)} texts",
                    f"give 'image', and as '{place}' which text it stands before",
                )
            before[known[place]].append(image)
        pairs = [
            p
            for x, text in zip(before, texts, strict=True)
            for p in (*((i, None) for i in x), (None, text))
        ]
    else:
        images = _list(annotation, "images") if "images" in annotation else [None] * len(texts)
        if len(images) != len(texts):
            raise _malformed(
                f"a document has {len(images)} images beside {len(texts)} texts",
                "give lists of one length with None where the other has something, or image_info",
            )
        pairs = list(zip(images, texts, strict=True))
    parts = []
    for image, text in pairs:
        if image is not None:
            parts.append({"type": "image", "image": image})
        if not isinstance(text, (str, type(None))):
            raise _malformed(
                f"a document has a text of type {type(text).__name__}", "give a string"
            )
        if text and parts and parts[-1]["type"] == "text":
            parts[-1]["text"] += " " + text
        elif text:
            parts.append({"type": "text", "text": text})
    return {"role": "document", "content": parts}


def stream_messages(annotation: dict) -> list[dict]:
    """Returns the messages of a stream annotation: the video, then what is said with its "time" in
    seconds of the file; `media.gather` puts its frames between them."""
    files = _media(annotation, "video")
    if len(files) != 1:
        raise _malformed(f"stream annotation has {len(files)} videos", "give one")
    times = {key: annotation.get(key) for key in ("start_time", "end_time")}
    if not all(map(is_time, times.values())):
        raise _malformed(f"stream annotation has {str(times)[:80]}", "give seconds")
    conversation = _list(annotation, "conversation")
    if not conversation:
        raise _malformed("stream annotation has no 'conversation'", "give [{role, content, time}]")
    part = {"type": "video", "video": files[0]}
    part |= {key: time for key, time in times.items() if time is not None}
    messages = [{"role": "stream", "content": [part]}]
    for number, turn in enumerate(conversation):
        role, text = _turn(number, turn)
        if not isinstance(text, str):
            raise _malformed(f"stream turn {number} says a {type(text).__name__}", "give text")
        messages.append({"role": role, "content": text, "time": turn.get("time")})
    check_stream(messages)
    return messages


def _turns(annotation):
    """Returns [(role, text or parts)] without assistant turns before the first user turn, and how
    many these were."""
    key = "messages" if "messages" in annotation else "conversations"
    every = [_turn(number, turn) for number, turn in enumerate(_list(annotation, key))]
    first = next((k for k, (role, _) in enumerate(every) if role == "user"), None)
    if first is None:
        raise _malformed(f"annotation has no human turn in {key!r}", "give at least one")
    turns = [turn for k, turn in enumerate(every) if k > first or turn[0] != "assistant"]
    return turns, len(every) - len(turns)


def _turn(number, turn):
    if not isinstance(turn, dict):
        raise _malformed(f"turn {number} is a {type(turn).__name__}", "give an object")
    who = turn.get("from", turn.get("role"))
    if not isinstance(who, str) or who not in ROLES:
        raise BadRecord("unknown_role", f"turn {number} is from {who!r}: give one of {list(ROLES)}")
    said = turn.get("value", turn.get("content"))
    if not isinstance(said, (str, list, tuple)):
        raise _malformed(f"turn {number} says a {type(said).__name__}", "give text")
    return ROLES[who], said


def _literal(turns, files):
    """Returns how many media tags are no place of a file, but HTML or SVG that users talk about.

    That is where there is no medium at all, and each tag is closed or has words before and behind
    it in its line: one that begins or ends a line is the place of a file that was lost.
    """
    texts = [said for role, said in turns if role == "user"]
    if any(files.values()) or not all(isinstance(said, str) for said in texts):
        return 0
    number = sum(len(_TAG.findall(said)) for said in texts)
    return number if all(map(_is_markup, texts)) else 0


def _is_markup(text):
    for tag in _TAG.finditer(text):
        before, behind = text[: tag.start()].rpartition("\n")[2], text[tag.end() :].split("\n")[0]
        if f"</{tag[0][1:]}" not in text and not (before.strip() and behind.strip()):
            return False
    return True


def _parts(role, said, tags=_TAG):
    """Returns the parts of a turn, media tags of users as parts without their file."""
    if isinstance(said, str) and role != "user":
        return [{"type": "text", "text": said}] if said else []
    if isinstance(said, str):
        pieces = (piece.strip() for piece in (tags.split(said) if tags else [said]))
        return [
            {"type": piece[1:-1]} if k % 2 else {"type": "text", "text": piece}
            for k, piece in enumerate(pieces)
            if piece
        ]
    for part in said:
        kind = part.get("type") if isinstance(part, dict) else part
        if kind not in ("text", *MEDIA) or (
            kind == "text" and not isinstance(part.get("text"), str)
        ):
            raise _malformed(f"a turn has the part {str(part)[:200]}", "use text, image or video")
    return [dict(part) for part in said]


def _media(annotation, kind):
    """Returns the files of a kind, given as one, as a list, or under the plural."""
    found = annotation.get(kind, annotation.get(kind + "s"))
    files = [] if found is None else list(found) if isinstance(found, (list, tuple)) else [found]
    for file in files:
        if isinstance(file, (dict, list, tuple, int, float, type(None))):
            raise _malformed(f"annotation has {kind} {str(file)[:200]!r}", "give paths")
    return files


def _list(annotation, key):
    found = annotation.get(key)
    if not isinstance(found, (list, tuple)):
        raise _malformed(f"annotation has {key!r} of type {type(found).__name__}", "give a list")
    return found


def _index(value, values):
    return isinstance(value, int) and 0 <= value < len(values)


def _pair(values):
    return len(values) == 2 and not any(isinstance(v, (list, tuple)) for v in values)


def _malformed(what, remedy):
    return BadRecord("malformed", f"{what}: {remedy}")
