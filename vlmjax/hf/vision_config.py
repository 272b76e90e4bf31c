"""config.json of vision towers to our configuration, and ours to that of transformers.

Settings that would change the function and that the tower does not have are refused, never ignored.
"""

from pathlib import Path

from vlmjax.hf.llm_config import need, rope_theta
from vlmjax.vision.pixels import CLIP, HALF, IMAGENET
from vlmjax.vision.vit import ViTConfig

# What transformers fills in where a config.json is silent (it leaves out values equal to the
# defaults of the class); of intern_vit_6b the original code.
_ALL = {"num_channels": 3, "attention_dropout": 0.0}
_SIGLIP = _ALL | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
_INTERNVL = _ALL | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 448,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "norm_type": "layer_norm",
    "attention_bias": False,
    "use_qk_norm": False,
    "layer_scale_init_value": 0.1,
    "use_mean_pooling": True,
    "use_absolute_position_embeddings": True,
    "hidden_dropout_prob": 0.0,
    "projection_dropout": 0.0,
}
VISION_DEFAULTS = {
    "video_llama_3_vision": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "clip_vision_model": _SIGLIP
    | {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "internvl_vision": _INTERNVL,
    "intern_vit_6b": _INTERNVL
    | {
        "hidden_size": 3200,
        "intermediate_size": 12800,
        "num_hidden_layers": 48,
        "num_attention_heads": 25,
        "image_size": 224,
        "norm_type": "rms_norm",
        "qkv_bias": False,
        "qk_normalization": True,
    },
}
SILENT = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "quick_gelu": "quick_gelu"}
NORMS = {"layer_norm": "layer", "rms_norm": "rms"}
PIXELS = {"clip_vision_model": CLIP, "internvl_vision": IMAGENET, "intern_vit_6b": IMAGENET}


def settings(section: dict) -> dict:
    """A vision section with the defaults of its class filled in; its image_size is a number."""
    kind = SILENT.get(section["model_type"], section["model_type"])
    c = VISION_DEFAULTS[kind] | section | {"model_type": kind}
    for name in ("image_size", "patch_size"):
        if not isinstance(c.get(name, 0), int) and len(set(c[name])) == 1:
            c[name] = c[name][0]
    return c


def read_vision(
    section: dict, file: Path, layer: int | None = None, pixels: dict | None = None
) -> ViTConfig:
    """The configuration of a tower from its section of a config.json.

    Args:
      section: with its model_type.
      layer: which of the hidden states is used, as transformers counts them; None = what leaves
        the tower.
      pixels: `mean` and `std` where the pixels of the whole model are not those of the tower.
    """
    if SILENT.get(section["model_type"], section["model_type"]) not in VISION_DEFAULTS:
        need(section, file, "model_type", " or ".join(VISION_DEFAULTS))
    c = settings(section)
    kind = c["model_type"]
    acts = {k: v for k, v in ACTIVATIONS.items() if kind in PIXELS or k != "quick_gelu"}
    if c["hidden_act"] not in acts:
        need(c, file, "hidden_act", " or ".join(acts))
    need(c, file, "num_channels", 3)
    need(c, file, "attention_dropout", 0)
    if not isinstance(c["patch_size"], int):
        raise ValueError(
            f"{file} has patch_size {c['patch_size']}; patches are square; use another checkpoint"
        )
    sizes = dict(
        width=c["hidden_size"],
        mlp=c["intermediate_size"],
        layers=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        patch=c["patch_size"],
        act=acts[c["hidden_act"]],
        eps=c["layer_norm_eps"],
        **(pixels or PIXELS.get(kind, HALF)),
    )
    if kind == "video_llama_3_vision":
        return ViTConfig(**sizes, rope_theta=rope_theta(c, file, kinds=("axial", "default")))
    if not isinstance(c["image_size"], int):
        raise ValueError(
            f"{file} has image_size {c['image_size']}; position tables are square; use another "
            "checkpoint"
        )
    sizes |= dict(position="table", side=c["image_size"] // c["patch_size"])
    if kind in ("internvl_vision", "intern_vit_6b"):
        sizes |= _internvit(c, file, kind)
    elif kind == "clip_vision_model":
        sizes |= dict(patch_bias=False, embed_norm=True, prefix=1)
    return ViTConfig(**sizes, features=_features(c, file, layer))


def _internvit(c: dict, file: Path, kind: str) -> dict:
    """The fields of a ViT that only these towers have."""
    for name in ("hidden_dropout_prob", "projection_dropout"):
        need(c, file, name, 0)
    need(c, file, "use_absolute_position_embeddings", True)
    if c["norm_type"] not in NORMS:
        need(c, file, "norm_type", " or ".join(NORMS))
    own = ("qkv_bias", "qk_normalization")
    bias, qk_norm = (
        c[name] for name in (own if kind == "intern_vit_6b" else ("attention_bias", "use_qk_norm"))
    )
    if qk_norm:
        need(c, file, "layer_norm_eps", 1e-6)  # a constant in the norms of queries and keys
    ends = not c["use_mean_pooling"]
    if ends:
        need(c, file, "norm_type", "layer_norm")  # the norm behind the blocks is no other
    return dict(
        norm=NORMS[c["norm_type"]],
        qkv_bias=bias,
        qk_norm=qk_norm,
        layer_scale=c["layer_scale_init_value"],
        final_norm=ends,
        prefix=1,
    )


def _features(c: dict, file: Path, layer: int | None) -> str:
    """`ViTConfig.features` of one of the num_hidden_layers + 1 hidden states."""
    layers = c["num_hidden_layers"]
    if layer is None:
        return "last"
    if isinstance(layer, (list, tuple)) and len(layer) == 1:
        (layer,) = layer
    if isinstance(layer, int):
        layer = layer - layers - 1 if layer >= 0 else layer
        if -layers <= layer < 0:
            return str(layer)
    raise ValueError(
        f"{file} takes the features of layer {layer} of {layers} layers; supported is what leaves "
        f"one block, -{layers} to -1; use a checkpoint with one"
    )


def make_vision(cfg: ViTConfig, image_size: int) -> dict:
    """The section of a config.json that describes the blocks that are built, for transformers.

    Whether it says all of `cfg` is for the caller to see, by `read_vision`.
    """
    made = {
        "hidden_size": cfg.width,
        "intermediate_size": cfg.mlp,
        "num_hidden_layers": cfg.blocks,
        "num_attention_heads": cfg.heads,
        "num_channels": 3,
        "patch_size": cfg.patch,
        "image_size": image_size,
        "hidden_act": {ours: theirs for theirs, ours in ACTIVATIONS.items()}.get(cfg.act, cfg.act),
        "layer_norm_eps": cfg.eps,
        "attention_dropout": 0.0,
    }
    if cfg.layer_scale:
        return made | {
            "model_type": "internvl_vision",
            "norm_type": {ours: theirs for theirs, ours in NORMS.items()}[cfg.norm],
            "attention_bias": cfg.qkv_bias,
            "use_qk_norm": cfg.qk_norm,
            "layer_scale_init_value": cfg.layer_scale,
            "use_mean_pooling": not (cfg.final_norm and cfg.features == "last"),
            "use_absolute_position_embeddings": True,
        }
    if cfg.prefix:
        return made | {"model_type": "clip_vision_model"}
    return made | {"model_type": "siglip_vision_model", "vision_use_head": False}
