"""360VL in the layout of its repository (360CVGroup/360VL): config.json, read only."""

from pathlib import Path

from vlmjax.connectors.c_abstractor import CAbstractorConfig
from vlmjax.hf.llava_original import TOWERS
from vlmjax.hf.llm_config import need, read_llm
from vlmjax.hf.pixels import mean_colour
from vlmjax.hf.vision_config import read_vision
from vlmjax.vlm import VLMConfig

KIND = "QH_360VL"
PLACEHOLDERS = ("<|reserved_special_token_44|>",)
ABSTRACTOR = "visual_projector_config"
_SILENT = {"prenorm": False, "num_eos_tokens": 1, "pos_emb": False}


def matches(raw: dict) -> bool:
    """Whether a config.json is of this system."""
    return raw.get("model_type") == KIND


def _tower(raw: dict, file: Path) -> dict:
    if raw.get("mm_vision_tower") not in TOWERS:
        need(raw, file, "mm_vision_tower", " or ".join(TOWERS))
    return TOWERS[raw["mm_vision_tower"]]


def read(raw: dict, file: Path) -> dict:
    """The fields of a `VLMConfig`."""
    need(raw, file, "mm_projector_type", "c-abs")
    need(raw, file, "proj_2", True)  # one abstractor for the map of the tiles, one for the whole
    need(raw, file, "mm_vision_select_feature", "patch")
    vision = read_vision(_tower(raw, file), file, raw.get("mm_vision_select_layer", -2))
    need(raw, file, "mm_num_tokens", vision.side**2 + 1)
    if not isinstance(raw.get(ABSTRACTOR), dict):
        raise ValueError(
            f"{file} has no {ABSTRACTOR}; sizes of the abstractors are read from there; copy the "
            f"content of {raw.get('mm_projector_config')} into that field"
        )
    c = _SILENT | raw[ABSTRACTOR]
    need(c, file, "pos_emb", True)
    if "encoder_hidden_size" in c:
        need(c, file, "encoder_hidden_size", vision.width)
    connector = CAbstractorConfig(
        queries=c["num_queries"],
        width=c["hidden_size"],
        depth=c["depth"],
        layers=c["mlp_depth"],
        side=vision.side,
        eos=c["num_eos_tokens"],
        norm="layer" if c["prenorm"] else "none",
        copies=("ctt", "ori"),
    )
    return dict(
        vision=vision,
        connector=connector,
        llm=read_llm({"tie_word_embeddings": False} | raw | {"model_type": "llama"}, file),
        sources=(0, 0),
    )


def picture(raw: dict, file: Path, cfg: VLMConfig) -> dict:
    """The settings of a `data.picture.PictureConfig`."""
    side = _tower(raw, file)["image_size"]
    pad = "square" if raw.get("image_aspect_ratio") == "pad" else "none"
    view = dict(name="grid2x2", side=side, whole="canvas", pad=pad)
    return dict(
        strategy=(view | {"fill": mean_colour(cfg.vision.mean)},),
        stitch="tiles",
    )


def template(raw: dict, file: Path, has) -> str:
    """The template of its conversations; the long system message of its demo is not in it."""
    return "llama3"
