"""The template of a tokenizer: its Jinja rendered with marks in place of messages, and split there.

What is split is put together again and compared with Jinja on other conversations, so a template
that is not made turn by turn is an error and never a near miss. Where answers begin and end is
known by construction; `{% generation %}` is not needed. Training adds two things that Jinja does
not know: stream messages as in VideoLLaMA3, where the tokenizer has their tokens, and documents.
"""

from __future__ import annotations

import re
from dataclasses import replace

from vlmjax.data.chat import render
from vlmjax.data.templates import CONTROL, TEMPLATES, Template, split_controls
from vlmjax.data.tokenizer import Tokenizer

OWN = "tokenizer"  # as the name of a template: the one that the tokenizer brings
ROLES = {"s": "system", "u": "user", "a": "assistant"}
MARK = "zqm{}zq"
STREAM = TEMPLATES["videollama3"].turns["stream"]
# Said in the comparison: space around, lines, other scripts, what looks like Jinja or like marks.
SAID = (
    "What is it?",
    "  two\n\nlines \n",
    "Größe 好 {{ x }} {% if %}",
    "USER: [INST] <<SYS>> ### <image>",
    "\tzqm1zq",
)


def choose_template(config, tokenizer: Tokenizer) -> Template:
    """Returns the template of a processor config, a row of `TEMPLATES` or the tokenizer's own."""
    if config.template != OWN:
        return TEMPLATES[config.template]
    video = "frames" if config.picture is None else "whole"
    return derive_template(tokenizer, config.image_token, config.video_token, video)


def derive_template(
    tokenizer: Tokenizer, image_token: str, video_token: str, video: str = "whole"
) -> Template:
    """Returns the `Template` that renders what the tokenizer's chat template renders.

    A system message is in its turns only if Jinja renders it as a turn before the others; records
    with one are refused otherwise. Space around what is said is kept or lost, by role, as there.

    Args:
      tokenizer: with a chat template.
      image_token, video_token: placeholders; a template of text only has none and pictures are
        followed by a newline.
      video: of the template, see there.
    """
    jinja = tokenizer.hf.chat_template
    if not jinja:
        raise ValueError(
            f"the tokenizer has no chat template: choose one of {sorted(TEMPLATES)}, or give it one"
        )
    if "strftime_now" in str(jinja):
        raise ValueError(
            "the tokenizer's chat template says the date of today, so records would change from "
            "day to day: write a date into it"
        )
    ask, first = _Asked(tokenizer), None
    shown = {kind: ask.around(kind) for kind in ("image", "video")}
    special = [str(t) for t in tokenizer.hf.added_tokens_decoder.values() if t.special]
    known = tuple(sorted(special, key=len, reverse=True))  # one may begin with another
    for template in _candidates(ask, known, tokenizer.hf.bos_token or ""):
        template = replace(template, video=video, trim=ask.trimmed(template.turns))
        if shown["image"] is not None:
            template = replace(template, picture=_around(shown["image"], image_token))
        template = _with_controls(template, known, tokenizer)
        problem = _difference(template, ask, shown, image_token, video_token)
        if problem is None:
            return template
        first = first or problem
    raise ValueError(
        "the tokenizer's chat template is not made turn by turn, it differs from such a template "
        f"in {first or 'what it says between turns'}; choose one of {sorted(TEMPLATES)}"
    )


class _Asked:
    """The chat template of a tokenizer, asked with text or with parts, whichever it takes."""

    def __init__(self, tokenizer):
        self.render, self.parts = tokenizer.render_chat, False
        text = self.split("u")
        self.parts = text is None
        parts = self.split("u", parts=True)
        if text is None and parts is None:
            self.render([_message("u", MARK.format(0), False)])  # says why, where it refuses
            raise ValueError(
                "the tokenizer's chat template leaves out what a user says: choose another template"
            )
        self.takes_parts = text is None or text == parts

    def messages(self, roles, texts, parts=None):
        parts = self.parts if parts is None else parts
        return [_message(role, text, parts) for role, text in zip(roles, texts, strict=True)]

    def split(self, roles, generation=False, parts=None):
        """Returns what stands around messages; None where one is missing or Jinja refuses.

        Args:
          roles: of the messages, their first letters.
          generation: whether an answer is to follow.
          parts: whether content is given as parts.
        """
        texts = [MARK.format(k) for k in range(len(roles))]
        return self._split(self.messages(roles, texts, parts), generation, len(roles))

    def _split(self, messages, generation, count):
        try:
            pieces = re.split(MARK.format(r"(\d+)"), self.render(messages, generation))
        except ValueError:
            return None
        return pieces[::2] if pieces[1::2] == [str(k) for k in range(count)] else None

    def around(self, kind):
        """Returns what stands for a picture or video between two texts; None where nothing does."""
        if not self.takes_parts:
            return None
        texts = [{"type": "text", "text": MARK.format(k)} for k in (0, 1)]
        with_it, without = (
            self._split([{"role": "user", "content": content}], False, 2)
            for content in ([texts[0], {"type": kind}, texts[1]], texts)
        )
        if with_it in (None, without):
            return None
        if with_it[::2] != without[::2]:
            raise ValueError(
                f"the tokenizer's chat template moves the {kind} away from its place between "
                f"texts: choose one of {sorted(TEMPLATES)}"
            )
        return with_it[1]

    def trimmed(self, turns):
        """Returns the roles that lose the space around what they say."""
        roles, found = "sua" if "system" in turns else "ua", []
        for role in roles:
            plain, padded = (
                self.render(self.messages(roles, [text if r == role else "x" for r in roles]))
                for text in ("y", " \n y\n ")
            )
            found += [ROLES[role]] if plain == padded else []
        return tuple(found)


def _message(role, text, parts):
    return {"role": ROLES[role], "content": [{"type": "text", "text": text}] if parts else text}


def _candidates(ask, known, bos):
    """Yields templates that agree with what is around marks; how it divides may be ambiguous."""
    talk, said = ask.split("uauau"), ask.split("uaua")
    asked, prompt = ask.split("u"), ask.split("u", generation=True)
    if None in (talk, said, asked, prompt) or talk[1:3] != talk[3:5] or said[:-1] != talk[:4]:
        return
    before, to_answer, to_user = talk[0], talk[1], talk[2]
    for k in range(len(said[-1]), -1, -1):  # what ends the conversation, the shortest first
        answer_after, end = said[-1][:k], said[-1][k:]
        user_after = asked[1].removesuffix(end)
        if not asked[1].endswith(end):
            return
        fits = to_answer.startswith(user_after) and prompt[1].startswith(user_after)
        user_before = to_user[len(answer_after) :]
        if not (fits and to_user.startswith(answer_after) and before.endswith(user_before)):
            continue
        turns = {
            "user": (user_before, user_after),
            "assistant": (to_answer[len(user_after) :], answer_after),
        }
        start = before[: len(before) - len(user_before)]
        answer = prompt[1][len(user_after) :]
        cut, whole = [*turns["user"], *turns["assistant"]], _controls(known, *said, *prompt)
        if _controls(known, start, *cut, *cut, end, start, *turns["user"], answer) != whole:
            continue  # it is cut inside a control token
        start, system, turn = _system(ask, start, user_before, bos)
        turns |= {"system": turn} if turn else {}
        yield Template(turns, answer, (), (), start=start, system=system or None, end=end)


def _system(ask, start, user_before, bos):
    """Returns (start, default system message, what stands around system messages or None)."""
    split = ask.split("sua")
    if split is None or not split[1].endswith(user_before):
        return start, "", None
    before, after = split[0], split[1][: len(split[1]) - len(user_before)]
    if before.startswith(start):
        return start, "", (before[len(start) :], after)
    room = len(start) - len(before) - len(after)
    if room > 0 and start.startswith(before) and start.endswith(after):
        first = bos if bos and before.startswith(bos) else ""
        return first, start[len(before) :][:room], (before[len(first) :], after)
    return start, "", None


def _controls(known, *texts):
    pieces = [piece for text in texts for piece in split_controls(text, known)]
    return [value for kind, value in pieces if kind == CONTROL]


def _with_controls(template, known, tokenizer):
    """Returns the template with its control tokens: the special tokens in its texts."""
    turns, eos = template.turns, tokenizer.hf.eos_token
    if tokenizer.has("<|stream_start|>") and tokenizer.has("<|stream_end|>"):
        turns = turns | {"stream": STREAM}
    around = [text for turn in turns.values() for text in turn]
    around += [template.start, *template.picture, template.answer, template.end]
    used, ends = (
        _controls(known, *around),
        _controls(known, turns["assistant"][1], turns["user"][0])[:1],
    )
    return replace(
        template,
        turns=turns,
        controls=tuple(token for token in known if token in used),
        stops=tuple(dict.fromkeys([*ends, *([eos] if eos else [])])),
        document=eos or "",
    )


def _around(shown, token):
    if shown.count(token) != 1:
        raise ValueError(
            f"the tokenizer's chat template shows a picture as {shown!r}, the processor's "
            f"image_token is {token!r}: set it to the one that stands for the picture there"
        )
    return tuple(shown.split(token))


def _difference(template, ask, shown, image_token, video_token):
    """Returns the first conversation that the template renders otherwise than Jinja, or None."""
    kinds = ["u", "ua", "uau", "uaua", "uauau", "uua", "uaa"]
    kinds += ["s" + roles for roles in kinds] if "system" in template.turns else []
    talks = [
        ask.messages(roles, [SAID[(k + first) % len(SAID)] for k in range(len(roles))])
        for roles in kinds
        for first in range(len(SAID))
    ]
    seen = [k for k in shown if shown[k] and (k == "image" or template.video == "whole")]
    say = {"type": "text", "text": SAID[0]}
    for part in ({"type": kind} for kind in seen):
        contents = [part, say], [say, part, say], [part, part, say]
        talks += [[{"role": "user", "content": content}] for content in contents]
    for messages in talks:
        for generation in {False, messages[-1]["role"] == "user"}:
            try:
                theirs = ask.render(messages, generation)
            except ValueError:
                continue  # what Jinja refuses has no form to differ from
            ours = render(messages, image_token, video_token, generation, template)
            if ours != theirs:
                return f"{messages}: {theirs!r}, by turns {ours!r}"
    return None
