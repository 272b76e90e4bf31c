"""Which class of transformers computes a model, and what its directory says then.

A model fits a class if the config.json and the processor files that we would write are read back
as the same model. What differs is the reason for which it does not.
"""

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from vlmjax.connectors.mlp import MLPConfig
from vlmjax.data.picture import PictureConfig, Show
from vlmjax.data.processor import ProcessorConfig
from vlmjax.hf import internvl, llava
from vlmjax.hf.llm_config import make_llm
from vlmjax.vision.vit import ViTConfig
from vlmjax.vlm import VLMConfig

FILE = Path("the export/config.json")
LAYOUTS = {llava: "llava A", internvl: "internvl A"}


class Fit(NamedTuple):
    """A class of transformers that computes a model.

    Attributes:
      kind: its model_type.
      system: the module that writes it.
      layout: of the keys, of `systems.LAYOUTS`.
      config: config.json without the ids of the text tokens.
      sections: of images and videos in the processor files.
      show: of the model's processor.
      notes: what it shows otherwise of several images and of videos.
    """

    kind: str
    system: ModuleType
    layout: str
    config: dict
    sections: tuple[dict, dict]
    show: Show
    notes: tuple[str, ...]


def find_class(
    cfg: VLMConfig, settings: ProcessorConfig, ids: dict[str, int], max_position: int
) -> Fit:
    """The class that computes a model whose processor shows views of a picture.

    Args:
      ids: of the placeholders `image` and `video`.
      max_position: longest sequence that readers should allow.

    Raises:
      ValueError: there is none; says what the nearest does not have.
    """
    show = Show(PictureConfig(**dict(settings.picture)), cfg.form)
    found = [(s, s.nearest(cfg, show)) for s in LAYOUTS]
    system, kind = next((f for f in found if f[1]), (None, None))
    if system is None:
        _refuse(None, [f"pictures shown by the strategy {show.plan.image[0].name!r}"])
    if not isinstance(cfg.vision, ViTConfig):
        _refuse(kind, ["encoders other than one ViT"])
    if not isinstance(cfg.connector, MLPConfig):
        _refuse(kind, [f"a connector such as {type(cfg.connector).__name__}"])
    try:
        text = make_llm(cfg.llm, max_position)
        config = system.make(kind, cfg, show, text, ids)
        sections = system.make_pixels(kind, cfg, show)
        back = VLMConfig(**system.read(config, FILE, sections))
        picture = system.picture(config, FILE, sections, back.vision)
        back_show = Show(PictureConfig(**picture), back.form)
    except ValueError as error:
        raise ValueError(f"the model does not fit the class {kind} of transformers: {error}") from (
            error
        )
    differ = _differ("vision", *map(_same_vision, (cfg.vision, back.vision)))
    differ += _differ("connector", *map(_same_connector, (cfg.connector, back.connector)))
    differ += [f"{n}={getattr(cfg, n)!r}" for n in ("pool",) if getattr(cfg, n) != back.pool]
    differ += [f"sources={cfg.sources}"] * bool(cfg.sources and cfg.sources != (0,))
    ours, theirs = map(_views, (show, back_show))
    differ += [f"{name} {ours[name]}" for name in IMAGES if ours[name] != theirs[name]]
    if differ:
        _refuse(kind, differ)
    seen = ("several images", *VIDEOS) if sections[1] else ("several images",)
    notes = {NOTES[name] for name in seen if ours[name] != theirs[name]}
    if not sections[1]:
        notes.add("This class has no videos.")
    if _reading(show) != "transformers":
        notes.add(ANYRES)
    return Fit(kind, system, LAYOUTS[system], config, sections, show, tuple(sorted(notes)))


def _refuse(kind, differ):
    near = f"the nearest, {kind}, does not have" if kind else "none has"
    raise ValueError(
        f"no class of transformers computes this model: {near} {'; '.join(differ)}; change that, "
        "or export the model with its own code, which transformers loads with trust_remote_code"
    )


def _differ(part, ours, theirs):
    have = dataclasses.asdict(theirs)
    return [f"{part}.{k}={v!r}" for k, v in dataclasses.asdict(ours).items() if v != have[k]]


def _same_vision(v: ViTConfig) -> ViTConfig:
    """A tower that computes the same, in one spelling: the blocks that are built, all used."""
    if v.features == "last" and v.final_norm:
        return v
    return dataclasses.replace(v, layers=v.blocks, features="-1", final_norm=True)


def _same_connector(c: MLPConfig) -> MLPConfig:
    """Windows never leave a rest here, and of one patch have no order."""
    return dataclasses.replace(c, pad=True, order="row" if c.window == 1 else c.order)


IMAGES = ("image", "format", "stitch", "resample")
VIDEOS = ("frame", "frame format", "frame resample")
_VIDEO = (
    "transformers shows and arranges the frames of videos otherwise than in training, so its "
    "answers about videos differ."
)
NOTES = dict.fromkeys(VIDEOS, _VIDEO) | {
    "several images": "transformers cuts each of several images otherwise than in training, so its "
    "answers about several images differ."
}
ANYRES = (
    "About one in a hundred pictures, small or square ones, has two equally good grids of tiles; "
    "transformers takes the other one."
)


def _reading(show: Show) -> str:
    return getattr(show.plan.image[0].settings, "reading", "transformers")


def _views(show: Show) -> dict:
    """What a processor does, AnyRes as transformers reads it."""

    def read(chosen):
        return tuple(
            dataclasses.replace(s, settings=llava.heights_first(s.settings))
            if s.name == "anyres"
            else s
            for s in chosen
        )

    def arranged(form):
        rounded = "none" if form.unpad == "none" else "transformers"
        return dataclasses.replace(form, unpad=rounded, control=tuple(form.control))

    plan, config = show.plan, show.config
    several = plan.images or plan.image
    resample = tuple(map(tuple, config.resample))
    return {
        "image": read(plan.image),
        "several images": read(several),
        "frame": read(plan.frame or several),
        "format": arranged(show.format),
        "frame format": arranged(show.frame_format),
        "stitch": config.stitch,
        "resample": resample,
        "frame resample": tuple(map(tuple, config.frame_resample)) or resample,
    }
