"""What is in a source, seen through a processor: how many records of what kind and size."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from vlmjax.data.sample import Sample

MODALITIES = ("text", "image", "several images", "video", "stream")
_BINS, _BAR = 10, 40


@dataclass(frozen=True, eq=False)
class Seen:
    """A record that was looked at: its kind, one of `MODALITIES`, and its sample."""

    name: str
    modality: str
    sample: Sample

    @property
    def sizes(self):
        """Numbers of its tokens, trained tokens, encoded patches and visual tokens, as a dict."""
        sample = self.sample
        return {
            "tokens": len(sample.tokens),
            "trained": int((sample.labels >= 0).sum()),
            "patches": sum(item.num_encoded for item in sample.items),
            "visual": int(sample.visual.sum()),
        }

    @property
    def pruned(self):
        """The share of visual tokens that DiffFP took away."""
        keep = [item.keep for item in self.sample.items]
        return 1 - float(np.concatenate(keep).mean()) if keep else 0.0


@dataclass(frozen=True, eq=False)
class Survey:
    """A source: its spec, length (None = endless), what was seen, and what cannot be used."""

    spec: str
    length: int | None
    ignored: dict
    seen: list[Seen]
    bad: list[tuple[str, str, str]]  # id, reason, message


def modality(record):
    """Returns the kind of a record, one of `MODALITIES`."""
    parts = [
        part["type"]
        for message in record["messages"]
        if not isinstance(message["content"], str)
        for part in message["content"]
    ]
    if any(message["role"] == "stream" for message in record["messages"]):
        return "stream"
    if "video" in parts:
        return "video"
    return MODALITIES[min(parts.count("image"), 2)]


def survey(spec, source, process, number):
    """Returns the `Survey` of `number` records, evenly spread over the source.

    Args:
      spec: of the source.
      source: of `data.sources`.
      process: record -> Sample.
      number: of records to look at; all of a smaller source.
    """
    length = len(source) if hasattr(source, "__len__") else None
    if length is None:
        chosen = range(number)
    else:
        chosen = np.unique(np.linspace(0, length - 1, min(number, length)).astype(int))
    seen, bad = [], []
    for index in map(int, chosen):
        try:
            record = source[index]
            seen.append(Seen(str(record["id"]), modality(record), process(record)))
        except ValueError as error:
            reason = getattr(error, "reason", "unnamed")
            bad.append((source.id(index), reason, str(error)))
    return Survey(spec, length, dict(getattr(source, "ignored", {})), seen, bad)


def report(surveys):
    """Returns the surveys in words: counts and kinds of each source, histograms of all."""
    lines = []
    for s in surveys:
        count = "without end" if s.length is None else f"{s.length:,} records"
        kinds = Counter(seen.modality for seen in s.seen)
        lines.append(f"{s.spec}: {count}, {len(s.seen) + len(s.bad)} looked at")
        lines.append(
            "  " + (", ".join(f"{kinds[m]} {m}" for m in MODALITIES if kinds[m]) or "none")
        )
        for kind, values in _columns(s.seen).items():
            lines.append(
                f"  {kind:<8} min {values.min()}, median {np.median(values):.0f}, "
                f"95 % {np.percentile(values, 95):.0f}, max {values.max()}"
            )
        moving = [seen.pruned for seen in s.seen if seen.modality in ("video", "stream")]
        if moving:
            lines.append(f"  DiffFP takes away {np.mean(moving):.0%} of the tokens of videos")
        if s.ignored:
            lines.append(f"  files left out: {s.ignored}")
        lines += [
            f"  {reason}: {text if name in text else f'{name}: {text}'}"
            for name, reason, text in s.bad
        ]
    everything = _columns([seen for s in surveys for seen in s.seen])
    for kind in ("tokens", "patches") if everything else ():
        lines += ["", f"{kind} a record", *_histogram(everything[kind])]
    return "\n".join(lines)


def _columns(seen):
    """Returns {name: array of a size of every record}."""
    sizes = [one.sizes for one in seen]
    return {name: np.array([s[name] for s in sizes]) for name in sizes[0]} if sizes else {}


def _histogram(values):
    """Returns the lines of a histogram with bins of whole numbers."""
    low, high = int(values.min()), int(values.max())
    step = -(-(high - low + 1) // _BINS)
    counts = np.bincount((values - low) // step)
    wide = len(str(high))
    lines = []
    for k, number in enumerate(counts):
        first = low + k * step
        bar = "#" * round(_BAR * number / counts.max())
        label = f"{first:>{wide}} to {first + step - 1:>{wide}}" if step > 1 else f"{first:>{wide}}"
        lines.append(f"  {label}  {bar:<{_BAR}} {number}")
    return lines
