"""Where each parameter of VideoLLaMA3 lies in a checkpoint: tables in the form of `table.py`.

Paths and keys are relative to a module; `LAYOUTS` says under which prefix each kind of checkpoint
keeps each module, and what a kind holds that we do not use.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from vlmjax.hf.decoders import HEADS, ROTARY, decoder_rows, written_kind
from vlmjax.hf.table import Row, make_rows
from vlmjax.vlm import VLMConfig

VISION = (
    ("patch/kernel", "embeddings.patch_embedding.weight", "D C p q -> (C p q) D"),
    ("patch/bias", "embeddings.patch_embedding.bias", "D -> D"),
    ("blocks/attn_norm/scale", "encoder.layers.{}.layer_norm1.weight", "D -> D"),
    ("blocks/attn_norm/bias", "encoder.layers.{}.layer_norm1.bias", "D -> D"),
    ("blocks/attn/q/kernel", "encoder.layers.{}.self_attn.q_proj.weight", "(N H) D -> D N H"),
    ("blocks/attn/q/bias", "encoder.layers.{}.self_attn.q_proj.bias", "(N H) -> N H"),
    ("blocks/attn/k/kernel", "encoder.layers.{}.self_attn.k_proj.weight", "(N H) D -> D N H"),
    ("blocks/attn/k/bias", "encoder.layers.{}.self_attn.k_proj.bias", "(N H) -> N H"),
    ("blocks/attn/v/kernel", "encoder.layers.{}.self_attn.v_proj.weight", "(N H) D -> D N H"),
    ("blocks/attn/v/bias", "encoder.layers.{}.self_attn.v_proj.bias", "(N H) -> N H"),
    ("blocks/attn/o/kernel", "encoder.layers.{}.self_attn.out_proj.weight", "D (N H) -> N H D"),
    ("blocks/attn/o/bias", "encoder.layers.{}.self_attn.out_proj.bias", "D -> D"),
    ("blocks/mlp_norm/scale", "encoder.layers.{}.layer_norm2.weight", "D -> D"),
    ("blocks/mlp_norm/bias", "encoder.layers.{}.layer_norm2.bias", "D -> D"),
    ("blocks/mlp/up/kernel", "encoder.layers.{}.mlp.fc1.weight", "M D -> D M"),
    ("blocks/mlp/up/bias", "encoder.layers.{}.mlp.fc1.bias", "M -> M"),
    ("blocks/mlp/down/kernel", "encoder.layers.{}.mlp.fc2.weight", "D M -> M D"),
    ("blocks/mlp/down/bias", "encoder.layers.{}.mlp.fc2.bias", "D -> D"),
    ("norm/scale", "post_layernorm.weight", "D -> D"),
    ("norm/bias", "post_layernorm.bias", "D -> D"),
)
CONNECTOR = (  # readout.1 is the GELU
    ("dense_0/kernel", "readout.0.weight", "D I -> I D"),
    ("dense_0/bias", "readout.0.bias", "D -> D"),
    ("dense_1/kernel", "readout.2.weight", "D E -> E D"),
    ("dense_1/bias", "readout.2.bias", "D -> D"),
)
MODULES = ("vision", "connector", "llm")


@dataclass(frozen=True)
class Layout:
    """How one kind of checkpoint names things.

    Attributes:
      prefixes: module -> what its keys start with; a module that is absent here is absent in the
      checkpoint.
      marker: a key that only this kind has (`LAYOUTS` is searched in order).
      dropped: regexes of keys that belong to the checkpoint and not to our model.
    """

    prefixes: dict[str, str]
    marker: str
    dropped: tuple[str, ...] = ()

    def owner(self, key: str) -> str | None:
        """The module a key belongs to: the longest prefix wins, heads belong to the decoder."""
        if key in HEADS:
            return "llm" if "llm" in self.prefixes else None
        fits = [(len(p), m) for m, p in self.prefixes.items() if key.startswith(p)]
        return max(fits)[1] if fits else None


# The position table goes because 2-D RoPE replaces it, the pooling head and the text tower because
# nothing here uses them.
POOLING = (r"embeddings\.position_embedding\.weight", r"embeddings\.position_ids", r"head\..*")
PATCH, EMBED = "embeddings.patch_embedding.weight", "embed_tokens.weight"
LAYOUTS = {
    "transformers": Layout(
        {
            "vision": "model.vision_model.",
            "connector": "model.projector.",
            "llm": "model.language_model.",
        },
        marker=f"model.language_model.{EMBED}",
    ),
    "train": Layout(  # as the training code of VideoLLaMA3 saves it
        {
            "vision": "model.vision_encoder.vision_encoder.",
            "connector": "model.mm_projector.",
            "llm": "model.",
        },
        marker=f"model.vision_encoder.vision_encoder.{PATCH}",
    ),
    "hub": Layout(  # trust_remote_code
        {"vision": "model.vision_encoder.", "connector": "model.mm_projector.", "llm": "model."},
        marker=f"model.vision_encoder.{PATCH}",
    ),
    "siglip": Layout(
        {"vision": "vision_model."},
        marker=f"vision_model.{PATCH}",
        dropped=(
            *(rf"vision_model\.{p}" for p in POOLING),
            r"text_model\..*",
            "logit_scale",
            "logit_bias",
        ),
    ),
    "siglip_5": Layout(  # SiglipVisionModel as transformers 5 saves it
        {"vision": ""}, marker="embeddings.position_embedding.weight", dropped=POOLING
    ),
    "siglip_navit": Layout({"vision": ""}, marker=PATCH),
    "decoder": Layout({"llm": "model."}, marker=f"model.{EMBED}", dropped=ROTARY),
    "internlm2": Layout({"llm": "model."}, marker="model.tok_embeddings.weight", dropped=ROTARY),
}


def find_layout(keys: Iterable[str]) -> str:
    """Name of the layout that a checkpoint with these keys has."""
    keys = set(keys)
    for name, layout in LAYOUTS.items():
        if layout.marker in keys:
            return name
    raise ValueError(
        f"unknown checkpoint layout with {len(keys)} keys such as {', '.join(sorted(keys)[:5])}; "
        "known layouts and the key each is "
        f"told by: {', '.join(f'{n} ({x.marker})' for n, x in LAYOUTS.items())}; convert the "
        "checkpoint to one of them"
    )


def rows(
    cfg: VLMConfig, layout: str, modules: Iterable[str] = MODULES, kind: str | None = None
) -> list[Row]:
    """The table for one configuration in one layout, decoder head included unless it is tied.

    Args:
      kind: of the decoder, of `decoders.KINDS`; what transformers writes when absent.
    """
    if "connector" in modules and cfg.connector.layers != 2:
        raise ValueError(
            f"the connector has {cfg.connector.layers} layers; the VideoLLaMA3 projector in "
            "checkpoints has exactly 2; "
            "set connector layers=2"
        )
    made = []
    for module in modules:
        prefix = LAYOUTS[layout].prefixes[module]
        if module == "llm":
            made += decoder_rows(cfg.llm, kind or written_kind(cfg.llm), prefix)
        elif module == "vision":
            layers = cfg.vision.layers
            made += make_rows(VISION, _vision_sizes(cfg), layers, "vision/", prefix)
        else:
            sizes = {"I": cfg.vision.width, "D": cfg.llm.width, "E": cfg.llm.width}
            made += make_rows(CONNECTOR, sizes, path="connector/", key=prefix)
    return made


def _vision_sizes(cfg: VLMConfig) -> dict[str, int]:
    v = cfg.vision
    return {
        "D": v.width,
        "M": v.mlp,
        "N": v.heads,
        "H": v.width // v.heads,
        "C": 3,
        "p": v.patch,
        "q": v.patch,
    }
