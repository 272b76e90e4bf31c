"""The Python API and the command of generation."""

import dataclasses
import json

import av
import numpy as np
import pytest
import tiny
from PIL import Image

import vlmjax
from vlmjax import build, checkpoint
from vlmjax.generate import cli
from vlmjax.generate.chat import Chat
from vlmjax.nn import flatten

PICTURE = np.random.default_rng(0).integers(0, 256, (28, 42, 3), dtype=np.uint8)
QUESTION = {"type": "text", "text": "what?"}
CONVERSATIONS = [
    [{"role": "user", "content": "hi"}],
    [{"role": "user", "content": [{"type": "image", "image": PICTURE}, QUESTION]}],
]


@pytest.fixture(scope="module")
def exported(vlm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    vlm.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A picture and a video of three seconds."""
    folder = tmp_path_factory.mktemp("media")
    Image.fromarray(PICTURE).save(folder / "a.png")
    with av.open(str(folder / "b.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=2)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for k in range(6):
            pixels = np.full((32, 32, 3), 40 * k, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return str(folder / "a.png"), str(folder / "b.mp4")


def test_one_conversation_or_many(vlm):
    texts = vlm.generate(CONVERSATIONS, max_new_tokens=5)
    assert [vlm.generate(c, max_new_tokens=5) for c in CONVERSATIONS] == texts
    drawn = {vlm.generate(CONVERSATIONS[0], 5, seed, temperature=2.0) for seed in range(4)}
    assert len(drawn) > 1


def test_media_are_named_as_transformers_names_them(vlm, files):
    """A "path" is a picture; what is no conversation is refused in words."""
    picture, _ = files
    asked = {"role": "user", "content": [{"type": "image", "path": picture}, QUESTION]}
    assert vlm.generate([asked], 5) == vlm.generate(CONVERSATIONS[1], 5)
    said = [asked, {"role": "assistant", "content": "yes"}]
    ours = [CONVERSATIONS[1][0], said[1]]
    np.testing.assert_array_equal(vlm.logits(said), vlm.logits(ours))
    for wrong in ("hi", asked):
        with pytest.raises(ValueError, match="messages are a (str|dict): give a conversation, a"):
            vlm.generate(wrong)
    with pytest.raises(ValueError, match="message 0 is a str: give role and content"):
        vlm.generate([["hi"]])


def test_logits_cover_the_conversation(vlm):
    messages = [*CONVERSATIONS[1], {"role": "assistant", "content": "yes"}]
    n = len(vlm.processor({"id": "", "messages": messages}).tokens)
    logits = vlm.logits(messages)
    assert logits.shape == (n, vlm.config.llm.vocab) and logits.dtype == np.float32


def test_saved_and_loaded_is_the_same_model(vlm, exported):
    again = vlmjax.from_pretrained(exported)
    ours, theirs = flatten(vlm.params), flatten(again.params)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[path], theirs[path]) for path in ours)
    assert again.generate(CONVERSATIONS, 5) == vlm.generate(CONVERSATIONS, 5)
    assert again.max_length == vlm.max_length
    half = vlmjax.from_pretrained(exported, dtype="bfloat16")
    assert half.config.compute.dtype == "bfloat16"
    full = vlm.logits(CONVERSATIONS[1])
    assert np.abs(half.logits(CONVERSATIONS[1]) - full).max() < 0.1 * np.abs(full).max()


def _write_run(workdir, folder):
    """A run of one checkpoint with random weights; returns its flat parameters."""
    config = tiny.tiny_config(folder)
    (workdir / "config.json").write_text(config.to_json_best_effort())
    params = build.random_params(build.resolve(config).model, 0)
    frozen = {path: x for path, x in params.items() if path.startswith("llm")}
    arrays = {"trainable": {p: x for p, x in params.items() if p not in frozen}, "frozen": frozen}
    with checkpoint.Saver(workdir, 1) as saver:
        saver.save(3, arrays, {})
    return params


def test_the_model_of_a_run(tmp_path, files):
    (tmp_path / "run").mkdir()
    params = _write_run(tmp_path / "run", tmp_path)
    vlm = Chat.from_run(tmp_path / "run")
    loaded = flatten(vlm.params)
    assert all(np.array_equal(loaded[path], params[path]) for path in params)
    picture, _ = files
    image = {"type": "image", "image": picture}
    expected = vlm.generate([{"role": "user", "content": [image, QUESTION]}], 5)
    assert cli.run(tmp_path / "run", [picture], prompt="what?", max_new_tokens=5) == expected
    with pytest.raises(ValueError, match="dtype=bfloat16 is not allowed.*export"):
        cli.run(tmp_path / "run", prompt="hi", dtype="bfloat16")
    with pytest.raises(ValueError, match="no config.json"):
        Chat.from_run(tmp_path)


def test_command(exported, files):
    picture, video = files
    for media in ({}, dict(image=[picture, picture]), dict(video=[video])):
        assert isinstance(cli.run(exported, prompt="what?", max_new_tokens=3, **media), str)
    names = [name for _, name, _, _ in cli.FLAGS]
    values = {name: default for _, name, default, _ in cli.FLAGS} | {"model": exported}
    assert len(set(names)) == len(names)
    with pytest.raises(ValueError, match="nothing to answer: give --prompt"):
        cli.run(**values)
    system, user = cli.messages_of([picture], [video], "what?", "be brief")
    assert system == {"role": "system", "content": "be brief"}
    assert [p["type"] for p in user["content"]] == ["image", "video", "text"]


def test_long_prompts_and_unknown_options_are_refused(vlm):
    with pytest.raises(ValueError, match=r"together 6\d\d, at most 600 are allowed; shorten"):
        vlm.generate([{"role": "user", "content": "a" * 560}], max_new_tokens=64)
    with pytest.raises(ValueError, match=r"7\d\d tokens .*max_length is 600: shorten"):
        vlm.generate([{"role": "user", "content": "a" * 700}])
    with pytest.raises(ValueError, match=r"unknown sampling options \['topk'\]; known are"):
        vlm.generate(CONVERSATIONS[0], topk=3)
    small = dataclasses.replace(vlm.processor.config, max_length=30)
    assert Chat(vlm.config, vlm.params, type(vlm.processor)(small, vlm.tokenizer)).max_length == 30


def test_released_length_is_read(exported):
    raw = json.loads((exported / "config.json").read_text())
    assert raw["text_config"]["max_position_embeddings"] == 600
