"""Chat templates: what stands around the messages of a conversation, as data.

A template is trusted text in which control tokens are recognised; what a message says is not, and
never becomes a control token. Sources are named at each row; those of LLaVA are in
`llava/conversation.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

CONTROL, TEXT, VISUAL = "control", "text", "visual"


@dataclass(frozen=True)
class Template:
    """A chat format.

    Attributes:
      turns: role -> (what comes before a message, what comes after it). An answer is trained
        together with what follows it up to the first control token.
      answer: what comes before an answer that is to be generated.
      controls: the control tokens in all of these texts.
      start: what comes before the first message.
      system: system message, which may be empty, of a conversation that brings none; None = none.
      picture: what comes before and after a picture or video.
      place: of pictures, "inside" the message or "first", in front of all that belongs to it.
      video: "frames" shows each frame as a picture with its time, "whole" leaves it to the format
        of visual tokens.
      stops: tokens that end an answer.
      last: what comes after a last answer in place of what comes after others; "" = the same.
      end: what comes after a last message, trained after an answer.
      document: the control token that ends a document, trained with it; "" = none. A document is
        trained as a whole, between `start` and this, its pictures where they stand in its text.
      trim: roles whose text loses the space around it.
    """

    turns: dict[str, tuple[str, str]] = field(hash=False)
    answer: str
    controls: tuple[str, ...]
    stops: tuple[str, ...]
    start: str = ""
    system: str | None = None
    picture: tuple[str, str] = ("", "\n")
    place: str = "inside"
    video: str = "whole"
    last: str = ""
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


def _chatml(between="\n", **more):
    turn = "<|im_start|>{}\n", f"<|im_end|>{between}"
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


CAMBRIAN = (
    "You are Cambrian, a highly intelligent multimodal AI trained by NYU Vision X.",
    "As a multimodal AI, you have the ability to process and analyze images. Whenever an image is "
    "present in the conversation, very carefully examine it and consider its content when "
    "formulating your response.",
    "You should give concise responses to very simple questions, but provide thorough responses to "
    "more complex and open-ended questions.",
)
INTERNVL = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。"
)
INTERNVL_2_5 = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态"
    "大语言模型。"
)


def _plain(start, end):
    """LLaVA's stage 1: the picture, then its caption."""
    return Template(
        turns={"user": ("", ""), "assistant": ("", "\n")},
        answer="",
        start=start,
        controls=tuple(dict.fromkeys(filter(None, (start, end)))),
        stops=(end,),
        document=end,
        picture=("", ""),
    )


def _phi3(between="\n", **more):
    made = dict(
        turns={r: (f"<|{r}|>\n", f"<|end|>{between}") for r in ("system", "user", "assistant")},
        answer="<|assistant|>\n",
        start="<s>",
        controls=("<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        stops=("<|end|>", "<|endoftext|>"),
        document="<|endoftext|>",
    )
    return Template(**(made | more))


def _llama3(between="\n\n", **more):
    turns = {
        role: (f"<|start_header_id|>{role}<|end_header_id|>{between}", "<|eot_id|>")
        for role in ("system", "user", "assistant")
    }
    made = dict(
        turns=turns,
        start="<|begin_of_text|>",
        answer=f"<|start_header_id|>assistant<|end_header_id|>{between}",
        controls=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        stops=("<|eot_id|>", "<|end_of_text|>"),
        document="<|end_of_text|>",
    )
    return Template(**(made | more))


TEMPLATES = {
    "videollama3": _videollama3(),
    "chatml": _chatml(),
    "plain": _plain("<s>", "</s>"),
    "plain_llama3": _plain("<|begin_of_text|>", "<|end_of_text|>"),
    "plain_chatml": _plain("", "<|endoftext|>"),  # Qwen's and Yi's tokenizers add no first token
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
    # The last answer ends otherwise: `llava/conversation.py` of VILA.
    "vila_llama3": _llama3(
        system=LLAMA_3,
        last="<|end_of_text|>",
        controls=(*_llama3().controls, "<|end_of_text|>"),
    ),
    # `cambrian/conversation.py`, whose line breaks and indents are part of the text.
    "cambrian_llama3": _llama3("", system="{} \n    {}\n    {} ".format(*CAMBRIAN)),
    "cambrian_chatml": _chatml("", system=" ".join(CAMBRIAN)),
    "qwen": _chatml(system="You are a helpful assistant."),
    "llava_chatml": _chatml("", system="Answer the questions."),  # mistral_direct, chatml_direct
    # `internvl/conversation.py`: Hermes-2, internlm2-chat, internvl2_5, phi3-chat, internvl_zh.
    "internvl": _chatml("", system=INTERNVL),
    "internvl_internlm2": _chatml(
        "", system=INTERNVL, start="<s>", controls=("<s>", "<|im_start|>", "<|im_end|>")
    ),
    "internvl_2_5": _chatml(system=INTERNVL_2_5),
    "internvl_phi3": _phi3("", system=INTERNVL),
    "internvl_zh": Template(
        turns={
            "system": ("", " "),
            "user": ("<human>: ", " "),
            "assistant": ("<bot>: ", "</s>"),
        },
        answer="<bot>:",
        system="",
        start="<s>",
        controls=("<s>", "</s>"),
        stops=("</s>",),
        document="</s>",
    ),
    "phi3": _phi3(),
    "minicpm": Template(
        turns={"user": ("<用户>", ""), "assistant": ("<AI>", "</s>")},
        answer="<AI>",
        start="<s>",
        controls=("<s>", "</s>"),
        stops=("</s>",),
        document="</s>",
    ),
    "cogvlm": Template(
        turns={"user": ("Question: ", " "), "assistant": ("Answer: ", "\n")},
        answer="Answer:",
        last="<|end_of_text|>",
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
