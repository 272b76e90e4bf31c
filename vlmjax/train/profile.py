"""Traces of a few steps, which xprof and TensorBoard open: `train --profile FIRST:LAST`."""

import re

import jax


def parse(text):
    """Returns (first, last) of "FIRST:LAST", both traced; None for None."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(
            f"--profile={text!r} is not allowed: give the first and the last step to trace, "
            "counted from 1, as FIRST:LAST, e.g. --profile 10:12"
        )
    return int(found[1]), int(found[2])


def traced(steps, profile, folder):
    """Returns an iterator of `steps` that traces some of them, marked as steps, into `folder`.

    Args:
      steps: a range.
      profile: of `parse`.
      folder: for the trace.

    Steps that a resumed run has behind it are not traced again.

    Raises:
      ValueError: the run ends before the last step to trace.
    """
    if profile is None:
        return iter(steps)
    first, last = profile
    if last >= steps.stop:
        raise ValueError(
            f"--profile={first}:{last} is not allowed: this run ends with step {steps.stop - 1}; "
            "choose among its steps"
        )
    return _traced(steps, max(first, steps.start), last, folder)


def _traced(steps, first, last, folder):
    tracing = False
    try:
        for step in steps:
            if step == first <= last:
                jax.profiler.start_trace(folder)
                tracing = True
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                yield step
            if step == last and tracing:
                jax.block_until_ready(jax.live_arrays())  # the device lags behind
                jax.profiler.stop_trace()
                tracing = False
    finally:
        if tracing:
            jax.profiler.stop_trace()
