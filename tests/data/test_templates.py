"""Chat templates: what they render, what is trained; a prompt is the start of its record."""

import numpy as np
import pytest

from vlmjax.data import chat
from vlmjax.data.templates import CAMBRIAN, INTERNVL, LLAMA_3, TEMPLATES, VICUNA
from vlmjax.data.tokenizer import SPECIAL_TOKENS, byte_tokenizer

TOKENS = dict(image_token="<|image_pad|>", video_token="<|video_pad|>")
PICTURE = {"type": "image"}
QUESTION = {"role": "user", "content": [PICTURE, {"type": "text", "text": "What is it?"}]}
MESSAGES = [
    QUESTION,
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]
RENDERED = {
    "plain": "<s><|image_pad|>What is it?A cat.\nSure?Yes.\n",
    "vicuna": f"<s>{VICUNA} USER: <|image_pad|>\nWhat is it? ASSISTANT: A cat.</s>"
    "USER: Sure? ASSISTANT: Yes.</s>",
    "mistral": "<s>[INST] <|image_pad|>\nWhat is it? [/INST] A cat.</s>"
    "[INST] Sure? [/INST] Yes.</s>",
    "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<|image_pad|>\n"
    "What is it?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>",
    "chatml": "<|im_start|>user\n<|image_pad|>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    "A cat.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n",
    "phi3": "<s><|user|>\n<|image_pad|>\nWhat is it?<|end|>\n<|assistant|>\nA cat.<|end|>\n"
    "<|user|>\nSure?<|end|>\n<|assistant|>\nYes.<|end|>\n",
    "minicpm": "<s><用户><|image_pad|>\nWhat is it?<AI>A cat.</s><用户>Sure?<AI>Yes.</s>",
    "cogvlm": "<|begin_of_text|><|image_pad|>Question: What is it? Answer: A cat.\n"
    "Question: Sure? Answer: Yes.<|end_of_text|>",
    "llava_chatml": "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n"
    "<|image_pad|>\nWhat is it?<|im_end|><|im_start|>assistant\nA cat.<|im_end|>"
    "<|im_start|>user\nSure?<|im_end|><|im_start|>assistant\nYes.<|im_end|>",
    "internvl_internlm2": f"<s><|im_start|>system\n{INTERNVL}<|im_end|><|im_start|>user\n"
    "<|image_pad|>\nWhat is it?<|im_end|><|im_start|>assistant\nA cat.<|im_end|>"
    "<|im_start|>user\nSure?<|im_end|><|im_start|>assistant\nYes.<|im_end|>",
    "internvl_phi3": f"<s><|system|>\n{INTERNVL}<|end|><|user|>\n<|image_pad|>\nWhat is it?<|end|>"
    "<|assistant|>\nA cat.<|end|><|user|>\nSure?<|end|><|assistant|>\nYes.<|end|>",
    "internvl_zh": "<s> <human>: <|image_pad|>\nWhat is it? <bot>: A cat.</s>"
    "<human>: Sure? <bot>: Yes.</s>",
    "vila_llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    f"{LLAMA_3}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n<|image_pad|>\nWhat is it?"
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|end_of_text|>",
    "cambrian_llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>"
    f"{CAMBRIAN[0]} \n    {CAMBRIAN[1]}\n    {CAMBRIAN[2]} <|eot_id|>"
    "<|start_header_id|>user<|end_header_id|><|image_pad|>\nWhat is it?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>A cat.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>Sure?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>Yes.<|eot_id|>",
    "glm4": "[gMASK]<sop><|user|>\n<|image_pad|>What is it?<|assistant|>\nA cat."
    "<|user|>\nSure?<|assistant|>\nYes.<|endoftext|>",
}


@pytest.fixture(scope="module")
def tokenizer():
    controls = {token for template in TEMPLATES.values() for token in template.controls}
    return byte_tokenizer(sorted(controls | set(SPECIAL_TOKENS)))


@pytest.mark.parametrize("name", RENDERED)
def test_rendering(name):
    assert chat.render(MESSAGES, **TOKENS, template=TEMPLATES[name]) == RENDERED[name]


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_are_trained_with_what_ends_them(name, tokenizer):
    template = TEMPLATES[name]
    found = chat.encode(MESSAGES, [2], tokenizer, **TOKENS, seed="s", template=template)
    trained = found.labels != chat.IGNORE
    np.testing.assert_array_equal(found.labels[trained], found.tokens[trained])
    starts = np.flatnonzero(np.diff(trained.astype(int), prepend=0) == 1)
    stops = np.flatnonzero(np.diff(trained.astype(int), append=0) == -1) + 1
    said = [tokenizer.decode(found.tokens[a:b]) for a, b in zip(starts, stops, strict=True)]
    assert [text.strip() for text in said] == ["A cat.", "Yes."]
    if not name.startswith("plain"):
        assert tokenizer.decode(found.tokens[stops[-1] - 1 : stops[-1]], False) in template.stops


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_the_start_of_its_record(name, tokenizer):
    how = dict(TOKENS, seed=None, template=TEMPLATES[name])
    prompt = chat.encode(MESSAGES[:1], [2], tokenizer, **how, generation=True)
    whole = chat.encode(MESSAGES, [2], tokenizer, **how)
    n = len(prompt.tokens)
    np.testing.assert_array_equal(prompt.tokens, whole.tokens[:n])
    assert (whole.labels[:n] == chat.IGNORE).all()
    assert (prompt.labels == chat.IGNORE).all()


def test_a_system_message_replaces_that_of_the_template():
    messages = [{"role": "system", "content": "Be brief."}, *MESSAGES[:2]]
    text = chat.render(messages, **TOKENS, template=TEMPLATES["vicuna"])
    assert text.startswith("<s>Be brief. USER: ") and VICUNA not in text


def test_an_unknown_role_is_refused():
    messages = [{"role": "system", "content": "Be brief."}, *MESSAGES[:2]]
    with pytest.raises(
        ValueError, match=r"role 'system', the template knows \['assistant', 'user'"
    ):
        chat.render(messages, **TOKENS, template=TEMPLATES["minicpm"])


def test_text_between_visual_tokens_and_text_alone(tokenizer):
    shown = [("control", "<|im_start|>"), ("visual", np.array([1, 0, -1])), ("alone", "\n")]
    found = chat.encode([QUESTION], [shown], tokenizer, **TOKENS, seed=None)
    np.testing.assert_array_equal(found.entry[found.visual], [1, 0, -1])
    np.testing.assert_array_equal(found.picture[found.visual], 0)
