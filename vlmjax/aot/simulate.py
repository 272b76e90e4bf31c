"""Cycles of Pallas kernels by the simulator inside libtpu.

It runs the final bundles of a kernel in their static order. Run-time scalars read as 0, so a grid
or a loop that depends on data looks impossibly fast: simulate a twin with constants in their place.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from vlmjax.aot.topology import ENVIRONMENT


def simulated_cycles(script, kernels, *arguments):
    """Returns {kernel: cycles} of kernels that a python script compiles for a TPU topology.

    The simulator can abort its process, so the script runs in one of its own.

    Args:
      script: file that compiles them, ahead of time.
      kernels: names in the compiled program, with their number: "attend.1".
      arguments: of the script.

    Raises:
      ValueError: a kernel has no cycles; with the end of what the script said.
    """
    cycles = {}
    for kernel in kernels:  # the simulator's filter takes one exact name
        with tempfile.TemporaryDirectory() as folder:
            options = (
                f"--xla_jf_dump_static_llo_profile_to={folder} "
                f"--xla_jf_dump_only_matching_hlo={kernel}"
            )
            environment = {**ENVIRONMENT, "JAX_PLATFORMS": "cpu", **os.environ}
            done = subprocess.run(
                [sys.executable, str(script), *arguments],
                env=environment | {"LIBTPU_INIT_ARGS": options},
                capture_output=True,
                text=True,
            )
            found = "".join(file.read_text() for file in Path(folder).iterdir())
        number = re.search(r"estimated_cycles: (\d+)", found)
        if not number:
            raise ValueError(
                f"{script} gave no cycles of {kernel!r} (exit code {done.returncode}); it must "
                "compile a kernel of that name, as custom calls of the compiled text are called: "
                f"{done.stderr[-500:]}"
            )
        cycles[kernel] = int(number[1])
    return cycles
