"""The data of a run on this host: batches from a checkpoint's position on, and their health."""

import collections
import dataclasses
import hashlib
import json
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from vlmjax import build, sharding
from vlmjax.data import mix
from vlmjax.data.health import Ledger
from vlmjax.data.loading import prefetch
from vlmjax.data.pack import Stats
from vlmjax.data.plan import Mark
from vlmjax.data.stream import NoGoodRecord, Position, packed_batches, planned_batches


def gathered(value):
    """Returns [value of each process], which json can write; a collective."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(data)))
    lines = multihost_utils.process_allgather(np.resize(data, int(sizes.max())))
    return [json.loads(bytes(line[:n])) for line, n in zip(lines, sizes, strict=True)]


def check_alike(what, value):
    """Raises ValueError on all hosts if they have different values, which json can write."""
    digests = [hashlib.sha256(json.dumps(v).encode()).hexdigest()[:12] for v in gathered(value)]
    if len(set(digests)) > 1:
        raise ValueError(
            f"hosts disagree about {what} (digests by process: {', '.join(digests)}), process "
            f"{jax.process_index()} has {json.dumps(value)[:1000]}; all of them need the same "
            "files: look for one that is not mounted, not whole, or of another version"
        )


class Feed(NamedTuple):
    """Batches of a run.

    Attributes:
      batches: iterator of `PackedBatch`; close it at the end.
      local: numbers of the rows of a step that a batch has here; None = all of them.
      identity: what the order of the data depends on, for checkpoints.
      ledger: of records that cannot be used.
      data: a `mix.Data`.
    """

    batches: object
    local: tuple | None
    identity: dict
    ledger: Ledger
    data: mix.Data

    @property
    def apart(self):
        """Whether each host has rows of its own."""
        return self.local is not None and jax.process_count() > 1

    @property
    def notes(self):
        """Lines for the log, on sources that are not there."""
        absent = self.data.absent
        names = ", ".join(absent)
        return [f"{len(absent)} sources are not there, left out are {names}"] if absent else []

    def record(self, packed):
        """Lists the bad records of a `PackedBatch`; raises above the quota if one host can tell."""
        self.ledger.extend(packed.bad, packed.repairs)
        if packed.bad and not self.apart:
            self.ledger.check()

    def health(self, position):
        """Returns the metrics of `Ledger.metrics` over all hosts; a collective.

        Raises:
          TooManyBadRecords: a source exceeds its quota, on all hosts at once.
          ValueError: the hosts have read to different positions, which the same files cannot cause.
        """
        if not self.apart:
            check_alike("where the data stand", position)
            self.ledger.check()
            return self.ledger.metrics()
        found = [[source, reason, n] for (source, reason), n in self.ledger.found.items()]
        hosts = gathered([found, self.ledger.repairs])
        self.ledger.elsewhere = collections.Counter()
        for process, (others, _) in enumerate(hosts):
            if process != jax.process_index():
                self.ledger.elsewhere += {(s, reason): n for s, reason, n in others}
        self.ledger.check()
        repairs = sum((collections.Counter(repairs) for _, repairs in hosts), collections.Counter())
        return self.ledger.metrics() | {f"repaired/{k}": n for k, n in sorted(repairs.items())}

    def place(self, mesh, batch, rows):
        """Returns a host `Batch` as global arrays of `rows` rows."""
        return jax.tree.map(partial(sharding.place_rows, mesh, local=self.local, rows=rows), batch)

    def totals(self, stats, rows):
        """Returns a list of `Stats` of `rows` rows each; a collective where hosts have their own.

        Rows that several hosts have, each some slots of them, count once.
        """
        if not self.apart:
            return stats
        table = np.array([jax.tree.leaves(dataclasses.astuple(s)) for s in stats], np.float64)
        summed = multihost_utils.process_allgather(table).sum(0)
        form = jax.tree.structure(dataclasses.astuple(stats[0]))
        copies = jax.process_count() * len(self.local) / rows
        every = [jax.tree.unflatten(form, list(line)) for line in summed / copies]
        fills = summed[:, -2:] / jax.process_count()
        return [Stats(*s[:-2], *fill) for s, fill in zip(every, fills, strict=True)]


def list_alike(ledger, source, found):
    """Lists bad records of a source that all hosts have found, so that they come to one verdict.

    Args:
      ledger: a `Ledger`.
      source: its name.
      found: {"id", "reason", "message"} each.
    """
    for bad in found:
        if jax.process_index():
            ledger.count(source, bad["id"], bad["reason"])
        else:
            ledger.record(source, bad["id"], bad["reason"], bad["message"])


def check_identity(saved, found, step, changed_at):
    """Returns whether the data go on where a checkpoint left them; False = they begin anew.

    Args:
      saved: {what: value} in the checkpoint.
      found: of this run.
      step: of the checkpoint.
      changed_at: of the config.

    Raises:
      ValueError: they differ, and the config does not say that they may from this step on.
    """
    other = sorted(k for k in saved.keys() | found.keys() if saved.get(k) != found.get(k))
    if not other:
        return True
    if changed_at == step:
        return False
    told = "; ".join(f"{k}: {saved.get(k)} there, {found.get(k)} here" for k in other)
    raise ValueError(
        f"the checkpoint of step {step} was trained on other data ({told}); use the data of "
        f"before, or give --config.data.changed_at={step} to go on with these, from their beginning"
    )


def listed(batches, ledger):
    """Yields batches; lists the bad records in front of which there was no good one any more."""
    try:
        yield from batches
    except NoGoodRecord as error:
        ledger.extend(error.bad, {})
        ledger.check()
        raise
    finally:
        batches.close()


def open_feed(run, budgets, mesh, saved, step, workdir):
    """Returns the `Feed` of a run.

    Args:
      run: a `build.Run`.
      budgets: of its buckets.
      mesh: the devices.
      saved: {"position", "identity"} of the checkpoint that is resumed, None at the start.
      step: of that checkpoint, 0 at the start.
      workdir: of the run, for the ledger.
    """
    if run.data.changed_at > step:
        raise ValueError(
            f"data.changed_at={run.data.changed_at} lies behind step {step}, where the run is: it "
            "is the step of the checkpoint from which other data count; set it to 0 for a new run"
        )
    data, config, rows = build.open_data(run), run.data, run.train.rows
    process = jax.process_index()
    role = "count" if process and not config.index else "write"  # without a plan all read the same
    # Before the first collective below: no host counts what another has written in this run.
    ledger = Ledger(workdir, data.sizes(), config.quota, process, role)
    how = dict(form=run.model.form, normalisation=config.normalisation)
    how |= dict(workers=config.workers, ahead=config.ahead, stall=config.stall)
    if not config.index:
        mixture, reader, identity = mix.streamed(data)
        check_alike("the data", identity)
        goes_on = saved and check_identity(
            saved.get("identity", {}), identity, step, config.changed_at
        )
        position = Position(*saved["position"]) if goes_on else Position()
        batches = packed_batches(
            mixture,
            reader,
            budgets,
            rows,
            pool=config.pool,
            position=position,
            quota=config.quota,
            **how,
        )
        batches = listed(prefetch(batches), ledger)
        return Feed(batches, None, identity, ledger, data)
    plan, reader, identity, indices = mix.planned(data, budgets, rows)
    check_alike("the data", identity)
    for name, index in zip(data.names, indices, strict=True):
        list_alike(ledger, name, index.bad())
    ledger.check()
    if saved and check_identity(saved.get("identity", {}), identity, step, config.changed_at):
        plan.first = Mark(*saved["position"])
    local = sharding.local_rows(mesh, rows)
    start = step - config.changed_at
    batches = planned_batches(plan, reader, budgets, local, start=start, **how)
    return Feed(batches, local, identity, ledger, data)
