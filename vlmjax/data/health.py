"""Records that cannot be used: why, which ones, and how many may be."""

import collections
import json
import math
import os
from pathlib import Path

# Why a record is unusable -> what is meant.
REASONS = {
    "missing_file": "a media file is not there or is empty",
    "damaged_media": "a media file is truncated, or no picture or video",
    "hostile_media": "a media file costs more than it may: pixels, frames, seconds of decoding",
    "outside_root": "a media path leads outside its folder, or is a link that does",
    "remote_media": "a media path is a URL; nothing is ever fetched",
    "malformed": "the annotation lacks a key, or has a value of another type",
    "unknown_role": "a turn is from nobody that is known",
    "no_answer": "no assistant turn has any text, so nothing would be trained",
    "placeholders": "the text has other tags than the record has media",
    "too_long": "the sample fits no row, or is longer than max_length",
}


class BadRecord(ValueError):
    """A record cannot be used; `reason` is a key of `REASONS`."""

    def __init__(self, reason, message):
        super().__init__(message)
        assert reason in REASONS, reason
        self.reason = reason

    def __reduce__(self):  # both arguments survive the way back from a worker
        return BadRecord, (self.reason, str(self))


class TooManyBadRecords(ValueError):
    """More records of a source are unusable than its quota allows."""


class Ledger:
    """The unusable records met so far, one JSON line each in data_errors.jsonl.

        ledger = Ledger(workdir, {"coco": 118_000}, quota=0.001)
        ledger.record("coco", "train.jsonl:17", "missing_file", "image 'a.jpg' is not a file")
        ledger.check()  # raises once 119 records of coco are unusable

    A record is listed and counted once, also when a resumed run meets it again.

    Attributes:
      found, repairs: {(source, reason): number of records}, {what was changed: how often}, of
        `extend` since the run was started: of the rows of this host.
      elsewhere: the same as `found`, of the other hosts; set it where they have rows of their own.
    """

    def __init__(self, folder, sizes, quota=0.001, process=0, role="write"):
        """Opens it, with what earlier runs wrote.

        Args:
          folder: where the file is.
          sizes: {source: number of its records}, math.inf for one without end.
          quota: share of a source's records that may be unusable; one record always may.
          process: which of several hosts this is. Each writes a file of its own, and counts what
            the others had written when it started.
          role: "write", or "count" where another host meets the same records and writes them.
        """
        if not 0 <= quota <= 1:
            raise ValueError(
                f"the quota of bad records is {quota}, a share from 0 to 1 is needed: correct the "
                "config"
            )
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / f"data_errors{f'.{process}' if process else ''}.jsonl"
        self.sizes, self.quota, self.role = dict(sizes), quota, role
        self.found, self.elsewhere = collections.Counter(), collections.Counter()
        self.repairs = collections.Counter()
        self.reasons = {}  # source -> {id: reason}
        for file in sorted({self.file, *folder.glob("data_errors*.jsonl")}):
            for entry in _entries(file):
                self.reasons.setdefault(entry["source"], {})[entry["id"]] = entry["reason"]
        if self.file.exists():
            content = self.file.read_bytes()
            os.truncate(self.file, content.rfind(b"\n") + 1)  # of a line that a crash cut off

    def count(self, source, id, reason):
        """Counts an unusable record; returns whether it is new."""
        assert reason in REASONS and source in self.sizes, (reason, source)
        known = self.reasons.setdefault(source, {})
        if id in known:
            return False
        known[id] = reason
        return True

    def record(self, source, id, reason, message):
        """Lists an unusable record of a source by its id, a key of `REASONS`; whether it is new."""
        new = self.count(source, id, reason)
        if new and self.role == "write":
            entry = {"source": source, "id": id, "reason": reason, "message": message}
            with open(self.file, "a") as file:
                file.write(json.dumps(entry) + "\n")
        return new

    def extend(self, found, repairs):
        """Lists several, as `record` takes them.

        Args:
          found: unusable records.
          repairs: {what was changed in usable ones: how often}, added up since the run was started.
        """
        self.repairs.update(repairs)
        for source, id, reason, message in found:
            self.found[source, reason] += self.record(source, id, reason, message)

    def counts(self, source):
        """Returns {reason: number of records} of a source, on all hosts."""
        counts = collections.Counter(self.reasons.get(source, {}).values())
        counts += {r: n for (name, r), n in self.elsewhere.items() if name == source}
        return dict(sorted(counts.items()))

    def metrics(self):
        """Returns {"bad/SOURCE/REASON": number of records, "repaired/WHAT": how often}."""
        return {f"repaired/{what}": number for what, number in sorted(self.repairs.items())} | {
            f"bad/{source}/{reason}": number
            for source in sorted(self.sizes.keys() | self.reasons.keys())
            for reason, number in self.counts(source).items()
        }

    def check(self):
        """Raises `TooManyBadRecords` if a source exceeds its quota."""
        for source, size in self.sizes.items():
            bad, counts = self.reasons.get(source, {}), self.counts(source)
            number = sum(counts.values())
            if math.isinf(size) or number <= max(self.quota * size, 1):
                continue
            counts = ", ".join(f"{n} {reason}" for reason, n in counts.items())
            raise TooManyBadRecords(
                f"{number} of the {size} records of source {source!r} cannot be used ({counts}), "
                f"the quota is {self.quota:g} of them or 1: the first are "
                f"{', '.join(map(repr, list(bad)[:5]))}, all with their messages are in "
                f"{self.file}. Repair or remove them, or raise data.quota"
            )


def _entries(file):
    """Returns the entries of a ledger's file, without a line that a crash cut off."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
