"""The commands python -m vlmjax.main data ..."""

from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vlmjax.data import contact_sheet, inspection, mix
from vlmjax.data.index import build
from vlmjax.data.sources import open_source

# (kind, name, default, text) of the flags that only these commands have.
FLAGS = (
    ("string", "source", None, "KIND:WHERE; see vlmjax/data/sources.py"),
    ("string", "media_root", None, "folder of media that are given by path"),
    ("integer", "samples", 64, "inspect: records of each source to look at"),
    ("integer", "workers", 0, "index: processes; 0 = this one"),
    ("bool", "kept", False, "index: decode, and count the visual tokens of videos that are kept"),
)


def pack(source, media_root, output):
    """Writes a source as an ArrayRecord file; returns a line that says what came of it.

    Args:
      source: spec KIND:WHERE.
      media_root: folder of media that are given by path; None = the one it is run in.
      output: OUT.array_record.
    """
    from vlmjax.data import convert  # only here the file format is needed

    if not output.endswith(".array_record"):
        raise ValueError(f"--output={output} must end with .array_record: rename it")
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    written, bad = convert.pack(open_source(source, media_root or ".", 0), output)
    line = f"{written:,} records in {output}, {Path(output).stat().st_size:,} bytes"
    if not bad:
        return f"{line}; all were usable"
    reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(bad.items()))
    return f"{line}; {sum(bad.values()):,} left out ({reasons}), see {output}.errors.jsonl"


def inspect(data, samples, output=None):
    """Returns what is in sources in words; writes contact_sheet.png into a folder if one is given.

    Args:
      data: a `mix.Data`.
      samples: records of each source to look at.
      output: folder, or None.
    """
    parts = zip(data.names, data.sources, data.processors, strict=True)
    found = [inspection.survey(*part, samples) for part in parts]
    text = inspection.report(found)
    text += "".join(f"\n{name} is not there" for name in data.absent)
    if output is not None:
        file = Path(output) / "contact_sheet.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet.draw(found, data.processors[0].tokenizer).save(file)
        text += f"\n\n{file}"
    return text


def index(data, budget, workers=0, kept=False):
    """Makes the length index of each source, or goes on with it; returns a line for each.

    Args:
      data: a `mix.Data`.
      budget: the `Budget` of rows.
      workers: see `index.build`.
      kept: decode everything, and count what is left of videos after pruning.
    """
    how = dict(workers=workers, pixels="decoded" if kept else "blank", stall=data.config.stall)
    if not data.config.index:
        raise ValueError("data.index='' names no folder: give --config.data.index=DIR")
    lines = [f"{name}: not there" for name in data.absent]
    for name, source, processor in zip(data.names, data.sources, data.processors, strict=True):
        folder = mix.index_folder(data, name)
        found = build(source, processor, budget, folder, say=name, **how)
        sizes = found.sizes[found.usable[:100_000]]
        what = zip(budget.names, sizes.mean(0) if len(sizes) else budget.limits, strict=True)
        means = ", ".join(f"{mean:,.0f} {what}" for what, mean in what if mean)
        bad = Counter(entry["reason"] for entry in found.bad())
        reasons = "".join(f", {number:,} {reason}" for reason, number in sorted(bad.items()))
        lines.append(f"{name}: {len(found.usable):,} records of {means} each{reasons}  ({folder})")
    return "\n".join(lines)


def plan(data, budgets, rows):
    """Returns what a plan makes of the sources: steps, fill, imbalance, shares of the sources.

    Of one epoch, where the config does not say how many.

    Args:
      data: a `mix.Data`.
      budgets: of the buckets.
      rows: of a step.
    """
    made, _, _, _ = mix.planned(data, budgets, rows)
    if made.total is None:
        made.total = made.mixture.epochs(1)
    limits = [np.maximum(budget.limits, 1) for budget in budgets]
    names, patches = budgets[0].names, slice(1, 1 + len(budgets[0].patches))
    steps, used, slots = Counter(), np.zeros(len(names)), np.zeros(len(names))
    loads, drawn = [], Counter()
    for bucket, packed in tqdm(made, unit=" steps", desc="planning"):
        sizes = np.array([made.taken(row).sum(0) for row in packed])
        steps[bucket] += 1
        used, slots = used + sizes.sum(0), slots + len(packed) * limits[bucket]
        loads.append(sizes[:, patches].sum(1))
        drawn.update(source for row in packed for source, _ in row)
    lines = [f"{sum(steps.values()):,} steps of {rows} rows, {made.total:,} draws"]
    if len(budgets) > 1:
        lines.append(", ".join(f"{steps[k]:,} of bucket {k}" for k in range(len(budgets))))
    fill = zip(names, used / slots, strict=True)
    lines.append("fill: " + ", ".join(f"{share:.3f} of {what}" for what, share in fill if share))
    mean = sum(load.mean() for load in loads)
    if mean:
        over = sum(load.max() for load in loads) / mean - 1
        lines.append(f"the row with most patches of a step has {over:.1%} more than the average")
    for source, name in enumerate(data.names):
        share, n = drawn[source] / made.total, made.mixture.lengths[source]
        lines.append(f"{name}: {share:.2%} of the draws, {drawn[source] / n:.2f} epochs of {n:,}")
    return "\n".join(lines + [f"{name}: not there" for name in data.absent])
