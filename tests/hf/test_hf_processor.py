"""An exported directory in transformers: same text, same tokens, same pixels as ours."""

import dataclasses
import json

import numpy as np
import pytest
from hf_reference import needs_torchvision, reference_model
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.video_utils import VideoMetadata

from vlmjax import hf
from vlmjax.data import chat
from vlmjax.data.processor import Processor, ProcessorConfig
from vlmjax.data.tokenizer import SPECIAL_TOKENS, byte_tokenizer
from vlmjax.hf.processor import CHAT_TEMPLATE

FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
}
CONFIG = ProcessorConfig(max_visual_tokens=600, min_visual_tokens=4, max_frames=9, max_length=4000)


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    source, out = (tmp_path_factory.mktemp(name) for name in ("source", "out"))
    reference_model("qwen2 4/2 tied").save_pretrained(source)
    cfg, params = hf.read_config(source), hf.load_params(source)
    tokenizer = byte_tokenizer()
    card = {"license": "apache-2.0"}
    return hf.save_pretrained(out, cfg, params, tokenizer, CONFIG, model_name="tiny", card=card)


def _pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _clip():
    """Five frames of 56 x 84 in which only some regions change."""
    frames = np.repeat(_pixels(1, 56, 84, 3), 5, axis=0)
    frames[2:, :28, 28:56] = _pixels(3, 28, 28, 3, seed=1)
    frames[4, 30:50] += 9
    return frames


def _user(*parts):
    return {"role": "user", "content": list(parts)}


TEXT = {"type": "text", "text": "What is this? 好\n"}
CASES = {
    "text": [_user(TEXT), {"role": "assistant", "content": "Words."}, _user(TEXT)],
    "system": [{"role": "system", "content": "Be brief."}, _user(TEXT)],
    "image": [_user({"type": "image", "image": _pixels(45, 80, 3)}, TEXT)],
    "two images and two turns": [
        _user({"type": "image", "image": _pixels(70, 28, 3)}, TEXT),
        {"role": "assistant", "content": [{"type": "text", "text": "A."}]},
        _user({"type": "text", "text": "Now:"}, {"type": "image", "image": _pixels(90, 300, 3)}),
    ],
    "video": [_user({"type": "video", "video": _clip(), "timestamps": [0, 1, 2.5, 3, 4]}, TEXT)],
    "video and timed image": [
        _user(
            {"type": "video", "video": _clip()[:3], "timestamps": [0.0, 0.5, 1.0]},
            {"type": "image", "image": _pixels(42, 42, 3), "time": 2.04},
            TEXT,
        ),
    ],
}


def test_every_file_is_written(export):
    assert {p.name for p in export.iterdir()} == FILES
    front = (export / "README.md").read_text().split("---")[1]
    for line in ('library_name: "transformers"', 'pipeline_tag: "image-text-to-text"', "license"):
        assert line in front
    generation = json.loads((export / "generation_config.json").read_text())
    ids = byte_tokenizer()
    assert generation == {
        "bos_token_id": ids.id("<|endoftext|>"),
        "eos_token_id": [ids.id("<|im_end|>"), ids.id("<|endoftext|>")],
        "pad_token_id": ids.id("<|endoftext|>"),
        "do_sample": False,
    }


def test_processor_settings_come_back(export):
    tokenizer, config = hf.load_processor(export)
    assert config == CONFIG
    assert tokenizer.encode("a<|im_end|>é") == byte_tokenizer().encode("a<|im_end|>é")


def test_an_export_says_that_transformers_prunes_elsewhere(export, tmp_path):
    cfg, params = hf.read_config(export), hf.load_params(export)
    config = dataclasses.replace(CONFIG, prune="before_encoder")
    hf.save_pretrained(tmp_path, cfg, params, byte_tokenizer(), config)
    assert hf.load_processor(tmp_path)[1] == config
    note = "before the\nvision tower, as this model was trained. transformers drops them after"
    assert note in (tmp_path / "README.md").read_text()
    assert "vision tower" not in (export / "README.md").read_text()


@pytest.mark.parametrize("name", CASES)
def test_the_chat_template_renders_what_our_chat_renders(name, export):
    messages = CASES[name]
    ours = chat.render(messages, "<|image_pad|>", "<|video_pad|>", generation=True)
    tokenizer = AutoTokenizer.from_pretrained(export)
    theirs = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else ():
            if part["type"] == "video":
                frames = (f"Time {t:.1f}s:<|video_pad|>" for t in part["timestamps"])
                theirs = theirs.replace("<|video_pad|>", ",".join(frames), 1)
    assert theirs == ours


def test_the_chat_template_renders_streams(export):
    messages = [
        {"role": "stream", "content": [{"type": "image", "time": 0.0}]},
        {"role": "stream", "content": [{"type": "image", "time": 3.05}]},
        {"role": "assistant", "content": "Now."},
    ]
    tokenizer = AutoTokenizer.from_pretrained(export)
    theirs = tokenizer.apply_chat_template(messages, tokenize=False)
    assert theirs == chat.render(messages, "<|image_pad|>", "<|image_pad|>")


@needs_torchvision
@pytest.mark.parametrize("name", CASES)
def test_auto_processor_gives_our_tokens_and_pixels(name, export):
    messages = CASES[name]
    processor = AutoProcessor.from_pretrained(export)
    # Pillow's bicubic is the reference; that of torchvision gives other values where it resizes.
    processor.image_processor = AutoImageProcessor.from_pretrained(export, backend="pil")
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    parts = [p for m in messages if isinstance(m["content"], list) for p in m["content"]]
    media = {}
    images = [p["image"] for p in parts if p["type"] == "image"]
    clips = [p for p in parts if p["type"] == "video"]
    if images:
        media["images"] = images
    if clips:
        media["videos"] = [p["video"] for p in clips]
        media["video_metadata"] = [
            VideoMetadata(
                total_num_frames=9, fps=2.0, frames_indices=[2 * t for t in p["timestamps"]]
            )
            for p in clips
        ]
    theirs = processor(text=text, return_tensors="pt", **media)
    ours = Processor(CONFIG, hf.load_processor(export)[0]).prompt(messages)
    assert theirs["input_ids"][0].tolist() == ours.tokens.tolist()
    for key, merge in (("pixel_values", 1), ("pixel_values_videos", 2)):
        rows = [i.patches for i in ours.items if i.merge == merge]
        assert bool(rows) == (key in theirs)
        if rows:
            pixels = (theirs[key].numpy() + 1) * 127.5
            assert np.allclose(pixels, np.concatenate(rows), rtol=0, atol=1e-4)
    if clips:
        kept = np.concatenate([i.keep for i in ours.items if i.merge == CONFIG.video_merge])
        assert 0 < kept.sum() < len(kept)
        assert np.array_equal(theirs["video_compression_mask"], kept)


def _copy_tokenizer(tmp_path, special=SPECIAL_TOKENS):
    byte_tokenizer(special).save(tmp_path)


def test_processor_files_of_released_models_in_the_original_layout(tmp_path):
    _copy_tokenizer(tmp_path, (*SPECIAL_TOKENS, "<image>"))
    half = [0.5, 0.5, 0.5]
    image = {"min_tokens": 16, "max_tokens": 16384, "patch_size": 14, "resample": 3}
    image |= {"image_mean": half, "image_std": half}
    processor = {"fps": 1, "max_frames": 128, "image_merge_size": 1, "video_merge_size": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(image))
    (tmp_path / "processor_config.json").write_text(json.dumps(processor))
    (tmp_path / "config.json").write_text(json.dumps({"use_token_compression": True}))
    tokenizer, config = hf.load_processor(tmp_path)
    assert config == ProcessorConfig(
        max_frames=128, image_token="<image>", video_token="<image>", compression=True
    )
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(image | {"image_mean": [0.4]}))
    with pytest.raises(ValueError, match="mean and std 0.5"):
        hf.load_processor(tmp_path)


def test_processor_files_of_transformers(tmp_path):
    _copy_tokenizer(tmp_path)
    half = [0.5, 0.5, 0.5]
    both = {"image_mean": half, "image_std": half, "patch_size": 14}
    image = both | {"min_pixels": 3136, "max_pixels": 3211264, "merge_size": 1}
    size = {"shortest_edge": 12544, "longest_edge": 12845056}
    video = both | {"size": size, "merge_size": 2, "max_frames": 180}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(image))
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(video))
    _, config = hf.load_processor(tmp_path)
    assert config == ProcessorConfig(resize="transformers", frame_sampling="transformers")


def test_files_that_are_broken_are_named(export, tmp_path):
    for file in export.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    processor = json.loads((tmp_path / "processor_config.json").read_text())
    processor["vlmjax"]["pach"] = 14
    (tmp_path / "processor_config.json").write_text(json.dumps(processor))
    with pytest.raises(ValueError, match=r"processor_config.json vlmjax.*unknown keys \['pach'\]"):
        hf.load_processor(tmp_path)
    for text, words in (("{", "config.json is no JSON"), ("[]", "config.json holds a list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            hf.read_config(tmp_path)


def test_export_needs_the_special_tokens_and_a_row_for_each_token(export, tmp_path):
    cfg, params = hf.read_config(export), hf.load_params(export)
    with pytest.raises(ValueError, match="no token '<|video_pad|>'"):
        hf.save_pretrained(tmp_path, cfg, params, byte_tokenizer(SPECIAL_TOKENS[:4]), CONFIG)
    many = byte_tokenizer((*SPECIAL_TOKENS, *(f"<{i}>" for i in range(9))))
    with pytest.raises(ValueError, match="272 tokens and the embedding 271 rows"):
        hf.save_pretrained(tmp_path, cfg, params, many, CONFIG)
    assert "<|video_pad|>" in CHAT_TEMPLATE and not list(tmp_path.iterdir())
