"""Where each system keeps its modules in a checkpoint: a `Layout` for each kind of checkpoint.

What the keys of a module are called is in `towers`, `connectors` and `decoders`; here is in front
of what they stand, and by which key a kind of checkpoint is told. Adding a system is adding its
rows. The letters are those of `specs`: transformers saved LLaVA as A before 4.52, as B up to 4.x
and saves it as C; "memory" is what its state_dict says; D is the repository of LLaVA.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import jax
from flax import nnx

from vlmjax.connectors import module_of
from vlmjax.connectors.sva import SVABlock
from vlmjax.hf import connectors, towers
from vlmjax.hf.decoders import HEADS, KINDS, decoder_rows, written_kind
from vlmjax.hf.original_layouts import ORIGINALS, TOWERS
from vlmjax.hf.table import Row
from vlmjax.nn import flatten, stack, unbind
from vlmjax.vlm import VLMConfig

MODULES = ("vision", "connector", "llm")


@dataclass(frozen=True)
class Layout:
    """How one kind of checkpoint names things.

    Attributes:
      prefixes: part -> what its keys start with; a part that is absent here is absent in the
        checkpoint. With `{}` in that of vision, it counts the encoders from 0.
      owned: part -> beginnings of its keys, where it shares its prefix with another part.
      marker: a key that only this kind has (`LAYOUTS` is searched in order).
      tower: a key of `towers.TABLES`.
      towers: where the configuration tells the tower, {`towers.kind_of`: (a key of
        `towers.TABLES`, what follows the prefix)}.
      connector: a key of `connectors.LAYOUTS`.
      specials: learned vector of the connector -> its key.
      head: what the key of the decoder's head starts with.
      extra: prefix of the blocks of SVA between decoder layers; "" = there are none.
      elsewhere: whether frozen towers may be in directories of their own.
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
    owned: dict[str, tuple[str, ...]] = field(default_factory=dict)
    towers: dict[str, tuple[str, str]] = field(default_factory=dict)
    extra: str = ""
    elsewhere: bool = False

    @property
    def heads(self) -> tuple[str, ...]:
        """Keys that an untied head may have."""
        return tuple(self.head + key for key in HEADS)

    def table(self, tower) -> tuple[str, str]:
        """(key of `towers.TABLES`, what follows the prefix) of the config of a tower."""
        if not self.towers:
            return self.tower, ""
        kind = towers.kind_of(tower)
        if kind not in self.towers:
            raise ValueError(
                f"this layout has no names for a tower like {kind}; it has them for "
                f"{', '.join(self.towers)}; take one of these"
            )
        return self.towers[kind]

    def prefix(self, module: str, tower=None) -> str:
        """What the keys of a module start with; of an encoder by its config."""
        number = int(module.partition("_")[2] or 1) - 1 if part_of(module) == "vision" else 0
        prefix = self.prefixes[part_of(module)].format(number)
        return prefix if tower is None else prefix + self.table(tower)[1]

    def owner(self, key: str) -> str | None:
        """The part a key belongs to: the longest prefix wins, heads belong to the decoder.

        It is one encoder where the prefix counts them.
        """
        if key in self.heads:
            return "llm" if "llm" in self.prefixes else None
        if key in self.specials.values():
            return "connector"
        begins = [(part, p.partition("{")[0]) for part, p in self.prefixes.items()]
        begins += [(part, p) for part, beginnings in self.owned.items() for p in beginnings]
        if self.extra:
            begins.append(("llm", self.extra.partition("{")[0]))
        fits = [(len(p), part) for part, p in begins if key.startswith(p)]
        if not fits:
            return None
        length, part = max(fits)
        number = "{" in self.prefixes[part] and re.match(r"[1-9]\d*", key[length:])
        return f"{part}_{int(number[0]) + 1}" if number else part

    def foreign(self, key: str, modules: Iterable[str]) -> bool:
        """Whether a key belongs to a part, or an encoder, that is not among the modules."""
        owner = self.owner(key)
        if owner is None or owner in modules:
            return False
        return "{" in self.prefixes[part_of(owner)] or owner not in map(part_of, modules)

    def unused(self, key: str, cfg: VLMConfig, modules: Iterable[str]) -> bool:
        """Whether a key is known and no module that is loaded needs it."""
        if re.fullmatch("|".join(self.dropped) or r"(?!)", key):
            return True
        owner = self.owner(key)
        if owner is None:
            return False
        if owner == "llm":
            return bool(re.fullmatch(UNUSED, key.removeprefix(self.prefixes[owner])))
        for module in modules:
            if part_of(module) == part_of(owner) == "vision":
                tower = cfg.encoders[module]
                prefix = self.prefix(module, tower)
                rest = key.removeprefix(prefix)
                if key.startswith(prefix) and towers.unused(tower, self.table(tower)[0], rest):
                    return True
        return part_of(owner) == "connector" and key in self.constants(cfg)

    def constants(self, cfg: VLMConfig) -> dict:
        """Tensors of the connector by key that are stored here and that our model computes."""
        found = connectors.constants(cfg.connector, cfg.llm.width)
        return {self.prefixes["connector"] + key: value for key, value in found.items()}


# Constants that old checkpoints of decoders store.
UNUSED = r"(layers\.\d+\.(self_attn|attention)\.rotary_emb|rotary_pos_emb)\.inv_freq"
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
    **{name: Layout(**row) for name, row in ORIGINALS.items()},
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
    **{name: Layout(**row) for name, row in TOWERS.items()},
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
        if module == "llm":
            kind, prefix = kind or written_kind(cfg.llm), where.prefix(module)
            made += decoder_rows(cfg.llm, kind, prefix, where.head + KINDS[kind].head)
            made += _extra_rows(cfg, layout)
        elif module == "connector":
            made += _connector_rows(cfg, where)
        else:
            tower = cfg.encoders[module]
            made += towers.rows(tower, where.table(tower)[0], where.prefix(module, tower), module)
    return made


def _connector_rows(cfg: VLMConfig, where: Layout) -> list[Row]:
    module, prefix = _connector(cfg), where.prefix("connector")
    if len(copies := getattr(cfg.connector, "copies", ())) > 1:
        return [
            row
            for name in copies
            for row in connectors.rows(
                getattr(module, name), where.connector, f"{prefix}{name}.", f"connector/{name}/"
            )
        ]
    specials = where.specials.items()
    extra = [(f"specials/{name}/embedding", key, "D -> D") for name, key in specials]
    return connectors.rows(module, where.connector, prefix, extra=extra)


def _extra_rows(cfg: VLMConfig, layout: str) -> list[Row]:
    """Of the blocks of SVA between decoder layers."""
    if not cfg.llm.extra_num:
        return []
    prefix = LAYOUTS[layout].extra
    if not prefix:
        raise ValueError(
            f"llm.extra_num={cfg.llm.extra_num}, and the layout {layout!r} has no names for blocks "
            "between decoder layers; set extra_num=0 or take a layout that has them"
        )

    def blocks():
        make = partial(SVABlock, cfg.connector, cfg.llm.width)
        return stack(lambda rngs: make(rngs=rngs), cfg.llm.extra_num, rngs=nnx.Rngs(0))

    leaves = flatten(unbind(jax.eval_shape(blocks))[1])
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    entries = connectors.sva_block(cfg.connector.windows)
    return connectors.block_rows(entries, shapes, prefix, "llm/extra/")


def _connector(cfg: VLMConfig) -> nnx.Module:
    """The connector without arrays."""
    encoders, make = list(cfg.encoders.values()), module_of(cfg.connector)
    widths = tuple(encoders[e].out_width for e in cfg.form.encoders)
    return jax.eval_shape(lambda: make(cfg.connector, widths, cfg.llm.width, rngs=nnx.Rngs(0)))
