"""Systems that transformers has no class for, in the layouts of their own repositories: read only.

Each is a module with

    matches(raw)                 whether a config.json is of it
    read(raw, file)              the fields of a `VLMConfig`
    picture(raw, file, cfg)      the settings of a `data.picture.PictureConfig`
    template(raw, file, has)     the key in `data.templates.TEMPLATES` of its conversations
    PLACEHOLDERS                 tokens one of which stands where a picture is

and, where config.json does not hold the settings of the decoder in the words of transformers,
text(raw, file) for these. Their keys are rows of `original_layouts`. Adding a system is adding a
module here.
"""

from pathlib import Path
from types import ModuleType

from vlmjax.data.processor import ProcessorConfig
from vlmjax.data.tokenizer import Tokenizer
from vlmjax.hf import cambrian, cogvlm, glm4v, minicpm_v, qihoo_360vl, vila
from vlmjax.vlm import VLMConfig

SYSTEMS = (qihoo_360vl, cambrian, cogvlm, glm4v, minicpm_v, vila)
NAMES = ("QH_360VL", "cambrian_llama", "CogVLMForCausalLM", "chatglm", "minicpmv", "VILA")
# So many frames of a video are shown unless config.json or the caller says otherwise.
MAX_FRAMES = 8


def find(raw: dict) -> ModuleType | None:
    """The system of a config.json, None if it is none of these."""
    return next((system for system in SYSTEMS if system.matches(raw)), None)


def max_position(raw: dict, file: Path) -> int | None:
    """The longest sequence that a decoder was made for, None if its config says nothing."""
    system = find(raw)
    text = system.text(raw, file) if hasattr(system, "text") else raw
    return text.get("max_position_embeddings")


def tower_names(raw: dict) -> dict[str, str]:
    """Module -> the name of its tower, where a config.json names towers."""
    towers = raw.get(cambrian.TOWERS) or [raw.get("mm_vision_tower")]
    names = ("vision" if i == 0 else f"vision_{i + 1}" for i in range(len(towers)))
    return {module: name for module, name in zip(names, towers, strict=True) if name}


def tokenizer_directory(directory: Path, raw: dict) -> Path:
    """Where the tokenizer of a checkpoint is."""
    return directory / "llm" if find(raw) is vila else directory


def processor(
    raw: dict, file: Path, cfg: VLMConfig, tokenizer: Tokenizer, template: str | None
) -> ProcessorConfig:
    """The settings of the processor.

    Args:
      raw: config.json.
      file: it.
      cfg: what `read` makes of it.
      tokenizer: of the model.
      template: a key of `data.templates.TEMPLATES`; None = the usual one of the system (chat
        templates of these tokenizers are those of the decoder alone, which know no pictures).
    """
    system = find(raw)
    token = next((token for token in system.PLACEHOLDERS if tokenizer.has(token)), None)
    if token is None:
        raise ValueError(
            f"the tokenizer of {file.parent} has none of {', '.join(system.PLACEHOLDERS)}; one of "
            "them stands where pictures are; use the tokenizer of the released model"
        )
    return ProcessorConfig(
        patch=next(iter(cfg.encoders.values())).patch,
        image_token=token,
        video_token=token,
        max_frames=raw.get("num_video_frames") or MAX_FRAMES,
        template=template or system.template(raw, file, tokenizer.has),
        picture=system.picture(raw, file, cfg),
    )
