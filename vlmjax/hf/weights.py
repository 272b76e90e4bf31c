"""Parameters from and to checkpoint directories, strictly: all that does not fit is one error."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from vlmjax.hf import remote
from vlmjax.hf.config import CONFIG, read_config, read_module_config, tower_names
from vlmjax.hf.decoders import find_kind
from vlmjax.hf.systems import LAYOUTS, find_layout, part_of, rows
from vlmjax.hf.table import Row, by_key
from vlmjax.hf.tensors import DTYPES, Tensor, TensorDirectory
from vlmjax.nn import unflatten
from vlmjax.vlm import VLMConfig

# What the shapes of a checkpoint do not show (a width of 24 may be 2 heads of 12 or 3 of 8);
# compared with its config.json instead.
UNSEEN = (
    "heads",
    "kv_heads",
    "head_dim",
    "rope_theta",
    "eps",
    "act",
    "rotary",
    "rope_short",
    "rope_long",
    "rope_attention",
    "embed_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_divisor",
)


def load_params(directory, cfg: VLMConfig | None = None, dtype=None) -> dict:
    """All parameters of a full checkpoint as a nested dict of numpy arrays.

    Args:
      directory: in one of `systems.LAYOUTS` that holds a whole model.
      cfg: what the parameters must fit; read from the directory when absent.
      dtype: float32, bfloat16 or float16; None keeps each tensor as it is stored.
    """
    cfg = cfg or read_config(directory)
    return _load(directory, cfg, (*cfg.encoders, "connector", "llm"), dtype)


def load_module(module: str, directory, cfg: VLMConfig, dtype=None) -> dict:
    """The parameters under one top-level name, from any layout that holds it."""
    known = (*cfg.encoders, "connector", "llm")
    if module not in known:
        raise ValueError(
            f"unknown module {module!r}; modules are {', '.join(known)}; name one of them"
        )
    return _load(directory, cfg, (module,), dtype)[module]


def _load(directory, cfg: VLMConfig, modules: Iterable[str], dtype) -> dict:
    if remote.is_remote(directory):
        return _load_remote(directory, cfg, modules, dtype)
    tensors = TensorDirectory(directory)
    layout = find_layout(tensors)
    absent = [m for m in modules if part_of(m) not in LAYOUTS[layout].prefixes]
    if absent:
        raise ValueError(
            f"{directory} has the layout {layout!r}, which holds "
            f"{', '.join(LAYOUTS[layout].prefixes)} and not {', '.join(absent)}; "
            "whole models load with load_params, parts with load_module; name a module it holds or "
            "another directory"
        )
    if (Path(directory) / CONFIG).is_file():
        _check_config(directory, cfg, modules)
    lacking = _lacking(tensors, layout, modules, cfg)
    modules = [m for m in modules if m not in lacking]
    kind = find_kind(tensors, LAYOUTS[layout].prefixes["llm"]) if "llm" in modules else None
    table = rows(cfg, layout, modules, kind)
    _check_tensors(tensors, table, layout, modules, cfg)
    params = {m: load_module(m, Path(directory) / m, cfg, dtype) for m in lacking}
    for row in table:
        if not row.path:
            continue  # what the checkpoint holds and nothing reads
        *parents, leaf = row.path.split("/")
        node = params
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = _read(tensors, row, dtype)
    return params


def _load_remote(directory, cfg: VLMConfig, modules: Iterable[str], dtype) -> dict:
    """The parameters of a directory in our own layout."""
    whole = set(modules) == {*cfg.encoders, "connector", "llm"}
    remote.check_config(directory, cfg, None if whole else modules)
    tensors = TensorDirectory(directory)
    table = [r for r in remote.rows(cfg) if whole or r.path.split("/")[0] in modules]
    shapes = {key: row.stored_shape for row in table for key in row.keys}
    ours = [key for key in tensors if whole or key.split(".")[0] in modules]
    _fail(
        f"{directory} (layout {remote.KIND!r}) does not fit the configuration",
        [key for key in shapes if key not in tensors],
        [key for key in ours if key not in shapes],
        [
            f"{key} {list(tensors.shape(key))} instead of {list(shape)}"
            for key, shape in shapes.items()
            if key in tensors and tensors.shape(key) != shape
        ],
    )
    return unflatten({row.path: _read(tensors, row, dtype) for row in table})


def _lacking(tensors: TensorDirectory, layout: str, modules, cfg: VLMConfig) -> list[str]:
    """The frozen towers that a checkpoint does not hold; they are directories of its directory."""
    where, directory = LAYOUTS[layout], tensors.directory
    if not where.elsewhere:
        return []
    towers = {m: where.prefix(m) for m in modules if part_of(m) == "vision"}
    lacking = [m for m, p in towers.items() if not any(key.startswith(p) for key in tensors)]
    absent = [m for m in lacking if not (directory / m).is_dir()]
    if absent:
        names = tower_names(directory)
        raise ValueError(
            f"{directory} does not hold the frozen towers "
            f"{', '.join(f'{m} ({names.get(m)})' for m in absent)}; put the checkpoint of each "
            f"into {', '.join(str(directory / m) for m in absent)}, or start a run with "
            f"{' '.join(f'--config.init.{m}=hf:DIR' for m in absent)}"
        )
    return lacking


def _check_config(directory, cfg: VLMConfig, modules):
    problems = []
    for module in modules:
        if module == "connector":
            continue
        ours = cfg.llm if module == "llm" else cfg.encoders[module]
        theirs = read_module_config(directory, module)
        want, have = map(dataclasses.asdict, (ours, theirs))
        problems += [
            f"{module}.{name} is {have[name]} there and {want[name]} here"
            for name in UNSEEN
            if name in want and name in have and want[name] != have[name]
        ]
    if problems:
        raise ValueError(
            f"{directory}/{CONFIG} disagrees with the configuration: {'; '.join(problems)}; "
            "weights are only meaningful with the "
            "settings they were trained with; change the configuration or load another checkpoint"
        )


def _check_tensors(
    tensors: TensorDirectory, table: list[Row], layout: str, modules, cfg: VLMConfig
):
    shapes = {key: row.stored_shape for row in table for key in row.keys}
    where = LAYOUTS[layout]
    tied_head = {k for k in where.heads if "llm" in modules and cfg.llm.tie and k in tensors}
    expected = shapes.keys() | tied_head
    missing = [key for key in shapes if key not in tensors]
    unexpected = [
        key
        for key in tensors
        if key not in expected
        and not where.foreign(key, modules)
        and not where.unused(key, cfg, modules)
    ]
    wrong = [
        f"{key} {list(tensors.shape(key))} instead of {list(shape)}"
        for key, shape in shapes.items()
        if key in tensors and tensors.shape(key) != shape
    ]
    for key in tied_head:
        embedding = tensors.read(
            next(row for row in table if row.path == "llm/embed/embedding").keys[0]
        )
        if not np.array_equal(tensors.read(key), embedding):
            wrong.append(
                f"{key} differs from the embedding although the model is tied: set tie=False "
                "to use it"
            )
    constants = where.constants(cfg) if "connector" in modules else {}
    wrong += [
        f"{key} differs from the table that the model computes"
        for key, value in constants.items()
        if key in tensors and not _close(tensors.read(key), value)
    ]
    _fail(
        f"{tensors.directory} (layout {layout!r}) does not fit the configuration",
        missing,
        unexpected,
        wrong,
    )


def _close(stored: np.ndarray, value: np.ndarray) -> bool:
    """Whether a tensor is a table of sines up to its precision."""
    if stored.shape != value.shape:
        return False
    return np.abs(stored.astype(np.float32) - value).max() < 1e-2


def _fail(what: str, missing: list[str], unexpected: list[str], wrong: list[str]):
    """Raises one error with every problem, or returns when there is none."""
    kinds = (("missing", missing), ("unexpected", unexpected), ("mis-shaped", wrong))
    if any(names for _, names in kinds):
        lines = [f"{kind} ({len(names)}): {', '.join(names)}" for kind, names in kinds if names]
        raise ValueError(
            "\n  ".join(
                [
                    f"{what}; all keys and shapes must match; give the matching configuration or "
                    f"weights:",
                    *lines,
                ]
            )
        )


def _read(tensors: TensorDirectory, row: Row, dtype) -> np.ndarray:
    if dtype is None:
        dtype = np.result_type(*{tensors.dtype(key) for key in row.keys})
    out = np.empty(row.shape, _float(dtype))
    for i, key in enumerate(row.keys):
        out[i if row.stacked else ...] = row.load(tensors.read(key))
    return out


def _float(dtype) -> np.dtype:
    known = {d.name: d for d in DTYPES.values()}
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in known:
        raise ValueError(
            f"weights of dtype {name}; they may be {', '.join(known)}; choose one of these"
        )
    return known[name]


def export_tensors(
    cfg: VLMConfig, params: Mapping, dtype=None, layout: str = "videollama3"
) -> list[Tensor]:
    """The tensors of a layout."""
    return table_tensors(rows(cfg, layout), params, dtype)


def table_tensors(table: list[Row], params: Mapping, dtype=None) -> list[Tensor]:
    """The tensors of a table, each made from the parameters when its turn comes.

    A stacked leaf is sliced on the device where it lives, so that the host never holds more than
    one tensor.
    """
    leaves = dict(_flatten(params))
    shapes = {row.path: row.shape for row in table if row.path}
    missing = [path for path in shapes if path not in leaves]
    unexpected = [path for path in leaves if path not in shapes]
    wrong = [
        f"{path} {list(leaves[path].shape)} instead of {list(shape)}"
        for path, shape in shapes.items()
        if path in leaves and tuple(leaves[path].shape) != shape
    ]
    _fail("the parameters do not fit the configuration", missing, unexpected, wrong)
    tensors = []
    for key, parts in by_key(table).items():
        held = [(row, leaves[row.path], layer) for row, layer in parts if row.path]
        target = _float(dtype or np.result_type(*{leaf.dtype for _, leaf, _ in held}))
        shape = parts[0][0].stored_shape
        tensors.append(Tensor(key, target, shape, _maker(held, shape, target)))
    return tensors


def _maker(held: list[tuple[Row, object, int]], shape: tuple[int, ...], dtype: np.dtype):
    def make():
        stored = np.zeros(shape, dtype)
        for row, leaf, layer in held:
            row.put(np.asarray(leaf[layer] if row.stacked else leaf), stored)
        return stored

    return make


def _flatten(tree: Mapping, prefix=""):
    for name, node in tree.items():
        if isinstance(node, Mapping):
            yield from _flatten(node, f"{prefix}{name}/")
        else:
            yield prefix + name, node
