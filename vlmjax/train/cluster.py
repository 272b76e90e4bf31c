"""Several processes: joining them at the start, and leaving together when one is told to stop."""

import contextlib
import os
import signal
import socket
import sys
import traceback

import jax
from jax.experimental import multihost_utils

# Seconds: one process seals the last checkpoint, which may be 100 GB, while the others wait at the
# end; after jax's own 300 they would be killed, and it with them.
SHUTDOWN = dict(shutdown_timeout_seconds=3600)


def join(always=False):
    """Starts `jax.distributed` where there are several processes; call before any other use of jax.

    They are recognised by JAX_NUM_PROCESSES (with JAX_PROCESS_ID and JAX_COORDINATOR_ADDRESS, which
    say it all), by the variables of `srun`, `mpirun` or of a TPU job on GKE. One process alone is
    left alone: asking a cluster that is not there can take minutes.

    Args:
      always: lets jax look for the others whatever the variables say: those of a Cloud TPU slice
        are known to its metadata server only.
    """
    env = os.environ
    if "JAX_NUM_PROCESSES" in env:
        need = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
        missing = [name for name in need if name not in env]
        if missing:
            raise ValueError(
                f"JAX_NUM_PROCESSES={env['JAX_NUM_PROCESSES']} is set, {', '.join(missing)} not; "
                "set all three or none"
            )
        address, num, process_id = (env[name] for name in need)
        jax.distributed.initialize(address, int(num), int(process_id), **SHUTDOWN)
        return
    counts = "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES"
    several = any(int(env.get(name, 1)) > 1 for name in counts)
    if always or several or "," in env.get("TPU_WORKER_HOSTNAMES", ""):
        jax.distributed.initialize(**SHUTDOWN)


@contextlib.contextmanager
def leave_on_error():
    """Ends the process at once where something is raised in one of several.

    At its exit jax would wait for the others, up to `SHUTDOWN`, while these wait for it inside a
    collective. Once it is gone, jax ends them when it misses its heartbeat: after 100 seconds.
    """
    try:
        yield
    except BaseException:
        if not jax.distributed.is_initialized():  # the backend may be what failed: ask it nothing
            raise
        traceback.print_exc()
        print(
            f"the process {os.getpid()} of {socket.gethostname()} ends with this error; jax ends "
            "the others in about two minutes",
            file=sys.stderr,
        )
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


@contextlib.contextmanager
def preemption():
    """Yields f(step) -> whether to save and leave after this step, because of a SIGTERM.

    Every process asks at every step and gets the same answer, whichever of them was told.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    told = []
    previous = signal.signal(signal.SIGTERM, lambda *_: told.append(True))
    try:
        yield lambda step: bool(told)
    finally:
        signal.signal(signal.SIGTERM, previous)
