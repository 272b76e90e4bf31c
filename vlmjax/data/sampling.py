"""Which frames of a video are shown, from presentation times alone.

A sampler takes the sorted times (exact fractions, in seconds) of all frames and the time at which
the last one ends, and returns the indices of the chosen frames, ascending, with the timestamps to
show.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from fractions import Fraction

MIN_FRAMES = 4  # of the transformers rule


def _cut(times, end, start, stop):
    """Returns (first, last, end) of the frames shown in [start, stop)."""
    first = 0 if start is None else bisect_left(times, Fraction(start))
    last = len(times) if stop is None else bisect_left(times, Fraction(stop))
    if first >= last:
        raise ValueError(
            f"no frame between {start} s and {stop} s, frames are shown from "
            f"{float(times[0]):.2f} s to "
            f"{float(end):.2f} s: correct the start and end time"
        )
    return first, last, end if stop is None else min(end, Fraction(stop))


def last_of_second(
    times: Sequence[Fraction],
    stop: Fraction,
    *,
    fps: float,
    max_frames: int,
    rate: Fraction | None = None,
    offset: Fraction | None = None,
    start: float | None = None,
    end: float | None = None,
) -> tuple[list[int], list[float]]:
    """Chooses as the ffmpeg filter fps=FPS:round=down does: the last frame shown in each period of
    1/fps seconds.

    Period k holds the times with floor((time - offset) * fps) == k; a period without a frame
    repeats the one before; the last period counts only if the video lasts to its end. Timestamps
    are those of the period starts, start + k / fps. More than `max_frames` are thinned by a
    truncated linspace.

    Args:
      times: ascending times of all frames.
      stop: time at which the last frame ends.
      fps: periods a second.
      max_frames: most frames returned.
      rate: unused, times say it all.
      offset: start of the file in seconds where it is earlier than the first frame (sound before
        picture).
      start, end: part of the file in seconds.
    """
    del rate
    fps = Fraction(fps).limit_denominator(100_000)
    first, last, stop = _cut(times, stop, start, end)
    origin = zero = times[0]
    if offset is not None and offset < origin - Fraction(1, 1000):
        origin = offset
    if start is not None and Fraction(start) > zero:
        origin = zero = Fraction(start)
    periods = [math.floor((time - origin) * fps) for time in times[first:last]]
    count = math.floor((stop - origin) * fps) - periods[0]
    if count < 1:
        raise ValueError(
            f"lasts {float(stop - times[first]):.2f} s, last_of_second needs at least one period "
            f"of {float(1 / fps):g} s:"
            " raise fps or use frame_sampling='transformers'"
        )
    kept = _thin(count, max_frames)
    chosen = [first + bisect_right(periods, periods[0] + k) - 1 for k in kept]
    return chosen, [float(zero + k / fps) for k in kept]


def transformers(
    times: Sequence[Fraction],
    stop: Fraction,
    *,
    fps: float,
    max_frames: int,
    rate: Fraction | None = None,
    offset: Fraction | None = None,
    start: float | None = None,
    end: float | None = None,
) -> tuple[list[int], list[float]]:
    """Chooses as transformers' VideoLLaMA3 video processor does: frame floor(k * total / n), k =
    0..n-1.

    n = total / rate * fps, at least 4 and at most `max_frames` and the total. Timestamps are the
    presentation times counted from the first frame of the file.
    """
    del offset
    first, last, stop = _cut(times, stop, start, end)
    total = last - first
    rate = rate or total / (stop - times[first])
    wanted = total / rate * Fraction(fps).limit_denominator(100_000)
    count = math.floor(min(max(wanted, MIN_FRAMES), max_frames, total))
    chosen = [first + k * total // count for k in range(count)]
    return chosen, [float(times[k] - times[0]) for k in chosen]


SAMPLERS = {"last_of_second": last_of_second, "transformers": transformers}


def _thin(count: int, most: int) -> list[int]:
    """Returns 0..count-1, or `most` of them by numpy's truncated linspace."""
    if count <= most:
        return list(range(count))
    if most == 1:
        return [0]
    return [k * (count - 1) // (most - 1) for k in range(most)]
