"""Chat templates: what stands around the messages of a conversation, as data.

A template is trusted text in which control tokens are recognised; what a message says is not, and
never becomes a control token. Sources are named at each row; those of LLaVA are in
`llava/conversation.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

CONTROL, TEXT, VISUAL = "control", "text", "visual"
ALONE = "alone"  # text that is tokenised by itself


@dataclass(frozen=True)
class Template:
    """A chat format.

    Attributes:
      turns: role -> (what comes before a message, what comes after it). An answer is trained
        together with what follows it up to the first control token.
      answer: what comes before an answer that is to be generated.
      controls: the control tokens in all of these texts.
      start: what comes before the first message.
      system: system message of a conversation that brings none; "" = none.
      picture: what comes before and after a picture or video.
      place: of pictures, "inside" the message or "first", in front of all that belongs to it.
      video: "frames" shows each frame as a picture with its time, "whole" leaves it to the format
        of visual tokens.
      stops: tokens that end an answer.
      end: what comes after a last answer, trained with it.
      document: the control token that ends a document, trained with it; "" = none. A document is
        trained as a whole, between `start` and this, its pictures where they stand in its text.
      trim: roles whose text loses the space around it.
    """

    turns: dict[str, tuple[str, str]] = field(hash=False)
    answer: str
    controls: tuple[str, ...]
    stops: tuple[str, ...]
    start: str = ""
    system: str = ""
    picture: tuple[str, str] = ("", "\n")
    place: str = "inside"
    video: str = "whole"
    end: str = ""
    document: str = ""
    trim: tuple[str, ...] = ()

    def pieces(self, text):
        """Returns the [(kind, value)] of a trusted text."""
        return split_controls(text, self.controls)


def split_controls(text: str, controls: tuple[str, ...]) -> list[tuple[str, str]]:
    """Returns the [(kind, value)] of a trusted text: control tokens, and text between them."""
    if not controls:
        return [(TEXT, text)] if text else []
    split = re.split("|".join(map(re.escape, controls)).join("()"), text)
    kinds = ((CONTROL if value in controls else TEXT, value) for value in split)
    return [(kind, value) for kind, value in kinds if value]


def _chatml(**more):
    turn = "<|im_start|>{}\n", "<|im_end|>\n"
    turns = {role: (turn[0].format(role), turn[1]) for role in ("system", "user", "assistant")}
    made = dict(
        turns=turns,
        answer="<|im_start|>assistant\n",
        controls=("<|im_start|>", "<|im_end|>"),
        stops=("<|im_end|>", "<|endoftext|>"),
        document="<|endoftext|>",
    )
    return Template(**(made | more))


def _videollama3():
    chatml = _chatml()
    return _chatml(
        turns=chatml.turns | {"stream": ("<|stream_start|>stream\n", "<|stream_end|>\n")},
        controls=(*chatml.controls, "<|stream_start|>", "<|stream_end|>"),
        video="frames",
    )


VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
LLAMA_3 = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)


def _llama3(**more):
    turns = {
        role: (f"<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>")
        for role in ("system", "user", "assistant")
    }
    made = dict(
        turns=turns,
        start="<|begin_of_text|>",
        answer="<|start_header_id|>assistant<|end_header_id|>\n\n",
        controls=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        stops=("<|eot_id|>", "<|end_of_text|>"),
        document="<|end_of_text|>",
    )
    return Template(**(made | more))


TEMPLATES = {
    "videollama3": _videollama3(),
    "chatml": _chatml(),
    # LLaVA's stage 1: the picture, then its caption.
    "plain": Template(
        turns={"user": ("", ""), "assistant": ("", "\n")},
        answer="",
        start="<s>",
        controls=("<s>", "</s>"),
        stops=("</s>",),
        document="</s>",
        picture=("", ""),
    ),
    "vicuna": Template(  # vicuna_v1
        turns={"system": ("", " "), "user": ("USER: ", " "), "assistant": ("ASSISTANT: ", "</s>")},
        answer="ASSISTANT:",
        start="<s>",
        system=VICUNA,
        controls=("<s>", "</s>"),
        stops=("</s>",),
        document="</s>",
    ),
    "mistral": Template(  # the template of llava-v1.6-mistral-7b
        turns={"user": ("[INST] ", " [/INST]"), "assistant": (" ", "</s>")},
        answer="",
        start="<s>",
        controls=("<s>", "</s>"),
        stops=("</s>",),
        document="</s>",
    ),
    "llama3": _llama3(),
    "llava_llama3": _llama3(system=LLAMA_3),
    "qwen": _chatml(system="You are a helpful assistant."),
    "llava_chatml": _chatml(system="Answer the questions."),  # mistral_direct, chatml_direct
    "phi3": Template(
        turns={r: (f"<|{r}|>\n", "<|end|>\n") for r in ("system", "user", "assistant")},
        answer="<|assistant|>\n",
        start="<s>",
        controls=("<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        stops=("<|end|>", "<|endoftext|>"),
        document="<|endoftext|>",
    ),
    "minicpm": Template(
        turns={"user": ("<用户>", ""), "assistant": ("<AI>", "</s>")},
        answer="<AI>",
        start="<s>",
        controls=("<s>", "</s>"),
        stops=("</s>",),
        document="</s>",
    ),
    "cogvlm": Template(
        turns={"user": ("Question: ", " "), "assistant": ("Answer: ", "<|end_of_text|>")},
        answer="Answer:",
        start="<|begin_of_text|>",
        controls=("<|begin_of_text|>", "<|end_of_text|>"),
        stops=("<|end_of_text|>",),
        document="<|end_of_text|>",
        picture=("", ""),
        place="first",
    ),
    "glm4": Template(
        turns={
            "system": ("<|system|>\n", ""),
            "user": ("<|user|>\n", ""),
            "assistant": ("<|assistant|>\n", ""),
        },
        answer="<|assistant|>\n",
        start="[gMASK]<sop>",
        end="<|endoftext|>",
        controls=("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>"),
        stops=("<|user|>", "<|endoftext|>", "<|observation|>"),
        document="<|endoftext|>",
        picture=("", ""),
    ),
}
