"""How full rows are, and how even the shards, by the way that samples are put together.

    python tests/benchmarks/packing.py [--lengths FILE.csv] [--samples 200000]

Prints a JSON line for each method, ours last. FILE.csv has the columns source,tokens,patches (one
sample a line, drawn in proportion to how many lines a source has); without it, samples are drawn
from the groups and counts of VideoLLaMA3's tables 1 to 4 (arXiv:2501.13106), with sizes of pictures
and durations of videos that we chose, through the resize rule of the model.

A row has 16,384 token and 40,960 patch slots. Fill is the share of the slots that a method computes
which hold something: of the padded batch for the two that pad, of the fixed row for the others. A
row can be full of patches before it is full of tokens; `row_fill` is the mean of the larger share.
Imbalance is how much more patches the fullest of 256 shards has than the average one, each shard
with one row (two samples for the methods that do not pack), over all steps.
"""

import argparse
import csv
import json
import time

import numpy as np

from vlmjax.batch import Budget
from vlmjax.data.mixture import Mixture
from vlmjax.data.plan import Plan
from vlmjax.data.resize import Clip, resize_videollama3

TOKENS, PATCHES, SHARDS = 16384, 40960, 256
# Group -> millions of samples in tables 1 to 4, what it shows, median tokens of text.
GROUPS = {
    "scene image": (25.28, "photo", 130),
    "scene text": (5.62, "photo", 120),
    "document": (6.79, "page", 450),
    "chart": (1.04, "chart", 110),
    "fine-grained": (1.50, "photo", 90),
    "general": (9.87, "photo", 220),
    "ocr": (0.83, "photo", 150),
    "multi-image": (0.41, "photos", 150),
    "text": (4.77, "nothing", 500),
    "video": (6.20, "video", 150),
}
# (width, height) -> share.
SIZES = {
    "photo": {
        (640, 480): 4,
        (480, 640): 1.5,
        (500, 375): 2,
        (1024, 683): 1.5,
        (1500, 2250): 0.7,
        (2250, 1500): 0.7,
        (224, 224): 0.8,
        (800, 800): 0.8,
    },
    "page": {(1700, 2200): 2, (1240, 1754): 2, (1000, 1414): 1, (2550, 3300): 1},
    "chart": {(850, 600): 2, (1200, 800): 1, (640, 480): 1, (1600, 900): 0.5},
    "video": {
        (640, 360): 3,
        (596, 336): 3,
        (480, 360): 1,
        (1280, 720): 3,
        (340, 256): 1.5,
        (1920, 1080): 1,
    },
}
SECONDS = {15: 0.45, 45: 0.35, 170: 0.2}  # median duration of videos -> share


def published(samples, rng):
    """Returns (source names, i64[samples, 3]: source, tokens, patches)."""
    names, found = list(GROUPS), np.zeros((samples, 3), np.int64)
    shares = np.array([GROUPS[name][0] for name in names])
    found[:, 0] = rng.choice(len(names), samples, p=shares / shares.sum())

    def pick(table):
        chosen = rng.choice(len(table), p=np.array(list(table.values())) / sum(table.values()))
        return list(table)[chosen]

    for line in found:
        _, kind, median = GROUPS[names[line[0]]]
        tokens = 10 + int(np.clip(rng.lognormal(np.log(median), 0.8), 8, 4000))
        frames, merge, number = 1, 1, 1
        if kind == "video":
            merge, frames = 2, int(np.clip(rng.lognormal(np.log(pick(SECONDS)), 0.6), 2, 180))
            tokens += 7 * frames  # of the times
        elif kind == "photos":
            number = rng.integers(2, 6)
        clips = []
        for _ in range(0 if kind == "nothing" else number):
            width, height = pick(SIZES["photo" if kind == "photos" else kind])
            scale = rng.uniform(0.85, 1.15, 2)
            clips.append(Clip(int(height * scale[0]), int(width * scale[1]), frames, merge))
        sizes = resize_videollama3(clips, patch=14, min_tokens=16, max_tokens=10240)
        patches = sum(frames * (h // 14) * (w // 14) for h, w in sizes)
        line[1:] = tokens + patches // merge**2, patches
    return names, found


def read(file):
    """Returns (source names, i64[samples, 3]) of a CSV file."""
    with open(file, newline="") as lines:
        rows = [(r["source"], int(r["tokens"]), int(r["patches"])) for r in csv.DictReader(lines)]
    names = sorted({name for name, _, _ in rows})
    number = {name: k for k, name in enumerate(names)}
    return names, np.array([(number[name], t, p) for name, t, p in rows], np.int64)


def figures(batches, tokens, patches):
    """Returns the metrics of steps.

    Args:
      batches: for each shard of each step [(tokens, patches), ...] of its samples.
      tokens, patches: (used, slots).
    """
    loads = np.array([sum(p for _, p in batch) for batch in batches], np.float64)
    loads = loads[: len(loads) // SHARDS * SHARDS].reshape(-1, SHARDS)
    loads = loads[loads.sum(1) > 0]
    return {
        "token_fill": tokens[0] / tokens[1],
        "patch_fill": patches[0] / max(patches[1], 1),
        "imbalance": float(loads.max(1).sum() / loads.mean(1).sum() - 1) if len(loads) else 0.0,
        "rows": len(batches),
    }


def padded(pairs):
    """Batches of two samples, padded to the longer one in tokens and in patches."""
    pairs = [pairs[k : k + 2] for k in range(0, len(pairs) // 2 * 2, 2)]
    tokens, patches = (
        (sum(sum(s[d] for s in b) for b in pairs), sum(2 * max(s[d] for s in b) for b in pairs))
        for d in (0, 1)
    )
    return figures(pairs, tokens, patches)


def pad(samples, rng):
    """Padding to the longest of a batch in random order, as the collator of transformers."""
    return padded(samples[rng.permutation(len(samples))].tolist())


def group_by_length(samples, rng):
    """The same in an order of similar lengths within groups of 50 steps, as LLaVA's sampler."""
    order, group = rng.permutation(len(samples)), 2 * SHARDS * 50
    parts = [order[k : k + group] for k in range(0, len(order), group)]
    order = [p[np.argsort(-samples[p, 0], kind="stable")] for p in parts]
    return padded(samples[np.concatenate(order)].tolist())


def in_rows(rows):
    """Figures of fixed rows."""
    used = np.array([[sum(s[d] for s in row) for d in (0, 1)] for row in rows])
    shares = used / (TOKENS, PATCHES)
    tokens, patches = used.sum(0)
    made = figures(rows, (tokens, len(rows) * TOKENS), (patches, len(rows) * PATCHES))
    return made | {"row_fill": float(shares.max(1).mean())}


def fits(row):
    return sum(t for t, _ in row) <= TOKENS and sum(p for _, p in row) <= PATCHES


def flatten(samples, rng):
    """Two samples one after another in a row, as VideoLLaMA3; a row of one where two do not fit."""
    listed, rows = samples[rng.permutation(len(samples))].tolist(), []
    for k in range(0, len(listed), 2):
        pair = listed[k : k + 2]
        rows += [pair] if fits(pair) else [[s] for s in pair]
    return in_rows(rows)


def first_fit(samples, rng, bins=64):
    """Each sample to the first of 64 open rows with room, else all are closed, as grain packs."""
    room, open_rows, rows = np.tile([TOKENS, PATCHES], (bins, 1)), [[] for _ in range(bins)], []
    for sample in samples[rng.permutation(len(samples))]:
        fit = (room >= sample).all(1)
        if not fit.any():
            rows += open_rows
            room, open_rows = np.tile([TOKENS, PATCHES], (bins, 1)), [[] for _ in range(bins)]
            fit[:] = True
        row = int(fit.argmax())
        room[row] -= sample
        open_rows[row].append(tuple(sample))
    return in_rows([row for row in rows + open_rows if row])


def planned(names, found):
    """Our plan: each source in proportion to its samples, all of them once."""
    sizes = []
    for k in range(len(names)):
        own = found[found[:, 0] == k, 1:]
        sizes.append(np.concatenate([own, np.zeros_like(own[:, :1].repeat(3, 1))], 1))
    mixture = Mixture([len(s) for s in sizes], [len(s) for s in sizes], seed=0)
    budget = Budget(TOKENS, (PATCHES,), (PATCHES // 4,), (4,))
    plan = Plan(mixture, sizes, (budget,), SHARDS, draws=mixture.epochs(1))
    rows = [row for step in plan for row in step.rows]
    return in_rows([[tuple(sizes[s][r, :2]) for s, r in row] for row in rows])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", help="CSV file with the columns source,tokens,patches")
    parser.add_argument("--samples", type=int, default=200_000, help="drawn without --lengths")
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    names, found = read(given.lengths) if given.lengths else published(given.samples, rng)
    over = (found[:, 1] > TOKENS) | (found[:, 2] > PATCHES)
    if over.any():
        raise ValueError(
            f"{over.sum()} samples fit no row of {TOKENS} tokens and {PATCHES} patches; remove them"
        )
    methods = {
        "padding to the longest (transformers)": lambda: pad(found[:, 1:], rng),
        "length grouping (LLaVA)": lambda: group_by_length(found[:, 1:], rng),
        "flattened micro-batch (VideoLLaMA3)": lambda: flatten(found[:, 1:], rng),
        "first-fit (grain)": lambda: first_fit(found[:, 1:], rng),
        "planned best-fit (vlmjax)": lambda: planned(names, found),
    }
    for name, method in methods.items():
        began = time.perf_counter()
        made = method()
        seconds = round(time.perf_counter() - began, 2)
        line = {"method": name, "samples": len(found)} | made | {"seconds": seconds}
        rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}
        print(json.dumps(rounded), flush=True)


if __name__ == "__main__":
    main()
