"""Traces: written for the steps asked for, readable, marked as steps; bad choices are refused."""

import subprocess
import sys

import jax
import pytest

from vlmjax.train.profile import parse, traced


def read_traces(workdir):
    files = list((workdir / "profile" / "plugins" / "profile").glob("*/*.xplane.pb"))
    return [jax.profiler.ProfileData.from_file(str(file)) for file in files]


def run(code, folder):
    """Runs code in a process of its own: where a test has loaded libtpu, the profiler crashes."""
    head = f"import sys; sys.path[:0] = {sys.path!r}; from pathlib import Path\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{head}folder = Path({str(folder)!r})\n{code}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


TRAIN = """
from tiny import tiny_config
from vlmjax.train import loop
config = tiny_config(folder, train__steps=4, lr=(("connector/.*", 1e-3), (".*", None)))
loop.train(config, folder / "run", profile=(2, 3))
"""
LEAVE = """
from vlmjax.train.profile import traced
for _ in traced(range(1, 9), (1, 5), folder / "profile"):
    break
"""


@pytest.mark.slow
def test_trace_holds_the_steps_asked_for(tmp_path):
    run(TRAIN, tmp_path)
    (trace,) = read_traces(tmp_path / "run")
    events = [e for plane in trace.planes for line in plane.lines for e in line.events]
    steps = [dict(e.stats)["step_num"] for e in events if e.name == "train"]
    assert steps == [2, 3]
    assert any("dot" in e.name for e in events)  # what the device ran


def test_trace_ends_with_the_run(tmp_path):
    """Also when the loop is left inside it, as by a SIGTERM."""
    run(LEAVE, tmp_path)
    assert len(read_traces(tmp_path)) == 1


def test_no_steps_to_trace():
    assert parse(None) is None
    assert list(traced(range(3, 6), None, "nowhere")) == [3, 4, 5]


@pytest.mark.parametrize("text", ["5", "3:2", "0:4", "a:b", "1:2:3", "-1:2", ""])
def test_bad_ranges_are_refused(text):
    with pytest.raises(ValueError, match="FIRST:LAST, e.g. --profile 10:12"):
        parse(text)


def test_steps_that_are_not_run_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--profile=2:9 .* this run ends with step 6"):
        traced(range(4, 7), parse("2:9"), tmp_path)


def test_a_resumed_run_does_not_trace_what_is_behind_it(tmp_path):
    assert list(traced(range(4, 7), parse("2:3"), tmp_path / "trace")) == [4, 5, 6]
    assert not (tmp_path / "trace").exists()
