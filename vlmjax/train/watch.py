"""What becomes of a step that went wrong: the run stops, or goes on without its update."""

import math

import numpy as np

MOST = 10  # steps in a row that are left out before the run stops


class Diverged(ValueError):
    """A loss or gradient became NaN or infinite, or too many steps in a row were left out; names
    the step and the records in its batch."""


class Watch:
    """The losses of a session by step; those of steps that were left out are not among them."""

    def __init__(self):
        self.losses, self.left_out = {}, []

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
            self.left_out.append(step)
            found = ", ".join(f"{k} is {v:.4g}" for k, v in shown.items())
            said = f"step {step} was left out: {found}; the records of its batch: {', '.join(ids)}"
            if self.left_out[-MOST - 1 :] == list(range(step - MOST, step + 1)):
                raise Diverged(
                    f"{said}. It is the {MOST + 1}th in a row, {MOST} are allowed: raise "
                    "optim.skip_above, lower the learning rate, or delete the newest checkpoints"
                )
            return said
        bad = {k: v for k, v in shown.items() if not math.isfinite(v)}
        if bad:
            raise Diverged(
                f"{', '.join(f'{k} is {v}' for k, v in bad.items())} at step {step}; training "
                "stopped, this step is not saved. The steps before it may have done the damage: if "
                "a resumed run ends here again, delete the newest checkpoint. The records of that "
                f"batch: {', '.join(ids)}. Lower the learning rate, set optim.clip='global_norm', "
                "leave such steps out with optim.skip_above=inf, or look at these records"
            )
        self.losses[step] = shown["loss"]
        return None

    def since(self, step):
        """Returns the metrics of the steps behind this one: mean loss, how many were left out."""
        losses = [loss for done, loss in self.losses.items() if done > step]
        left_out = sum(done > step for done in self.left_out)
        return {"loss": float(np.mean(losses)) if losses else None, "skipped": left_out}
