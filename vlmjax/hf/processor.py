"""Tokenizer and preprocessing settings from and to checkpoint directories."""

import dataclasses
import json
from pathlib import Path

from vlmjax.data.processor import ProcessorConfig
from vlmjax.data.tokenizer import Tokenizer
from vlmjax.hf import remote

IMAGE_TOKEN, VIDEO_TOKEN = (
    "<|image_pad|>",
    "<|video_pad|>",
)  # fixed in transformers' VideoLlama3Processor
PROCESSOR, IMAGE, VIDEO = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
TEMPLATE = "chat_template.jinja"
# Section of processor_config.json with every field of ours; transformers passes over it.
OURS = "vlmjax"

# Renders what data/chat.py renders, with one placeholder for each image and each video:
# VideoLlama3Processor repeats them and writes the `Time 0.0s:` of video frames. An image with a
# time is a frame of a stream.
CHAT_TEMPLATE = r"""
{%- for message in messages %}
    {%- if message['role'] == 'stream' %}
        {{- '<|stream_start|>stream\n' }}
    {%- else %}
        {{- '<|im_start|>' + message['role'] + '\n' }}
    {%- endif %}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'text' %}
                {{- part['text'] }}
            {%- elif part['type'] == 'image' %}
                {%- if part['time'] is defined and part['time'] is not none %}
                    {{- 'Time %.1fs: ' % part['time'] }}
                {%- endif %}
                {{- '<|image_pad|>\n' }}
            {%- elif part['type'] == 'video' %}
                {{- '<|video_pad|>\n' }}
            {%- else %}
                {{- raise_exception('a part is text, image or video, not ' + part['type']) }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {%- if message['role'] == 'stream' %}
        {{- '<|stream_end|>\n' }}
    {%- else %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""".lstrip("\n")


def write_processor(directory, tokenizer: Tokenizer, config: ProcessorConfig):
    """Writes tokenizer, chat template and processor files.

    transformers 5 reads processor_config.json, transformers 4 the other two.
    """
    directory = Path(directory)
    name = {"processor_class": "VideoLlama3Processor"}
    write_tokenizer(directory, tokenizer, name)
    (directory / TEMPLATE).write_text(CHAT_TEMPLATE)
    image = _pixels(config, config.image_merge) | {
        "image_processor_type": "VideoLlama3ImageProcessor"
    }
    video = _pixels(config, config.video_merge) | {
        "video_processor_type": "VideoLlama3VideoProcessor",
        "max_frames": config.max_frames,
        "do_sample_frames": False,
        "use_token_compression": config.compression,
    }
    ours = dataclasses.asdict(config) | {"image_token": IMAGE_TOKEN, "video_token": VIDEO_TOKEN}
    _write(directory / IMAGE, image | name)
    _write(directory / VIDEO, video | name)
    _write(
        directory / PROCESSOR,
        {"image_processor": image, "video_processor": video, OURS: ours} | name,
    )


def write_tokenizer(directory, tokenizer: Tokenizer, more: dict):
    """Writes the tokenizer's files, with more entries in tokenizer_config.json."""
    file = Path(directory) / "tokenizer_config.json"
    tokenizer.save(directory)
    config = json.loads(file.read_text())
    config.pop("auto_map", None)  # of a tokenizer that came with trust_remote_code
    if config["tokenizer_class"] == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # its name in transformers 4
    _write(file, config | more)


def _pixels(config: ProcessorConfig, merge: int) -> dict:
    area = (config.patch * merge) ** 2
    return {
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
        "patch_size": config.patch,
        "temporal_patch_size": 1,
        "merge_size": merge,
        "size": {
            "shortest_edge": config.min_visual_tokens * area,
            "longest_edge": config.max_visual_tokens * area,
        },
    }


def load_processor(directory) -> tuple[Tokenizer, ProcessorConfig]:
    """Tokenizer and settings of our exports, and of both kinds of released VideoLLaMA3."""
    directory = Path(directory)
    if remote.is_remote(directory):
        return load_remote(directory)
    tokenizer = Tokenizer(directory)
    processor = _read(directory / PROCESSOR)
    if OURS in processor:
        return tokenizer, ProcessorConfig(**processor[OURS])
    image = processor.get("image_processor") or _read(directory / IMAGE)
    if not image:
        raise ValueError(
            f"{directory} has no {PROCESSOR} with an image_processor and no {IMAGE}; one of them "
            "says how pixels are prepared; "
            "copy it beside the weights"
        )
    _need_half(image, directory)
    if "max_tokens" in image:
        return tokenizer, _original(directory, tokenizer, image, processor)
    return tokenizer, _transformers(
        image, processor.get("video_processor") or _read(directory / VIDEO)
    )


def load_remote(directory: Path) -> tuple[Tokenizer, ProcessorConfig]:
    """Tokenizer and settings of a directory in our own layout, none of whose code is run."""
    from transformers import AutoTokenizer, PreTrainedConfig

    how = dict(config=PreTrainedConfig(), trust_remote_code=False, local_files_only=True)
    tokenizer = Tokenizer(AutoTokenizer.from_pretrained(str(directory), **how))
    return tokenizer, ProcessorConfig(**remote.frozen(_read(directory / PROCESSOR)[OURS]))


def _original(
    directory: Path, tokenizer: Tokenizer, image: dict, processor: dict
) -> ProcessorConfig:
    """Settings of the trust_remote_code layout."""
    own = "<image>" in tokenizer.hf.get_vocab()
    return ProcessorConfig(
        patch=image["patch_size"],
        image_merge=processor.get("image_merge_size", 1),
        video_merge=processor.get("video_merge_size", 2),
        max_visual_tokens=image["max_tokens"],
        min_visual_tokens=image.get("min_tokens", 16),
        image_token="<image>" if own else IMAGE_TOKEN,
        video_token="<image>" if own else VIDEO_TOKEN,
        fps=float(processor.get("fps") or 1.0),
        max_frames=processor.get("max_frames", 180),
        compression=bool(_read(directory / "config.json").get("use_token_compression", False)),
    )


def _transformers(image: dict, video: dict) -> ProcessorConfig:
    """Settings of a transformers directory that we did not write: its own resizing and sampling."""
    low, high = zip(_tokens(image, merge=1), _tokens(video or image, merge=2), strict=True)
    return ProcessorConfig(
        patch=image.get("patch_size", 14),
        image_merge=image.get("merge_size", 1),
        video_merge=video.get("merge_size", 2),
        max_visual_tokens=min(high),
        min_visual_tokens=max(low),
        max_frames=video.get("max_frames", 180),
        compression=video.get("use_token_compression", True),
        resize="transformers",
        frame_sampling="transformers",
    )


def _tokens(section: dict, merge: int) -> tuple[int, int]:
    """Fewest and most visual tokens that a transformers processor section allows."""
    size = section.get("size") or {}
    area = (section.get("patch_size", 14) * section.get("merge_size", merge)) ** 2
    low = (
        section.get("min_pixels")
        or size.get("shortest_edge")
        or size.get("min_pixels")
        or 16 * area
    )
    high = (
        section.get("max_pixels")
        or size.get("longest_edge")
        or size.get("max_pixels")
        or 16384 * area
    )
    return low // area, high // area


def _need_half(image: dict, directory: Path):
    for name in ("image_mean", "image_std"):
        if any(value != 0.5 for value in image.get(name) or [None]):
            raise ValueError(
                f"{directory} normalises pixels with {name}={image.get(name)}; the model is fed "
                "with mean and std 0.5; "
                "use the preprocessor_config.json of the released model"
            )


def _read(file: Path) -> dict:
    return json.loads(file.read_text()) if file.is_file() else {}


def _write(file: Path, content: dict):
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
