"""Templates of conversations: `data.templates` written as Jinja, and recognised in a tokenizer."""

import json

from vlmjax.data import chat
from vlmjax.data.templates import TEMPLATES, Template
from vlmjax.data.tokenizer import Tokenizer

PART = """
            {{%- if part['type'] == 'text' %}}
                {{{{- part['text'] }}}}
            {{%- elif part['type'] == 'image' %}}
                {{{{- {image} }}}}
            {{%- elif part['type'] == 'video' %}}
                {{{{- {video} }}}}
            {{%- else %}}
                {{{{- raise_exception('a part is text, image or video, not ' + part['type']) }}}}
            {{%- endif %}}
""".strip("\n")
PICTURES = """
    {{%- if message['content'] is not string %}}
        {{%- for part in message['content'] %}}
            {{%- if part['type'] == 'image' %}}
                {{{{- {image} }}}}
            {{%- elif part['type'] == 'video' %}}
                {{{{- {video} }}}}
            {{%- endif %}}
        {{%- endfor %}}
    {{%- endif %}}
""".strip("\n")


def make_chat_template(template: Template, image: str, video: str) -> str:
    """Jinja that renders what `chat.render` renders, with one placeholder for a whole video."""
    before, after = template.picture
    lines = []
    if template.start:
        lines.append(_say(template.start))
    if template.system is not None:
        turn = template.turns["system"]
        lines += [
            "{%- if messages[0]['role'] != 'system' %}",
            "    " + _say(template.system.join(turn)),
            "{%- endif %}",
        ]
    shown = dict(image=_text(before + image + after), video=_text(before + video + after))
    lines.append("{%- for message in messages %}")
    if template.place == "first":
        lines.append(PICTURES.format(**shown))
        shown = dict(image=_text(""), video=_text(""))
    part = PART.format(**shown)
    lines += [
        *_by_role(template, 0),
        *_content(template),
        "    {%- else %}",
        "        {%- for part in message['content'] %}",
        part,
        "        {%- endfor %}",
        "    {%- endif %}",
        *_by_role(template, 1),
        "{%- endfor %}",
        "{%- if add_generation_prompt %}",
        "    " + _say(template.answer),
    ]
    if template.end:
        lines += ["{%- else %}", "    " + _say(template.end)]
    return "\n".join([*lines, "{%- endif %}"]) + "\n"


def _content(template):
    """What opens a message: its text, or the start of its parts."""
    text = "        {{- message['content'] }}"
    lines = ["    {%- if message['content'] is string %}", text]
    if template.trim:
        lines[1:] = [
            f"        {{%- if message['role'] in {list(template.trim)} %}}",
            "            {{- message['content'] | trim }}",
            "        {%- else %}",
            "    " + text,
            "        {%- endif %}",
        ]
    return lines


def _by_role(template, side):
    """What stands before (0) or after (1) a message."""
    lines = []
    for k, (role, turn) in enumerate(template.turns.items()):
        lines.append(f"    {{%- {'elif' if k else 'if'} message['role'] == '{role}' %}}")
        if side and role == "assistant" and template.last:
            other, last = _text(turn[side]), _text(template.last)
            lines.append(f"        {{{{- {last} if loop.last else {other} }}}}")
        else:
            lines.append("        " + _say(turn[side]))
    if side == 0:
        known = f"roles are {', '.join(template.turns)}, not "
        lines.append("    {%- else %}")
        lines.append(f"        {{{{- raise_exception({_text(known)} + message['role']) }}}}")
    return [*lines, "    {%- endif %}"]


def _text(value):
    return json.dumps(value, ensure_ascii=False)


def _say(value):
    return f"{{{{- {_text(value)} }}}}"


PROBE = [
    {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "probe"}],
    }
]
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "answer"}]}


def find_template(tokenizer: Tokenizer, image: str, jinja: str | None = None) -> str | None:
    """The key in `data.templates.TEMPLATES` of what a checkpoint renders.

    Templates of transformers often leave out the system message that a model was trained with, and
    the first token, which tokenizers add. One that is equal as a whole is preferred to one that is
    equal but for these; of several, the one that adds least, then the one that starts alike, then
    the one whose answers end alike.

    Args:
      tokenizer: with its chat template.
      image: placeholder of an image.
      jinja: a template that the tokenizer does not hold.

    Returns:
      None if there is no chat template, or none that we have.
    """
    jinja = jinja or tokenizer.hf.chat_template
    if not isinstance(jinja, str):
        return None
    try:
        theirs = tokenizer.render_chat(PROBE, generation=True, jinja=jinja)
        answered = tokenizer.render_chat([*PROBE, ANSWER], jinja=jinja)
    except ValueError:
        return None  # one of words alone, which refuses pictures
    fits = []
    for name, template in TEMPLATES.items():
        if template.video != "whole":
            continue
        ours = chat.render(PROBE, image, image, generation=True, template=template)
        ours = ours.removeprefix(template.start)
        system = ""
        if template.system is not None:
            system = template.system.join(template.turns["system"])
        rest = theirs.removeprefix(template.start)
        if ours in (rest, system + rest):
            other = chat.render([*PROBE, ANSWER], image, image, template=template)
            end = other.rpartition("answer")[2] != answered.rpartition("answer")[2]
            start = not theirs.startswith(template.start)
            fits.append((len(ours) - len(rest), start, end, name))
    return min(fits)[-1] if fits else None
