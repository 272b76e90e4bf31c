"""Where each system keeps its modules in a checkpoint: a `Layout` for each kind of checkpoint.

What the keys of a module are called is in `towers`, `connectors` and `decoders`; here is in front
of what they stand, and by which key a kind of checkpoint is told. Adding a system is adding its
rows. The letters are those of `specs`: transformers saved LLaVA as A before 4.52, as B up to 4.x
and saves it as C; "memory" is what its state_dict says; D is the repository of LLaVA.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import jax
from flax import nnx

from vlmjax.hf import connectors, towers
from vlmjax.hf.decoders import HEADS, KINDS, decoder_rows, written_kind
from vlmjax.hf.table import Row
from vlmjax.vlm import MODULES as CONNECTORS
from vlmjax.vlm import VLMConfig

MODULES = ("vision", "connector", "llm")


@dataclass(frozen=True)
class Layout:
    """How one kind of checkpoint names things.

    Attributes:
      prefixes: part -> what its keys start with; a part that is absent here is absent in the
        checkpoint.
      marker: a key that only this kind has (`LAYOUTS` is searched in order).
      tower: a key of `towers.TABLES`.
      connector: a key of `connectors.LAYOUTS`.
      specials: learned vector of the connector -> its key.
      head: what the key of the decoder's head starts with.
      dropped: regexes of keys that belong to the checkpoint and not to our model, beside what
        `towers.unused` and `UNUSED` know.
    """

    prefixes: dict[str, str]
    marker: str
    tower: str = "siglip"
    connector: str = ""
    specials: dict[str, str] = field(default_factory=dict)
    head: str = ""
    dropped: tuple[str, ...] = ()

    @property
    def heads(self) -> tuple[str, ...]:
        """Keys that an untied head may have."""
        return tuple(self.head + key for key in HEADS)

    def owner(self, key: str) -> str | None:
        """The part a key belongs to: the longest prefix wins, heads belong to the decoder."""
        if key in self.heads:
            return "llm" if "llm" in self.prefixes else None
        if key in self.specials.values():
            return "connector"
        fits = [(len(p), part) for part, p in self.prefixes.items() if key.startswith(p)]
        return max(fits)[1] if fits else None

    def unused(self, key: str, cfg: VLMConfig, modules: Iterable[str]) -> bool:
        """Whether a key is known and no module that is loaded needs it."""
        if re.fullmatch("|".join(self.dropped) or r"(?!)", key):
            return True
        owner = self.owner(key)
        if owner not in self.prefixes:
            return False
        rest = key.removeprefix(self.prefixes[owner])
        if owner == "llm":
            return bool(re.fullmatch(UNUSED, rest))
        seen = [cfg.encoders[m] for m in modules if part_of(m) == owner == "vision"]
        return any(towers.unused(tower, self.tower, rest) for tower in seen)


# Constants that old checkpoints of decoders store.
UNUSED = r"layers\.\d+\.(self_attn|attention)\.rotary_emb\.inv_freq"
PATCH, EMBED = "embeddings.patch_embedding.weight", "embed_tokens.weight"
PATCHES = "embeddings.patch_embeddings.projection.weight"


def _llava(prefix: str, text: str, tower: str, head: str) -> Layout:
    """A layout of transformers, for the classes whose tower is CLIP or SigLIP."""
    return Layout(
        {
            "vision": f"{prefix}{tower}",
            "connector": f"{prefix}multi_modal_projector.",
            "llm": f"{prefix}{text}",
        },
        marker=f"{prefix}{tower}{PATCH}",
        connector="llava",
        specials={"newline": f"{prefix}image_newline"},
        head=head,
    )


def _internvl(prefix: str, text: str, head: str) -> Layout:
    """A layout of transformers."""
    parts = {"vision": "vision_tower.", "connector": "multi_modal_projector.", "llm": text}
    return Layout(
        {part: prefix + key for part, key in parts.items()},
        marker=f"{prefix}vision_tower.{PATCHES}",
        tower="internvit_transformers",
        connector="internvl_transformers",
        head=head,
    )


_BEFORE, _AFTER = "language_model.model.", "language_model."
_LEGACY = "vision_tower.vision_model."
# What a bare SigLIP or CLIP holds that a tower with 2-D RoPE, or no text, does not use.
_POOLING = (r"embeddings\.position_embedding\.weight", r"embeddings\.position_ids", r"head\..*")
_TEXT = (r"text_model\..*", "logit_scale", "logit_bias", r"(text|visual)_projection\.weight")
LAYOUTS = {
    "llava A": _llava("", _BEFORE, _LEGACY, "language_model."),
    "llava B": _llava("model.", _AFTER, _LEGACY, ""),
    "llava D": Layout(
        {
            "vision": f"model.vision_tower.{_LEGACY}",
            "connector": "model.mm_projector.",
            "llm": "model.",
        },
        marker=f"model.vision_tower.{_LEGACY}{PATCH}",
        connector="llava_original",
        specials={"newline": "model.image_newline"},
    ),
    "llava C": _llava("", _BEFORE, "vision_tower.", "language_model."),
    "llava memory": _llava("model.", _AFTER, "vision_tower.", ""),
    "internvl A": _internvl("", _BEFORE, "language_model."),  # and C
    "internvl B": _internvl("model.", _AFTER, ""),  # and memory
    "internvl D": Layout(  # OpenGVLab
        {"vision": "vision_model.", "connector": "mlp1.", "llm": _BEFORE},
        marker="vision_model.encoder.layers.0.attn.qkv.weight",
        tower="internvit",
        connector="internvl",
        head="language_model.",
    ),
    "videollama3": Layout(  # transformers
        {
            "vision": "model.vision_model.",
            "connector": "model.projector.",
            "llm": "model.language_model.",
        },
        marker=f"model.vision_model.{PATCH}",
        connector="videollama3",
    ),
    "videollama3 train": Layout(  # as its training code saves it
        {
            "vision": "model.vision_encoder.vision_encoder.",
            "connector": "model.mm_projector.",
            "llm": "model.",
        },
        marker=f"model.vision_encoder.vision_encoder.{PATCH}",
        connector="videollama3",
    ),
    "videollama3 hub": Layout(  # trust_remote_code
        {"vision": "model.vision_encoder.", "connector": "model.mm_projector.", "llm": "model."},
        marker=f"model.vision_encoder.{PATCH}",
        connector="videollama3",
    ),
    "tower": Layout(  # SigLIP, CLIP
        {"vision": "vision_model."},
        marker=f"vision_model.{PATCH}",
        dropped=(*(rf"vision_model\.{p}" for p in _POOLING), *_TEXT),
    ),
    "tower_5": Layout(  # the vision models of both as transformers 5 saves them
        {"vision": ""}, marker="embeddings.position_embedding.weight", dropped=_POOLING
    ),
    "tower_navit": Layout({"vision": ""}, marker=PATCH),
    "internvit": Layout(
        {"vision": ""}, marker="encoder.layers.0.attn.qkv.weight", tower="internvit"
    ),
    "decoder": Layout({"llm": "model."}, marker=f"model.{EMBED}"),
    "internlm2": Layout({"llm": "model."}, marker="model.tok_embeddings.weight"),
}


def part_of(module: str) -> str:
    """vision, connector or llm; further encoders (vision_2, ...) are vision, too."""
    return "vision" if module.startswith("vision") else module


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
    where, made = LAYOUTS[layout], []
    for module in modules:
        prefix = where.prefixes[part_of(module)]
        if module == "llm":
            kind = kind or written_kind(cfg.llm)
            made += decoder_rows(cfg.llm, kind, prefix, where.head + KINDS[kind].head)
        elif module == "connector":
            specials = where.specials.items()
            extra = [(f"specials/{name}/embedding", key, "D -> D") for name, key in specials]
            made += connectors.rows(_connector(cfg), where.connector, prefix, extra=extra)
        else:
            made += towers.rows(cfg.encoders[module], where.tower, prefix, module)
    return made


def _connector(cfg: VLMConfig) -> nnx.Module:
    """The connector without arrays."""
    encoders, make = list(cfg.encoders.values()), CONNECTORS[type(cfg.connector)]
    widths = tuple(encoders[e].out_width for e in cfg.form.encoders)
    return jax.eval_shape(lambda: make(cfg.connector, widths, cfg.llm.width, rngs=nnx.Rngs(0)))
