"""Training in several processes equals training in one, and they leave together."""

import os
import pickle
import signal
import time

import jax
import numpy as np
import pytest
from processes import finish, start
from tiny import tiny_config

from vlmjax import checkpoint
from vlmjax.train import cluster, metrics

CODE = """
import pickle, sys
from pathlib import Path
import jax
from vlmjax.train import cluster, loop
cluster.join()
folder = Path(sys.argv[1])
assert (jax.process_count(), len(jax.devices())) == (int(sys.argv[2]), 2)
for name, config in pickle.loads((folder / "configs").read_bytes()).items():
    loop.train(config, folder / name)
"""


@pytest.mark.long
def test_two_processes_equal_one(tmp_path):
    """Weights sharded over both; then a stage that starts from these, one copy in each. The loss of
    held-out records, of which each has some, as well.

    `test_data_engine.py` compares the losses of one, two and four in every run of `.ci/run`.
    """
    saved = []
    for num in (1, 2):
        folder = tmp_path / str(num)
        folder.mkdir()
        held = dict(spec=f"json:{folder / 'annotations.json'}", weight=1.0, held_out=3)
        stage = dict(train__steps=3, train__log_every=1, eval__every=1, data__sources=(held,))
        configs = {
            "one": tiny_config(folder, **stage, mesh=dict(data=1, fsdp=2)),
            "two": tiny_config(folder, **stage, mesh=dict(data=2), init=str(folder / "one")),
        }
        (folder / "configs").write_bytes(pickle.dumps(configs))
        finish(folder, start(folder, CODE, (folder, num), num, 2))
        losses = [
            m[loss]
            for name in configs
            for m in metrics.read(folder / name)
            for loss in ("loss", "held_out_loss")
        ]
        saved.append((losses, checkpoint.restore_params(folder / "two")[0]))
    (one, whole), (two, cut) = saved
    assert len(one) == 12
    np.testing.assert_allclose(one, two, rtol=1e-6)
    for path, x in whole.items():
        np.testing.assert_allclose(x, cut[path], atol=1e-6, err_msg=path)


@pytest.mark.slow
def test_a_sigterm_to_one_process_stops_both_at_the_same_step(tmp_path):
    config = tiny_config(tmp_path, train__steps=40000, train__log_every=1, mesh=dict(data=2))
    (tmp_path / "configs").write_bytes(pickle.dumps({"run": config}))
    processes = start(tmp_path, CODE, (tmp_path, 2), 2, 2)
    until = time.monotonic() + 200
    while not checkpoint.steps(tmp_path / "run"):
        assert all(p.poll() is None for p in processes) and time.monotonic() < until
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    finish(tmp_path, processes)
    saved = checkpoint.steps(tmp_path / "run")[-1]
    checkpoint.verify(tmp_path / "run" / "checkpoints" / str(saved))
    assert saved == metrics.read(tmp_path / "run")[-1]["step"] < 40000


ALONE = """
import pickle, sys
from pathlib import Path
import jax
from vlmjax.train import cluster, feed, loop
cluster.join()
folder = Path(sys.argv[1])

def fails(self, packed):
    raise OSError("a disk of this host is gone")

if jax.process_index():
    feed.Feed.record = fails
with cluster.leave_on_error():
    loop.train(pickle.loads((folder / "config").read_bytes()), folder / "run")
"""


@pytest.mark.slow
def test_an_error_in_one_process_ends_both(tmp_path):
    """The one at once, which jax would have wait for the other, and the other soon after."""
    config = tiny_config(tmp_path, train__steps=40000, mesh=dict(data=2))
    (tmp_path / "config").write_bytes(pickle.dumps(config))
    other, failed = start(tmp_path, ALONE, (tmp_path,), 2, 2)
    try:
        assert failed.wait(timeout=200) == 1
        assert other.wait(timeout=150) != 0
    finally:
        other.kill()
        failed.kill()
    log = (tmp_path / "log1").read_text()
    assert "OSError: a disk of this host is gone" in log
    assert f"the process {failed.pid} of" in log and "ends with this error" in log


EXPLICIT = dict(JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="1", JAX_COORDINATOR_ADDRESS="10.0.0.1:1234")


@pytest.mark.parametrize(
    ("env", "always", "calls"),
    [
        ({}, False, []),
        ({}, True, [()]),
        (EXPLICIT, False, [("10.0.0.1:1234", 2, 1)]),
        (dict(SLURM_JOB_ID="7", SLURM_NTASKS="2"), False, []),  # inside salloc, without srun
        (dict(SLURM_STEP_NUM_TASKS="1"), False, []),
        (dict(SLURM_STEP_NUM_TASKS="2"), False, [()]),
        (dict(OMPI_COMM_WORLD_SIZE="2"), False, [()]),
        (dict(TPU_WORKER_HOSTNAMES="localhost"), False, []),
        (dict(TPU_WORKER_HOSTNAMES="a,b"), False, [()]),
        (dict(TPU_WORKER_HOSTNAMES="a", MEGASCALE_NUM_SLICES="2"), False, [()]),
    ],
)
def test_a_cluster_is_recognised(env, always, calls, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "environ", env)
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *args, **how: seen.append((args, how))
    )
    cluster.join(always)
    assert seen == [(args, cluster.SHUTDOWN) for args in calls]


def test_half_an_address_is_refused(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(JAX_NUM_PROCESSES="2"))
    with pytest.raises(ValueError, match="JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID not; set all"):
        cluster.join()
