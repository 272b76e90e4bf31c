"""Tokenizer and preprocessing settings from and to checkpoint directories."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from vlmjax.data.derive import OWN, choose_template
from vlmjax.data.processor import ProcessorConfig
from vlmjax.data.templates import TEMPLATES
from vlmjax.data.tokenizer import Tokenizer
from vlmjax.hf import internvl, llava, llava_original, originals, remote
from vlmjax.hf.chat_template import find_template, make_chat_template
from vlmjax.hf.config import CONFIG, read_config, system_of
from vlmjax.hf.pixels import IMAGE, PROCESSOR, VIDEO, read_json, read_sections

IMAGE_TOKEN, VIDEO_TOKEN = (
    "<|image_pad|>",
    "<|video_pad|>",
)  # fixed in transformers' VideoLlama3Processor
TEMPLATE = "chat_template.jinja"
# Template of conversations where the checkpoint does not show one that we have.
DEFAULT_TEMPLATES = {
    "llava": "vicuna",
    "llava_llama": "vicuna",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen",
    "llava_next": "vicuna",
    "llava_next_video": "vicuna",
    "llava_onevision": "qwen",
    "internvl": "chatml",
}
# What OpenGVLab calls the templates of its models.
ORIGINAL_TEMPLATES = {
    "internlm2-chat": "internvl_internlm2",
    "Hermes-2": "internvl",
    "internvl2_5": "internvl_2_5",
    "phi3-chat": "internvl_phi3",
    "internvl_zh": "internvl_zh",
}
# Models with `picture` show so many frames of a video, unless told otherwise.
MAX_FRAMES = 32
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
    _write_sections(directory, image, video, name | {OURS: ours}, name)


def write_picture_processor(
    directory,
    tokenizer: Tokenizer,
    config: ProcessorConfig,
    sections: tuple[dict, dict],
    processor: dict,
    named: Mapping[str, str],
):
    """The same for models that are shown views of a picture.

    Args:
      sections: of images and of videos; {} without videos.
      processor: what the processor class of transformers takes, its name included.
      named: tokens that this class asks the tokenizer for, by the name of the attribute.
    """
    directory = Path(directory)
    name = {"processor_class": processor["processor_class"]}
    more = dict(named and {"extra_special_tokens": dict(named), **named})
    write_tokenizer(directory, tokenizer, name | more)
    tokens = config.image_token, named.get("video_token", config.video_token)
    template = make_chat_template(choose_template(config, tokenizer), *tokens)
    (directory / TEMPLATE).write_text(template)
    _write_sections(directory, *sections, processor | {OURS: dataclasses.asdict(config)}, name)


def _write_sections(directory: Path, image: dict, video: dict, processor: dict, name: dict):
    sections = {"image_processor": image}
    _write(directory / IMAGE, image | name)
    if video:
        sections["video_processor"] = video
        _write(directory / VIDEO, video | name)
    _write(directory / PROCESSOR, sections | processor)


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


def load_processor(directory, template: str | None = None) -> tuple[Tokenizer, ProcessorConfig]:
    """Tokenizer and settings of our exports and of every kind of checkpoint that `hf` reads.

    Args:
      directory: with the processor files beside the weights.
      template: of conversations, a key of `data.templates.TEMPLATES`. When absent: that of our
        export, the one whose text the chat template of the checkpoint renders, or the usual one of
        its model_type (`DEFAULT_TEMPLATES`).
    """
    directory = Path(directory)
    if remote.is_remote(directory):
        return load_remote(directory)
    processor, raw = read_json(directory / PROCESSOR), read_json(directory / CONFIG)
    tokenizer = Tokenizer(originals.tokenizer_directory(directory, raw))
    if OURS in processor:
        config = ProcessorConfig(**_frozen(processor[OURS]))
        return tokenizer, dataclasses.replace(config, template=template or config.template)
    if originals.find(raw):
        made = directory / CONFIG, read_config(directory), tokenizer, template
        return tokenizer, originals.processor(raw, *made)
    sections = read_sections(directory)
    system = system_of(raw)
    if not sections[0] and system not in (llava_original, internvl):
        raise ValueError(
            f"{directory} has no {PROCESSOR} with an image_processor and no {IMAGE}; one of them "
            "says how pixels are prepared; "
            "copy it beside the weights"
        )
    if system:
        return tokenizer, _pictures(directory, tokenizer, raw, sections, template)
    if template is not None:
        raise ValueError(
            f"template={template!r} is given for {directory}, a VideoLLaMA3, which has one "
            "template; leave it out"
        )
    image, video = sections
    _need_half(image, directory)
    if "max_tokens" in image:
        return tokenizer, _original(directory, tokenizer, image, processor)
    return tokenizer, _transformers(image, video)


def _frozen(value):
    """Lists as tuples, as settings are written in Python."""
    if isinstance(value, dict):
        return {k: _frozen(v) for k, v in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _pictures(directory: Path, tokenizer, raw, sections, template) -> ProcessorConfig:
    """Settings of a model that is shown views of a picture."""
    system, cfg = system_of(raw), read_config(directory)
    images, videos = _placeholders(system, tokenizer, raw)
    return ProcessorConfig(
        patch=cfg.vision.patch,
        image_token=images,
        video_token=videos,
        max_frames=MAX_FRAMES,
        template=template or _template(directory, tokenizer, raw, images),
        picture=system.picture(raw, directory / CONFIG, sections, cfg.vision),
    )


def _template(directory: Path, tokenizer: Tokenizer, raw: dict, image: str) -> str:
    """The template of conversations that a checkpoint shows."""
    kind, named = raw["model_type"], raw.get("template")
    if kind == internvl.ORIGINAL:  # its own code reads no chat template
        if named not in ORIGINAL_TEMPLATES:
            raise ValueError(
                f"{directory} has the template {named!r}; known here are "
                f"{sorted(ORIGINAL_TEMPLATES)}; give template, one of {sorted(TEMPLATES)}"
            )
        return ORIGINAL_TEMPLATES[named]
    jinja = read_json(directory / "chat_template.json").get("chat_template")
    if not (jinja or tokenizer.hf.chat_template):
        return DEFAULT_TEMPLATES[kind]
    found = find_template(tokenizer, image, jinja)
    if found is None:
        if jinja:
            tokenizer.hf.chat_template = jinja
        try:
            choose_template(ProcessorConfig(image_token=image, template=OWN), tokenizer)
        except ValueError as error:
            raise ValueError(
                f"{directory} has a chat template that is none of ours, and {error}; give "
                f"template, one of {sorted(TEMPLATES)}"
            ) from error
    return found or OWN


def load_remote(directory: Path) -> tuple[Tokenizer, ProcessorConfig]:
    """Tokenizer and settings of a directory in our own layout, none of whose code is run."""
    from transformers import AutoTokenizer, PreTrainedConfig

    how = dict(config=PreTrainedConfig(), trust_remote_code=False, local_files_only=True)
    tokenizer = Tokenizer(AutoTokenizer.from_pretrained(str(directory), **how))
    return tokenizer, ProcessorConfig(**remote.frozen(read_json(directory / PROCESSOR)[OURS]))


def _placeholders(system, tokenizer: Tokenizer, raw: dict) -> tuple[str, str]:
    """The tokens that stand where images and videos are; any will do, the model never sees them."""
    if system is internvl:
        if not tokenizer.has(internvl.CONTEXT):
            raise ValueError(
                f"the tokenizer has no {internvl.CONTEXT}; it stands where images are; use the "
                "tokenizer of the released model"
            )
        return internvl.CONTEXT, internvl.CONTEXT
    ids = llava.placeholders(raw) if system is llava else {}
    found = {name: tokenizer.hf.convert_ids_to_tokens(i) for name, i in ids.items()}
    unknown = tokenizer.hf.unk_token or tokenizer.hf.pad_token or tokenizer.hf.eos_token
    for name, usual in (("image_token", "<image>"), ("video_token", "<video>")):
        if found.get(name) is None:
            found[name] = usual if tokenizer.has(usual) else found.get("image_token") or unknown
    return found["image_token"], found["video_token"]


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
        compression=bool(read_json(directory / "config.json").get("use_token_compression", False)),
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


def _write(file: Path, content: dict):
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
