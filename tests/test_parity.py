"""Logits of the whole model against transformers, in f32, and against the golden file.

Tokens, pixels and masks come from our processor here; `hf/test_hf_processor.py` shows that those of
transformers are the same.
"""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_reference import VARIANTS, reference_model
from safetensors.numpy import save_file

from vlmjax import hf, vlm
from vlmjax.batch import Budget, Form, TowerForm
from vlmjax.connectors import units
from vlmjax.data.pack import pack, size
from vlmjax.data.processor import Processor, ProcessorConfig
from vlmjax.data.sample import Item, Sample
from vlmjax.data.tokenizer import byte_tokenizer
from vlmjax.objectives import OBJECTIVES

TOLERANCE = 2e-5  # below what a wrong eps changes; 1e-4 is asked for
FRAMES = 5
GOLDENS = Path(os.environ.get("VLMJAX_GOLDENS", Path(__file__).parent / "goldens"))


def _picture(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _clip():
    frames = np.repeat(_picture(1, 56, 84, 3, seed=1), FRAMES, axis=0)
    frames[2:, :28, 28:56] = _picture(3, 28, 28, 3, seed=2)
    frames[4, 30:50] //= 2
    return {"type": "video", "video": frames, "timestamps": [0.0, 1.0, 2.5, 3.0, 4.0]}


def _turns(*questions):
    """A conversation with an answer to each question."""
    messages = []
    for parts in questions:
        messages += [
            {"role": "user", "content": list(parts)},
            {"role": "assistant", "content": "Yes, " * len(parts)},
        ]
    return messages


def _image(*shape, seed):
    return {"type": "image", "image": _picture(*shape, 3, seed=seed)}


WHAT = {"type": "text", "text": "what?"}
CONVERSATIONS = {
    "image": _turns([_image(42, 70, seed=3), WHAT]),
    "two images and two turns": _turns([_image(28, 42, seed=4), WHAT], [_image(56, 14, seed=5)]),
    "video": _turns([_clip(), WHAT]),
    "text": _turns([WHAT], [WHAT, WHAT]),
}


def _samples():
    config = ProcessorConfig(min_visual_tokens=1, max_visual_tokens=400)
    processor = Processor(config, byte_tokenizer())
    return {
        name: processor({"id": name, "messages": messages})
        for name, messages in CONVERSATIONS.items()
    }


def _batch(rows):
    """Rows of samples in the smallest common budget, with some padding in every row."""
    sizes = np.array([np.sum([size(s) for s in row], axis=0) for row in rows]).max(0)
    budget = Budget(*(int(n) + 3 for n in sizes[:3]))
    return jax.tree.map(jnp.asarray, pack(rows, budget, Form((TowerForm(14),)))[0])


def _model(directory):
    cfg, params = hf.read_config(directory), hf.load_params(directory)
    abstract = jax.eval_shape(lambda: vlm.VLM(cfg, rngs=vlm.nnx.Rngs(0)))
    return vlm.bind(vlm.unbind(abstract)[0], params)


def _reference_logits(model, sample):
    """The f32[T, V] logits of transformers for one of our samples."""
    inputs = {"input_ids": torch.tensor(sample.tokens[None].astype(np.int64))}
    videos = [i for i in sample.items if i.merge == 2]
    images = [i for i in sample.items if i.merge == 1]

    def rows(items):
        pixels = np.concatenate([i.patches for i in items]).astype(np.float32)
        return torch.tensor((pixels / 255 - 0.5) / 0.5)

    if images:
        inputs["pixel_values"] = rows(images)
        inputs["image_grid_thw"] = torch.tensor([[1, *i.grid] for i in images])
        inputs["image_merge_sizes"] = torch.tensor([1] * len(images))
    if videos:
        inputs["pixel_values_videos"] = rows(videos)
        inputs["video_grid_thw"] = torch.tensor([[len(videos), *videos[0].grid]])
        inputs["video_merge_sizes"] = torch.tensor([2])
        inputs["video_compression_mask"] = torch.tensor(np.concatenate([i.keep for i in videos]))
    with torch.no_grad():
        return model(**inputs).logits[0].numpy()


def _error(ours, theirs):
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_against_transformers(variant, tmp_path):
    tokenizer = byte_tokenizer()
    ids = {f"{kind}_token_id": tokenizer.id(f"<|{kind}_pad|>") for kind in ("image", "video")}
    reference = reference_model(variant, **ids)
    reference.save_pretrained(tmp_path)
    samples = _samples()
    kept = np.concatenate([i.keep for i in samples["video"].items])
    assert FRAMES < kept.sum() < len(kept)
    singles, packed = [[s] for s in samples.values()], list(samples.values())
    logits = np.asarray(
        jax.jit(lambda m, b: m.logits(b))(_model(tmp_path), _batch([*singles, packed]))
    )
    start, errors = 0, {}
    for row, (name, sample) in enumerate(samples.items()):
        theirs, n = _reference_logits(reference, sample), len(sample.tokens)
        errors[name] = _error(logits[row, :n], theirs)
        errors[f"{name}, packed"] = _error(logits[-1, start : start + n], theirs)
        start += n
    assert max(errors.values()) < TOLERANCE, errors


def _golden_model(z, meta, directory):
    text, vision = meta["config"]["text"], meta["config"]["vision"]
    assert text.pop("qkv_bias")
    config = {
        "model_type": "video_llama_3",
        "text_config": text | {"model_type": "qwen2"},
        "vision_config": vision | {"model_type": "video_llama_3_vision"},
    }
    (directory / "config.json").write_text(json.dumps(config))
    weights = {k.removeprefix("w/"): z[k] for k in z.files if k.startswith("w/")}
    save_file(weights, directory / "model.safetensors")
    return _model(directory)


def _golden_items(z, meta, kind):
    """The images or frames of the file as items, all visual tokens kept."""
    suffix, name = ("", "image") if kind == "image" else ("_videos", "video")
    t, h, w = z[f"in/{name}_grid_thw"][0]
    merge = meta["config"][f"{name}_merge_size"]
    pixels = np.rint((z[f"in/pixel_values{suffix}"] + 1) * 127.5).astype(np.uint8)
    keep = np.ones(h * w // merge**2, bool)
    return [Item(rows, (int(h), int(w)), merge, keep) for rows in np.split(pixels, t)]


def _pruned(items, mask):
    masks = np.split(mask, len(items))
    return [Item(i.patches, i.grid, i.merge, m) for i, m in zip(items, masks, strict=True)]


def test_golden_videollama3(tmp_path):
    z = np.load(GOLDENS / "videollama3.npz")
    meta = json.loads(str(z["meta"]))
    model = _golden_model(z, meta, tmp_path)
    image, video = (_golden_items(z, meta, kind) for kind in ("image", "video"))
    pruned = _pruned(video, z["in/video_compression_mask"])
    placeholders = [meta["config"][f"{kind}_token_id"] for kind in ("image", "video")]
    cases = {
        "image": image,
        "video": pruned,
        "video_full": video,
        "mixed": [*pruned, *image],
        "text": [],
    }
    samples = {}
    for name, items in cases.items():
        tokens = z[f"in/input_ids_{name}"].astype(np.int32)
        labels = z["in/labels_mixed"] if name == "mixed" else np.full(len(tokens), -100)
        visual = np.isin(tokens, placeholders)
        samples[name] = Sample(name, tokens, labels, tuple(items), visual)
    batch = _batch([[s] for s in samples.values()])

    @jax.jit
    def run(model, batch):
        spec = vlm.AttentionSpec(model.cfg.compute.attention, model.cfg.compute.vision_block)
        x, mask = units.gather(model.vision(batch.patches[0], attention=spec), batch.units[0].index)
        visual = model.connector((x,), (mask,))[:, :, 0]
        hidden, _ = model.decode(model.embed(batch, vlm.Visual(visual)), batch)
        return units.mean(x, mask), visual, model.llm.logits(hidden)

    merged, visual, logits = (np.asarray(x) for x in run(model, batch))
    ours = {}
    for row, (name, sample) in enumerate(samples.items()):
        ours[f"logits_{name}"] = logits[row, : len(sample.tokens)]
        if name in ("image", "video_full"):
            kind, n = name.removesuffix("_full"), int(sample.visual.sum())
            ours[f"vision_{kind}"] = merged[row, :n]
            ours[f"projected_{kind}"] = visual[row, :n]
    ours["loss_mixed"] = jax.jit(OBJECTIVES["sft"])(model, _batch([[samples["mixed"]]]))[0]
    assert {f"out/{name}" for name in ours} == {k for k in z.files if k.startswith("out/")}
    errors = {name: _error(np.asarray(value), z[f"out/{name}"]) for name, value in ours.items()}
    assert all(error <= meta["tolerance"]["rel"] for error in errors.values()), errors
