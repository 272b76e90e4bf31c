"""The length index: what each record of a source takes of a row, found once, from headers alone.

    index = build(source, processor, budget, folder)
    index.sizes[index.usable[k]]        # of the k-th usable record, as `pack.size` counts it

Text is tokenised, of a picture the size is read, of a video its packets; nothing is decoded. Sizes
of videos are those before unchanged parts are pruned, which depends on content: rows planned with
them always hold the samples. With `pixels="decoded"` (`data index --kept`) everything is decoded
and pruned, which takes as long as an epoch of loading and fills rows as far as they can be. A
record that cannot be used is listed with the reason, and no plan has it.

A folder holds sizes.npy, reasons.npy (0 = usable, else the number of a reason), bad.jsonl and
index.json, which says what the sizes are of, with a digest once all are there; beside them lies
what `places` keeps of the source. An interrupted pass goes on where it was; a finished index is
made once more for the records whose media were at fault.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vlmjax.data.health import REASONS, BadRecord
from vlmjax.data.loading import load
from vlmjax.data.pack import check_fits

# What is measured, and how many records a worker does at a time: of these the parent hears nothing
# for as long as they take, and does not know which of them has killed the worker.
CHUNK = {"blank": 128, "decoded": 1}
PIXELS = tuple(CHUNK)
_NAMES = tuple(REASONS)
_PENDING = 255  # in reasons.npy
# Media are files of their own, which may be repaired: these are looked at again.
_OF_MEDIA = ("missing_file", "damaged_media", "hostile_media", "outside_root")


@dataclasses.dataclass(frozen=True, eq=False)
class Index:
    """Lengths of a source, in memory only as far as they are read.

    Attributes:
      folder: its files.
      source: that it is of.
      budget: of the rows that are wanted.
      sizes: i32[records, n].
      reasons: u8[records].
      usable: i64[usable records]: their numbers.
      over: i64[n]: numbers of the records that only larger rows would hold.
      digest: of what is in it: two indices with one digest and budget plan the same rows.
    """

    folder: Path
    source: object
    budget: object
    sizes: np.ndarray
    reasons: np.ndarray
    usable: np.ndarray
    over: np.ndarray
    digest: str

    def bad(self):
        """Yields {"record", "id", "reason", "message"} of each record that cannot be used."""
        with open(self.folder / "bad.jsonl") as lines:
            yield from map(json.loads, lines)
        names, limits = self.budget.names, self.budget.limits
        for number in self.over.tolist():
            name = self.source.id(number)
            taken = zip(names, self.sizes[number].tolist(), limits, strict=True)
            over = ", ".join(
                f"{n} {what} (row budget {most})" for what, n, most in taken if n > most
            )
            message = (
                f"record {name!r} has {over}: it fits no row and is never cut silently. Raise "
                "data.budget, or lower the processor's max_visual_tokens or max_frames"
            )
            yield {"record": number, "id": name, "reason": "too_long", "message": message}


def identity(source, processor, budget, pixels="blank"):
    """Returns {what: digest}: an index is of use as long as all of these stay."""
    settings = dataclasses.asdict(processor.config)
    return {
        "source": source.fingerprint,
        "records": len(source),
        "processor": _digest(settings),
        "tokenizer": processor.tokenizer.fingerprint,
        "model": _digest(repr(processor.form)),
        "row": _digest(repr(budget.names)),
        "pixels": pixels,
    }


def _digest(value):
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def open_index(folder, source, processor, budget, pixels="blank"):
    """Returns the `Index` of a folder; ValueError where it is absent, unfinished or of other data.

    Args:
      folder: of `build`.
      source, processor: as `build` had them.
      budget: a `Budget` of the same model, with rows of any size.
      pixels: lengths of decoded records serve as well as of "blank" ones.
    """
    folder = Path(folder)
    if not (folder / "index.json").is_file():
        raise ValueError(f"there is no length index in {folder}: {_HOW}")
    found, _ = _state(folder, identity(source, processor, budget, pixels))
    reasons, sizes = np.load(folder / "reasons.npy"), open_sizes(folder)
    if "digest" not in found:
        left = int((reasons == _PENDING).sum())
        raise ValueError(f"the length index in {folder} lacks {left} records still: {_HOW}")
    over = np.zeros(len(sizes), bool)
    for k in range(0, len(sizes), 1 << 20):
        for taken, limit in zip(sizes[k : k + (1 << 20)].T, budget.limits, strict=True):
            over[k : k + (1 << 20)] |= taken > limit
    usable, over = np.flatnonzero((reasons == 0) & ~over), np.flatnonzero((reasons == 0) & over)
    return Index(folder, source, budget, sizes, reasons, usable, over, found["digest"])


_HOW = "make it with `python -m vlmjax.main data index` and the same config"


def _state(folder, wanted):
    """Returns (index.json, its identity); ValueError where that is not the one that is wanted."""
    try:
        found = json.loads((folder / "index.json").read_text())
    except ValueError as error:
        raise ValueError(
            f"{folder / 'index.json'} is damaged ({error}): remove {folder} and {_HOW}"
        ) from error
    if wanted["pixels"] == "blank":
        wanted = wanted | {"pixels": found["identity"]["pixels"]}
    other = [name for name, value in wanted.items() if found["identity"].get(name) != value]
    if other:
        raise ValueError(
            f"the length index in {folder} was made with another {', '.join(other)}: {_HOW}, in "
            "another folder or after removing this one"
        )
    return found, wanted


def open_sizes(folder):
    """Returns the lengths in a folder, which stay there: only what is asked for is read."""
    return np.load(Path(folder) / "sizes.npy", mmap_mode="r")


def build(source, processor, budget, folder, *, workers=0, pixels="blank", stall=300.0, say=None):
    """Measures every record that `folder` does not have yet; returns its `Index`.

    Args:
      source: see `data.sources`; it and the processor are sent to the workers.
      processor: a `Processor`.
      budget: a `Budget` of the model; what it has no empty row for is measured and not used.
      folder: made when absent.
      workers: processes; 0 = in this one.
      pixels: "blank" or "decoded".
      stall: seconds after which a worker that has measured nothing counts as lost.
      say: name in the progress bar; None = no bar.
    """
    if pixels not in PIXELS:
        raise ValueError(f"pixels={pixels!r} is unknown; choose one of {PIXELS}")
    folder, wanted = Path(folder), identity(source, processor, budget, pixels)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "index.json").is_file():
        _begin(folder, wanted, len(budget.limits))
    found, wanted = _state(folder, wanted)
    if hasattr(source, "keep"):
        source.keep(folder)
    sizes = np.load(folder / "sizes.npy", mmap_mode="r+")
    reasons = np.load(folder / "reasons.npy", mmap_mode="r+")
    done = "digest" in found
    again = [1 + _NAMES.index(reason) for reason in _OF_MEDIA]
    due = np.isin(reasons, again) if done else reasons == _PENDING
    chunks = _chunks(due, CHUNK[wanted["pixels"]])
    measured = load(
        _Measured(source, processor, _endless(budget), wanted["pixels"]),
        keys=chunks,
        workers=workers,
        ahead=max(4 * workers, 1),
        stall=stall,
    )
    _end_line(folder / "bad.jsonl")
    with (
        contextlib.closing(measured),
        open(folder / "bad.jsonl", "a") as bad,
        tqdm(total=sum(map(len, chunks)), unit=" records", desc=say, disable=say is None) as bar,
    ):
        for chunk, (rows, why, errors) in zip(chunks, measured, strict=True):
            bar.update(len(chunk))
            at = list(chunk)
            if done and (why == reasons[at]).all():
                continue
            if done:  # until it is finished anew nobody may take it for what the digest says
                _replace(folder / "index.json", json.dumps({"identity": wanted}, indent=1))
                done = False
            bad.writelines(json.dumps(error) + "\n" for error in errors)
            bad.flush()
            sizes[at] = rows
            sizes.flush()
            reasons[at] = why  # last: a chunk counts when this is written
            reasons.flush()
    if not done:
        _finish(folder, wanted, sizes, reasons)
    return open_index(folder, source, processor, budget, pixels)


def _endless(budget):
    """Returns a budget of the same model whose rows hold any sample: lengths depend on none."""
    most = int(np.iinfo(np.int32).max)
    patches, visual = ((most,) * len(of_each) for of_each in (budget.patches, budget.visual))
    pool = (most, budget.pool[1])
    return dataclasses.replace(
        budget, tokens=most, patches=patches, visual=visual, pool=pool, routed=most
    )


def _chunks(due, size):
    """Returns the numbers of records that are due, those of one chunk in each."""
    numbers = np.flatnonzero(due)
    cuts = np.flatnonzero(np.diff(numbers // size)) + 1
    chunks = [tuple(part.tolist()) for part in np.split(numbers, cuts) if len(part)]
    whole = [range(chunk[0], chunk[-1] + 1) for chunk in chunks]  # as short as messages want it
    return [
        each if len(each) == len(chunk) else chunk
        for each, chunk in zip(whole, chunks, strict=True)
    ]


def _begin(folder, wanted, width):
    n = wanted["records"]
    np.lib.format.open_memmap(folder / "sizes.npy", "w+", np.int32, (n, width)).flush()
    np.save(folder / "reasons.npy", np.full(n, _PENDING, np.uint8))
    (folder / "bad.jsonl").write_text("")
    _replace(folder / "index.json", json.dumps({"identity": wanted}, indent=1))


def _finish(folder, wanted, sizes, reasons):
    """Sorts bad.jsonl (a chunk may have been listed twice, or is good now); writes the digest."""
    listed = (folder / "bad.jsonl").read_text().splitlines(keepends=True)
    lines = {json.loads(line)["record"]: line for line in listed}
    _replace(folder / "bad.jsonl", "".join(lines[k] for k in sorted(lines) if reasons[k]))
    made = hashlib.sha256(wanted["source"].encode())
    for k in range(0, len(reasons), 1 << 20):
        made.update(sizes[k : k + (1 << 20)].tobytes())
        made.update(reasons[k : k + (1 << 20)].tobytes())
    done = {"identity": wanted, "digest": made.hexdigest()[:16]}
    _replace(folder / "index.json", json.dumps(done, indent=1))


def _replace(file, text):
    """Writes a file that is whole at any moment."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(text)
    os.replace(part, file)


def _end_line(file):
    """Cuts off the line that a killed process has begun; its chunk is measured again."""
    content = file.read_bytes()
    if not content.endswith(b"\n"):
        os.truncate(file, content.rfind(b"\n") + 1)


class _Measured:
    """Chunks as they are measured, for workers."""

    def __init__(self, *work):
        self.work = work

    def __getitem__(self, chunk):
        return measure(*self.work, chunk)


def measure(source, processor, budget, pixels, chunk):
    """Returns (i32[n, sizes], u8[n] reasons, errors) of some records.

    Args:
      source, processor: see `reader.Reader`.
      budget: `Budget` of a row.
      pixels: one of `PIXELS`.
      chunk: numbers of the records.
    """
    sizes = np.zeros((len(chunk), len(budget.limits)), np.int32)
    reasons, errors = np.zeros(len(chunk), np.uint8), []
    for row, number in enumerate(chunk):
        try:
            sizes[row] = check_fits(processor(source[number], pixels=pixels), budget)
        except BadRecord as error:
            reasons[row] = 1 + _NAMES.index(error.reason)
            where = {"record": number, "id": source.id(number)}
            errors.append(where | {"reason": error.reason, "message": str(error)})
        except Exception as error:
            raise RuntimeError(f"record {number} ({source.id(number)!r}): {error!r}") from error
    return sizes, reasons, errors
