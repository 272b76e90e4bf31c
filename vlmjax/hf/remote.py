"""Our own layout of a checkpoint: any `VLMConfig`, with the code that transformers runs beside it.

config.json holds our configuration; tensors have our paths with "." for "/", those of stacked
layers one by one: `llm/blocks/attn/q/kernel` is `llm.blocks.0.attn.q.kernel`, .... Nothing is
transposed, so that loading what was exported gives the same bits.
"""

import dataclasses
import json
import string
from pathlib import Path

from vlmjax import build
from vlmjax.connectors import CONNECTORS
from vlmjax.hf.pixels import read_json
from vlmjax.hf.table import Row
from vlmjax.vlm import VLMConfig

KIND = "vlmjax"  # the model_type
CONFIG = "config.json"
STACKS = ("blocks", "cross", "extra")  # names of stacked layers


def is_remote(directory) -> bool:
    """Whether a directory has this layout."""
    return read_json(Path(directory) / CONFIG).get("model_type") == KIND


def describe(cfg: VLMConfig) -> dict:
    """Returns a configuration as nested dicts, all but how to compute it."""

    def part(kinds, config):
        (kind,) = (name for name, entry in kinds.items() if entry[0] is type(config))
        return {"type": kind} | dataclasses.asdict(config)

    towers = [part(build.TOWERS, tower) for tower in cfg.encoders.values()]
    return {
        "vision": towers if isinstance(cfg.vision, tuple) else (towers or [None])[0],
        "connector": part(CONNECTORS, cfg.connector) if towers else None,
        "llm": dataclasses.asdict(cfg.llm),
        "sources": list(cfg.sources),
        "pool": cfg.pool,
    }


def read_config(directory) -> VLMConfig:
    """Returns the configuration of a directory; unknown and missing entries are one ValueError."""
    raw = read_json(Path(directory) / CONFIG)
    if not isinstance(raw.get("model"), dict):
        raise ValueError(
            f"{directory}/{CONFIG} has model_type {KIND!r} and no entry 'model', which holds the "
            "configuration; copy the file of the export again"
        )
    return build.model_config(build.frozen(raw["model"]))


def check_config(directory, cfg: VLMConfig, modules=None):
    """Raises ValueError where a configuration differs from that of the directory.

    Args:
      modules: names of the parts that count; None = all.
    """
    there, here = describe(read_config(directory)), json.loads(json.dumps(describe(cfg)))
    there = json.loads(json.dumps(there))
    differ = [
        f"{name} is {there[name]} there and {here[name]} here"
        for name in here
        if (modules is None or name in modules) and there[name] != here[name]
    ]
    if differ:
        raise ValueError(
            f"{directory}/{CONFIG} disagrees with the configuration: {'; '.join(differ)}; weights "
            "are only meaningful with the settings they were trained with; change the "
            "configuration or load another checkpoint"
        )


def rows(cfg: VLMConfig) -> list[Row]:
    """The table of a model, see `hf.table`."""
    _, shapes, axes = build.abstract(cfg)
    return [_row(path, shapes[path].shape, len(axes[path])) for path in shapes]


def _row(path, shape, dims):
    parts, stacked = path.split("/"), len(shape) > dims
    keys = (".".join(parts),)
    if stacked:
        (at,) = (i + 1 for i, part in enumerate(parts) if part in STACKS)
        keys = tuple(".".join([*parts[:at], str(k), *parts[at:]]) for k in range(shape[0]))
    letters = string.ascii_uppercase[:dims]
    sizes = dict(zip(letters, shape[stacked:], strict=True))
    return Row(path, keys, stacked, f"{' '.join(letters)} -> {' '.join(letters)}", sizes)
