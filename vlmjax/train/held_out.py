"""The loss on held-out records, measured between the steps of a run."""

import itertools
import math
import time

import jax
import numpy as np

from vlmjax import build, sharding
from vlmjax.batch import Budget
from vlmjax.data import held_out
from vlmjax.data.loading import load
from vlmjax.data.reader import join_rows
from vlmjax.train.feed import check_alike, gathered, list_alike
from vlmjax.train.program import batch_shapes
from vlmjax.train.watch import Diverged


class HeldOutLoss:
    """metrics = held_out(state, step): those of a step where they are due, {} of others.

    The records are packed as training packs them, so many rows at a time as one micro-batch has,
    which takes no more memory than a step. Each host loads rows of its own, with as many workers as
    training has; the first rows of the next round are always ready. Use as a context manager.
    """

    def __init__(self, run, budgets, mesh, program, feed, start, say):
        """Finds the records, plans their rows and compiles the program; nothing if none is due.

        Args:
          run: a `build.Run`.
          budgets: of its buckets.
          mesh: the devices.
          program: a `Program`.
          feed: a `Feed`, for its sources and its ledger.
          start: steps that are done.
          say: function of a line.

        Raises:
          ValueError: there are no held-out records, or the hosts have others.
        """
        self.every, self.last, self.packed = run.eval.every, run.train.steps, None
        if not self.every or start >= self.last:
            return
        self.mesh, self.ledger, began = mesh, feed.ledger, time.monotonic()
        self.num_rows, budget = run.train.rows // run.train.accumulate, Budget.largest(budgets)
        parts, sizes = self._measured(build.open_held_out(run, feed.data), budget)
        self.local = sharding.local_rows(mesh, self.num_rows)
        self.place = feed._replace(local=self.local).place
        rows = held_out.Rounds(parts, sizes, budget, self.num_rows, self.local, run.model.form)
        self.steps = {part.name: n for part, n in zip(parts, rows.steps, strict=True)}
        shapes = batch_shapes(run, budget, mesh, self.num_rows)
        self.measure = program.measure.lower(program.state, shapes).compile()
        how = run.data
        self.packed = load(rows, workers=how.workers, ahead=how.ahead, stall=how.stall)
        say(
            f"every {self.every} steps the loss of {sum(map(len, sizes))} held-out records of "
            f"{len(parts)} sources is measured, in {sum(rows.steps)} batches of {self.num_rows} "
            f"rows; ready after {time.monotonic() - began:.1f} s"
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.packed is not None:
            self.packed.close()

    def _measured(self, parts, budget):
        """Returns (`HeldOut`s of the usable records, their sizes); lists the other records."""
        parts, sizes, bad = zip(*(held_out.measured(part, budget) for part in parts), strict=True)
        found = [[p.name, p.source.fingerprint, p.records.tolist()] for p in parts]
        check_alike("the held-out records", [found, [s.tolist() for s in sizes]])
        for part, listed in zip(parts, bad, strict=True):
            size = len(part.source) if hasattr(part.source, "__len__") else math.inf
            self.ledger.sizes.setdefault(part.name, size)
            list_alike(self.ledger, part.name, listed)
        self.ledger.check()
        return parts, sizes

    def __call__(self, state, step):
        """Returns the metrics of a step: "held_out_loss" in nats per supervised token, the same of
        each source, "held_out_seconds" that they took; a collective.

        Raises:
          Diverged: a loss is not a number.
        """
        if not self.every or (step % self.every and step != self.last):
            return {}
        began, bad = time.monotonic(), []
        sums = {}
        for name, steps in self.steps.items():
            values = []
            for _ in range(steps):
                packed = list(itertools.islice(self.packed, len(self.local)))
                bad += [one for row in packed for one in row.bad]
                batch = self.place(self.mesh, join_rows(packed)[0], self.num_rows)
                jax.block_until_ready(values[-1:])  # no more than one batch waits for the device
                values.append(self.measure(state, batch))
            sums[name] = np.sum(jax.device_get(values), 0)
        for source, id, reason, message in itertools.chain(*gathered(bad)):
            list_alike(self.ledger, source, [dict(id=id, reason=reason, message=message)])
        sums = {"": sum(sums.values())} | {f"/{name}": both for name, both in sums.items()}
        found = {f"held_out_loss{k}": float(loss / n) for k, (loss, n) in sums.items() if n}
        if wrong := {k: v for k, v in found.items() if not math.isfinite(v)}:
            raise Diverged(
                f"after step {step} a held-out loss is not a number, {wrong}; training stopped. If "
                "the loss of training is well, look at the held-out records of that source; "
                "otherwise delete the newest checkpoint and lower the learning rate"
            )
        return found | {"held_out_seconds": time.monotonic() - began}
