"""Rows made ahead of time, in order, by a thread or by worker processes that cannot hang a run.

A worker is a python of its own, neither a fork nor a copy of `__main__`, so it never sees jax. What
it makes comes back as an anonymous file in memory that both sides map: arrays are not copied
through a pipe, nothing has a name that could be left behind, and no limit of /dev/shm applies.
grain 0.2.18 was measured first: its workers import jax (first row after 3 to 7 s), one that stalls
was no error within 25 s, and segments stayed in /dev/shm.
"""

import collections
import ctypes
import faulthandler
import itertools
import math
import mmap
import os
import pickle
import queue
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from multiprocessing import reduction
from multiprocessing.connection import Connection, Pipe, wait

INLINE = 1 << 16  # bytes that go through the pipe, which holds more
ALIGN = 64  # of arrays in a file
# Processes are the parallelism: libraries inside one must not start a thread for each core.
ONE_THREAD = {
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    "TOKENIZERS_PARALLELISM": "false",
}


class WorkerFailure(RuntimeError):
    """What makes rows died or does not come back; says which row, and the stack as far as known."""


def load(rows, start=0, *, keys=None, workers=0, ahead=8, stall=300.0):
    """Returns an iterator of rows[start], rows[start + 1], ..., up to len(rows) where there is one.

    Order and content do not depend on `workers`. Work begins at once. An exception of rows[i] is
    raised where row i would come, with the stack of the worker as a note. To stop early, drop the
    iterator or call its `close()`: the processes are gone then.

    Args:
      rows: picklable where there are workers, with classes from importable modules; rows[i] is a
        pure function of i and gives anything picklable, e.g. a NamedTuple of arrays.
      start: the first row.
      keys: what is asked for instead of numbers, in order: rows[key] for each. It is iterated
        while the rows are made, `ahead` of what has come, perhaps in another thread.
      workers: processes; 0 = a thread of this one.
      ahead: rows that are made before they are asked for; at least one a worker.
      stall: seconds without a row after which the worker (or thread) that is to bring the next one
        counts as lost, a `WorkerFailure`.
    """
    if workers < 0 or ahead < 1 or not stall > 0 or start < 0:
        raise ValueError(
            f"start={start}, workers={workers}, ahead={ahead}, stall={stall}: start and workers "
            "may not be negative, ahead is at least 1 and stall above 0 seconds; correct the config"
        )
    if keys is None:
        keys = range(start, len(rows)) if hasattr(rows, "__len__") else itertools.count(start)
    if not workers:
        return prefetch((rows[key] for key in keys), ahead, stall)
    items = _from_processes(rows, iter(keys), workers, max(ahead, workers), stall)
    next(items)  # starts the workers
    return items


def prefetch(iterator, depth=2, stall=math.inf):
    """Returns an iterator over the same items, made `depth` ahead in a thread; errors are raised.

    After `stall` seconds without an item it raises a `WorkerFailure` with the thread's stack.
    """
    items = _from_thread(iterator, depth, stall)
    next(items)  # starts the thread
    return items


def _from_thread(iterator, depth, stall):
    ready, stop = queue.Queue(depth), threading.Event()

    def put(item):
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.2)
            except queue.Full:
                continue
        return None

    def work():
        try:
            for item in iterator:
                put((item, None))
                if stop.is_set():
                    break
            else:
                put((None, StopIteration()))
        except BaseException as e:  # handed to the consumer, which raises it
            put((None, e))
        finally:
            if hasattr(iterator, "close"):
                iterator.close()

    thread = threading.Thread(target=work, daemon=True, name="vlmjax-data")
    thread.start()
    try:
        yield None
        while True:
            try:
                item, error = ready.get(timeout=None if math.isinf(stall) else stall)
            except queue.Empty:
                frame = sys._current_frames().get(thread.ident)
                raise WorkerFailure(
                    f"the data thread made nothing for {stall:g} s; {STALLED}. Its stack:\n"
                    + "".join(traceback.format_stack(frame))
                ) from None
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()


STALLED = (
    "a file system that does not answer, or a row that takes longer: look at the stack, and raise "
    "data.stall if it only needs more time"
)


def _from_processes(rows, numbers, workers, ahead, stall):
    """Yields None once the workers are started, then the rows."""
    crew, waiting, done = [], collections.deque(), {}

    def ask():
        for number in itertools.islice(numbers, ahead - len(waiting)):
            worker = min(crew, key=lambda w: len(w.asked))
            worker.ask(number)
            waiting.append((number, worker))

    try:
        with _anonymous_file() as setup:
            pickle.dump(rows, setup)
            setup.flush()
            for number in range(workers):
                crew.append(_Worker(number, setup.fileno()))
        ask()
        yield None
        while waiting:
            number, worker = waiting.popleft()
            _receive(crew, done, number, worker, stall)
            kind, value = done.pop(number)
            if kind == "error":
                raise value
            ask()
            yield value
            del value
    finally:
        for worker in crew:
            worker.process.kill()
        for worker in crew:
            worker.close()


def _receive(crew, done, number, worker, stall):
    """Moves what workers have made to `done` until row `number`, which `worker` makes, is there."""
    connections = {w.connection: w for w in crew}
    deadline = time.monotonic() + stall
    while number not in done:
        ready = wait(connections, max(0, deadline - time.monotonic()))
        if not ready:
            raise WorkerFailure(
                f"data worker {worker.number} (process {worker.process.pid}) made nothing for "
                f"{stall:g} s, it is at row {worker.asked[0]}; {STALLED}. Its stack:\n"
                f"{worker.stack()}"
            )
        for connection in ready:
            made, outcome = connections[connection].take()
            done[made] = outcome
        if worker.connection in ready:
            deadline = time.monotonic() + stall


class _Worker:
    """A process that makes rows, as the parent sees it; `asked` are the numbers not yet made."""

    def __init__(self, number, setup):
        self.number, self.asked = number, collections.deque()
        self.connection, theirs = Pipe()
        self.stacks = _anonymous_file()
        files = (theirs.fileno(), setup, self.stacks.fileno())
        code = f"from vlmjax.data.loading import serve; serve{files}"
        path = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                pass_fds=files,
                env=os.environ | ONE_THREAD | {"PYTHONPATH": path},
                process_group=0,  # Ctrl-C is for the parent, which ends its workers
            )

    def ask(self, number):
        self.asked.append(number)
        try:
            self.connection.send(number)
        except OSError:
            raise self._death() from None

    def take(self):
        """Returns (number, ("row" or "error", value)) of what it has made; waits for it."""
        try:
            number, kind, body, spans = self.connection.recv()
            if body is None:
                file = reduction.recv_handle(self.connection)
                body = mmap.mmap(file, spans[-1][1])
                os.close(file)
        except (EOFError, OSError):
            raise self._death() from None
        assert number == self.asked.popleft()
        view = memoryview(body)
        head, *buffers = (view[begin:end] for begin, end in spans)
        value = pickle.loads(head, buffers=buffers)
        if kind == "error":
            value, stack = value
            value.add_note(f"Row {number}, in data worker {self.number}:\n{stack}")
        return number, (kind, value)

    def stack(self):
        """Returns the stack of its threads now, or what is left of it in a crash."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGUSR1)
            for _ in range(20):
                time.sleep(0.1)
                if os.fstat(self.stacks.fileno()).st_size:
                    break
        self.stacks.seek(0)
        return self.stacks.read().decode(errors="replace") or "unknown, the process did not answer"

    def _death(self):
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            code = None
        how = f"ended with exit code {code}"
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            how += " (as the kernel does when memory runs out: fewer workers, a smaller data.ahead)"
        return WorkerFailure(
            f"data worker {self.number} (process {self.process.pid}) {how} before it made rows "
            f"{list(self.asked)}; see what it printed above. Its stack:\n{self.stack()}"
        )

    def close(self):
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:  # a dead file system holds it; it ends with that
            self.process.returncode = -signal.SIGKILL
        self.connection.close()
        self.stacks.close()


def _anonymous_file():
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("vlmjax-rows"), "w+b")
    return tempfile.TemporaryFile()


def keep_memory():
    """Has glibc keep up to 256 MiB that were freed for what comes next; elsewhere does nothing.

    Else it returns the arrays of every picture, and the kernel clears those of the next: a fifth of
    the time that a sample takes.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    mallopt(mmap_threshold, 32 << 20)  # the most it takes
    mallopt(trim_threshold, 256 << 20)


def serve(connection, setup, stacks):
    """Makes the rows that are asked for until the parent is gone; the body of a worker.

    Args:
      connection: file descriptor of the pipe to the parent.
      setup: of a file that holds the pickled rows.
      stacks: of a file to write stacks to, on SIGUSR1 and in a crash.
    """
    keep_memory()
    faulthandler.enable(stacks)
    faulthandler.register(signal.SIGUSR1, stacks)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY:  # sources may have thousands of shards
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    connection, rows = Connection(connection), None
    while True:
        try:
            number = connection.recv()
        except (EOFError, OSError):
            return
        kind = "row"
        try:
            if rows is None:
                with mmap.mmap(setup, 0, access=mmap.ACCESS_READ) as pickled:
                    rows = pickle.loads(pickled)
            parts = _pickled(rows[number])
        except Exception as error:
            kind, parts = "error", _pickled_error(error)
        try:
            _send(connection, number, kind, parts)
        except OSError:
            return
        del parts


def _pickled(value):
    """Returns the pickle of a value and the memory of its arrays, which it leaves out."""
    buffers = []
    head = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return [head, *(buffer.raw() for buffer in buffers)]


def _pickled_error(error):
    stack = "".join(traceback.format_exception(error))
    try:
        parts = _pickled((error, stack))
        pickle.loads(parts[0], buffers=parts[1:])
        return parts
    except Exception:  # an exception of a library that does not come through a pickle
        return _pickled((RuntimeError(f"{type(error).__name__}: {error}"), stack))


def _send(connection, number, kind, parts):
    spans, end = [], 0
    for part in parts:
        begin = -(-end // ALIGN) * ALIGN
        end = begin + len(part)
        spans.append((begin, end))
    if end <= INLINE:
        body = bytearray(end)
        for part, (begin, stop) in zip(parts, spans, strict=True):
            body[begin:stop] = part
        connection.send((number, kind, body, spans))
        return
    with _anonymous_file() as file:
        for part, (begin, _) in zip(parts, spans, strict=True):
            file.write(bytes(begin - file.tell()))
            file.write(part)
        file.flush()
        connection.send((number, kind, None, spans))
        reduction.send_handle(connection, file.fileno(), os.getppid())
