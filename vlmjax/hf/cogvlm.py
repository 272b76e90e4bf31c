"""CogVLM2 in the layout of its own code: config.json, read only.

CogVLM is another function (no convolution, other positions) and is refused.
"""

from pathlib import Path

from vlmjax.connectors.conv_glu import ConvGLUConfig
from vlmjax.hf.llm_config import need, read_llm
from vlmjax.hf.tower_config import eva2
from vlmjax.vlm import VLMConfig

CLASS = "CogVLMForCausalLM"
PLACEHOLDERS = ("<|reserved_special_token_0|>",)
# Defaults of the class, of which a config.json may be silent. CogVLM has none of this: its
# decoder begins texts with 1.
_LLAMA_3 = 128000
DEFAULTS = {"template_version": "chat", "tie_word_embeddings": False}
SHARED = dict(vectors=("boi", "eoi"), positions="shared")


def matches(raw: dict) -> bool:
    """Whether a config.json is of this system; it has no model_type."""
    return raw.get("model_type", "cogvlm") == "cogvlm" and CLASS in raw.get("architectures", ())


def read(raw: dict, file: Path) -> dict:
    """The fields of a `VLMConfig`."""
    c = DEFAULTS | raw | {"model_type": "cogvlm"}
    if c.get("bos_token_id") == _LLAMA_3:
        c = {"num_multi_query_heads": 8} | c
    return dict(
        vision=eva2(c["vision_config"], file),
        connector=ConvGLUConfig(hidden=c["intermediate_size"]),
        llm=read_llm(c, file),
    )


def picture(raw: dict, file: Path, cfg: VLMConfig) -> dict:
    """The settings of a `data.picture.PictureConfig`."""
    side = raw["vision_config"]["image_size"]
    return dict(strategy=(dict(name="square", side=side, mode="resize"),), format=SHARED)


def template(raw: dict, file: Path, has) -> str:
    """The template of its conversations."""
    need(DEFAULTS | raw, file, "template_version", "chat")
    return "cogvlm"
