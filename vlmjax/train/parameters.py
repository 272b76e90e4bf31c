"""The table of `inspect`: what a config trains, how fast, and its bytes; nothing is allocated."""

import functools
from typing import NamedTuple

import jax

from vlmjax import build
from vlmjax.train.optimizer import make_optimizer, resolve_lr
from vlmjax.train.step import init_state

ORDER = ("vision", "connector", "llm", "patch", "embed", "blocks", "norm", "head")  # as data flows


class Row(NamedTuple):
    """One line: the parameters of a sub-block that share a learning rate."""

    name: str
    count: int
    lr: float | None  # None = frozen
    weights: int  # bytes, as stored while training
    optimizer: int  # bytes


def parameter_rows(run):
    """Returns the `Row`s of a `build.Run`, one for each (sub-block, learning rate)."""
    _, shapes, _ = build.abstract(run.model)
    lrs = resolve_lr(run.lr, shapes)
    peaks = {path: lr for path, lr in lrs.items() if lr is not None}
    optimizer = make_optimizer(run.optim, peaks, run.train.steps)
    init = functools.partial(
        init_state, lrs=lrs, optimizer=optimizer, frozen_dtype=run.train.frozen_dtype
    )
    state = jax.eval_shape(init, shapes)
    stored = state.trainable | state.frozen
    moments = dict.fromkeys(stored, 0)
    for path, x in jax.tree_util.tree_leaves_with_path(state.opt):
        name = next((k.key for k in reversed(path) if isinstance(k, jax.tree_util.DictKey)), None)
        if name is not None:  # the rest are step counters
            moments[name] += _bytes(x)
    rows = {}
    for path in shapes:
        key = "/".join(path.split("/")[:2]), lrs[path]
        row = rows.get(key, Row(key[0], 0, lrs[path], 0, 0))
        rows[key] = row._replace(
            count=row.count + shapes[path].size,
            weights=row.weights + _bytes(stored[path]),
            optimizer=row.optimizer + moments[path],
        )
    return sorted(rows.values(), key=lambda row: [_place(part) for part in row.name.split("/")])


def _place(part):
    kind = part.split("_")[0]  # vision_2, vision_3 as vision
    return (ORDER.index(kind) if kind in ORDER else len(ORDER), part)


def _bytes(x):
    return x.size * x.dtype.itemsize


def _total(name, rows):
    count, weights, optimizer = (
        sum(getattr(row, field) for row in rows) for field in ("count", "weights", "optimizer")
    )
    return Row(name, count, None, weights, optimizer)


def parameter_table(run):
    """Returns the rows as text, with a line for each module and a total."""
    rows = parameter_rows(run)
    layers = {"llm/blocks": run.model.llm.layers}
    for name, tower in run.model.encoders.items():
        layers |= {f"{name}/blocks": tower.blocks} if hasattr(tower, "blocks") else {}
    lines = [("module", "parameters", "", "peak lr", "weights", "optimizer")]
    for module in dict.fromkeys(row.name.split("/")[0] for row in rows):
        inside = [row for row in rows if row.name.split("/")[0] == module]
        lines.append(_line(_total(module, inside)))
        for row in inside:
            name = "  " + row.name.split("/")[1]
            name += f" ({layers[row.name]} layers)" if row.name in layers else ""
            kind, lr = ("frozen", "-") if row.lr is None else ("trained", f"{row.lr:g}")
            lines.append(_line(row._replace(name=name), kind, lr))
    lines.append(_line(_total("total", rows)))
    for kind in ("trained", "frozen"):
        part = [row for row in rows if (row.lr is None) == (kind == "frozen")]
        lines.append(_line(_total(f"  {kind}", part)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = (False, True, False, True, True, True)
    return "\n".join(
        "  ".join(
            x.rjust(w) if r else x.ljust(w) for x, w, r in zip(line, widths, right, strict=True)
        )
        for line in lines
    )


def _line(row, kind="", lr=""):
    return row.name, f"{row.count:,}", kind, lr, _size(row.weights), _size(row.optimizer)


def _size(num_bytes):
    """Returns "1.54 GiB"."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
