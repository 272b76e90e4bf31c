"""What becomes of a step that went wrong: the run stops, or goes on without its update."""

import math
from collections import deque

import numpy as np

ENDS = 20  # losses at either end of a session that its summary is of
MOST = 10  # steps in a row that are left out before the run stops


class Diverged(ValueError):
    """A metric became NaN or infinite, or too many steps in a row were left out; names
    the step and the records in its batch."""


class Watch:
    """The losses of a session; those of steps that were left out are not among them."""

    def __init__(self):
        self.num, self.first, self.last = 0, [], deque(maxlen=ENDS)
        self.losses, self.left_out = [], 0  # since the last line
        self.row = 0  # of steps left out, up to now

    def see(self, step, values, ids):
        """Takes the metrics of a step, in order, and the ids of its records.

        Returns:
          A line about a step that `optim.skip_above` left out; None for others.

        Raises:
          Diverged: what is not a number was not left out, or it is the last of `MOST` + 1.
        """
        names = ["loss", *(k for k in values if k.startswith("grad_norm/"))]
        shown = {k: float(values[k]) for k in names}
        if values.get("skipped"):
            self.left_out += 1
            self.row += 1
            found = ", ".join(f"{k} is {v:.4g}" for k, v in shown.items())
            said = f"step {step} was left out: {found}; the records of its batch: {', '.join(ids)}"
            if self.row > MOST:
                raise Diverged(
                    f"{said}. It is the {MOST + 1}th in a row, {MOST} are allowed: raise "
                    "optim.skip_above, lower the learning rate, or delete the newest checkpoints"
                )
            return said
        bad = {k: float(v) for k, v in values.items() if not math.isfinite(v)}
        if bad:
            raise Diverged(
                f"{', '.join(f'{k} is {v}' for k, v in bad.items())} at step {step}; training "
                "stopped, this step is not saved. The steps before it may have done the damage: if "
                "a resumed run ends here again, delete the newest checkpoint. The records of that "
                f"batch: {', '.join(ids)}. Lower the learning rate, set optim.clip='global_norm', "
                "leave such steps out with optim.skip_above=inf, or look at these records"
            )
        self.num, self.row = self.num + 1, 0
        for losses in (self.losses, self.last, *[self.first] * (self.num <= ENDS)):
            losses.append(shown["loss"])
        return None

    def line(self):
        """Returns the metrics of the steps since the last line: mean loss, number left out."""
        mean = float(np.mean(self.losses)) if self.losses else None
        found = {"loss": mean, "skipped": self.left_out}
        self.losses, self.left_out = [], 0
        return found

    def ends(self):
        """Returns the mean of the first and of the last losses, at most half of all; None for
        none."""
        if not self.num:
            return None
        part = max(min(ENDS, self.num // 2), 1)
        return float(np.mean(self.first[:part])), float(np.mean(list(self.last)[-part:]))
