"""Rows from threads and processes: order, transport, and every way in which a worker can fail."""

import os
import resource
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np
import pytest

from vlmjax.data.health import BadRecord
from vlmjax.data.loading import WorkerFailure, load, prefetch


class Row(NamedTuple):
    number: int
    big: np.ndarray
    small: dict


class Rows:
    """Rows that take a random time, and what is odd about one of them."""

    def __init__(self, size=12, odd=None, at=5, seconds=0.02):
        self.size, self.odd, self.at, self.seconds = size, odd, at, seconds

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        rng = np.random.default_rng(i)
        time.sleep(self.seconds * rng.random())
        if self.odd and i == self.at:
            getattr(self, self.odd)(i)
        big = rng.integers(0, 256, (i + 1, 40_000), np.uint8)
        return Row(i, big, {"id": (f"r{i}", None), "kept": np.arange(i, dtype=np.float32)})

    def bad(self, i):
        raise BadRecord("too_long", f"row {i} is bad")

    def unpicklable(self, i):
        error = ValueError("holds a lock")
        error.lock = sys._getframe()
        raise error

    def killed(self, i):
        os.kill(os.getpid(), signal.SIGKILL)

    def crash(self, i):
        os.kill(os.getpid(), signal.SIGSEGV)

    def left(self, i):
        sys.exit(3)

    def stalled(self, i):
        self.hang_here()

    def hang_here(self):
        time.sleep(1000)


class Endless:
    def __getitem__(self, i):
        return i


class Inside:
    """What a worker sees of its process."""

    def __getitem__(self, i):
        return (
            os.getpid(),
            [m for m in ("jax", "torch", "grain") if m in sys.modules],
            {**os.environ},
        )


def processes_of(items):
    return [worker.process for worker in items.gi_frame.f_locals["crew"]]


@pytest.mark.parametrize("workers,start", [(0, 0), (1, 0), (2, 7), (4, 0)])
def test_rows_come_in_order_and_are_the_same(workers, start):
    rows = Rows()
    items = list(load(rows, start, workers=workers, ahead=3))
    assert [type(item) for item in items] == [Row] * (12 - start)
    for i, item in enumerate(items, start):
        assert item.number == i and item.small["id"] == (f"r{i}", None)
        np.testing.assert_array_equal(item.big, rows[i].big)
        np.testing.assert_array_equal(item.small["kept"], rows[i].small["kept"])
        item.big[:] = 0  # each row is the consumer's own


def test_rows_may_be_without_end():
    for workers in (0, 1):
        items = load(Endless(), 5, workers=workers)
        assert [next(items) for _ in range(3)] == [5, 6, 7]
        items.close()


def test_workers_are_busy_while_the_consumer_is():
    items = load(Rows(seconds=0), workers=1, ahead=4)
    next(items)
    time.sleep(0.5)
    began = time.monotonic()
    for _ in range(4):
        next(items)
    assert time.monotonic() - began < 0.2


@pytest.mark.parametrize("workers", (0, 2))
def test_an_exception_comes_where_its_row_would(workers):
    items = load(Rows(odd="bad"), workers=workers, ahead=6)
    assert [next(items).number for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(BadRecord, match="row 5 is bad") as caught:
        next(items)
    assert caught.value.reason == "too_long"
    if workers:
        assert "in bad" in caught.value.__notes__[0] and "Row 5, in data worker" in str(
            caught.value.__notes__
        )
    with pytest.raises(StopIteration):
        next(items)


def test_an_exception_that_cannot_be_sent_is_described():
    items = load(Rows(odd="unpicklable", at=0), workers=1)
    with pytest.raises(RuntimeError, match="ValueError: holds a lock") as caught:
        next(items)
    assert "in unpicklable" in caught.value.__notes__[0]


def test_rows_that_do_not_unpickle_are_an_error():
    items = load(Hidden(), workers=1)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        next(items)


class Hidden:
    def __reduce__(self):
        return __import__, ("no_such_module",)


@pytest.mark.parametrize(
    "odd,how",
    [
        ("killed", "killed by SIGKILL.*memory.*fewer workers"),
        ("crash", "(?s)killed by SIGSEGV.*in crash"),
        ("left", "ended with exit code 3"),
    ],
)
def test_a_dead_worker_is_an_error(odd, how):
    items = load(Rows(odd=odd), workers=2, ahead=2)
    began = time.monotonic()
    with pytest.raises(WorkerFailure, match=how):
        list(items)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("workers", (0, 2))
def test_a_stalled_worker_is_an_error_with_its_stack(workers):
    items = load(Rows(odd="stalled", at=3), workers=workers, stall=8.0)
    crew = processes_of(items) if workers else []
    got = []
    with pytest.raises(WorkerFailure, match="(?s)nothing for 8 s.*data.stall.*in hang_here"):
        for item in items:
            got.append(item.number)
    assert got == [0, 1, 2]
    assert all(process.poll() is not None for process in crew)


def test_slow_rows_are_no_stall():
    items = load(Rows(size=3, seconds=1.5), workers=2, ahead=3, stall=6.0)
    next(items)
    time.sleep(1)  # nor is a consumer that is busy
    assert len(list(items)) == 2


@pytest.mark.parametrize("how", ["close", "drop", "end", "throw"])
def test_nothing_is_left_behind(how):
    shared, files = set(os.listdir("/dev/shm")), len(os.listdir("/proc/self/fd"))
    items = load(Rows(seconds=0.2), workers=2)
    crew, first = processes_of(items), next(items)
    if how == "close":
        items.close()
    elif how == "end":
        list(items)
    elif how == "throw":
        with pytest.raises(KeyboardInterrupt):
            items.throw(KeyboardInterrupt)
    else:
        del items
    assert all(process.poll() is not None for process in crew)
    assert set(os.listdir("/dev/shm")) <= shared
    del first
    assert len(os.listdir("/proc/self/fd")) <= files


def test_a_worker_has_no_jax_and_one_thread():
    pid, found, environment = next(load(Inside(), workers=1))
    assert pid != os.getpid() and not found
    assert environment["OMP_NUM_THREADS"] == "1"


class Limits:
    def __getitem__(self, i):
        return resource.getrlimit(resource.RLIMIT_NOFILE)


def test_a_worker_may_open_as_many_files_as_the_system_lets_it():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        assert next(load(Limits(), workers=1)) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_workers_end_with_their_parent(tmp_path, name):
    script = tmp_path / "parent.py"
    script.write_text(
        f"import signal, sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "from test_loading import *\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # the shell may ignore it\n"
        "items = load(Rows(size=10**6), workers=2)\n"
        "next(items)\n"
        "print(*[p.pid for p in processes_of(items)], flush=True)\n"
        "for _ in items: pass\n"
    )
    parent = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    pids = list(map(int, parent.stdout.readline().split()))
    assert len(pids) == 2
    parent.send_signal(getattr(signal, name))
    try:
        errors = parent.communicate(timeout=20)[1]
    finally:
        parent.kill()
    assert errors.count("Traceback") == (name == "SIGINT")  # one, of the parent
    for _ in range(50):
        if not any(running(pid) for pid in pids):
            break
        time.sleep(0.1)
    assert not any(running(pid) for pid in pids)


def running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_settings_are_checked():
    for settings in (dict(workers=-1), dict(ahead=0), dict(stall=0), dict(start=-1)):
        with pytest.raises(ValueError, match="correct the config"):
            load(Rows(), **settings)


def test_an_error_in_the_data_thread_is_raised_here():
    def bad():
        yield 1
        raise OSError("disk gone")

    items = prefetch(bad())
    assert next(items) == 1
    with pytest.raises(OSError, match="disk gone"):
        next(items)


def test_prefetch_closes_what_it_reads():
    inner = load(Endless(), workers=1)
    (process,), items = processes_of(inner), prefetch(inner)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    items.close()
    process.wait(5)
