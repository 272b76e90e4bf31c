"""The template of a tokenizer: what Jinja renders, and what `{% generation %}` marks as answers."""

import dataclasses
import re
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vlmjax.data import chat
from vlmjax.data.derive import choose_template, derive_template
from vlmjax.data.templates import TEMPLATES
from vlmjax.data.tokenizer import SPECIAL_TOKENS, Tokenizer, byte_tokenizer
from vlmjax.hf.chat_template import make_chat_template

TOKENS = dict(image_token="<|image_pad|>", video_token="<|video_pad|>")
# As published for these models, with the answers marked; without the marks they are as published.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>' + '\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set head = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' %}"
    "{% if loop.index0 == 0 %}{% set head = bos_token + head %}{% endif %}{{ head }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
VICUNA = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}"
    "{% set loop_messages = messages %}{% set system_message = 'A chat between a curious user "
    "and an assistant.' %}{% endif %}{{ bos_token + system_message + ' ' }}"
    "{% for message in loop_messages %}{% if message['role'] == 'user' %}"
    "{{ 'USER: ' + message['content'] + ' ' }}{% else %}{{ 'ASSISTANT: ' }}{% generation %}"
    "{{ message['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + eos_token}}{% endgeneration %}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
PHI_3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
    "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n'}}{% generation %}"
    "{{ message['content'] + '<|end|>'}}{% endgeneration %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{% generation %}"
    "{{ eos_token }}{% endgeneration %}{% endif %}"
)
INTERNLM_2 = (
    "{{ bos_token }}{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>' + '\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' }}"
    "{% if role == 'model' %}{% generation %}"
    "{{ message['content'] | trim + '<end_of_turn>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] | trim + '<end_of_turn>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
QWEN_2_VL = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = {
    "chatml": CHATML,
    "llama3": LLAMA_3,
    "vicuna": VICUNA,
    "mistral": MISTRAL,
    "phi3": PHI_3,
    "internlm2": INTERNLM_2,
    "gemma": GEMMA,
}
SPECIAL = [
    *SPECIAL_TOKENS,
    *("<s>", "</s>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|vision_start|>", "<|vision_end|>"),
]
NAMES = {
    "llama3": dict(bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"),
    "phi3": dict(bos_token="<s>", eos_token="<|endoftext|>"),
}


@pytest.fixture
def with_jinja():
    def make(jinja, name=""):
        tokenizer = byte_tokenizer(SPECIAL)
        tokenizer.hf.chat_template = jinja
        for key, token in NAMES.get(name, dict(bos_token="<s>", eos_token="</s>")).items():
            setattr(tokenizer.hf, key, token)
        return tokenizer

    return make


def talks(template):
    texts = ["What?", "A cat, zqm0zq.", " two\n\nlines ", "Größe 好 USER: [/INST]", "ok", "Yes."]
    for count in range(1, 7):
        roles = (["user", "assistant"] * 3)[:count]
        said = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
        yield said
        if "system" in template.turns:
            yield [{"role": "system", "content": "Be brief.\n"}, *said]


@pytest.mark.parametrize("name", MARKED)
def test_tokens_and_answers_are_those_of_transformers(with_jinja, name):
    tokenizer = with_jinja(MARKED[name], name)
    template = derive_template(tokenizer, **TOKENS)
    assert ("system" in template.turns) == (name not in ("mistral", "gemma"))
    for messages in talks(template):
        theirs = tokenizer.hf.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        found = chat.encode(messages, [], tokenizer, **TOKENS, seed=None, template=template)
        np.testing.assert_array_equal(found.tokens, theirs["input_ids"])
        answers = np.array(theirs["assistant_masks"], bool)
        if name == "phi3" and messages[-1]["role"] == "user":
            answers[-1] = False  # an end that follows no answer
        if name == "vicuna":  # the space before a word is of its token, here it is one
            answers[:-1] |= answers[1:]
        np.testing.assert_array_equal(found.labels != chat.IGNORE, answers)
        np.testing.assert_array_equal(found.labels[answers], found.tokens[answers])
        if messages[-1]["role"] == "user":
            prompt = tokenizer.hf.apply_chat_template(messages, add_generation_prompt=True)
            found = chat.encode(
                messages, [], tokenizer, **TOKENS, seed=None, template=template, generation=True
            )
            np.testing.assert_array_equal(found.tokens, prompt["input_ids"])


@pytest.mark.parametrize("name", MARKED)
def test_marks_make_no_difference_and_the_template_can_be_written_again(with_jinja, name):
    template = derive_template(with_jinja(MARKED[name], name), **TOKENS)
    published = re.sub(r"{% (end)?generation %}", "", MARKED[name])
    assert derive_template(with_jinja(published, name), **TOKENS) == template
    written = make_chat_template(template, *TOKENS.values())
    again = derive_template(with_jinja(written, name), **TOKENS)
    assert dataclasses.replace(again, document=template.document) == template
    assert again.stops == template.stops


@pytest.fixture(params=["always", "first", "never"])
def words(request):
    """A tokenizer of words with the three ways of SentencePiece to put a space before them."""
    backend = Backend(models.BPE(unk_token="<unk>"))
    how = dict(prepend_scheme=request.param)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False, **how)
    backend.decoder = decoders.Metaspace(**how)
    trainer = trainers.BpeTrainer(
        vocab_size=110, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    corpus = ["[INST] What is it? [/INST] A cat. A cat.", re.sub("[{%}]", "", VICUNA)] * 20
    backend.train_from_iterator(corpus, trainer)
    names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, **names))


@pytest.mark.parametrize("name", ["vicuna", "mistral"])
def test_spaces_before_words_are_those_of_transformers(words, name):
    words.hf.chat_template = MARKED[name]
    tokens = dict(image_token="<unk>", video_token="<unk>")
    template = derive_template(words, **tokens)
    said = ["What is it?", "A cat.", "What is it?", "A cat. A cat."]
    roles = ["user", "assistant"] * 2
    messages = [{"role": r, "content": t} for r, t in zip(roles, said, strict=True)]
    theirs = words.hf.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    found = chat.encode(messages, [], words, **tokens, seed=None, template=template)
    np.testing.assert_array_equal(found.tokens, theirs["input_ids"])
    trained, answers = found.labels != chat.IGNORE, np.array(theirs["assistant_masks"], bool)
    assert trained[answers].all()  # and a space before a word, where it is a token
    assert {words._backend.id_to_token(t) for t in found.tokens[trained & ~answers]} <= {"▁"}


def test_the_parts_of_a_template(with_jinja):
    template = derive_template(with_jinja(CHATML), **TOKENS, video="frames")
    assert template.system == "You are a helpful assistant." and template.video == "frames"
    assert template.turns == TEMPLATES["videollama3"].turns
    assert template.answer == "<|im_start|>assistant\n" and template.document == "</s>"
    assert template.stops == ("<|im_end|>", "</s>") and template.trim == ()
    llama = derive_template(with_jinja(LLAMA_3, "llama3"), **TOKENS)
    assert llama.trim == ("system", "user", "assistant")
    assert llama.turns["user"] == TEMPLATES["llama3"].turns["user"]
    assert llama.start == "<|begin_of_text|>" and llama.stops == ("<|eot_id|>",)


def test_pictures_stand_as_the_template_says(with_jinja):
    tokenizer = with_jinja(QWEN_2_VL)
    template = derive_template(tokenizer, **TOKENS)
    assert template.picture == ("<|vision_start|>", "<|vision_end|>")
    text = {"type": "text", "text": "Which?"}
    content = [{"type": "image"}, text, {"type": "video"}, {"type": "image"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "This."}]
    theirs = tokenizer.render_chat(messages)
    assert chat.render(messages, *TOKENS.values(), template=template) == theirs
    found = chat.encode(messages, [1, 1, 1], tokenizer, **TOKENS, seed=None, template=template)
    assert found.tokens.tolist() == tokenizer.encode(theirs) and found.visual.sum() == 3
    with pytest.raises(ValueError, match="shows a picture as .*image_token is '<image>': set it"):
        derive_template(tokenizer, "<image>", "<video>")


THINKS = CHATML.replace(
    "{% generation %}",
    "{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% generation %}",
)
FIRST_SYSTEM = (  # Llama-2: the system message is inside the first user turn
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}"
    "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PICTURES_FIRST = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}{{ '<|image_pad|>\n' }}{% endif %}{% endfor %}"
    "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] + ' ' }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@pytest.mark.parametrize(
    "jinja,match",
    [
        (None, "no chat template: choose one of"),
        (THINKS, "not made turn by turn"),
        ("{{ strftime_now('%d') }}" + CHATML, "date of today.*write a date"),
        (CHATML.replace("message['content'] +", "message['content'].upper() +"), "leaves out"),
        (
            CHATML.replace("{{ message['content'] +", "{{ message['content'].rstrip() +"),
            r"first in|differs from such a template in \[.*two.*by turns",
        ),
        ("{{ raise_exception('never') }}", r"refuses the roles \['user'\]: never; choose another"),
        ("hello", "leaves out what a user says"),
    ],
)
def test_other_templates_are_refused(with_jinja, jinja, match):
    with pytest.raises(ValueError, match=match):
        derive_template(with_jinja(jinja), **TOKENS)


def test_a_system_message_that_is_no_turn_is_refused_where_a_record_has_one(with_jinja):
    template = derive_template(with_jinja(FIRST_SYSTEM), **TOKENS)
    assert template.turns["user"] == ("<s>[INST] ", " [/INST]") and "system" not in template.turns
    assert template.trim == ("user", "assistant")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    with pytest.raises(ValueError, match="role 'system', the template knows"):
        chat.render(messages, *TOKENS.values(), template=template)


def test_pictures_that_change_places_are_refused(with_jinja):
    with pytest.raises(ValueError, match="moves the image away"):
        derive_template(with_jinja(PICTURES_FIRST), **TOKENS)


def test_a_config_chooses(with_jinja):
    config = SimpleNamespace(template="vicuna", picture=None, **TOKENS)
    assert choose_template(config, None) is TEMPLATES["vicuna"]
    config.template = "tokenizer"
    assert choose_template(config, with_jinja(CHATML)).video == "frames"
    config.picture = {}
    assert choose_template(config, with_jinja(CHATML)).video == "whole"
