"""Exports with our own torch code: transformers scores and answers as we do, and we read them back.

A subprocess plays the user of transformers: offline, with an empty cache of modules, without vlmjax
on its path and without PyAV (`remote_run.py`).
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torchvision_shim
from PIL import Image
from remote_systems import ALL, make_chat
from safetensors.numpy import load_file, save_file
from transformers import dynamic_module_utils

import vlmjax
from vlmjax import hf
from vlmjax.generate.decode import score
from vlmjax.nn import flatten

torchvision_shim.install()  # before transformers looks for torchvision
QUICK = ("cogvlm2", "sva_in_layers")
SIZES = ((60, 40), (30, 90), (50, 50))
NEW = 10


def _chats(folder):
    """Conversations with one picture of each shape, with two, and with none."""
    rng, files = np.random.default_rng(3), []
    for k, (w, h) in enumerate(SIZES):
        files.append(str(folder / f"{k}.png"))
        Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)).save(files[-1])

    def chat(*names):
        pictures = [{"type": "image", "image": name} for name in names]
        text = {"type": "text", "text": "what?"}
        return [{"role": "user", "content": [*pictures, text]}]

    return [chat(files[0]), chat(files[1]), chat(*files[1:]), chat()]


def _check(names, tmp_path):
    models, chats = tmp_path / "models", _chats(tmp_path)
    ours = {name: make_chat(name) for name in names}
    for name, chat in ours.items():
        chat.save_pretrained(models / name, format="remote")
        (models / f"{name}.json").write_text(json.dumps(chats))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"HF_MODULES_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    script = [sys.executable, str(Path(__file__).parent / "remote_run.py"), str(models)]
    done = subprocess.run(script, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, chat in ours.items():
        _compare(chat, np.load(models / f"{name}.npz"), chats)
        again = vlmjax.from_pretrained(models / name)
        assert dataclasses.replace(again.config, compute=chat.config.compute) == chat.config
        assert again.processor.config == chat.processor.config
        read = flatten(again.params)
        assert all(np.array_equal(x, read[path]) for path, x in flatten(chat.params).items())


def _compare(chat, found, chats):
    samples = [chat.processor.prompt(messages) for messages in chats]
    answers = chat.generator.generate_samples(samples, NEW)
    batch, _, lengths = chat.generator.batch(samples, len(samples))
    scores = np.asarray(score(chat.generator.graphdef, chat.generator.params, batch))
    for k, (sample, answer) in enumerate(zip(samples, answers, strict=True)):
        np.testing.assert_array_equal(found[f"tokens_{k}"], sample.tokens)
        want = scores[k, : lengths[k]]
        for kind in ("logits", "together"):
            assert np.abs(found[f"{kind}_{k}"] - want).max() < 2e-5 * np.abs(want).max(), (kind, k)
        np.testing.assert_array_equal(found[f"answer_{k}"], answer.tokens)
        np.testing.assert_array_equal(found["answers"][k], answer.tokens)
    np.testing.assert_array_equal(found["uncached"], answers[-1].tokens)


@pytest.mark.long
def test_transformers_runs_an_export_as_we_do(tmp_path):
    _check(QUICK, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in ALL if name not in QUICK])
def test_transformers_runs_each_system_as_we_do(name, tmp_path):
    _check([name], tmp_path)


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    chat = make_chat("glm4v")
    return chat, chat.save_pretrained(tmp_path_factory.mktemp("export") / "tiny")


def test_a_model_without_a_class_in_transformers_carries_its_code(export, capsys):
    chat, out = export
    assert {"modeling_vlmjax.py", "vlmjax_picture.py", "model.safetensors"} <= set(os.listdir(out))
    keys = load_file(out / "model.safetensors")
    assert "llm.blocks.1.attn.q.kernel" in keys and "connector.specials.boi.embedding" in keys
    card = (out / "README.md").read_text()
    assert "trust_remote_code=True" in card and "conv_glu" in card
    chat.save_pretrained(out.parent / "other")
    assert "trust_remote_code=True" in capsys.readouterr().out


def test_the_installed_transformers_answers_as_we_do(export, tmp_path, monkeypatch):
    """`generate` of this version, with a cache, about a picture; the other versions are `long`."""
    chat, out = export
    monkeypatch.setitem(sys.modules, "av", None)  # only videos need it
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    load = functools.partial(
        dynamic_module_utils.get_class_from_dynamic_module, pretrained_model_name_or_path=str(out)
    )
    model = load("modeling_vlmjax.VLMJaxForConditionalGeneration").from_pretrained(out).eval()
    processor = load("processing_vlmjax.VLMJaxProcessor")
    settings = json.loads((out / "processor_config.json").read_text())
    inputs = processor(chat.processor.tokenizer.hf, settings["vlmjax"], settings["form"])(
        messages := _chats(tmp_path)[0]
    )
    how = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    answer = model.generate(**inputs, **how)[0, inputs["input_ids"].shape[1] :]
    (ours,) = chat.generator.generate_samples([chat.processor.prompt(messages)], NEW)
    np.testing.assert_array_equal(answer, ours.tokens)


def test_the_loader_of_transformers_finds_every_file(export):
    _, out = export
    starts = ("modeling_vlmjax.py", "processing_vlmjax.py")
    imports = dynamic_module_utils.get_relative_import_files
    found = {Path(f).name for s in starts for f in imports(str(out / s))}
    assert found | set(starts) == {name for name in os.listdir(out) if name.endswith(".py")}


def test_all_that_does_not_fit_is_one_error(export, tmp_path):
    chat, out = export
    for file in out.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(out / "model.safetensors")
    tensors["llm.more"] = tensors.pop("llm.norm.scale")
    tensors["vision.patch.kernel"] = tensors["vision.patch.kernel"][1:]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError) as error:
        hf.load_params(tmp_path)
    for name in ("llm.more", "llm.norm.scale", "vision.patch.kernel"):
        assert name in str(error.value)
    wider = dataclasses.replace(chat.config.llm, rope_theta=3.0)
    with pytest.raises(ValueError, match="llm is .* there"):
        hf.load_params(out, dataclasses.replace(chat.config, llm=wider))
    tower = hf.load_module("vision", out, chat.config)
    np.testing.assert_array_equal(
        tower["patch"]["kernel"], chat.params["vision"]["patch"]["kernel"]
    )
    raw = json.loads((out / "config.json").read_text())
    raw["model"]["llm"]["depth"] = 3
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="depth"):
        hf.read_config(tmp_path)


def test_an_unknown_format_is_refused(export, tmp_path):
    with pytest.raises(ValueError, match="remote"):
        export[0].save_pretrained(tmp_path, format="onnx")
