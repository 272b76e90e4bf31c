"""What is refused and why: models that no class computes, checkpoints that do not fit."""

import dataclasses
import json

import numpy as np
import picture_layouts as layouts
import picture_models as models
import pytest
from safetensors.numpy import load_file, save_file

from vlmjax import hf
from vlmjax.data.chat import render
from vlmjax.data.derive import choose_template
from vlmjax.data.templates import TEMPLATES
from vlmjax.data.tokenizer import byte_tokenizer
from vlmjax.hf.chat_template import find_template, make_chat_template


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """Returns (VLMConfig, parameters, tokenizer, ProcessorConfig) of a model and its directory."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("reference")
            models.save(name, models.model_of(name), folder)
            cfg, processor = hf.read_config(folder), hf.load_processor(folder)
            made[name] = (cfg, hf.load_params(folder), *processor), folder
        return made[name]

    return get


def _square(settings, **changes):
    return {"strategy": ({**settings.picture["strategy"][0], **changes},)}


CHANGES = {  # name -> (of the VLMConfig, of the picture, what is said)
    "norm behind the blocks": (
        "llava pad",
        dict(vision=dict(features="last")),
        {},
        "features='last'",
    ),
    "activation": ("llava pad", dict(vision=dict(act="silu")), {}, "hidden_act='silu'"),
    "column order": ("internvl", dict(connector=dict(order="column")), {}, "order='column'"),
    "deep projector": ("llava pad", dict(connector=dict(layers=3)), {}, "connector.layers=3"),
    "pool behind": ("llava_next", dict(pool="weighted"), {}, "pool='weighted'"),
    "rotary": ("llava pad", dict(llm=dict(o_bias=True)), {}, "o_bias=True"),
    "no thumbnail": ("internvl", {}, dict(whole="none"), "'none'"),
    "another strategy": ("llava pad", {}, dict(name="s2"), "strategy 's2'"),
    "colour": ("llava pad", {}, dict(fill=(0, 0, 0)), "image .*fill=\\(0, 0, 0\\)"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_no_class_computes_is_refused_with_the_reason(change, read, tmp_path):
    name, model, view, message = CHANGES[change]
    (cfg, params, tokenizer, settings), _ = read(name)
    for part, values in model.items():
        if isinstance(values, dict):
            values = dataclasses.replace(getattr(cfg, part), **values)
        cfg = dataclasses.replace(cfg, **{part: values})
    if view.get("name"):
        view = {"picture": {"strategy": (dict(name="s2", side=35, scales=(35,)),)}}
        settings = dataclasses.replace(settings, **view)
    elif view:
        picture = settings.picture | _square(settings, **view)
        settings = dataclasses.replace(settings, picture=picture)
    with pytest.raises(ValueError, match=message) as error:
        out = tmp_path / "out"
        hf.save_pretrained(out, cfg, params, tokenizer, settings, format="transformers")
    assert "its own code" in str(error.value) or change in ("activation", "rotary")
    assert not (tmp_path / "out").exists()


def test_the_card_says_what_transformers_does_otherwise(read, tmp_path):
    (cfg, params, tokenizer, settings), _ = read("llava_onevision")
    picture = settings.picture | {"several": (), "frame": settings.picture["strategy"]}
    settings = dataclasses.replace(settings, picture=picture)
    out = hf.save_pretrained(tmp_path, cfg, params, tokenizer, settings, card={"license": "mit"})
    card = (out / "README.md").read_text()
    assert "LLaVA-OneVision" in card and 'license: "mit"' in card
    assert "several images otherwise" in card and "frames of videos otherwise" in card


def test_a_placeholder_is_a_token_of_its_own(read, tmp_path):
    (cfg, params, tokenizer, settings), _ = read("llava pad")
    for token in ("</s>", "a"):
        wrong = dataclasses.replace(settings, image_token=token)
        with pytest.raises(ValueError, match="special token of its own"):
            hf.save_pretrained(tmp_path, cfg, params, tokenizer, wrong)


def test_unused_parts_are_dropped_and_all_else_is_one_error(read, tmp_path):
    _, folder = read("llava pad")
    other = layouts.other_layout("llava pad", "A", folder, tmp_path / "other")
    stored = load_file(other / "model.safetensors")
    tower = "vision_tower.vision_model."
    # The last block and the norm behind it are there, and the features do not pass them.
    assert (
        f"{tower}encoder.layers.2.mlp.fc1.bias" in stored
        and f"{tower}post_layernorm.bias" in stored
    )
    stored |= {
        f"{tower}embeddings.position_ids": np.zeros((1, 26), np.float32),
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(3, np.float32),
    }
    save_file(stored, other / "model.safetensors")
    hf.load_params(other)
    del stored["multi_modal_projector.linear_2.bias"]
    stored |= {
        "image_newline": np.zeros(24, np.float32),
        f"{tower}encoder.layers.3.mlp.fc1.bias": np.zeros(29, np.float32),
        "language_model.lm_head.weight": np.zeros((3, 24), np.float32),
    }
    save_file(stored, other / "model.safetensors")
    with pytest.raises(ValueError) as error:
        hf.load_params(other)
    missing, unexpected, wrong = str(error.value).splitlines()[1:]
    assert missing.startswith("  missing (1): ") and "linear_2.bias" in missing
    assert unexpected.startswith("  unexpected (2): ") and "layers.3" in unexpected
    assert wrong.startswith("  mis-shaped (1): ") and "lm_head.weight [3, 24]" in wrong


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("llava pad", dict(vision_feature_select_strategy="full"), "supported is 'default'"),
        ("llava siglip", dict(vision_feature_select_strategy="default"), "supported is 'full'"),
        ("llava pad", dict(vision_feature_layer=[-2, 1]), "one block"),
        ("llava pad", dict(multimodal_projector_bias=False), "multimodal_projector_bias=False"),
        ("llava_next_video", dict(spatial_pool_mode="max"), "spatial_pool_mode='max'"),
        ("llava_onevision", dict(vision_aspect_ratio="square"), "vision_aspect_ratio='square'"),
        ("internvl", dict(downsample_ratio=0.25), "a divisor of 6 patches"),
        ("llava_next", dict(image_grid_pinpoints=[[35, 35]]), "other image_grid_pinpoints"),
    ],
)
def test_settings_that_no_part_has_are_refused(name, change, message, read, tmp_path):
    _, folder = read(name)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        hf.load_processor(tmp_path)


def test_views_of_another_size_or_resize_are_refused(read, tmp_path):
    _, folder = read("llava crop")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    image = json.loads((folder / "preprocessor_config.json").read_text())
    for change in (dict(size={"shortest_edge": 40}), dict(resample=2)):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(image | change))
        with pytest.raises(ValueError, match="the tower sees 35x35"):
            hf.load_processor(tmp_path)


WHOLE = [name for name, template in TEMPLATES.items() if template.video == "whole"]
LLAVA_HF = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}{{ '<image>\n' }}{% endif %}"
    "{% endfor %}{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] + ' ' }}"
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def test_chat_templates_are_written_and_recognised():
    tokenizer = byte_tokenizer(sorted({t for name in WHOLE for t in TEMPLATES[name].controls}))
    part = [{"type": "image"}, {"type": "text", "text": 'What\'s "this"\n?'}, {"type": "video"}]
    question = {"role": "user", "content": part}
    messages = [question, {"role": "assistant", "content": "{{It}}"}, question]
    for name in WHOLE:
        jinja = make_chat_template(TEMPLATES[name], "<image>", "<video>")
        for chosen, generation in ((messages, True), (messages[:2], False)):
            how = dict(tokenize=False, add_generation_prompt=generation, chat_template=jinja)
            found = tokenizer.hf.apply_chat_template(chosen, **how)
            assert found == render(chosen, "<image>", "<video>", generation, TEMPLATES[name])
        assert find_template(tokenizer, "<image>", jinja) == name
    assert find_template(tokenizer, "<image>", LLAVA_HF) == "vicuna"
    assert find_template(tokenizer, "<image>", "{{ 'Q' }}") is None


def test_the_template_can_be_given(read):
    _, folder = read("llava pad")
    assert hf.load_processor(folder)[1].template == "vicuna"
    assert hf.load_processor(folder, "chatml")[1].template == "chatml"


TURN = "<start_of_turn>{{ m['role'] }}\n"
OTHER = (
    "{% for m in messages %}" + TURN + "{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
)


def test_an_unknown_chat_template_is_read_or_refused(read, tmp_path):
    _, folder = read("llava pad")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text(OTHER)
    tokenizer, config = hf.load_processor(tmp_path)
    assert config.template == "tokenizer"
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}]
    template = choose_template(config, tokenizer)
    said = render(messages, config.image_token, config.video_token, True, template)
    assert said == "<start_of_turn>user\n<image>Hi<end_of_turn>\n<start_of_turn>assistant\n"
    (tmp_path / "chat_template.jinja").write_text("{{ messages | length }}")
    with pytest.raises(ValueError, match="a chat template that is none of ours, .*give template"):
        hf.load_processor(tmp_path)
