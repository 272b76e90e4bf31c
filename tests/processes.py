"""Real processes on one machine, joined by jax.distributed; CPU collectives go through gloo."""

import os
import socket
import subprocess
import sys


def start(folder, code, args, num, devices):
    """Starts `num` processes with so many devices together, each with a log in `folder`."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "JAX_NUM_CPU_DEVICES": str(devices // num),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(num),
    }
    command, processes = [sys.executable, "-c", code, *map(str, args)], []
    for i in range(num):
        here = env | {"JAX_PROCESS_ID": str(i)}
        with open(folder / f"log{i}", "w") as log:
            processes.append(subprocess.Popen(command, env=here, stdout=log, stderr=log))
    return processes


def finish(folder, processes):
    """Waits for all; a failed one fails the test with the end of its log."""
    try:
        for i, process in enumerate(processes):
            assert process.wait(timeout=300) == 0, (folder / f"log{i}").read_text()[-3000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()
